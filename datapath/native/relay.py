"""The relay as a Python object: kicks of the front-end in, doorbells of the device out.

Python only adds and removes rings; relay.c forwards. Owns no descriptor that it is given.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datapath.native._native import ffi, lib

if TYPE_CHECKING:
    from _cffi_backend import FFI


@dataclass(frozen=True)
class Doorbell:
    """How one queue of a device is notified; exactly one of the two is set."""

    #: Eventfd of the device.
    fd: int | None = None
    #: Address, in this process, of the mapped 16-bit register that takes the queue's number.
    address: int | None = None


class Relay:
    """One thread that forwards the kicks of one device's rings."""

    def __init__(self, rings: int) -> None:
        """Start the thread, for rings 0 to `rings` - 1.

        :raise OSError: when descriptors or threads have run out.
        """
        self._rings = rings
        opened = ffi.new("struct relay **")
        _check(lib.relay_open(rings, opened))
        self._relay: FFI.CData | None = opened[0]

    def add(self, ring: int, kick: int | None, doorbell: Doorbell) -> None:
        """Forward a ring's kicks; without a kick eventfd the doorbell is rung every millisecond.

        :raise OSError: when `kick` cannot be waited for, or the ring has been added already.
        """
        fd = -1 if doorbell.fd is None else doorbell.fd
        address = ffi.cast("void *", doorbell.address or 0)
        _check(lib.relay_add(self._open(), ring, -1 if kick is None else kick, fd, address))

    def remove(self, ring: int) -> None:
        """Forward no more; on return neither the kick nor the doorbell is in use."""
        lib.relay_remove(self._open(), ring)

    def ring(self, ring: int) -> None:
        """Ring an added ring's doorbell once, now.

        :raise OSError: when the ring has not been added.
        """
        _check(lib.relay_ring(self._open(), ring))

    def statistics(self) -> dict[str, int]:
        """`kicks.N`: notifications forwarded; `kick_errors.N`: kick descriptors or doorbells that failed."""
        result: dict[str, int] = {}
        for ring in range(self._rings):
            count = lib.relay_count(self._open(), ring)
            result[f"kicks.{ring}"] = count.kicks
            result[f"kick_errors.{ring}"] = count.errors
        return result

    def close(self) -> None:
        """End the thread. Idempotent."""
        if self._relay is not None:
            lib.relay_close(self._relay)
            self._relay = None

    def _open(self) -> "FFI.CData":
        if self._relay is None:
            raise ValueError("the relay is closed")
        return self._relay


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
