"""A guest of ours before DPDK's mlx5 vDPA driver, and the other end of the emulated ConnectX' cable.

What the guest writes is remembered page by page, so that a test can move its memory as a migration does: what
has been written, and what the dirty log says.
"""

import os
import select
import socket
from collections.abc import Sequence

from datapath.vhost_user.backend import F_LOG_ALL, F_PROTOCOL_FEATURES
from datapath.vhost_user.messages import LogArea, Message, Request, encode_request
from datapath.virtio import NET_HEADER_SIZE, Feature, bit
from tests.harness.closeable import Closeable
from tests.harness.dirty_log import PAGE, marked_pages
from tests.harness.front_end import BUFFERS, MEMORY_SIZE
from tests.harness.notifier_front_end import NotifierFrontEnd
from tests.harness.processes import HarnessError, wait_for
from tests.harness.traffic import RX, TX
from tests.harness.virtqueue import Buffer, MemfdMemory
from tests.harness.wire import frame, number_of

#: What it does without host notifiers: MQ, LOG_SHMFD, NET_MTU, BACKEND_REQ and STATUS.
PROTOCOL = 0x10033
#: With them: BACKEND_SEND_FD and HOST_NOTIFIER.
WITH_NOTIFIERS = PROTOCOL | 0xC00
FEATURES = bit(Feature.F_VERSION_1)
#: DPDK takes an address of 0 for none.
RINGS = 0x10000
LOG_SIZE = MEMORY_SIZE // PAGE // 8
#: Buffers are 2 KiB, those to be filled in the first half of what is left of memory.
BUFFER_SIZE = 2048
HALF = (MEMORY_SIZE - BUFFERS) // 2
PATIENCE = 5.0


class RememberingMemory(MemfdMemory):
    """Guest memory that knows which pages its guest has written since it was last asked."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._written: set[int] = set()

    def write(self, address: int, data: bytes) -> None:
        super().write(address, data)
        last = address + max(len(data), 1) - 1
        self._written.update(range(address // PAGE * PAGE, last + 1, PAGE))

    def take_written(self) -> set[int]:
        """The addresses of those pages."""
        written, self._written = self._written, set()
        return written


class DpdkFrontEnd(NotifierFrontEnd):
    """One guest with one pair of rings, which sends and receives numbered frames."""

    def __init__(self, sock: socket.socket, protocol: int) -> None:
        super().__init__(sock, protocol)
        self.memory.close()
        self.memory: RememberingMemory = RememberingMemory(MEMORY_SIZE)
        self.lay_rings_out(RINGS)
        self.log = os.memfd_create("log")
        os.ftruncate(self.log, LOG_SIZE)
        self._buffers = [0, 0]

    def begin(self, features: int = FEATURES) -> None:
        """All that makes rings run, from where they stand."""
        self.connect()
        self.start(features)

    def take_over(self, other: "DpdkFrontEnd", bases: Sequence[int]) -> None:
        """Go on with the guest of another front-end, whose memory has been copied, where its rings stand."""
        self.queues, other.queues = other.queues, self.queues
        for mine, theirs in zip(self.queues, other.queues, strict=True):
            mine.memory, theirs.memory = theirs.memory, mine.memory
            mine.kick_fd, theirs.kick_fd = theirs.kick_fd, mine.kick_fd
            mine.call_fd, theirs.call_fd = theirs.call_fd, mine.call_fd
        self._buffers = list(other._buffers)
        self.connect()
        self.enable()
        self.tell(Request.SET_FEATURES, FEATURES | F_PROTOCOL_FEATURES)
        self.share_memory()
        for index, base in enumerate(bases):
            self.set_up_ring(index, base)
        self.driver_ok()
        self.settle()

    def start_logging(self) -> None:
        """As QEMU does when a running guest begins to move."""
        # DPDK answers without a payload, which our own decoder does not take.
        self.send(encode_request(Message(Request.SET_LOG_BASE, LogArea(LOG_SIZE, 0))), [self.log])
        self.read_reply()
        self.tell(Request.SET_FEATURES, FEATURES | F_PROTOCOL_FEATURES | F_LOG_ALL)
        for index in (RX, TX):
            self.tell(Request.SET_VRING_ADDR, self.address(index, flags=1))
        self.settle()

    def take_log(self) -> set[int]:
        """The addresses of the pages that are marked; they are not afterwards. Only while nobody marks."""
        data = os.pread(self.log, LOG_SIZE, 0)
        os.pwrite(self.log, bytes(LOG_SIZE), 0)
        return marked_pages(data)

    def transmit(self, *numbers: int) -> None:
        """Let the guest send numbered frames; at most a ring of them may be on their way."""
        for number in numbers:
            data = bytes(NET_HEADER_SIZE) + frame(number)
            address = BUFFERS + HALF + self._next_buffer(TX)
            self.memory.write(address, data)
            self.queues[TX].add(Buffer(address, len(data)))
        self.queues[TX].kick()

    def offer(self, count: int) -> None:
        """Give the receive ring buffers to fill, two on each page."""
        for _ in range(count):
            self.queues[RX].add(Buffer(BUFFERS + self._next_buffer(RX), BUFFER_SIZE, writable=True))
        self.queues[RX].kick()

    def received(self) -> dict[int, int]:
        """The numbers of the frames that the guest has received meanwhile, and where each lies."""
        frames: dict[int, int] = {}
        for head, length in self.queues[RX].collect():
            descriptor = self.memory.read(self.queues[RX].descriptors + 16 * head, 8)
            address = int.from_bytes(descriptor, "little")
            number = number_of(self.memory.read(address, length)[NET_HEADER_SIZE:])
            assert number is not None, "a frame that nobody sent"
            assert number not in frames, "a frame came twice"
            frames[number] = address
        return frames

    def receive(self, count: int) -> dict[int, int]:
        """Wait until that many frames have come.

        :raise HarnessError: when they do not.
        """
        frames: dict[int, int] = {}

        def have_come() -> bool:
            more = self.received()
            assert not frames.keys() & more.keys(), "a frame came twice"
            frames.update(more)
            return len(frames) >= count

        wait_for(f"{count} frames", have_come, PATIENCE)
        return frames

    def _next_buffer(self, index: int) -> int:
        number = self._buffers[index]
        self._buffers[index] += 1
        return number * BUFFER_SIZE % HALF

    def close(self) -> None:
        os.close(self.log)
        super().close()


class Cable(Closeable):
    """What an emulated ConnectX is plugged in by; a few frames fit into it, the device keeps the rest."""

    def __init__(self, patience: float = PATIENCE) -> None:
        """
        :param patience: seconds that a frame of the guest may take.
        """
        self._end, self._device = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._device.setblocking(False)
        self._device.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that there is
        self._end.settimeout(patience)
        #: What the device is given.
        self.fd = self._device.fileno()

    def send(self, *numbers: int) -> None:
        """Numbered frames to the guest; waits while the cable is full."""
        for number in numbers:
            self._end.send(frame(number))

    def receive(self, count: int) -> list[int | None]:
        """The numbers of the next frames from the guest.

        :raise HarnessError: when they do not come.
        """
        try:
            return [number_of(self._end.recv(2048)) for _ in range(count)]
        except TimeoutError:
            raise HarnessError(f"no frame in {self._end.gettimeout():g} s") from None

    def take_all(self) -> list[int | None]:
        """The numbers of the frames that it holds now."""
        numbers = []
        while select.select([self._end], [], [], 0)[0]:
            numbers += self.receive(1)
        return numbers

    def close(self) -> None:
        self._end.close()
        self._device.close()
