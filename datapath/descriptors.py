"""Descriptors that came with messages: signalling them and giving them back, whatever they are."""

import contextlib
import os
import select
import sys
from collections.abc import Iterable


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors, each though closing another failed: a peer's file may report an error of its own."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def signal_eventfd(fd: int) -> None:
    """Count an eventfd up; one that cannot take it now has been signalled and not yet read."""
    room = select.poll()
    room.register(fd, select.POLLOUT)
    with contextlib.suppress(OSError):
        if room.poll(0):
            os.write(fd, (1).to_bytes(8, sys.byteorder))
