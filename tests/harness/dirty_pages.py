"""Proof that a dirty log is right: what a front-end's memory holds, beside what the log says.

`Traffic` sends frames whose every 16 bytes tell when they were sent; `GuestPages` finds those parts in guest
memory, takes and clears the log while it is written, and keeps a copy of guest memory as a migration's
destination would have it. The loops are C (native/dirty_pages.c).
"""

import ctypes
import functools
import mmap
import os
import socket
import threading
import time
from contextlib import ExitStack

from tests.harness.compiled import compiled
from tests.harness.dirty_log import PAGE, marked_pages
from tests.harness.processes import wait_for
from tests.harness.vhost_user_proxy import VhostUserProxy

#: virtio 1.3 section 2.7: bytes of a used ring.
USED_HEAD, USED_ENTRY, USED_EVENT = 4, 8, 2


class _Traffic(ctypes.Structure):
    _fields_ = (
        ("fd", ctypes.c_int),
        ("shortest", ctypes.c_uint16),
        ("longest", ctypes.c_uint16),
        ("pause", ctypes.c_uint32),
        ("header", ctypes.c_uint8 * 14),
        ("next", ctypes.c_uint64),
        ("refused", ctypes.c_uint64),
        ("stop", ctypes.c_uint32),
        ("idle", ctypes.c_uint32),
        ("resting", ctypes.c_uint32),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(compiled("dirty_pages", "-shared", "-fPIC")))
    library.cells_find.restype = library.cells_compare.restype = library.log_take.restype = ctypes.c_uint64
    return library


class Traffic:
    """A thread that sends numbered frames on a link, without end, in bursts of 32.

    The frames begin with an Ethernet header; lengths from `shortest` to `longest` bytes come in turn.
    """

    def __init__(
        self, wire: socket.socket, header: bytes, shortest: int, longest: int, pause: int = 200
    ) -> None:
        """
        :param pause: microseconds between bursts.
        """
        wire.setblocking(True)
        self._wire = wire
        self._state = _Traffic(wire.fileno(), shortest, longest, pause, (ctypes.c_uint8 * 14)(*header))
        # A link may still hold frames of whoever sent before, and numbers must not come again.
        self._state.next = time.monotonic_ns() // 1000
        self._error = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._error = _library().traffic_run(ctypes.byref(self._state))

    @property
    def next(self) -> int:
        """Number of the next frame: each frame with a smaller one has been sent, or is being sent."""
        return int(self._state.next)

    def advance(self, frames: int) -> None:
        """Wait until so many more have been sent."""
        end = self.next + frames
        wait_for("frames to be sent", lambda: self.next >= end or not self._thread.is_alive(), 30)
        assert not self._error, os.strerror(self._error)

    def rest(self, on: bool = True) -> None:
        """Send no frames for now, or go on."""
        self._state.idle = on
        wait_for("the frames to stop or go on", lambda: self._state.resting == on, 10)

    def close(self) -> None:
        """Stop sending."""
        self._state.stop = 1
        self._thread.join()


class GuestPages:
    """The memory of a front-end behind a proxy, its dirty log, and the destination's copy.

    Bit n of a set of pages, and of the log, is page n of guest memory by guest physical address.
    """

    def __init__(self, proxy: VhostUserProxy) -> None:
        """A log for all of the guest's memory; of its regions just the one that holds everything."""
        (shared,) = proxy.memory
        self.proxy = proxy
        self.base = shared.region.guest_address
        self.size = shared.region.size
        self._close = ExitStack()
        self._memory = (ctypes.c_uint8 * self.size).from_buffer(shared.view)
        self.log_size = -(-(self.base + self.size) // (64 * PAGE)) * 8
        self._open_log()
        self._taken = self._new_set()
        self.marked = self._new_set()
        self.copy = (ctypes.c_uint8 * self.size)()
        self.rings = {index: self._used_ring(index) for index in proxy.addresses}

    def _open_log(self) -> None:
        self.log = os.memfd_create("dirty log", os.MFD_CLOEXEC)
        self._close.callback(os.close, self.log)
        os.ftruncate(self.log, self.log_size)
        view = mmap.mmap(self.log, self.log_size)
        self._words = (ctypes.c_uint64 * (self.log_size // 8)).from_buffer(view)

    def _new_set(self) -> "ctypes.Array[ctypes.c_uint8]":
        return (ctypes.c_uint8 * self.log_size)()

    def _used_ring(self, index: int) -> range:
        """Offsets of a used ring in the region."""
        start = self.proxy.guest_address(self.proxy.addresses[index].used) - self.base
        return range(start, start + USED_HEAD + USED_ENTRY * self.proxy.sizes[index] + USED_EVENT)

    # The log

    def take_bits(self) -> int:
        """Take the bits that are set, as QEMU does; how many."""
        words = ctypes.c_size_t(self.log_size // 8)
        count: int = _library().log_take(self._words, words, self._taken, self.marked)
        return count

    def take(self) -> int:
        """Take the bits that are set, and copy their pages to the destination; how many."""
        count = self.take_bits()
        first = ctypes.c_uint64(self.base // PAGE)
        size = ctypes.c_size_t(self.size)
        _library().pages_copy(self._taken, first, size, self._memory, self.copy)
        return count

    def replace_log(self) -> None:
        """Have another log kept from now on, as QEMU does when memory grows, and take what the first has."""
        before = self._words
        self._open_log()
        self.proxy.start_logging(self.log, self.log_size)
        now, self._words = self._words, before
        self.take()
        self._words = now

    def copy_all(self) -> None:
        """The first round of a migration: everything is copied, whatever the log says."""
        ctypes.memmove(self.copy, self._memory, self.size)

    def forget_marked(self) -> None:
        """Begin to collect what is marked anew."""
        self.take()
        ctypes.memset(self.marked, 0, self.log_size)

    # What memory says

    def written_since(self, number: int) -> set[int]:
        """Offsets of the pages that hold a part of a frame with that number or a later one, or its header."""
        found = (ctypes.c_uint8 * (self.size // PAGE // 8 + 1))()
        since, size = ctypes.c_uint64(number), ctypes.c_size_t(self.size)
        _library().cells_find(self._memory, size, since, found)
        return marked_pages(bytes(found))

    def marked_pages(self) -> set[int]:
        """Offsets of the pages that the log has named since `forget_marked`."""
        return {page - self.base for page in marked_pages(bytes(self.marked))}

    def used_ring_pages(self) -> set[int]:
        """Offsets of the pages that used rings lie in."""
        return {at // PAGE * PAGE for ring in self.rings.values() for at in (*ring[::PAGE], ring[-1])}

    def used_rings(self) -> dict[int, bytes]:
        """The used rings as they are now."""
        return {index: bytes(self._memory[ring.start : ring.stop]) for index, ring in self.rings.items()}

    def changed_ring_pages(self, before: dict[int, bytes]) -> set[int]:
        """Offsets of the pages in which a used ring is not as it was."""
        now = self.used_rings()
        return {
            (ring.start + at) // PAGE * PAGE
            for index, ring in self.rings.items()
            for at, (old, new) in enumerate(zip(before[index], now[index], strict=True))
            if old != new
        }

    def differences(self, *, headers: bool) -> list[str]:
        """What a device wrote that the destination's copy does not have as it is here.

        :param headers: compare virtio's headers of frames too: only where the front-end does not write them.
        """
        first = ctypes.c_uint64(0)
        size = ctypes.c_size_t(self.size)
        count = _library().cells_compare(
            self._memory, self.copy, size, ctypes.c_bool(headers), ctypes.byref(first)
        )
        result = [f"{count} parts of frames differ, the first at {first.value:#x}"] if count else []
        for index, ring in self.rings.items():
            for start in range(ring.start // PAGE * PAGE, ring.stop, PAGE):
                begin, end = max(start, ring.start), min(start + PAGE, ring.stop)
                if bytes(self._memory[begin:end]) != bytes(self.copy[begin:end]):
                    result.append(f"used ring {index} differs in page {start:#x}")
        return result

    def unlike(self) -> set[int]:
        """Offsets of the pages in which the destination's copy differs, whoever wrote them."""
        here, there = memoryview(self._memory).cast("B"), memoryview(self.copy).cast("B")
        return {at for at in range(0, self.size, PAGE) if here[at : at + PAGE] != there[at : at + PAGE]}

    def close(self) -> None:
        """Let the memory and the log go."""
        del self._memory
        self._close.close()
