"""What Python sees of the C units; kept beside the cffi part of their headers."""

from typing import Any, Protocol

from _cffi_backend import FFI

ffi: FFI

class RelayCounters(Protocol):
    kicks: int
    errors: int

class Library:
    # relay.h
    def relay_open(self, rings: int, relay: FFI.CData) -> int: ...
    def relay_add(
        self, relay: FFI.CData, ring: int, kick_fd: int, doorbell_fd: int, doorbell: FFI.CData
    ) -> int: ...
    def relay_remove(self, relay: FFI.CData, ring: int) -> None: ...
    def relay_ring(self, relay: FFI.CData, ring: int) -> int: ...
    def relay_count(self, relay: FFI.CData, ring: int) -> RelayCounters: ...
    def relay_close(self, relay: FFI.CData) -> None: ...
    # guard.h, ring.h: typed where they are wrapped
    def __getattr__(self, name: str) -> Any: ...

lib: Library
