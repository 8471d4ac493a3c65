"""The dirty log: the bitmap in which a front-end that saves or moves a guest learns what was written.

Bit n says that page n of guest memory (4 KiB) was written (QEMU docs/interop/vhost-user.rst, "Migration").
Owns the log's descriptor and mapping, and marks what no device marks. Who marks what is `marking.py`'s.
"""

import contextlib
import mmap
import os

from datapath.descriptors import close_all
from datapath.native._native import ffi, lib
from datapath.vdpa import DirtyBitmap
from datapath.vhost_user.messages import LogArea

#: Bytes of guest memory for each bit.
PAGE = 4096
_CHUNK = 1 << 20


class DirtyLog:
    """One log, from SET_LOG_BASE until the next one or the end of logging."""

    def __init__(self, fd: int, area: LogArea) -> None:
        """Take the descriptor over; `area` is where the bitmap lies in it, in bytes."""
        self._fd = fd
        self._area = area
        self._mapping = contextlib.ExitStack()
        self._bitmap: DirtyBitmap | None = None
        #: Bytes of it that are used.
        self._room = 0

    @property
    def size(self) -> int:
        """Length of the bitmap in bytes, as the front-end said."""
        return self._area.size

    def same_as(self, other: "DirtyLog") -> bool:
        """Whether two are the same bytes of one file."""
        if self._area != other._area:
            return False
        try:
            return os.path.sameopenfile(self._fd, other._fd)
        except OSError:
            return False

    def cover(self, needed: int) -> bool:
        """Use as much of the bitmap as guest memory needs, in whole pages and never less than before.

        :param needed: in bytes.
        :return: whether `bitmap` is longer from now on.
        """
        room = min(self._area.size, max(PAGE, -(-needed // PAGE) * PAGE))
        if room <= self._room:
            return False
        self._room = room
        self._bitmap = None  # a device may use the shorter one still: it stays mapped until `close`
        return True

    def mark(self, address: int, length: int) -> None:
        """Mark a range of guest memory; what lies beyond the log is left out.

        :raise OSError: when the log cannot be mapped, or has shrunk away.
        """
        bitmap = self.bitmap
        length = min(length, 8 * PAGE * bitmap.size - address)
        if length <= 0:
            return
        if lib.device_log_mark(ffi.cast("void *", bitmap.address), bitmap.size, address, length) < 0:
            raise OSError("the dirty log has shrunk away")

    @property
    def bitmap(self) -> DirtyBitmap:
        """What is used of it, in this process's memory until `close`. Its file may shrink at any time.

        :raise OSError: when the log cannot be mapped.
        """
        if self._bitmap is None:
            self._check_size()
            start = self._area.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            length = self._area.offset + self._room - start
            try:
                view = mmap.mmap(self._fd, length, offset=start)
            except ValueError as error:
                raise OSError(str(error)) from error
            self._mapping.callback(view.close)
            pin = ffi.from_buffer(view)
            self._mapping.callback(ffi.release, pin)
            address = int(ffi.cast("uintptr_t", pin)) + self._area.offset - start
            self._bitmap = DirtyBitmap(self._fd, self._area.offset, address, self._room)
        return self._bitmap

    def fill(self, address: int, length: int) -> None:
        """Mark a range of guest memory, in whole bytes of the bitmap, that need not have been mapped.

        :raise OSError: when the log cannot be written, or has shrunk away.
        """
        self._check_size()
        first, end = address // (8 * PAGE), -(-(address + length) // (8 * PAGE))
        end = min(end, self._area.size)
        for start in range(first, end, _CHUNK):
            os.pwrite(self._fd, b"\xff" * min(_CHUNK, end - start), self._area.offset + start)

    def close(self) -> None:
        """Let go of the mapping and the descriptor; nobody may mark anything any more."""
        self._mapping.close()
        close_all([self._fd])

    def _check_size(self) -> None:
        end = self._area.offset + self._area.size
        size = os.fstat(self._fd).st_size
        if size < end:
            raise OSError(f"the dirty log has {size} bytes instead of {end}")
