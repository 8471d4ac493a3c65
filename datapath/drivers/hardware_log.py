"""A dirty log that a function keeps by itself, by DMA into the bitmap of whoever moves the guest.

Owns the bitmap's mapping for DMA, at addresses that no guest memory has. To turn logging on and off is the
driver's business.
"""

import mmap

from datapath.bus.function import PciFunction
from datapath.drivers.dma_addresses import DmaAddresses, whole_pages
from datapath.drivers.log_bitmap import LogBitmap
from datapath.vdpa import DeviceError, DirtyBitmap, MemoryRegion


class HardwareLog(LogBitmap):
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
        super().__init__(function.name, bitmap)
        self._function = function
        self._addresses = addresses
        length = whole_pages(bitmap.size)
        start = addresses.place(length, "dirty log")
        #: What the function reaches: not guest memory, but mapped like it.
        self.memory = MemoryRegion(start, length, bitmap.fd, bitmap.fd_offset, bitmap.address)
        function.dma_map(self.memory)
        addresses.take(self.memory)
        #: DMA addresses of the first byte and of the one after the last.
        self.span = (start, start + bitmap.size)

    def close(self) -> None:
        """Take the bitmap back from the function, which logs no more.

        :raise DeviceError: when the function fails.
        """
        self._function.dma_unmap(self.memory)
        self._addresses.release(self.memory)  # only now: one that is still mapped has its addresses still
        super().close()
