"""The driver's side of a split virtqueue, laid out in memory that a test shares: what a guest would do.

Written for tests that want odd rings as well as good ones, so nothing here checks what it is told. Source:
virtio 1.3 section 2.7.
"""

import abc
import mmap
import os
import select
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

_DESC = struct.Struct("<QIHH")
_USED = struct.Struct("<II")
_U16 = struct.Struct("<H")


class Memory(Protocol):
    """Guest memory as bytes by guest physical address."""

    def read(self, address: int, size: int) -> bytes: ...
    def write(self, address: int, data: bytes) -> None: ...


class MemfdMemory:
    """Guest memory in a memfd whose first byte is guest physical address `base`."""

    def __init__(self, size: int, base: int = 0) -> None:
        self.size = size
        self.base = base
        self.fd = os.memfd_create("guest-memory")
        os.ftruncate(self.fd, size)

    def read(self, address: int, size: int) -> bytes:
        return os.pread(self.fd, size, address - self.base)

    def write(self, address: int, data: bytes) -> None:
        os.pwrite(self.fd, data, address - self.base)

    def close(self) -> None:
        os.close(self.fd)


@dataclass(frozen=True)
class Buffer:
    """A piece of guest memory for one descriptor; the device writes it if `writable`."""

    address: int
    size: int
    writable: bool = False


class DriverSide(abc.ABC):
    """What the driver's sides of split and packed rings share: two eventfds, and to wait for used buffers."""

    def __init__(self) -> None:
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)

    @abc.abstractmethod
    def collect(self) -> list[tuple[int, int]]:
        """The buffers used and not seen yet, each by its name in the ring, and the bytes written."""

    def ask_for_interrupt(self) -> list[tuple[int, int]]:
        """Ask for an interrupt at the next used buffer; what was used before the device could know.

        To be asked once for all, as by default, is enough for packed rings.
        """
        return []

    def wait_used(self, count: int = 1, deadline: float = 5.0) -> list[tuple[int, int]]:
        """Wait, by the call eventfd, until that many buffers are used.

        :raise TimeoutError: when they are not within `deadline` seconds.
        """
        end = time.monotonic() + deadline
        entries = self.collect()
        while len(entries) < count:
            if more := self.ask_for_interrupt():
                entries += more
                continue
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.call_fd], [], [], left)[0]:
                raise TimeoutError(f"{len(entries)} of {count} buffers used after {deadline} s")
            os.eventfd_read(self.call_fd)
            entries += self.collect()
        return entries

    def close(self) -> None:
        """Close the eventfds."""
        os.close(self.kick_fd)
        os.close(self.call_fd)


class Virtqueue(DriverSide):
    """A ring at a fixed place, its two eventfds, and where the driver stands."""

    def __init__(self, memory: Memory, address: int, size: int = 256, start: int = 0) -> None:
        """Lay an empty ring out at `address` (aligned to 4096), with both indices at `start`."""
        super().__init__()
        self.memory = memory
        self.size = size
        self.descriptors = address
        self.avail = address + 16 * size
        self.used = (self.avail + 6 + 2 * size + 4095) // 4096 * 4096
        self.end = self.used + 6 + 8 * size
        #: The page of the device's doorbell and what to write there, where the driver has that.
        self.page: tuple[mmap.mmap, int] | None = None
        self.avail_index = start
        self.seen = start
        self._next_descriptor = 0
        for part in (self.avail, self.used):
            memory.write(part, struct.pack("<HH", 0, start))

    def describe(self, index: int, buffer: Buffer, flags: int = 0, following: int = 0) -> None:
        """Write one descriptor."""
        flags |= DESC_F_WRITE if buffer.writable else 0
        entry = _DESC.pack(buffer.address, buffer.size, flags, following)
        self.memory.write(self.descriptors + 16 * index, entry)

    def add(self, *buffers: Buffer) -> int:
        """Make a chain of buffers available and return its head; the device is not told yet."""
        heads = [(self._next_descriptor + n) % self.size for n in range(len(buffers))]
        self._next_descriptor = (heads[-1] + 1) % self.size
        for n, (index, buffer) in enumerate(zip(heads, buffers, strict=True)):
            last = n == len(buffers) - 1
            self.describe(index, buffer, 0 if last else DESC_F_NEXT, 0 if last else heads[n + 1])
        self.publish(heads[0])
        return heads[0]

    def add_indirect(self, table: int, buffers: Sequence[Buffer]) -> int:
        """Make a chain available whose descriptors lie in a table of their own at address `table`."""
        for n, buffer in enumerate(buffers):
            last = n == len(buffers) - 1
            flags = (DESC_F_WRITE if buffer.writable else 0) | (0 if last else DESC_F_NEXT)
            self.memory.write(table + 16 * n, _DESC.pack(buffer.address, buffer.size, flags, n + 1))
        head = self._next_descriptor
        self._next_descriptor = (head + 1) % self.size
        self.describe(head, Buffer(table, 16 * len(buffers)), DESC_F_INDIRECT)
        self.publish(head)
        return head

    def publish(self, head: int) -> None:
        """Put a head into the available ring and move its index on."""
        self.memory.write(self.avail + 4 + 2 * (self.avail_index % self.size), _U16.pack(head))
        self.set_avail_index(self.avail_index + 1)

    def set_avail_index(self, index: int) -> None:
        """Set the available index, to a lie if need be."""
        self.avail_index = index & 0xFFFF
        self.memory.write(self.avail + 2, _U16.pack(self.avail_index))

    def kick(self) -> None:
        """Notify the device: by one 16-bit store to its page if there is one, else by the eventfd."""
        if self.page is None:
            os.eventfd_write(self.kick_fd, 1)
        else:
            memory, value = self.page
            with memoryview(memory) as view, view.cast("H") as cells:
                cells[0] = value

    @property
    def used_index(self) -> int:
        """The device's index now."""
        index: int = _U16.unpack(self.memory.read(self.used + 2, 2))[0]
        return index

    def want_interrupt(self) -> None:
        """Ask for an interrupt at the next used entry, where EVENT_IDX was negotiated (section 2.7.7)."""
        self.memory.write(self.avail + 4 + 2 * self.size, _U16.pack(self.seen))

    def collect(self) -> list[tuple[int, int]]:
        """The used entries not seen yet, each a head and the bytes written."""
        entries = []
        while self.seen != self.used_index:
            at = self.used + 4 + 8 * (self.seen % self.size)
            entries.append(_USED.unpack(self.memory.read(at, 8)))
            self.seen = (self.seen + 1) & 0xFFFF
        return entries

    def ask_for_interrupt(self) -> list[tuple[int, int]]:
        self.want_interrupt()
        return self.collect()
