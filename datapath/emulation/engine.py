"""The packet engine of a VF, typed: a thin cover of datapath/native/engine.h.

`QueueEngine` is what the register model needs of it; `Engine` is the real one. Everything that runs per
packet is C; a call here returns once the engine's thread has taken note.
"""

import os
from dataclasses import dataclass
from typing import Protocol

from datapath.native._native import ffi, lib
from datapath.vdpa import RingState

#: Largest ring in descriptors.
MAX_QUEUE_SIZE: int = lib.RING_MAX_SIZE
#: Queues that are served: one receives, one transmits.
QUEUES: int = lib.ENGINE_QUEUES
#: Value of a doorbell cell that nobody has rung.
NOT_RUNG: int = lib.ENGINE_NOT_RUNG


@dataclass(frozen=True)
class QueueSetup:
    """A queue as the driver programmed it; addresses are DMA addresses."""

    size: int
    descriptors: int
    avail: int
    used: int
    state: RingState
    event_idx: bool
    indirect: bool
    mergeable: bool


@dataclass(frozen=True)
class QueueCounters:
    """What one queue has done since the VF exists."""

    packets: int
    bytes: int
    dropped: int
    kicks: int
    interrupts: int


class QueueEngine(Protocol):
    """What moves the packets of a VF."""

    def start_queue(self, index: int, setup: QueueSetup) -> None:
        """Program a queue.

        :raise OSError: EINVAL for a size or alignment that no driver may use.
        """

    def stop_queue(self, index: int) -> RingState:
        """Take a queue out; nothing of it is in flight on return."""

    def kick(self, index: int) -> None:
        """Notify a queue."""

    def set_call(self, index: int, fd: int | None) -> None:
        """Interrupt by this eventfd, which stays the caller's."""

    def run(self, on: bool) -> None:
        """Whether programmed queues move packets."""

    def set_log(self, on: bool, base: int, end: int) -> None:
        """Whether pages that packets are written to are marked in the bitmap at DMA addresses base … end."""

    def reset(self) -> None:
        """No queue, no fault, no log."""


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))


class Engine:
    """The engine behind one packet descriptor; `close` ends its thread."""

    def __init__(self, packet_fd: int, doorbell_fd: int | None = None, prefetch: int = 0) -> None:
        """Start.

        :param packet_fd: a non-blocking TAP or datagram socket; stays the caller's, open until `close`.
        :param doorbell_fd: a sealed memfd with one page per queue to poll for doorbells.
        :param prefetch: receive descriptors to fetch ahead of need.
        :raise OSError: when the system has no more descriptors or threads.
        """
        handle = ffi.new("struct engine **")
        _check(lib.engine_open(packet_fd, -1 if doorbell_fd is None else doorbell_fd, handle))
        self._engine = handle[0]
        self._prefetch = prefetch
        #: Eventfds, owned by the engine: they notify the queues; the last is readable after a fault.
        self.kick_fds: tuple[int, ...] = tuple(lib.engine_kick_fd(self._engine, n) for n in range(QUEUES))
        self.fault_fd: int = lib.engine_fault_fd(self._engine)

    def close(self) -> None:
        """End the thread and let go of all memory."""
        lib.engine_close(self._engine)

    def map(self, iova: int, size: int, fd: int | None, offset: int, writable: bool) -> None:
        """Let the VF reach memory: `size` bytes of a file from `offset` on, or nothing without a file.

        :raise OSError: EINVAL, EEXIST or ENOSPC, or what mmap says.
        """
        _check(lib.engine_map(self._engine, iova, size, -1 if fd is None else fd, offset, writable))

    def unmap(self, iova: int, size: int) -> None:
        """Take a mapping back, exactly as it was made.

        :raise OSError: ENOENT when there is none.
        """
        _check(lib.engine_unmap(self._engine, iova, size))

    def unmap_all(self) -> None:
        """Take all mappings back."""
        lib.engine_unmap_all(self._engine)

    def start_queue(self, index: int, setup: QueueSetup) -> None:
        native = {
            "size": setup.size,
            "descriptors": setup.descriptors,
            "avail": setup.avail,
            "used": setup.used,
            "avail_index": setup.state.avail,
            "used_index": setup.state.used,
            "event_idx": setup.event_idx,
            "indirect": setup.indirect,
            "mergeable": setup.mergeable,
            "prefetch": self._prefetch if index == lib.ENGINE_RX else 0,
        }
        _check(lib.engine_start_queue(self._engine, index, ffi.new("struct ring_setup *", native)))

    def stop_queue(self, index: int) -> RingState:
        state = lib.engine_stop_queue(self._engine, index)
        return RingState(state.avail, state.used)

    def kick(self, index: int) -> None:
        lib.engine_kick(self._engine, index)

    def set_call(self, index: int, fd: int | None) -> None:
        lib.engine_set_call(self._engine, index, -1 if fd is None else fd)

    def run(self, on: bool) -> None:
        lib.engine_run(self._engine, on)

    def set_log(self, on: bool, base: int, end: int) -> None:
        lib.engine_set_log(self._engine, on, base, end)

    def reset(self) -> None:
        lib.engine_reset(self._engine)

    def fault(self) -> str | None:
        """What the driver did wrong, if it did; the engine stands still until `reset`."""
        queue = ffi.new("unsigned int *")
        reason = lib.engine_fault(self._engine, queue)
        if reason == ffi.NULL:
            return None
        text = ffi.string(reason)
        assert isinstance(text, bytes)
        return f"queue {queue[0]}: {text.decode()}"

    def count(self, index: int) -> QueueCounters:
        """The counters of a queue."""
        native = lib.engine_count(self._engine, index)
        return QueueCounters(native.packets, native.bytes, native.dropped, native.kicks, native.interrupts)
