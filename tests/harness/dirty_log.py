"""A dirty bitmap as a test keeps it, over the guest memory of a driven VF."""

import fcntl
import mmap
import os

from datapath.native._native import ffi
from datapath.vdpa import DirtyBitmap

PAGE = 4096


def marked_pages(bits: bytes, base: int = 0) -> set[int]:
    """The addresses of the pages whose bits are set, the first bit being that of the page at `base`."""
    return {
        base + (8 * at + number) * PAGE
        for at, byte in enumerate(bits)
        if byte
        for number in range(8)
        if byte >> number & 1
    }


class DirtyLog:
    """A bitmap for `size` bytes of guest memory at `base` (a multiple of 8 pages), and all below."""

    def __init__(self, base: int, size: int) -> None:
        self._base = base
        length = (base + size) // PAGE // 8
        self._fd = os.memfd_create("dirty log", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, length)
        self._view = mmap.mmap(self._fd, length)
        self._pin = ffi.from_buffer(self._view)
        #: What a device is told.
        self.bitmap = DirtyBitmap(self._fd, 0, int(ffi.cast("uintptr_t", self._pin)), len(self._view))

    def take(self) -> set[int]:
        """The guest physical addresses of the pages marked since the last look."""
        first = self._base // PAGE // 8
        data = self._view[first:]
        self._view[first:] = bytes(len(data))
        return marked_pages(data, self._base)

    def close(self) -> None:
        """Unmap it; the device must have been told, or closed."""
        ffi.release(self._pin)
        self._view.close()
        os.close(self._fd)


class OddLog:
    """A bitmap of `size` bytes that begins somewhere in its file, which ends with it and is sealed."""

    def __init__(self, size: int, offset: int = 0) -> None:
        fd = os.memfd_create("odd log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, offset + size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        self._view = mmap.mmap(fd, offset + size)
        self._pin = ffi.from_buffer(self._view)
        #: What a device is told.
        self.bitmap = DirtyBitmap(fd, offset, int(ffi.cast("uintptr_t", self._pin)) + offset, size)

    def is_marked(self, page: int) -> bool:
        """Whether the page at a guest physical address is."""
        at = self.bitmap.fd_offset + page // PAGE // 8
        return bool(self._view[at] >> page // PAGE % 8 & 1)

    def close(self) -> None:
        """Unmap it; the device must have been told, or closed."""
        ffi.release(self._pin)
        self._view.close()
        os.close(self.bitmap.fd)
