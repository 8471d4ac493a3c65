"""Descriptors: signalled, given back, and in a sudden end closed in an order that does no harm."""

import contextlib
import fcntl
import os
import resource
import select
import sys
from collections.abc import Iterable


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors, each though closing another failed: a peer's file may report an error of its own."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def closed_early(fd: int) -> int:
    """Move a descriptor to where a killed process loses it before its others; returns the new number.

    A device's must go before the front-end's: QEMU reads the rings as soon as that one is hung up, and the
    device must not write to them any more. The kernel gives up a dead process's files the highest first, as
    its task work runs last in, first out (kernel/task_work.c). With all numbers taken, it stays where it is.
    """
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _above_others())
    except OSError:
        return fd
    os.close(fd)
    return moved


def _above_others() -> int:
    """The middle of the numbers that a process may use, or of those that it does by default."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 512 if soft == resource.RLIM_INFINITY else min(soft // 2, 512)


def signal_eventfd(fd: int) -> None:
    """Count an eventfd up; one that cannot take it now has been signalled and not yet read."""
    room = select.poll()
    room.register(fd, select.POLLOUT)
    with contextlib.suppress(OSError):
        if room.poll(0):
            os.write(fd, (1).to_bytes(8, sys.byteorder))
