"""The relay as a Python object: kicks of the front-end in, doorbells of the device out, or whole rings.

Python only adds and removes rings; relay.c and shadow.c forward. Owns no descriptor and no memory that it
is given. Everything must stay as it was given until the ring is removed, the memory unmapped or the log
ended.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from datapath.native._native import ffi, lib

if TYPE_CHECKING:
    from _cffi_backend import FFI


class Doorbell(NamedTuple):
    """How one queue of a device is notified; exactly one of the two is set."""

    #: Eventfd of the device.
    fd: int | None = None
    #: Address, in this process, of the mapped 16-bit register that takes the queue's number.
    address: int | None = None


@dataclass(frozen=True)
class ShadowRing:
    """A guest's split ring, and the private one that the device works on instead (virtio 1.3 section 2.7).

    The device uses the guest's own descriptor table, and begins at index 0 of the private rings, which are
    as large as the guest's.
    """

    #: Number of descriptors, a power of two up to 32768.
    size: int
    #: Whether guest and device negotiated EVENT_IDX.
    event_idx: bool
    #: Guest physical addresses of the guest's ring.
    descriptors: int
    avail: int
    used: int
    #: The guest's used index: where the relay begins in both of the guest's rings.
    index: int
    #: Addresses, in this process, of the private rings: zeroed memory that the device can reach.
    private_avail: int
    private_used: int
    #: Eventfd of the guest's notifications; None: its ring is looked at every millisecond.
    kick: int | None
    #: Eventfd that interrupts the guest; None: it is not interrupted.
    call: int | None
    #: Eventfd that the device signals when it has completed something.
    interrupt: int
    doorbell: Doorbell
    #: Whether the guest was promised its buffers back in order (IN_ORDER), which the device is not asked for.
    in_order: bool = False


class ShadowState(NamedTuple):
    """Where a shadow ring stands; the indices are the guest's, free-running in 16 bits."""

    #: Next head to take from the guest's available ring.
    avail: int
    #: Next entry of the guest's used ring to write.
    used: int
    #: Heads that the device has been given and not completed.
    in_flight: int
    #: What the guest or the device did wrong; the ring then stands still until it is removed.
    error: str | None


class Relay:
    """One thread that forwards the notifications, or whole rings, of one device."""

    def __init__(self, rings: int) -> None:
        """Start the thread, for rings 0 to `rings` - 1.

        :raise OSError: when descriptors or threads have run out.
        """
        self._rings = rings
        opened = ffi.new("struct relay **")
        _check(lib.relay_open(rings, opened))
        self._relay: FFI.CData | None = opened[0]
        #: Eventfd, readable when a shadow ring has met an error (see `state`). Read it to take it back.
        self.broken_fd: int = lib.relay_broken_fd(self._relay)

    def add(self, ring: int, kick: int | None, doorbell: Doorbell) -> None:
        """Forward a ring's kicks; without a kick eventfd the doorbell is rung every millisecond.

        :raise OSError: when `kick` cannot be waited for, or the ring has been added already.
        """
        fd = -1 if doorbell.fd is None else doorbell.fd
        address = ffi.cast("void *", doorbell.address or 0)
        _check(lib.relay_add(self._open(), ring, _fd(kick), fd, address))

    def add_shadow(self, ring: int, shadow: ShadowRing) -> None:
        """Relay a whole ring: heads to the device, completions to the guest, whose ring is looked at once.

        A ring that lies outside the mapped memory is added and at once broken (see `state`).

        :raise OSError: when a descriptor cannot be waited for, the ring has been added already, or its
            size or an address is impossible.
        """
        setup = {
            "size": shadow.size,
            "event_idx": shadow.event_idx,
            "in_order": shadow.in_order,
            "descriptors": shadow.descriptors,
            "avail": shadow.avail,
            "used": shadow.used,
            "index": shadow.index,
            "private_avail": ffi.cast("void *", shadow.private_avail),
            "private_used": ffi.cast("void *", shadow.private_used),
        }
        wires = {
            "kick_fd": _fd(shadow.kick),
            "call_fd": _fd(shadow.call),
            "interrupt_fd": shadow.interrupt,
            "doorbell_fd": _fd(shadow.doorbell.fd),
            "doorbell": ffi.cast("void *", shadow.doorbell.address or 0),
        }
        given = ffi.new("struct shadow_setup *", setup), ffi.new("struct relay_wires *", wires)
        _check(lib.relay_add_shadow(self._open(), ring, *given))

    def set_call(self, ring: int, call: int | None) -> None:
        """Interrupt the guest by another eventfd; on return the former one is not in use.

        :raise OSError: when the ring is no shadow ring.
        """
        _check(lib.relay_set_call(self._open(), ring, _fd(call)))

    def map(self, address: int, size: int, host: int) -> None:
        """Let shadow rings find guest memory: `size` bytes at guest physical `address` are here at `host`.

        :raise OSError: for a range that is empty, wraps, or overlaps another; or when there are too many.
        """
        _check(lib.relay_map(self._open(), address, size, ffi.cast("void *", host)))

    def unmap(self, address: int, size: int) -> None:
        """Take back what was mapped so; on return it is not in use, and a ring in it is broken.

        :raise OSError: when exactly that has not been mapped.
        """
        _check(lib.relay_unmap(self._open(), address, size))

    def log(self, bitmap: tuple[int, int] | None) -> None:
        """Mark what shadow rings and their devices write, from now on; None ends it.

        :param bitmap: address in this process and length in bytes; bit n stands for the 4 KiB page n of
            guest memory. On return the former one is not in use.
        """
        address, size = bitmap or (0, 0)
        lib.relay_log(self._open(), ffi.cast("void *", address), size)

    def hold(self, ring: int) -> None:
        """Hand the device no more of a shadow ring's heads; completions go on. Until the ring is removed.

        :raise OSError: when the ring is no shadow ring.
        """
        _check(lib.relay_hold(self._open(), ring))

    def state(self, ring: int) -> ShadowState:
        """Where a shadow ring stands; of one that has been removed, where it stood.

        :raise OSError: when the ring is, or was, none.
        """
        state: Any = ffi.new("struct shadow_state *")
        _check(lib.relay_state(self._open(), ring, state))
        error = None if state.error == ffi.NULL else cast(bytes, ffi.string(state.error)).decode()
        return ShadowState(state.avail, state.used, state.in_flight, error)

    def remove(self, ring: int) -> None:
        """Forward no more; on return nothing that was given with the ring is in use.

        The device of a shadow ring has been stopped before: what it completed until then is carried over.
        """
        lib.relay_remove(self._open(), ring)

    def ring(self, ring: int) -> None:
        """Ring an added ring's doorbell once, now.

        :raise OSError: when the ring has not been added.
        """
        _check(lib.relay_ring(self._open(), ring))

    @property
    def log_missed(self) -> int:
        """Pages that the log had no room for, and logs that vanished, since the relay was made."""
        return lib.relay_log_count(self._open()).missed

    def statistics(self) -> dict[str, int]:
        """Count since the relay was made.

        `kicks.N`: notifications of the guest; `kick_errors.N`: descriptors or doorbells that failed;
        `relayed.N`: used entries carried over; `logged_pages`: pages marked that were not; `log_missed`:
        the property of that name.
        """
        result: dict[str, int] = {}
        for ring in range(self._rings):
            count = lib.relay_count(self._open(), ring)
            result[f"kicks.{ring}"] = count.kicks
            result[f"kick_errors.{ring}"] = count.errors
            result[f"relayed.{ring}"] = count.relayed
        log = lib.relay_log_count(self._open())
        result["logged_pages"] = log.marked
        result["log_missed"] = log.missed
        return result

    def close(self) -> None:
        """End the thread; shadow rings are let go as they are. Idempotent."""
        if self._relay is not None:
            lib.relay_close(self._relay)
            self._relay = None

    def _open(self) -> "FFI.CData":
        if self._relay is None:
            raise ValueError("the relay is closed")
        return self._relay


def _fd(fd: int | None) -> int:
    return -1 if fd is None else fd


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
