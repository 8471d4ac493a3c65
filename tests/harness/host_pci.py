"""The PCI functions of the machine that a test runs on, changed by writes to sysfs, and its kernel's log.

For the nested machine only: a real host's functions are not a test's to take.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datapath.bus.sysfs import function
from tests.harness.processes import POLL_INTERVAL, HarnessError, wait_for

PCI = Path("/sys/bus/pci")
#: Seconds that the user of a function gets to let it go.
RELEASE_TIME = 20.0
#: The numbers of the buses behind a bridge, in its configuration space (PCI-to-PCI Bridge Architecture 1.2,
#: section 3.2.5), and a value by which it has none.
BUS_NUMBERS, NO_BUSES = 0x18, bytes(3)


def bind(address: str, driver: str) -> None:
    """Give a function to one driver and no other.

    :raise HarnessError: when that driver does not take it.
    """
    folder = PCI / "devices" / address
    (folder / "driver_override").write_text(driver)
    _probe(address)
    bound = function(address).driver
    if bound != driver:
        raise HarnessError(f"{address} is bound to {bound}, not {driver}")


def give_back(address: str) -> None:
    """Let a function have whatever driver the kernel finds for it."""
    (PCI / "devices" / address / "driver_override").write_text("\n")
    _probe(address)


@contextmanager
def bound(address: str, driver: str = "vfio-pci") -> Iterator[str]:
    """A function that has a driver for a while."""
    bind(address, driver)
    try:
        yield address
    finally:
        if exists(address):
            give_back(address)


def _probe(address: str) -> None:
    driver = PCI / "devices" / address / "driver"
    if driver.exists():
        _finish(_begin_to_write(address, driver / "unbind"), f"{address} to be unbound")
    (PCI / "drivers_probe").write_text(address)


def exists(address: str) -> bool:
    return (PCI / "devices" / address).exists()


def begin_removal(address: str) -> subprocess.Popen[bytes]:
    """Take a function from the kernel; the process ends when whoever uses it has let go."""
    return _begin_to_write("1", PCI / "devices" / address / "remove")


def remove(address: str) -> None:
    """Take a function from the kernel, once whoever uses it lets go.

    :raise HarnessError: when nobody does.
    """
    _finish(begin_removal(address), f"{address} to be removed")


def _begin_to_write(text: str, file: Path) -> subprocess.Popen[bytes]:
    """Write in a process of its own what the kernel may not take before a function is let go.

    It waits beyond any signal: a test that waited for itself would never end.
    """
    return subprocess.Popen(["sh", "-c", 'echo "$0" >"$1"', text, file])


def _finish(writer: subprocess.Popen[bytes], what: str) -> None:
    try:
        writer.wait(RELEASE_TIME)
    except subprocess.TimeoutExpired:
        raise HarnessError(f"waited {RELEASE_TIME:g} s for {what}: who uses it?") from None


def rescan(address: str) -> None:
    """Let the kernel look for functions again, until it has found one."""
    (PCI / "rescan").write_text("1")
    wait_for(f"{address} to be found", lambda: exists(address), 5.0)


@contextmanager
def cut_off(bridge: str) -> Iterator[None]:
    """Let nothing behind a bridge have configuration space for a while, and tell nobody.

    Registers still answer: QEMU has them read as zeros where there is nothing, and only hardware as ones.
    """
    with (PCI / "devices" / bridge / "config").open("r+b", buffering=0) as config:
        before = os.pread(config.fileno(), len(NO_BUSES), BUS_NUMBERS)
        os.pwrite(config.fileno(), NO_BUSES, BUS_NUMBERS)
        try:
            yield
        finally:
            os.pwrite(config.fileno(), before, BUS_NUMBERS)


class KernelLog:
    """What the kernel says from now on."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)
        self.lines: list[str] = []

    def expect(self, *words: str, seconds: float = 5.0) -> str:
        """Wait for a line with all of these words.

        :raise HarnessError: when it does not come.
        """
        deadline = time.monotonic() + seconds
        while True:
            self._read()
            for line in self.lines:
                if all(word in line for word in words):
                    return line
            if time.monotonic() > deadline:
                raise HarnessError(f"the kernel did not say {words}, but {self.lines[-10:]}")
            time.sleep(POLL_INTERVAL)

    def find(self, *words: str) -> list[str]:
        """The lines so far with all of these words."""
        self._read()
        return [line for line in self.lines if all(word in line for word in words)]

    def _read(self) -> None:
        while True:
            try:
                record = os.read(self._fd, 8192)
            except BlockingIOError:
                return
            self.lines.append(record.split(b";", 1)[1].split(b"\n", 1)[0].decode(errors="replace"))

    def close(self) -> None:
        os.close(self._fd)
