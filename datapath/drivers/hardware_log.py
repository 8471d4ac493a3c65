"""A dirty log that a function keeps by itself, by DMA into the bitmap of whoever moves the guest.

Owns the bitmap's mapping for DMA, at addresses that no guest memory has. The function marks the buffers that
it writes, but not its used rings (docs/drivers/ifcvf.md): these are marked here when they have stopped. To
turn logging on and off is the driver's business.
"""

import mmap
import os
from typing import TYPE_CHECKING

from datapath.bus.function import PciFunction
from datapath.drivers.dma_addresses import DmaAddresses, whole_pages
from datapath.native._native import ffi, lib
from datapath.vdpa import DeviceError, DirtyBitmap, MemoryRegion, Ring
from datapath.virtio import ring_bytes

if TYPE_CHECKING:
    from _cffi_backend import FFI


#: Bytes of the bitmap that are looked at at once.
WORD = 8


class HardwareLog:
    """One bitmap, from its mapping until `close`."""

    def __init__(self, function: PciFunction, addresses: DmaAddresses, bitmap: DirtyBitmap) -> None:
        """Let the function reach the bitmap, in whole pages: the last may be in its file in part.

        :raise DeviceError: when it begins within a page, or the function has no room for it.
        """
        if bitmap.size < 1 or (bitmap.fd_offset | bitmap.address) % mmap.PAGESIZE:
            raise DeviceError(
                f"{function.name}: a dirty log of {bitmap.size} bytes at file offset {bitmap.fd_offset:#x}"
                " cannot be mapped for DMA: it begins within a page, or is empty"
            )
        self._function = function
        self._addresses = addresses
        self._bitmap = bitmap
        self._file = _identity(bitmap)
        length = whole_pages(bitmap.size)
        try:
            #: The bits at the last look; no memory until there is one.
            self._before = mmap.mmap(-1, length)
        except OSError as error:
            text = f"{function.name}: a dirty log of {bitmap.size} bytes: {error.strerror}"
            raise DeviceError(text) from error
        start = addresses.place(length, "dirty log")
        #: What the function reaches: not guest memory, but mapped like it.
        self.memory = MemoryRegion(start, length, bitmap.fd, bitmap.fd_offset, bitmap.address)
        function.dma_map(self.memory)
        addresses.take(self.memory)
        #: DMA addresses of the first byte and of the one after the last.
        self.span = (start, start + bitmap.size)
        #: Pages that were marked here or seen to be newly marked; and pages of used rings that the bitmap has
        #: no room for, plus 1 if it has vanished.
        self.marked = self.missed = 0
        self._vanished = False

    def is_in(self, bitmap: DirtyBitmap) -> bool:
        """Whether another description is of the same bytes of the same file; if so it counts from now on."""
        same = (self._bitmap.fd_offset, self._bitmap.size) == (bitmap.fd_offset, bitmap.size)
        if same and not bitmap.address % mmap.PAGESIZE and _identity(bitmap) == self._file:
            self._bitmap = bitmap
            return True
        return False

    def mark_used(self, ring: Ring) -> None:
        """Mark all of a used ring that has stopped: flags, index, entries and event index."""
        _, _, length = ring_bytes(ring.size)
        self._note(lib.device_log_mark(self._here, self._bitmap.size, ring.used, length), "missed")
        first, last = (address // mmap.PAGESIZE // 8 for address in (ring.used, ring.used + length - 1))
        self._look(first // WORD * WORD, min(last + 1, self._bitmap.size))

    def look(self) -> None:
        """Count what was marked since the last look, by whomever, and not taken meanwhile.

        It goes through all of the bitmap, 30 ms for a guest of 1 TiB: nothing to do while the guest waits.
        """
        self._look(0, self._bitmap.size)

    def close(self) -> None:
        """Take the bitmap back from the function, which logs no more.

        :raise DeviceError: when the function fails.
        """
        self._function.dma_unmap(self.memory)
        self._addresses.release(self.memory)  # only now: one that is still mapped has its addresses still
        self._before.close()

    def _look(self, begin: int, end: int) -> None:
        """Look at these bytes of the bitmap; `begin` is a multiple of a word."""
        with ffi.from_buffer(self._before) as before:
            found = lib.device_log_look(self._here + begin, before + begin, max(end - begin, 0))
        self._note(found, "marked")

    @property
    def _here(self) -> "FFI.CData":
        return ffi.cast("uint8_t *", self._bitmap.address)

    def _note(self, result: int, counter: str) -> None:
        """Count what a C function found; one that met a bitmap without memory says so once."""
        if result >= 0:
            setattr(self, counter, getattr(self, counter) + result)
        elif not self._vanished:
            self._vanished = True
            self.missed += 1


def _identity(bitmap: DirtyBitmap) -> tuple[int, int] | None:
    """Which file a bitmap is in; a descriptor's number may have become another's."""
    try:
        status = os.fstat(bitmap.fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino
