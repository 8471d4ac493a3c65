"""A virtio-net function that transmits, by nothing but its registers: to test a bus without a driver."""

import ctypes
import mmap
import os

from datapath.bus.function import PciFunction
from datapath.drivers.virtio_registers import VirtioRegisters
from datapath.native._native import ffi
from datapath.vdpa import MemoryRegion, Ring, RingState
from datapath.vfio import Irq
from datapath.virtio import NET_HEADER_SIZE, Feature, Status, bit
from tests.harness.virtqueue import Buffer, MemfdMemory, Virtqueue
from tests.harness.wire import frame

TX = 1
#: MSI-X vector of the transmit queue; 0 is for configuration changes, 1 stays unused.
VECTOR = 2
MEMORY_SIZE = 0x200000
BUFFERS = 0x100000


class SharedMemory:
    """Memory of this process that a function may be given, at addresses from `base` on."""

    def __init__(self, base: int, size: int = MEMORY_SIZE) -> None:
        self.memfd = MemfdMemory(size, base)
        self._mapping = mmap.mmap(self.memfd.fd, size)
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(self._mapping)))
        self.region = MemoryRegion(base, size, self.memfd.fd, 0, address)

    def close(self) -> None:
        self._mapping.close()
        self.memfd.close()


class RawTransmitter:
    """The transmit queue of a function, running; ring and buffers are in memory that is mapped for it."""

    def __init__(self, function: PciFunction, base: int) -> None:
        """Reset the function and start its queue, with memory at DMA address `base`."""
        self.function = function
        self.memory = SharedMemory(base)
        self.base = base
        self.queue = Virtqueue(self.memory.memfd, base, 16)
        self.config_fd = os.eventfd(0, os.EFD_NONBLOCK)
        function.dma_map(self.memory.region)
        function.reset()
        function.enable()
        self.registers = VirtioRegisters(function)
        self._start()

    def send(self, number: int, address: int | None = None) -> None:
        """Transmit a numbered frame, or whatever is at `address`; returns at once."""
        data = bytes(NET_HEADER_SIZE) + frame(number)
        if address is None:
            address = self.base + BUFFERS
            self.memory.memfd.write(address, data)
        self.queue.add(Buffer(address, len(data)))
        doorbell = self.registers.doorbell(TX)
        assert doorbell.address is not None
        ctypes.c_uint16.from_address(doorbell.address).value = TX

    def close(self) -> None:
        """Release memory and eventfds; the function is the caller's."""
        self.queue.close()
        os.close(self.config_fd)
        self.memory.close()

    def _start(self) -> None:
        registers = self.registers
        registers.reset()
        registers.accept_features(bit(Feature.F_VERSION_1) | bit(Feature.F_ACCESS_PLATFORM))
        self.function.set_eventfds(Irq.MSIX, 0, [self.config_fd, None, self.queue.call_fd])
        registers.set_config_vector(0)
        queue = self.queue
        registers.set_ring(
            TX, Ring(queue.size, queue.descriptors, queue.avail, queue.used, RingState(0, 0), None, None)
        )
        registers.set_queue_vector(TX, VECTOR)
        registers.enable_queue(TX, True)
        registers.add_status(Status.DRIVER_OK)
