"""The packet engine of a VF, typed: a thin cover of datapath/native/engine.h.

`QueueEngine` is what the register model needs of it; `Engine` is the real one. Everything that runs per
packet is C; a call here returns once the engine's thread has taken note.
"""

import fcntl
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from datapath.native._native import ffi, lib
from datapath.rx_filter import RxFilter, Scope
from datapath.vdpa import RingState

if TYPE_CHECKING:
    from _cffi_backend import FFI

#: Largest ring in descriptors.
MAX_QUEUE_SIZE: int = lib.RING_MAX_SIZE
#: Most queue pairs that an engine serves. A pair's first queue receives, the other transmits.
MAX_PAIRS: int = lib.ENGINE_MAX_PAIRS
#: Mappings that one VF may have.
MAX_MAPS: int = lib.DMA_MAX_MAPS
#: Value of a doorbell cell that nobody has rung.
NOT_RUNG: int = lib.ENGINE_NOT_RUNG
#: Bytes from one doorbell cell to the next.
PAGE = 4096


@dataclass(frozen=True)
class QueueSetup:
    """A queue as the driver programmed it; addresses are DMA addresses, in the meaning of `vdpa.Ring`."""

    size: int
    descriptors: int
    avail: int
    used: int
    state: RingState
    event_idx: bool
    indirect: bool
    mergeable: bool
    #: Whether the header before each packet is that of virtio 0.95, without num_buffers.
    short_header: bool = False
    #: Whether it is a packed ring, with `avail` and `used` in that meaning.
    packed: bool = False


@dataclass(frozen=True)
class QueueCounters:
    """What one queue has done since the VF exists."""

    packets: int
    bytes: int
    dropped: int
    #: Of what came, not meant for the driver as the filter says.
    filtered: int
    kicks: int
    interrupts: int


#: Scope -> what the engine calls it.
SCOPES: Mapping[Scope, int] = {
    Scope.NONE: lib.FILTER_NONE,
    Scope.LISTED: lib.FILTER_LISTED,
    Scope.ALL: lib.FILTER_ALL,
}


class Uplink(Protocol):
    """Where the packets of a VF come from and go to."""

    @property
    def fds(self) -> tuple[int, ...]:
        """For each queue pair a non-blocking descriptor that gives and takes one packet at a time."""

    @property
    def has_header(self) -> bool:
        """Whether a header stands before each frame, as on a TAP with IFF_VNET_HDR."""

    def accept(self, features: int) -> None:
        """Leave to the driver from now on what it has accepted: checksums, segmentation."""

    def use_pairs(self, pairs: int) -> None:
        """Spread what comes over so many pairs, from the first on."""


@dataclass(frozen=True)
class PlainUplink:
    """Datagram sockets, or anything else that takes and gives frames; who sends them chooses the pair."""

    fds: tuple[int, ...]
    has_header: bool = False

    def accept(self, features: int) -> None:
        """It is the other end that says what it leaves to the driver."""

    def use_pairs(self, pairs: int) -> None:
        """It is the other end that chooses."""


class QueueEngine(Protocol):
    """What moves the packets of a VF."""

    @property
    def pairs(self) -> int:
        """How many queue pairs it serves."""

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

    def accept(self, features: int) -> None:
        """The features that the driver has accepted: which checksums and segments may be left to whom."""

    def use_pairs(self, pairs: int) -> None:
        """How many pairs receive, from the first on."""

    def set_log(self, on: bool, base: int, end: int) -> None:
        """Whether pages that packets are written to are marked in the bitmap at DMA addresses base … end."""

    def reset(self) -> None:
        """No queue, no feature, no fault, no log."""


def _doorbell_pages(queues: int) -> int:
    """A memfd with a page for each queue, nothing rung; it cannot shrink under the engine."""
    fd = os.memfd_create("doorbells", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, queues * PAGE)
    for index in range(queues):
        os.pwrite(fd, NOT_RUNG.to_bytes(2, "little"), index * PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def _native_filter(wanted: RxFilter) -> "FFI.CData":
    vlans = bytearray(lib.FILTER_VLAN_BYTES)
    for vlan in wanted.vlans:
        vlans[vlan // 8] |= 1 << vlan % 8
    macs = [list(mac) for mac in wanted.macs]
    native = {
        "on": True,
        "promiscuous": wanted.promiscuous,
        "broadcast": wanted.broadcast,
        "unicast": SCOPES[wanted.unicast],
        "multicast": SCOPES[wanted.multicast],
        "vlan": SCOPES[wanted.vlan],
        "macs": len(macs),
        "mac": macs,
        "vlans": list(vlans),
    }
    return ffi.new("struct filter *", native)


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))


class Engine:
    """The engine at one uplink; `close` ends its thread."""

    def __init__(self, uplink: Uplink, prefetch: int = 0, keep: bool = False, mtu: int = 0) -> None:
        """Start.

        :param uplink: stays the caller's, open until `close`.
        :param prefetch: receive descriptors to fetch ahead of need.
        :param keep: leave what comes on the uplink while nobody receives.
        :param mtu: largest packet to pass, in bytes without its Ethernet header; 0 is no limit.
        :raise OSError: when the system has no more descriptors or threads.
        """
        handle = ffi.new("struct engine **")
        #: How many queue pairs there are.
        self.pairs = len(uplink.fds)
        native = {"pairs": self.pairs, "packet_fd": uplink.fds, "header": uplink.has_header, "mtu": mtu}
        _check(lib.engine_open(ffi.new("struct engine_uplink *", native), handle))
        self._uplink = uplink
        self._engine = handle[0]
        lib.engine_keep_packets(self._engine, keep)
        self._prefetch = prefetch
        #: What `set_filter` has set.
        self.filter: RxFilter | None = None
        #: Eventfd, owned by the engine, that is readable after a fault.
        self.fault_fd: int = lib.engine_fault_fd(self._engine)
        #: Owned by the engine and shared with its client, while there are doorbells: an eventfd for each
        #: queue, and the memfd of those that are memory.
        self.kick_fds: tuple[int, ...] = ()
        self.doorbell_fd: int | None = None

    def close(self) -> None:
        """End the thread and let go of all memory."""
        self.close_doorbells()
        lib.engine_close(self._engine)

    def set_client(self, fd: int | None) -> None:
        """Stop by oneself when this client's connection is hung up; it stays open until the next call.

        :raise OSError: when it is nothing to wait for.
        """
        _check(lib.engine_set_client(self._engine, -1 if fd is None else fd))

    def open_doorbells(self, mapped: bool) -> None:
        """Make doorbells that no earlier client has.

        :param mapped: whether they are memory as well, to be polled.
        :raise OSError: when the system has no more descriptors.
        """
        self.close_doorbells()
        if mapped:
            self.doorbell_fd = _doorbell_pages(2 * self.pairs)
        try:
            _check(
                lib.engine_open_doorbells(self._engine, -1 if self.doorbell_fd is None else self.doorbell_fd)
            )
        except OSError:
            self.close_doorbells()
            raise
        self.kick_fds = tuple(lib.engine_kick_fd(self._engine, n) for n in range(2 * self.pairs))

    def close_doorbells(self) -> None:
        """Take the doorbells away: whoever still has them rings nothing any more."""
        lib.engine_close_doorbells(self._engine)
        self.kick_fds = ()
        if self.doorbell_fd is not None:
            os.close(self.doorbell_fd)
            self.doorbell_fd = None

    def map(self, iova: int, size: int, fd: int | None, offset: int, writable: bool) -> None:
        """Let the VF reach memory: `size` bytes of a file from `offset` on, or nothing without a file.

        :raise OSError: EINVAL, EEXIST, ENOSPC or EOPNOTSUPP, see dma_add(), or what mmap says.
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
            "packed": setup.packed,
            "descriptors": setup.descriptors,
            "avail": setup.avail,
            "used": setup.used,
            "avail_index": setup.state.avail,
            "used_index": setup.state.used,
            "event_idx": setup.event_idx,
            "indirect": setup.indirect,
            "mergeable": setup.mergeable,
            "short_header": setup.short_header,
            "prefetch": self._prefetch if index % 2 == lib.ENGINE_RX else 0,
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

    def accept(self, features: int) -> None:
        lib.engine_set_features(self._engine, features)
        self._uplink.accept(features)

    def use_pairs(self, pairs: int) -> None:
        self._uplink.use_pairs(pairs)
        lib.engine_use_pairs(self._engine, pairs)

    def set_log(self, on: bool, base: int, end: int) -> None:
        lib.engine_set_log(self._engine, on, base, end)

    def reset(self) -> None:
        lib.engine_reset(self._engine)
        self._uplink.accept(0)

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
        return QueueCounters(
            native.packets,
            native.bytes,
            native.dropped,
            native.filtered,
            native.kicks,
            native.interrupts,
        )

    def set_filter(self, wanted: RxFilter | None) -> None:
        """Which of the packets that come are for the driver; None: all. It stays after a reset."""
        self.filter = wanted
        lib.engine_set_filter(self._engine, ffi.NULL if wanted is None else _native_filter(wanted))
