"""A dirty bitmap in which a VF marks the buffers that it writes, as its driver sees it.

The VF marks buffers, but not its used rings: these are marked here when they have stopped. What is marked is
counted by looking. Owns the numbers and what the bitmap was at the last look, not the bitmap.
"""

import mmap
import os
from typing import TYPE_CHECKING

from datapath.native._native import ffi, lib
from datapath.vdpa import DeviceError, DirtyBitmap, Ring
from datapath.virtio import ring_bytes

if TYPE_CHECKING:
    from _cffi_backend import FFI


#: Bytes of the bitmap that are looked at at once.
WORD = 8


class LogBitmap:
    """One bitmap, from when it is in use until `close`."""

    def __init__(self, name: str, bitmap: DirtyBitmap) -> None:
        """
        :param name: what messages call the VF.
        :raise DeviceError: when there is no memory to remember it by.
        """
        self._bitmap = bitmap
        self._file = _identity(bitmap)
        try:
            #: The bits at the last look; no memory until there is one.
            self._before = mmap.mmap(-1, -(-bitmap.size // WORD) * WORD)
        except OSError as error:
            text = f"{name}: a dirty log of {bitmap.size} bytes: {error.strerror}"
            raise DeviceError(text) from error
        #: Pages that were marked here or seen to be newly marked; and pages of used rings that the bitmap has
        #: no room for, plus 1 if it has vanished.
        self.marked = self.missed = 0
        self._vanished = False

    def is_in(self, bitmap: DirtyBitmap) -> bool:
        """Whether another description is of the same bytes of the same file; if so it counts from now on."""
        same = (self._bitmap.fd_offset, self._bitmap.size) == (bitmap.fd_offset, bitmap.size)
        if same and not bitmap.address % mmap.PAGESIZE and _identity(bitmap) == self._file:
            self._bitmap = bitmap
            return True
        return False

    def mark_used(self, ring: Ring) -> None:
        """Mark all of a used ring that has stopped: flags, index, entries and event index."""
        _, _, length = ring_bytes(ring.size)
        self._note(lib.device_log_mark(self._here, self._bitmap.size, ring.used, length), "missed")
        first, last = (address // mmap.PAGESIZE // 8 for address in (ring.used, ring.used + length - 1))
        self._look(first // WORD * WORD, min(last + 1, self._bitmap.size))

    def look(self) -> None:
        """Count what was marked since the last look, by whomever, and not taken meanwhile.

        It goes through all of the bitmap, 30 ms for a guest of 1 TiB: nothing to do while the guest waits.
        """
        self._look(0, self._bitmap.size)

    def close(self) -> None:
        """Look no more."""
        self._before.close()

    def _look(self, begin: int, end: int) -> None:
        """Look at these bytes of the bitmap; `begin` is a multiple of a word."""
        with ffi.from_buffer(self._before) as before:
            found = lib.device_log_look(self._here + begin, before + begin, max(end - begin, 0))
        self._note(found, "marked")

    @property
    def _here(self) -> "FFI.CData":
        return ffi.cast("uint8_t *", self._bitmap.address)

    def _note(self, result: int, counter: str) -> None:
        """Count what a C function found; one that met a bitmap without memory says so once."""
        if result >= 0:
            setattr(self, counter, getattr(self, counter) + result)
        elif not self._vanished:
            self._vanished = True
            self.missed += 1


def _identity(bitmap: DirtyBitmap) -> tuple[int, int] | None:
    """Which file a bitmap is in; a descriptor's number may have become another's."""
    try:
        status = os.fstat(bitmap.fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino
