"""The test guest: Debian's cloud kernel and a busybox initramfs, kept in the checkout's .cache/.

Owns the image and what its /init understands:

- `vdpa.ip=ADDRESS/LENGTH` on the kernel command line: the address of eth0; `vdpa.ip1=` that of eth1 …;
- `MODULE.PARAMETER=VALUE` there: a parameter of one of its kernel modules;
- a shell on the serial console (console.py talks to it);
- `traffic serve` on TRAFFIC_PORT, for a peer that wants traffic of which nothing may be lost
  (guest_traffic.py, native/traffic.c);
- `load serve` on LOAD_PORT, for a peer that wants as much traffic as goes (guest_load.py, native/load.c);
- `channels eth0 N`, by which a NIC uses N of its queue pairs (native/channels.c);
- `frames`, which shows what frames eth0 is given, and joins groups (native/frames.c);
- `vlans`, after which there can be VLANs (`vconfig add eth0 5`);
- `metronome`, without which a guest that migrates under software emulation is damaged (native/metronome.c);
- the ACPI power button (`virsh shutdown`), `poweroff -f` and `reboot -f` work.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

from tests.harness.cached import CACHE as CACHE
from tests.harness.cached import CHECKOUT as CHECKOUT
from tests.harness.compiled import NATIVE, compiled
from tests.harness.kernel import BUSYBOX, BootImage, boot_image, pack_initrd

#: Where the guest waits for a peer.
TRAFFIC_PORT, LOAD_PORT = 7000, 7100

#: Our programs in the guest, in C (native/).
PROGRAMS = ("traffic", "load", "metronome", "channels", "frames")

KERNEL_PACKAGE = "linux-image-cloud-amd64"

#: Kernel modules in the order to load them: each after those that it needs.
MODULES = (
    "kernel/drivers/virtio/virtio_ring.ko",
    "kernel/drivers/virtio/virtio.ko",
    "kernel/drivers/virtio/virtio_pci_legacy_dev.ko",
    "kernel/drivers/virtio/virtio_pci_modern_dev.ko",
    "kernel/drivers/virtio/virtio_pci.ko",
    "kernel/net/core/failover.ko",
    "kernel/drivers/net/net_failover.ko",
    "kernel/drivers/net/virtio_net.ko",
    "kernel/drivers/input/evdev.ko",
    "kernel/drivers/acpi/button.ko",
)

#: Those for VLANs, which `vlans` loads: a NIC that can filter is told of VLAN 0 from then on.
VLAN_MODULES = (
    "kernel/net/llc/llc.ko",
    "kernel/net/802/stp.ko",
    "kernel/net/802/garp.ko",
    "kernel/net/802/mrp.ko",
    "kernel/net/8021q/8021q.ko",
)

#: Where kernel and modules are kept; by another name when there are to be other modules.
KEPT = CACHE / f"guest-{hashlib.sha256(repr((MODULES, VLAN_MODULES)).encode()).hexdigest()[:8]}"

#: The guest's kernel command line, less its address. QEMU 7.2 under software emulation crashes when a
#: vhost-user NIC uses MSI-X (fixed in 8.0), hence pci=nomsi. Skipping clock calibration and mitigations
#: saves seconds there.
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet reboot=acpi pci=nomsi net.ifnames=0 mitigations=off "
    "tsc=reliable no_timer_check random.trust_cpu=on"
)

INIT = f"""#!/bin/busybox sh
export PATH=/bin PS1='guest# '
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
words=$(cat /proc/cmdline)
for module in $(cat /modules/order); do
    parameters=
    for word in $words; do
        case $word in "${{module%.ko}}".*) parameters="$parameters ${{word#*.}}" ;; esac
    done
    insmod "/modules/$module" $parameters
done
ip link set lo up
for word in $words; do
    case $word in
        vdpa.ip*=*)
            number=${{word#vdpa.ip}} number=${{number%%=*}}
            ip address add "${{word#*=}}" dev "eth${{number:-0}}" && ip link set "eth${{number:-0}}" up
            ;;
    esac
done
[ ! -e /sys/class/net/eth0 ] || ip link set eth0 up
acpid
metronome &
traffic serve {TRAFFIC_PORT} &
load serve {LOAD_PORT} &
while :; do setsid cttyhack /bin/sh; done
"""

#: The program `vlans`.
VLANS = "".join(
    ["#!/bin/busybox sh\n", *(f"insmod /modules/{Path(module).name}\n" for module in VLAN_MODULES)]
)

#: What acpid runs when the power button is pressed. busybox's poweroff without -f asks an init to do it;
#: ours is the script above.
POWER_BUTTON = "#!/bin/busybox sh\nexec poweroff -f\n"


def guest_image() -> BootImage:
    """The guest image, made at the first call on this machine.

    :raise HarnessError: when the kernel package can be had neither from the cache nor from the network.
    """
    return boot_image(
        KERNEL_PACKAGE,
        KEPT,
        keep_modules,
        make_initrd,
        [Path(__file__), *(NATIVE / f"{name}.c" for name in PROGRAMS)],
    )


def keep_modules(tree: Path, release: str, folder: Path) -> None:
    """Put the modules that the guest needs into `folder`/modules-RELEASE, from an unpacked package."""
    modules = folder / f"modules-{release}"
    modules.mkdir()
    for module in (*MODULES, *VLAN_MODULES):
        shutil.copy(tree / "lib/modules" / release / module, modules)


def make_initrd(modules: Path, initrd: Path) -> None:
    """Pack busybox, our programs, the modules and /init into an initramfs."""
    with tempfile.TemporaryDirectory(prefix="initrd-", dir=initrd.parent) as scratch:
        root = Path(scratch)
        for name in ("bin", "dev", "etc/acpi/PWRF", "modules", "proc", "sys", "var/log", "var/run"):
            (root / name).mkdir(parents=True)
        shutil.copy(BUSYBOX, root / "bin/busybox")
        for name in PROGRAMS:
            shutil.copy(compiled(name, "-static"), root / "bin" / name)
        for module in (*MODULES, *VLAN_MODULES):
            shutil.copy(modules / Path(module).name, root / "modules")
        (root / "modules/order").write_text("".join(f"{Path(module).name}\n" for module in MODULES))
        scripts = {"init": INIT, "bin/vlans": VLANS, "etc/acpi/PWRF/00000080": POWER_BUTTON}
        for path, text in scripts.items():
            (root / path).write_text(text)
            (root / path).chmod(0o755)
        pack_initrd(root, initrd)
