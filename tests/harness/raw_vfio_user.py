"""A vfio-user client that packs its own messages, as a foreign one would, and a driver of an IFCVF on it.

Shares no code with the device under test but the virtqueue of the tests. Numbers are those of QEMU's
docs/interop/vfio-user.rst, linux/vfio.h and the virtio specification.
"""

import mmap
import os
import select
import socket
import struct
from pathlib import Path

from tests.harness.virtqueue import Buffer, MemfdMemory, Virtqueue

VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS = 1, 2, 3, 4, 5, 6
GET_IRQ_INFO, SET_IRQS, REGION_READ, REGION_WRITE, DEVICE_RESET = 7, 8, 9, 10, 13
NO_REPLY = 0x10
CONFIG = 7
MSIX = 2
JSON = b'{"capabilities": {"max_msg_fds": 16, "max_data_xfer_size": 1048576, "pgsizes": 4096}}\0'
DEADLINE = 5.0
HEADER = struct.Struct("=HHIII")

#: Where a driver finds an IFCVF's registers; the BARs that the capabilities of the device name.
COMMON_BAR, NOTIFY_BAR, LM_BAR = 0, 2, 4
DEVICE_CONFIG = 0x2000
MEMORY_SIZE = 1 << 22
RX, TX = 0, 1
RX_RING, TX_RING, RX_DATA, TX_DATA = 0x10000, 0x20000, 0x100000, 0x200000
NET_HEADER = 12


class ErrnoReplyError(Exception):
    """The device answered with an error."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


class GoneError(Exception):
    """The device closed the connection."""


class RawClient:
    """One connection."""

    def __init__(self, path: Path, *, negotiate: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(DEADLINE)
        self.socket.connect(str(path))
        self._id = 0
        #: Descriptors that came with the last reply.
        self.fds: list[int] = []
        if negotiate:
            self.command(VERSION, struct.pack("=HH", 0, 0) + JSON)

    def send(self, command: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 0) -> int:
        """Send a command; returns its id."""
        self._id += 1
        message = HEADER.pack(self._id, command, HEADER.size + len(payload), flags, 0) + payload
        socket.send_fds(self.socket, [message], fds)
        return self._id

    def command(self, command: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        """Send a command and return the payload of its reply.

        :raise ErrnoReplyError: when it was refused.
        :raise GoneError: when the device hung up.
        """
        number = self.send(command, payload, fds)
        data, self.fds, _, _ = socket.recv_fds(self.socket, HEADER.size, 16)
        if not data:
            raise GoneError
        found, echoed, size, flags, errno = HEADER.unpack(data)
        assert (found, echoed, flags & 0xF) == (number, command, 1)
        if flags & 0x20:
            assert size == HEADER.size
            raise ErrnoReplyError(errno)
        payload = b""
        while len(payload) < size - HEADER.size:
            payload += self.socket.recv(size - HEADER.size - len(payload))
        return payload

    def is_gone(self) -> bool:
        """Wait for the device to hang up."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    def read(self, region: int, offset: int, width: int) -> int:
        reply = self.command(REGION_READ, struct.pack("=QII", offset, region, width))
        assert reply[:16] == struct.pack("=QII", offset, region, width)
        return int.from_bytes(reply[16:], "little")

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        data = value.to_bytes(width, "little")
        reply = self.command(REGION_WRITE, struct.pack("=QII", offset, region, width) + data)
        assert reply == struct.pack("=QII", offset, region, width)

    def region_info(self, index: int, argsz: int = 32) -> tuple[int, ...]:
        """argsz, flags, index, cap_offset, size, offset."""
        reply = self.command(GET_REGION_INFO, struct.pack("=IIIIQQ", argsz, 0, index, 0, 0, 0))
        self.capabilities = reply[32:]
        return struct.unpack("=IIIIQQ", reply[:32])

    def dma_map(self, address: int, size: int, fd: int | None, offset: int = 0, flags: int = 3) -> None:
        fds = () if fd is None else (fd,)
        self.command(DMA_MAP, struct.pack("=IIQQQ", 32, flags, offset, address, size), fds)

    def dma_unmap(self, address: int, size: int, flags: int = 0) -> None:
        request = struct.pack("=IIQQ", 24, flags, address, size)
        assert self.command(DMA_UNMAP, request) == request

    def set_irqs(
        self, flags: int, index: int, start: int, count: int, fds: tuple[int, ...] = (), data: bytes = b""
    ) -> None:
        request = struct.pack("=IIIII", 20 + len(data), flags, index, start, count) + data
        self.command(SET_IRQS, request, fds)

    def close(self) -> None:
        self.socket.close()


class RawDriver:
    """Drives the VF behind a client: memory, queues, interrupts."""

    def __init__(self, client: RawClient) -> None:
        self.client = client
        self.memory = MemfdMemory(MEMORY_SIZE)
        self.rx = Virtqueue(self.memory, RX_RING)
        self.tx = Virtqueue(self.memory, TX_RING)
        self.config_fd = os.eventfd(0, os.EFD_NONBLOCK)

    def start(self, features: int = 1 << 32) -> None:
        """Everything from function reset to DRIVER_OK, with memory at DMA address 0."""
        client = self.client
        client.command(DEVICE_RESET)
        client.write(CONFIG, 4, 2, 6)
        client.dma_map(0, MEMORY_SIZE, self.memory.fd)
        client.set_irqs(0x24, MSIX, 0, 3, (self.config_fd, self.rx.call_fd, self.tx.call_fd))
        self.set_status(0)
        self.set_status(3)
        for word in (0, 1):
            client.write(COMMON_BAR, 0x08, 4, word)
            client.write(COMMON_BAR, 0x0C, 4, features >> 32 * word & 0xFFFFFFFF)
        self.set_status(11)
        assert self.status == 11
        client.write(COMMON_BAR, 0x10, 2, 0)
        self.enable(RX, self.rx)
        self.enable(TX, self.tx)
        self.set_status(15)

    def enable(self, index: int, queue: Virtqueue) -> None:
        client = self.client
        client.write(COMMON_BAR, 0x16, 2, index)
        client.write(COMMON_BAR, 0x18, 2, queue.size)
        client.write(COMMON_BAR, 0x1A, 2, index + 1)
        for offset, address in ((0x20, queue.descriptors), (0x28, queue.avail), (0x30, queue.used)):
            client.write(COMMON_BAR, offset, 4, address & 0xFFFFFFFF)
            client.write(COMMON_BAR, offset + 4, 4, address >> 32)
        client.write(COMMON_BAR, 0x1C, 2, 1)

    @property
    def status(self) -> int:
        return self.client.read(COMMON_BAR, 0x14, 1)

    def set_status(self, value: int) -> None:
        self.client.write(COMMON_BAR, 0x14, 1, value)

    def clear_rings(self) -> None:
        """Empty rings, both indices at 0."""
        for queue in (self.rx, self.tx):
            queue.avail_index = queue.seen = 0
            self.memory.write(queue.avail, bytes(4))
            self.memory.write(queue.used, bytes(4))

    def kick(self, index: int) -> None:
        """Notify by message."""
        self.client.write(NOTIFY_BAR, 4096 * index, 2, index)

    def add_packet(self, frame: bytes) -> None:
        """Make a packet available; the device is not told."""
        at = TX_DATA + 4096 * (self.tx.avail_index % 64)
        self.memory.write(at, bytes(NET_HEADER) + frame)
        self.tx.add(Buffer(at, NET_HEADER + len(frame)))

    def add_buffers(self, count: int) -> None:
        """Make receive buffers available; the device is not told."""
        for _ in range(count):
            self.rx.add(Buffer(RX_DATA + 4096 * (self.rx.avail_index % 64), 2048, writable=True))

    def received(self) -> bytes:
        """Wait for the next packet and return it without its header."""
        [(head, size)] = self.rx.wait_used()
        return self.memory.read(RX_DATA + 4096 * head, size)[NET_HEADER:]

    def wait_config_interrupt(self) -> None:
        """Wait for vector 0.

        :raise TimeoutError: when it is not signalled.
        """
        if not select.select([self.config_fd], [], [], DEADLINE)[0]:
            raise TimeoutError("no configuration interrupt")
        os.eventfd_read(self.config_fd)

    def close(self) -> None:
        self.client.close()
        os.close(self.config_fd)
        self.rx.close()
        self.tx.close()
        self.memory.close()


def map_page(fd: int, offset: int) -> mmap.mmap:
    """One page of a mappable region."""
    return mmap.mmap(fd, 4096, offset=offset)
