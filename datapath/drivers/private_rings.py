"""The rings that a VF is given in place of the guest's own while the shadow-ring relay carries them.

For each ring an available and a used ring in memory of this process, which the VF reaches at DMA addresses
that no guest memory has, and an eventfd that the VF signals in place of the guest's. Owns that memory, its
mapping and the eventfds. What goes through the rings is the relay's business (native/shadow.c).
"""

import contextlib
import mmap
import os
from dataclasses import dataclass

from datapath.bus.function import PciFunction
from datapath.drivers.dma_addresses import DmaAddresses, overlap, whole_pages
from datapath.native._native import ffi
from datapath.vdpa import DeviceError, MemoryRegion
from datapath.virtio import ring_bytes


@dataclass(frozen=True)
class PrivateRing:
    """One ring's place."""

    #: Addresses of the two parts for the VF.
    avail: int
    used: int
    #: The same in this process.
    avail_here: int
    used_here: int
    #: Eventfd for the VF's interrupts.
    interrupt: int


class PrivateRings:
    """Memory for all rings of one function, each of up to `size` descriptors."""

    def __init__(self, function: PciFunction, addresses: DmaAddresses, rings: int, size: int) -> None:
        """Allocate it and give the function access.

        :raise DeviceError: when the function has no room for it, or the host does not.
        """
        _, avail, used = ring_bytes(size)
        self._used_offset = whole_pages(avail)
        self._stride = self._used_offset + whole_pages(used)
        length = rings * self._stride
        start = addresses.place(length, "private rings")
        with contextlib.ExitStack() as undo:
            try:
                fd = os.memfd_create("private-rings")
                undo.callback(os.close, fd)
                os.ftruncate(fd, length)
                self._view = mmap.mmap(fd, length)
                undo.callback(self._view.close)
                pin = ffi.from_buffer(self._view)
                undo.callback(ffi.release, pin)
                self._interrupts: list[int] = []
                for _ in range(rings):
                    self._interrupts.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
                    undo.callback(os.close, self._interrupts[-1])
            except OSError as error:
                text = f"{function.name}: {length} bytes for private rings: {error.strerror}"
                raise DeviceError(text) from error
            #: What the function reaches: not guest memory, but mapped like it.
            self.memory = MemoryRegion(start, length, fd, 0, int(ffi.cast("uintptr_t", pin)))
            function.dma_map(self.memory)
            addresses.take(self.memory)
            undo.callback(addresses.release, self.memory)
            self._resources = undo.pop_all()

    def overlaps(self, region: MemoryRegion) -> bool:
        """Whether guest memory wants addresses that are taken here."""
        return overlap(region, self.memory)

    def interrupt(self, index: int) -> int:
        """The eventfd for a ring's interrupts."""
        return self._interrupts[index]

    def place(self, index: int) -> PrivateRing:
        """Where a ring is."""
        at = index * self._stride
        start, here = self.memory.guest_address + at, self.memory.address + at
        return PrivateRing(
            start, start + self._used_offset, here, here + self._used_offset, self._interrupts[index]
        )

    def clear(self, index: int) -> PrivateRing:
        """Make a ring empty, so that it begins at index 0; the VF must not be running it."""
        at = index * self._stride
        self._view[at : at + self._stride] = bytes(self._stride)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._interrupts[index])
        return self.place(index)

    def close(self) -> None:
        """Release memory and eventfds, which the function must not reach any more."""
        self._resources.close()
