"""The kernel's files through which a host's PCI functions are moved between drivers, and its modules.

Owns the writing: `datapath.bus.sysfs` reads. The folders are parameters so that tests stand on made-up
trees and answer the writes as a kernel would.
"""

import fcntl
import os
import socket
import subprocess
from pathlib import Path

from datapath.bus.sysfs import SYSFS

PROCFS = Path("/proc")
DEVICES, DRIVERS, DRIVERS_PROBE = "bus/pci/devices", "bus/pci/drivers", "bus/pci/drivers_probe"
#: linux/sockios.h: the IPv4 address of an interface; struct ifreq has 40 bytes.
SIOCGIFADDR, IFREQ_SIZE = 0x8915, 40
#: Seconds that modprobe may take.
MODPROBE_LIMIT = 20.0


class KernelError(Exception):
    """The kernel refused; the text is one line that names what was written where, or the module."""

    def __init__(self, text: str, number: int | None = None) -> None:
        super().__init__(text)
        #: The kernel's errno, where there is one.
        self.number = number


class Kernel:
    """This host's kernel."""

    def __init__(self, sysfs: Path = SYSFS, procfs: Path = PROCFS) -> None:
        self.sysfs = sysfs
        self.procfs = procfs

    def write(self, name: str, text: str) -> None:
        """Write an attribute of sysfs, in one write.

        :param name: the attribute's path below sysfs.
        :raise KernelError: when there is none, or the kernel does not take the text.
        """
        path = self.sysfs / name
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, text.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            who = "" if os.geteuid() == 0 else "; run it as root"
            raise KernelError(f"{path}: '{text.strip()}': {error.strerror}{who}", error.errno) from None

    def read(self, name: str) -> str:
        """An attribute's text, stripped; empty when there is no such attribute."""
        return text_of(self.sysfs / name)

    def identity(self, address: str) -> int | None:
        """A number that tells a PCI function from later ones at its address; None when there is none."""
        try:
            return (self.sysfs / DEVICES / address).stat().st_ino
        except OSError:
            return None

    def load_module(self, name: str) -> None:
        """Load a module, with what it depends on.

        :raise KernelError: when that is not possible.
        """
        try:
            done = subprocess.run(
                ["modprobe", "--", name],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=MODPROBE_LIMIT,
            )
        except OSError as error:
            raise KernelError(f"module {name}: modprobe: {error.strerror or error}") from None
        except subprocess.TimeoutExpired:
            raise KernelError(f"module {name}: modprobe takes more than {MODPROBE_LIMIT:g} s") from None
        if done.returncode:
            words = " ".join(done.stderr.split()) or f"modprobe ended with {done.returncode}"
            raise KernelError(f"module {name} cannot be loaded: {words}")

    def has_ipv4_address(self, interface: str) -> bool:
        """Whether a network interface of this network namespace has an IPv4 address.

        One ioctl answers; sysfs does not know, and a netlink library would be there for this question alone.
        """
        request = bytearray(IFREQ_SIZE)
        name = interface.encode()[:15]
        request[: len(name)] = name
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            try:
                fcntl.ioctl(asking, SIOCGIFADDR, request)
            except OSError:
                return False
        return True

    def processor_vendor(self) -> str:
        """The processor's maker as it calls itself, such as "GenuineIntel"; empty when it does not say."""
        for line in text_of(self.procfs / "cpuinfo").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "vendor_id":
                return value.strip()
        return ""

    def openers(self, prefix: str) -> dict[str, list[str]]:
        """Who has the files open whose path begins with `prefix`: path -> processes, by name and pid.

        Only root sees other users' processes.
        """
        found: dict[str, list[str]] = {}
        for process in self.procfs.glob("[0-9]*"):
            links = {link_of(descriptor) for descriptor in entries(process / "fd")}
            for path in links:
                if path.startswith(prefix):
                    name = f"{text_of(process / 'comm') or 'a process'} (pid {process.name})"
                    found.setdefault(path, []).append(name)
        return found


def text_of(file: Path) -> str:
    """A file's text, stripped; empty when there is none, or it may not be read."""
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing when it may not be looked into, or is gone."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def link_of(path: Path) -> str:
    """Where a link leads; empty when it is gone."""
    try:
        return str(path.readlink())
    except OSError:
        return ""
