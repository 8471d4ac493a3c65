"""The driver's side of a packed virtqueue, laid out in memory that a test shares: what a guest would do.

Written for tests that want odd rings as well as good ones, so nothing here checks what it is told. Source:
virtio 1.3 section 2.8.
"""

import os
import struct
from collections.abc import Sequence

from tests.harness.virtqueue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Buffer, DriverSide, Memory

AVAIL, USED = 1 << 7, 1 << 15
#: What a side wants to hear of (section 2.8.14).
ENABLE, DISABLE, DESC = 0, 1, 2
#: A buffer id that no buffer has.
NOBODY = 7777

_DESC = struct.Struct("<QIHH")
_EVENT = struct.Struct("<HH")


class PackedVirtqueue(DriverSide):
    """A ring at a fixed place, its two eventfds, and where the driver stands: places with a wrap counter."""

    def __init__(self, memory: Memory, address: int, size: int = 256, start: int = 0x8000) -> None:
        """Lay an empty ring out at `address` (aligned to 4096), with both sides at `start`."""
        super().__init__()
        self.memory = memory
        self.size = size
        self.descriptors = address
        #: What the driver, and what the device wants to hear of.
        self.avail = address + 16 * size
        self.used = self.avail + 4
        self.end = self.used + 4
        self.place = self.seen = start
        self._ids = list(range(size))[::-1]
        self._count: dict[int, int] = {}
        memory.write(address, bytes(self.end - address))
        for slot in range(size):  # as the round before has left them
            was = bool(start & 0x8000) == (slot >= start & 0x7FFF)
            self.write(slot, flags=0 if was else AVAIL | USED)

    def write(self, slot: int, address: int = 0, size: int = 0, id: int = 0, flags: int = 0) -> None:
        """Write one descriptor, its flags last."""
        at = self.descriptors + 16 * slot
        entry = _DESC.pack(address, size, id, flags)
        self.memory.write(at, entry[:14])
        self.memory.write(at + 14, entry[14:])

    def read(self, slot: int) -> tuple[int, int, int, int]:
        """Address, length, id and flags of a descriptor."""
        address, length, id, flags = _DESC.unpack(self.memory.read(self.descriptors + 16 * slot, 16))
        return address, length, id, flags

    def forward(self, place: int, by: int = 1) -> int:
        slot = (place & 0x7FFF) + by
        return place + by if slot < self.size else slot - self.size | (place & 0x8000) ^ 0x8000

    def add(self, *buffers: Buffer, flags: int = 0) -> int:
        """Make a chain of buffers available and return its id; the device is not told yet."""
        id = self._ids.pop()
        self._count[id] = len(buffers)
        entries: list[tuple[int, int, int, int, int]] = []
        for n, buffer in enumerate(buffers):
            slot = self.place & 0x7FFF
            mark = AVAIL if self.place & 0x8000 else USED
            last = n == len(buffers) - 1
            more = 0 if last else DESC_F_NEXT
            writes = DESC_F_WRITE if buffer.writable else 0
            name = id if last else NOBODY  # section 2.8.6: the last descriptor's counts
            entries.append((slot, buffer.address, buffer.size, name, mark | more | writes | flags))
            self.place = self.forward(self.place)
        for entry in reversed(entries):  # the first last
            self.write(*entry)
        return id

    def add_indirect(self, table: int, buffers: Sequence[Buffer]) -> int:
        """Make a chain available whose descriptors lie in a table of their own at address `table`."""
        for n, buffer in enumerate(buffers):
            flags = DESC_F_WRITE if buffer.writable else 0
            self.memory.write(table + 16 * n, _DESC.pack(buffer.address, buffer.size, 0, flags))
        return self.add(Buffer(table, 16 * len(buffers)), flags=DESC_F_INDIRECT)

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def collect(self) -> list[tuple[int, int]]:
        """The used descriptors not seen yet, each an id and the bytes written."""
        entries: list[tuple[int, int]] = []
        while True:
            _, length, id, flags = self.read(self.seen & 0x7FFF)
            wrap = bool(self.seen & 0x8000)
            if bool(flags & AVAIL) != wrap or bool(flags & USED) != wrap:
                return entries
            entries.append((id, length if flags & DESC_F_WRITE else 0))
            self.seen = self.forward(self.seen, self._count.pop(id))
            self._ids.append(id)

    def want(self, flags: int, place: int = 0) -> None:
        """Say which used descriptors to be interrupted for."""
        self.memory.write(self.avail, _EVENT.pack(place, flags))

    def wish(self) -> tuple[int, int]:
        """Which available descriptors the device wants to be notified of: place and flags."""
        place, flags = _EVENT.unpack(self.memory.read(self.used, 4))
        return place, flags
