"""The device's side of a shadow ring, by hand: private available and used rings that a test acts on.

The counterpart of `virtqueue`, which is the guest; nothing here checks what it is told. Source: virtio 1.3
section 2.7.
"""

import mmap
import os
import struct

from datapath.native._native import ffi
from datapath.native.relay import Doorbell
from tests.harness.virtqueue import AVAIL_F_NO_INTERRUPT, USED_F_NO_NOTIFY

_USED = struct.Struct("<II")
_U16 = struct.Struct("<H")


class PrivateRing:
    """Zeroed rings in a memfd, the eventfds of interrupts and doorbell, and where the device stands."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._used = (6 + 2 * size + 3) // 4 * 4
        self._bytes = self._used + 6 + 8 * size
        self.fd = os.memfd_create("private-ring")
        os.ftruncate(self.fd, self._bytes)
        self._view = mmap.mmap(self.fd, self._bytes)
        #: Addresses in this process.
        self.avail_address = int(ffi.cast("uintptr_t", ffi.from_buffer(self._view)))
        self.used_address = self.avail_address + self._used
        self.interrupt_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.doorbell_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.doorbell = Doorbell(fd=self.doorbell_fd)
        self.taken = 0
        self.used_index = 0

    def _read16(self, offset: int) -> int:
        value: int = _U16.unpack_from(self._view, offset)[0]
        return value

    @property
    def avail_index(self) -> int:
        return self._read16(2)

    @property
    def interrupts_wanted(self) -> bool:
        """By the flag, without EVENT_IDX."""
        return not self._read16(0) & AVAIL_F_NO_INTERRUPT

    @property
    def used_event(self) -> int:
        return self._read16(4 + 2 * self.size)

    def want_notifications(self, wanted: bool) -> None:
        """By the flag, without EVENT_IDX."""
        _U16.pack_into(self._view, self._used, 0 if wanted else USED_F_NO_NOTIFY)

    def set_avail_event(self, index: int) -> None:
        _U16.pack_into(self._view, self._used + 4 + 8 * self.size, index & 0xFFFF)

    def take(self) -> list[int]:
        """The heads that are available and were not taken yet."""
        heads = []
        while self.taken != self.avail_index:
            heads.append(self._read16(4 + 2 * (self.taken % self.size)))
            self.taken = (self.taken + 1) & 0xFFFF
        return heads

    def put(self, head: int, length: int = 0) -> None:
        """Write a used entry; the relay cannot see it before `publish`."""
        _USED.pack_into(self._view, self._used + 4 + 8 * (self.used_index % self.size), head, length)
        self.used_index = (self.used_index + 1) & 0xFFFF

    def publish(self) -> None:
        """Move the used index to where entries have been put."""
        _U16.pack_into(self._view, self._used + 2, self.used_index)

    def interrupt(self) -> None:
        os.eventfd_write(self.interrupt_fd, 1)

    def complete(self, *heads: int, length: int = 0) -> None:
        """Give heads back, and interrupt."""
        for head in heads:
            self.put(head, length)
        self.publish()
        self.interrupt()

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.interrupt_fd)
        os.close(self.doorbell_fd)
