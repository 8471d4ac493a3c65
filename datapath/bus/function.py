"""The abstract PCI function: what every bus (vfio-user, kernel VFIO) gives to a driver.

Indices and flags are those of linux/vfio.h (`datapath.vfio`). A driver has no branch on the bus; what
differs between buses (one socket or many ioctls, file descriptors or addresses to map memory by) ends here.

Every call returns or raises within seconds, save that memory may take longer to map and unmap, see
`call_meanwhile`. `DeviceError` is a refusal or a missed deadline, `DeviceLostError` says that the function
is gone; after that only `close` is of use.
"""

import abc
import contextlib
import mmap
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from datapath.native.relay import Doorbell
from datapath.pci import COMMAND, PciCommand
from datapath.vdpa import HostNotifier, MemoryRegion
from datapath.vfio import Irq, Region, RegionFlag
from datapath.vfio_user import RegionInfo

#: Access widths of registers, in bytes. Not 8: kernel VFIO makes two accesses of one of that width.
WIDTHS = (1, 2, 4)


class RegionDescription(NamedTuple):
    """A region of the function: a BAR, or configuration space."""

    #: Bytes; 0 when the function has no such region.
    size: int
    #: (offset, size) of the parts that can be mapped.
    mappable: tuple[tuple[int, int], ...] = ()

    def has_page(self, offset: int) -> bool:
        """Whether the page that begins at `offset` can be mapped, the whole of it."""
        return any(at <= offset and offset + mmap.PAGESIZE <= at + size for at, size in self.mappable)

    @classmethod
    def of(cls, info: RegionInfo) -> Self:
        """What VFIO's answer about a region says; vfio-user has the same structure."""
        if not info.flags & RegionFlag.MMAP:
            return cls(info.size)
        if info.areas is None:
            return cls(info.size, ((0, info.size),))
        return cls(info.size, tuple((area.offset, area.size) for area in info.areas))


class PciFunction(abc.ABC):
    """One PCI function in this process's hands, from `open` of a bus until `close`."""

    #: What messages call it: the bus and the address, such as "vfio-user=/run/vf0.sock".
    name: str

    @abc.abstractmethod
    def region(self, index: Region) -> RegionDescription:
        """Size and mappable parts of a region."""

    @abc.abstractmethod
    def read(self, index: Region, offset: int, width: int) -> int:
        """Read a little-endian register in one access of `width` bytes (1, 2 or 4)."""

    @abc.abstractmethod
    def write(self, index: Region, offset: int, width: int, value: int) -> None:
        """Write a little-endian register in one access of `width` bytes (1, 2 or 4).

        Posted, as on PCI: it has arrived when a read that follows has come back, or any other call here; that
        the function refused it may not be heard of.
        """

    def read_later(self, index: Region, offset: int, width: int) -> Callable[[], int]:
        """Read a register now; what it held is had from the function returned, called once.

        Of what is done `together`, the call may be where it is waited for, and an error be raised.
        """
        value = self.read(index, offset, width)
        return lambda: value

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Around calls that a bus may carry out with fewer turns to the function and back.

        They keep their order. Writes may travel with what is waited for next; that eventfds were refused
        may be raised at the end. What is read later may be had after the end, too. After a failure it is not
        known which were carried out.
        """
        return contextlib.nullcontext()

    @abc.abstractmethod
    def config_space(self) -> bytes:
        """A copy of the first 256 bytes of configuration space."""

    @abc.abstractmethod
    def irq_count(self, index: Irq) -> int:
        """How many interrupts of a kind the function has; 0 if none that can signal an eventfd."""

    @abc.abstractmethod
    def set_eventfds(self, index: Irq, start: int, fds: Sequence[int | None]) -> None:
        """Signal `fds` for the interrupts from `start` on; None for one that nobody listens to.

        The first call of an index gives the whole range that will be used: a bus may be unable to
        enlarge it later.
        """

    @abc.abstractmethod
    def disable_irqs(self, index: Irq) -> None:
        """No interrupt of this kind signals any more."""

    @abc.abstractmethod
    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """The DMA addresses that memory can be mapped at: (first, last) of each range, rising."""

    @abc.abstractmethod
    def dma_map(self, memory: MemoryRegion) -> None:
        """Let the function read and write memory, at the guest's addresses.

        :raise DeviceError: also when a limit of the bus is met; the text names needed and allowed.
        """

    def dma_map_later(self, memory: MemoryRegion) -> Callable[[], None]:
        """Map memory as `dma_map`, which is done, or refused, when the function returned is called, once.

        Before that nothing may begin that makes the function reach the memory.
        """
        self.dma_map(memory)
        return lambda: None

    @abc.abstractmethod
    def dma_unmap(self, memory: MemoryRegion) -> None:
        """Take mapped memory back; on return the function does not reach it any more."""

    def call_meanwhile(self, callback: Callable[[], None]) -> None:  # noqa: B027
        """Have `callback` called again and again while `dma_map` and `dma_unmap` last.

        Kernel VFIO pins memory, about a second for a GiB of 4 KiB pages that nobody has touched yet. A bus
        whose calls are short, as all are here unless it says otherwise, calls nobody.

        :param callback: does not raise, and leaves the function alone.
        """

    @abc.abstractmethod
    def reset(self) -> None:
        """Function-level reset; memory stays mapped. Without effect on a function that has none."""

    @abc.abstractmethod
    def doorbell(self, index: Region, offset: int, value: int) -> Doorbell:
        """How to write the 16-bit `value` to a notify register from another thread; valid until `close`.

        An eventfd or a mapped address, never messages on a socket that commands share.

        :raise DeviceError: when the function offers neither.
        """

    @abc.abstractmethod
    def page(self, index: Region, offset: int) -> HostNotifier | None:
        """The page of a region that begins at `offset`, for another process to map; None if it cannot be.

        :param offset: a multiple of the page size.
        """

    @property
    @abc.abstractmethod
    def lost_fd(self) -> int:
        """A descriptor that is readable once the function is gone, or its removal is asked for."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give the function back. Idempotent, raises nothing."""

    def enable(self) -> None:
        """Let the function decode its BARs and reach memory, without legacy interrupts."""
        command = self.read(Region.CONFIG, COMMAND, 2)
        wanted = command | PciCommand.MEMORY | PciCommand.MASTER | PciCommand.INTX_DISABLE
        self.write(Region.CONFIG, COMMAND, 2, wanted)
