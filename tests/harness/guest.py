"""The test guest: Debian's cloud kernel and a busybox initramfs, kept in the checkout's .cache/guest.

Owns the image and what its /init understands:

- `vdpa.ip=ADDRESS/LENGTH` on the kernel command line: the address of eth0;
- a shell on the serial console (console.py talks to it);
- the ACPI power button (`virsh shutdown`), `poweroff -f` and `reboot -f` work.

The kernel package is unpacked, not installed. It comes from the machine's own package sources, under
whatever versioned name `linux-image-cloud-amd64` depends on today.
"""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.harness.processes import HarnessError, run

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = CHECKOUT / ".cache"

KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX = Path("/bin/busybox")

#: apt's own user may not write where we do.
UNSANDBOXED = ("-o", "APT::Sandbox::User=root")

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

#: The guest's kernel command line, less its address. QEMU 7.2 under software emulation crashes when a
#: vhost-user NIC uses MSI-X (fixed in 8.0), hence pci=nomsi. Skipping clock calibration and mitigations
#: saves seconds there.
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet reboot=acpi pci=nomsi net.ifnames=0 mitigations=off "
    "tsc=reliable no_timer_check random.trust_cpu=on"
)

INIT = """#!/bin/busybox sh
export PATH=/bin PS1='guest# '
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod "/modules/$module"; done
for word in $(cat /proc/cmdline); do
    case $word in vdpa.ip=*) address=${word#vdpa.ip=} ;; esac
done
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
    [ -z "$address" ] || ip address add "$address" dev eth0
    ip link set eth0 up
fi
acpid
while :; do setsid cttyhack /bin/sh; done
"""

#: What acpid runs when the power button is pressed. busybox's poweroff without -f asks an init to do it;
#: ours is the script above.
POWER_BUTTON = "#!/bin/busybox sh\nexec poweroff -f\n"


@dataclass(frozen=True)
class GuestImage:
    """What a domain boots from."""

    kernel: Path
    initrd: Path
    #: Release of the kernel, such as 6.1.0-9-cloud-amd64.
    release: str


def guest_image() -> GuestImage:
    """The guest image, made at the first call on this machine.

    :raise HarnessError: when the kernel package can be had neither from the cache nor from the network.
    """
    folder = CACHE / "guest"
    folder.mkdir(parents=True, exist_ok=True)
    kernels = sorted(folder.glob("vmlinuz-*"))
    if not kernels:
        download_kernel(folder)
        kernels = sorted(folder.glob("vmlinuz-*"))
    release = kernels[-1].name.removeprefix("vmlinuz-")
    initrd = folder / f"initrd-{release}"
    recipe = Path(__file__)
    if not initrd.exists() or initrd.stat().st_mtime < recipe.stat().st_mtime:
        make_initrd(folder / f"modules-{release}", initrd)
    return GuestImage(kernels[-1], initrd, release)


def versioned_kernel_package() -> str:
    """The package that the kernel metapackage depends on; its name changes with every kernel update."""
    answer = run(["apt-cache", "depends", KERNEL_PACKAGE], check=False).stdout
    found = re.search(r"Depends: (linux-image-\S+)", answer)
    if found is None:
        raise HarnessError(
            f"no package {KERNEL_PACKAGE} in this machine's package lists: run 'apt-get update'"
        )
    return found.group(1)


def download_kernel(folder: Path) -> None:
    """Put a kernel and the modules that the guest needs into `folder`: vmlinuz-RELEASE, modules-RELEASE."""
    with tempfile.TemporaryDirectory(prefix="kernel-", dir=folder) as scratch_name:
        scratch = Path(scratch_name)
        try:
            archive = download_package(scratch)
        except HarnessError:
            # The package lists may be older than the package sources.
            run(["apt-get", "--quiet", "update"], seconds=300)
            archive = download_package(scratch)
        run(["dpkg-deb", "--extract", archive, scratch / "tree"])
        kernel = next((scratch / "tree/boot").glob("vmlinuz-*"))
        release = kernel.name.removeprefix("vmlinuz-")
        tree = scratch / "tree/lib/modules" / release
        modules = folder / f"modules-{release}"
        shutil.rmtree(modules, ignore_errors=True)
        modules.mkdir()
        for module in MODULES:
            shutil.copy(tree / module, modules)
        # Last, since its presence says that the rest is there.
        kernel.rename(folder / kernel.name)


def download_package(folder: Path) -> Path:
    """The kernel's package, in `folder`.

    :raise HarnessError: when the package sources do not have it or cannot be reached.
    """
    package = versioned_kernel_package()
    run(["apt-get", "--quiet", *UNSANDBOXED, "download", package], cwd=folder, seconds=600)
    return next(folder.glob("*.deb"))


def make_initrd(modules: Path, initrd: Path) -> None:
    """Pack busybox, the modules and /init into an initramfs (uncompressed: the guest is emulated)."""
    with tempfile.TemporaryDirectory(prefix="initrd-", dir=initrd.parent) as scratch_name:
        root = Path(scratch_name) / "root"
        for name in ("bin", "dev", "etc/acpi/PWRF", "modules", "proc", "sys", "var/log", "var/run"):
            (root / name).mkdir(parents=True)
        shutil.copy(BUSYBOX, root / "bin/busybox")
        for module in MODULES:
            shutil.copy(modules / Path(module).name, root / "modules")
        (root / "modules/order").write_text("".join(f"{Path(module).name}\n" for module in MODULES))
        for path, text in (("init", INIT), ("etc/acpi/PWRF/00000080", POWER_BUTTON)):
            (root / path).write_text(text)
            (root / path).chmod(0o755)
        names = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
        packed = Path(scratch_name) / "initrd"
        with packed.open("wb") as output:
            subprocess.run(
                [BUSYBOX, "cpio", "-o", "-H", "newc"],
                cwd=root,
                input=names.encode(),
                stdout=output,
                stderr=subprocess.DEVNULL,
                check=True,
            )
        packed.rename(initrd)
