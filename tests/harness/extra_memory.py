"""More guest memory than a driven VF has, somewhere else."""

import mmap

from datapath.native._native import ffi
from datapath.vdpa import MemoryRegion
from datapath.virtio import NET_HEADER_SIZE
from tests.harness.closeable import Closeable
from tests.harness.virtqueue import Buffer, MemfdMemory
from tests.harness.wire import frame

SIZE = 0x10000


class ExtraMemory(Closeable):
    """A region of guest memory from an address on, which no device has been told of."""

    def __init__(self, base: int) -> None:
        self.memory = MemfdMemory(SIZE, base)
        self._mapping = mmap.mmap(self.memory.fd, SIZE)
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(self._mapping)))
        self.region = MemoryRegion(base, SIZE, self.memory.fd, 0, address)

    def frame(self, number: int) -> Buffer:
        """A numbered frame there, ready to be sent; the one before is no more."""
        data = bytes(NET_HEADER_SIZE) + frame(number)
        self.memory.write(self.memory.base, data)
        return Buffer(self.memory.base, len(data))

    def close(self) -> None:
        self._mapping.close()
        self.memory.close()
