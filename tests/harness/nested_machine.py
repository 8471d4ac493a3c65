"""A machine with VFIO and an IOMMU, under software emulation, that runs this machine's own programs.

QEMU's q35 with an emulated Intel IOMMU boots Debian's stock kernel. The root file system is this machine's
`/`, read-only over 9p with an overlay in memory on top: inside are the same Python, packages and checkout,
at the same paths; what is written there is gone with the machine. One command runs inside, then the machine
powers off. By hand:

    .venv/bin/python -m tests.harness.nested_machine lspci -nn
    .venv/bin/python -m tests.harness.nested_machine -- sh -c 'dmesg | grep -e DMAR -e IOMMU'

which prints the command's output as it comes and exits as the command did. Several machines may run at the
same time. The hardware is in nested_hardware.py, and described in tests/nested/conftest.py.

Owns the image (the checkout's .cache/nested), QEMU's process and the folder through which the two sides
exchange files. What runs inside, others say.
"""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from tests.harness import nested_hardware
from tests.harness.guest import CACHE, CHECKOUT
from tests.harness.kernel import BUSYBOX, BootImage, boot_image, pack_initrd
from tests.harness.nested_hardware import WIRES, hardware
from tests.harness.processes import POLL_INTERVAL, HarnessError, Process, run

KERNEL_PACKAGE = "linux-image-amd64"

#: What the machine has from the beginning; modprobe loads whatever else its kernel has. The first ones are
#: needed for the root file system.
MODULES = (
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_net",
    "virtio_console",
    "af_packet",
    "nvme",
    "vfio_pci",
    "vfio_iommu_type1",
    "tun",
)

#: Without IPv6, on which every interface that comes up says something. Skipping clock calibration and
#: mitigations saves seconds.
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet intel_iommu=on iommu=nopt net.ifnames=0 ipv6.disable_ipv6=1 mitigations=off "
    "tsc=reliable no_timer_check random.trust_cpu=on panic=-1 oops=panic"
)

#: Seconds that it gets to boot; where nothing else runs it needs ten.
BOOT_TIME = 150.0

#: Lines of each log that are worth showing when it fails.
LAST_LINES = 40

#: Where the exchange folder is, inside.
INSIDE = Path("/run/nested")

#: As much as can be done here is: busybox starts faster than programs from the root file system.
INIT = """#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod "/modules/$module" || echo "no $module"; done
ip link set lo up
{wires}
mkdir /lower /overlay
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=262144,cache=loose root /lower
mount -t tmpfs -o size=50% overlay /overlay
mkdir /overlay/upper /overlay/work
mount -t overlay -o lowerdir=/lower,upperdir=/overlay/upper,workdir=/overlay/work root /new
mount --move /proc /new/proc
mount --move /sys /new/sys
mount --move /dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm /new/lib/modules/{release}
mount -t devpts -o ptmxmode=666 devpts /new/dev/pts
mount -t tmpfs tmpfs /new/dev/shm
mount -t tmpfs tmpfs /new/run
mkdir -p /new/run/lock /new/run/tmp /new{inside}
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=none exchange /new{inside}
exec switch_root /new /bin/sh {inside}/start
"""

WIRE = """
interface=$(ls /sys/bus/pci/devices/{address}/virtio*/net)
ip link set $interface name {name}
ip link set {name} up
"""

#: What the machine's first process is on its own root file system.
START = """
cd {checkout}
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TMPDIR=/run/tmp
# Or else setuptools has something to say each time that a Python starts.
export SETUPTOOLS_USE_DISTUTILS=stdlib
mount --bind {modules} /lib/modules/{release}
: >{inside}/booted
{command} </dev/null >{inside}/output 2>&1
echo $? >{inside}/status.partial
mv {inside}/status.partial {inside}/status
/bin/busybox poweroff -f
"""


def image() -> BootImage:
    """The image, made at the first call on this machine.

    :raise UnavailableError: when the kernel package can be had neither from the cache nor from the network.
    """
    # The initramfs names the hardware, too.
    recipes = [Path(__file__), Path(nested_hardware.__file__)]
    return boot_image(KERNEL_PACKAGE, CACHE / "nested", keep_modules, make_initrd, recipes)


def keep_modules(tree: Path, release: str, folder: Path) -> None:
    """Put all modules into `folder`/modules-RELEASE, from an unpacked package."""
    run(["depmod", "--basedir", tree, release])
    (tree / "lib/modules" / release).rename(folder / f"modules-{release}")


def with_dependencies(modules: Path, names: Sequence[str]) -> list[Path]:
    """The files of modules, each after those that it needs, without what is built in."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        # The last of a module's line needs nothing of the others.
        needs[Path(path).stem.replace("-", "_")] = [*reversed(others.split()), path]
    ordered = dict.fromkeys(path for name in names for path in needs.get(name, ()))
    return [modules / path for path in ordered]


def make_initrd(modules: Path, initrd: Path) -> None:
    """Pack busybox, modules and /init into an initramfs."""
    wires = "".join(WIRE.format(name=name, address=address) for name, address in WIRES.items())
    init = INIT.format(wires=wires, inside=INSIDE, release=modules.name.removeprefix("modules-"))
    with tempfile.TemporaryDirectory(prefix="initrd-", dir=initrd.parent) as scratch:
        root = Path(scratch)
        for name in ("bin", "dev", "modules", "new", "proc", "sys"):
            (root / name).mkdir()
        shutil.copy(BUSYBOX, root / "bin/busybox")
        files = with_dependencies(modules, MODULES)
        for file in files:
            shutil.copy(file, root / "modules")
        (root / "modules/order").write_text("".join(f"{file.name}\n" for file in files))
        (root / "init").write_text(init)
        (root / "init").chmod(0o755)
        pack_initrd(root, initrd)


class NestedMachine(Process):
    """A running machine and its one command; as a context manager it is gone at the end."""

    #: Where those inside find the exchange folder.
    inside: ClassVar[Path] = INSIDE

    def __init__(self, command: Sequence[str], files: Mapping[str, str] | None = None) -> None:
        """
        Start it; `boot` waits for it.

        :param command: runs inside, in the checkout.
        :param files: texts that the exchange folder has from the beginning, by their names.
        :raise UnavailableError: when its image cannot be had.
        """
        made = image()
        self._folder = tempfile.TemporaryDirectory(prefix="nested-")
        folder = Path(self._folder.name)
        #: The folder that both sides see; inside, it is `INSIDE`.
        self.exchange = folder / "exchange"
        self.exchange.mkdir()
        for name, text in (files or {}).items():
            (self.exchange / name).write_text(text)
        self.console = folder / "console"
        #: What the command prints.
        self.output = self.exchange / "output"
        self.output.touch()
        words = {"inside": INSIDE, "checkout": shlex.quote(str(CHECKOUT)), "command": shlex.join(command)}
        words |= {"modules": shlex.quote(str(made.modules)), "release": made.release}
        start = START.format(**words)
        (self.exchange / "start").write_text(start)
        argv: list[str | Path] = [
            # Whoever starts a machine and is killed leaves none.
            *("setpriv", "--pdeathsig", "SIGKILL", "qemu-system-x86_64"),
            *("-name", "nested", "-no-reboot", "-serial", f"file:{self.console}"),
            *("-kernel", made.kernel, "-initrd", made.initrd, "-append", KERNEL_ARGUMENTS),
            *share("root", Path("/"), "readonly=on,multidevs=remap", "0x1e"),
            *share("exchange", self.exchange, "writeout=immediate", "0x1d"),
            *hardware(folder),
        ]
        super().__init__(argv, folder / "log")

    @property
    def status(self) -> int | None:
        """How the command exited; None while it runs."""
        file = self.exchange / "status"
        return int(file.read_text()) if file.exists() else None

    def boot(self, seconds: float = BOOT_TIME) -> None:
        """Wait until the command starts.

        :raise HarnessError: when the machine ends or does not come so far; `last_words` may say why.
        """
        deadline = time.monotonic() + seconds
        while not (self.exchange / "booted").exists():
            self.check()
            if time.monotonic() > deadline:
                raise HarnessError(
                    f"the nested machine did not boot within {seconds:g} s: {self.last_words()}"
                )
            time.sleep(POLL_INTERVAL)

    def check(self) -> None:
        """
        :raise HarnessError: when the machine has ended without having run its command to the end.
        """
        if not self.running and self.status is None:
            raise HarnessError("the nested machine died")

    def last_words(self) -> dict[str, str]:
        """The last lines of what was said inside, on the console and by QEMU."""
        logs = {"inside": self.output, "console": self.console, "QEMU": self.log}
        texts = {name: log.read_text(errors="replace") for name, log in logs.items() if log.exists()}
        return {name: "\n".join(text.splitlines()[-LAST_LINES:]) for name, text in texts.items() if text}

    def close(self) -> None:
        """End it, whatever it does, and forget what it left."""
        self.kill()
        self._folder.cleanup()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def share(tag: str, path: Path, options: str, slot: str) -> list[str]:
    """QEMU's arguments for a folder that the machine mounts by its tag."""
    return [
        *("-fsdev", f"local,id={tag},path={path},security_model=none,{options}"),
        *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag},addr={slot}"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="nested_machine", description="Run a command in the nested machine."
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="how long it may take")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("no command")
    try:
        with NestedMachine(command) as machine:
            try:
                return follow(machine, arguments.seconds)
            except HarnessError as error:
                # What was said inside has been printed.
                logs = [text for name, text in machine.last_words().items() if name != "inside"]
                raise HarnessError("\n".join([str(error), *logs])) from None
    except HarnessError as error:
        print(f"nested_machine: {error}", file=sys.stderr)
        return 125


def follow(machine: NestedMachine, seconds: float) -> int:
    """Print what the machine's command prints, and return how it exits.

    :raise HarnessError: when the machine does not run it to its end in time.
    """
    machine.boot()
    deadline = time.monotonic() + seconds
    with machine.output.open("rb") as output:
        while (status := machine.status) is None:
            machine.check()
            if time.monotonic() > deadline:
                raise HarnessError(f"the command did not end within {seconds:g} s")
            os.write(1, output.read())
            time.sleep(POLL_INTERVAL)
        os.write(1, output.read())
        return status


if __name__ == "__main__":
    sys.exit(main())
