"""A VF driven without a front-end: a test's own guest memory and rings on a vDPA device.

What a port and its guest are to the driver, in one object: the test transmits and receives through rings
that it laid out itself, by the first pair where it does not say another.
"""

import mmap
import os
import select
import time

from datapath.native._native import ffi
from datapath.vdpa import DeviceEvent, MemoryRegion, Ring, RingState, VdpaDevice
from datapath.virtio import NET_HEADER_SIZE, Feature, bit
from tests.harness.virtqueue import Buffer, MemfdMemory, Virtqueue
from tests.harness.wire import frame, number_of

RX, TX = 0, 1
FEATURES = bit(Feature.F_VERSION_1) | bit(Feature.NET_F_MAC) | bit(Feature.NET_F_STATUS)
#: Guest physical address of the memory: above 4 GiB, so that both halves of an address count.
BASE = 0x1_0000_0000
MEMORY_SIZE = 0x200000
RING_STRIDE = 0x8000
BUFFERS = 0x100000
BUFFER_SIZE = 2048


class DrivenVf:
    """A vDPA device with memory mapped and rings for one pair of queues or more, not started."""

    def __init__(self, device: VdpaDevice, size: int = 256, start: int = 0, pairs: int = 1) -> None:
        """Lay rings of `size` out, both indices at `start`."""
        self.device = device
        self.memory = MemfdMemory(MEMORY_SIZE, BASE)
        self.indices = range(2 * pairs)
        self.queues = [Virtqueue(self.memory, BASE + at * RING_STRIDE, size, start) for at in self.indices]
        self._mapping = mmap.mmap(self.memory.fd, MEMORY_SIZE)
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(self._mapping)))
        self.region = MemoryRegion(BASE, MEMORY_SIZE, self.memory.fd, 0, address)
        self.states = {index: RingState(start, start) for index in self.indices}
        self._buffer = 0
        try:
            device.map_memory(self.region)
        except BaseException:
            self.close()
            raise

    def ring(self, index: int, *, kick: bool = True, call: bool = True) -> Ring:
        """A ring as the front-end would describe it; `kick` False asks for polling."""
        queue = self.queues[index]
        return Ring(
            queue.size,
            queue.descriptors,
            queue.avail,
            queue.used,
            self.states[index],
            queue.kick_fd if kick else None,
            queue.call_fd if call else None,
        )

    def start(self, features: int = FEATURES, *, kick: bool = True, call: bool = True) -> None:
        """Start all rings where they stand."""
        rings = {index: self.ring(index, kick=kick, call=call) for index in self.indices}
        self.device.start(features & self.device.features, rings)

    def suspend(self) -> dict[int, RingState]:
        """Stop, and remember where the rings stand."""
        states = self.device.suspend()
        self.states |= states
        return states

    def transmit(self, *numbers: int, kick: bool = True, pair: int = 0) -> None:
        """Let the guest send numbered frames."""
        queue = self.queues[2 * pair + TX]
        for number in numbers:
            data = bytes(NET_HEADER_SIZE) + frame(number)
            queue.add(self._next_buffer(data))
        if kick:
            queue.kick()

    def offer(self, count: int, pair: int = 0) -> None:
        """Give the receive ring buffers to fill."""
        queue = self.queues[2 * pair + RX]
        for _ in range(count):
            buffer = self._next_buffer()
            queue.add(Buffer(buffer.address, BUFFER_SIZE, writable=True))
        queue.kick()

    def receive(self, count: int, deadline: float = 5.0, pair: int = 0) -> list[int]:
        """The numbers of the next frames that the guest receives; foreign frames are passed over.

        :raise TimeoutError: when they do not come in time.
        """
        numbers: list[int] = []
        end = time.monotonic() + deadline
        queue = self.queues[2 * pair + RX]
        while len(numbers) < count:
            ((head, length),) = self._take_one(end, queue)
            address = int.from_bytes(self.memory.read(queue.descriptors + 16 * head, 8), "little")
            number = number_of(self.memory.read(address, length)[NET_HEADER_SIZE:])
            if number is not None:
                numbers.append(number)
        return numbers

    def wait_event(self, deadline: float = 5.0) -> DeviceEvent | None:
        """The next event that the device tells, or None when it is silent for so long."""
        end = time.monotonic() + deadline
        while (left := end - time.monotonic()) > 0:
            if select.select([self.device.event_fd], [], [], left)[0]:
                event = self.device.take_event()
                if event is not None:
                    return event
        return None

    def close(self) -> None:
        """Close the device and release memory and rings."""
        self.device.close()
        for queue in self.queues:
            queue.close()
        self._mapping.close()
        self.memory.close()

    def _next_buffer(self, data: bytes = b"") -> Buffer:
        """The next place in a circle of buffers, filled with `data`."""
        address = BASE + BUFFERS + self._buffer * BUFFER_SIZE
        self._buffer = (self._buffer + 1) % ((MEMORY_SIZE - BUFFERS) // BUFFER_SIZE)
        self.memory.write(address, data)
        return Buffer(address, len(data))

    def _take_one(self, end: float, queue: Virtqueue) -> list[tuple[int, int]]:
        """One used entry of a receive ring, waited for by its call eventfd."""
        queue.want_interrupt()
        while queue.seen == queue.used_index:
            left = end - time.monotonic()
            if left <= 0 or not select.select([queue.call_fd], [], [], left)[0]:
                raise TimeoutError(f"no frame received; used index {queue.used_index}")
            os.eventfd_read(queue.call_fd)
        at = queue.used + 4 + 8 * (queue.seen % queue.size)
        entry = self.memory.read(at, 8)
        queue.seen = (queue.seen + 1) & 0xFFFF
        return [(int.from_bytes(entry[:4], "little"), int.from_bytes(entry[4:], "little"))]
