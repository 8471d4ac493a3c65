"""The MSI-X vectors of an emulated function: which eventfd each one signals.

Owns the eventfds that a client gives with SET_IRQS. Table and pending bits are the client's to emulate,
as with kernel VFIO: a masked vector is one without an eventfd.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Sequence

from datapath.native._native import lib


class MsixVectors:
    """Eventfds by vector number."""

    def __init__(self, count: int) -> None:
        self._fds: list[int | None] = [None] * count
        #: Called after a change and before the eventfds that went are closed.
        self.changed: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._fds)

    def __getitem__(self, vector: int) -> int | None:
        """The eventfd of a vector; None also for a number that is none, such as NO_VECTOR."""
        return self._fds[vector] if vector < len(self._fds) else None

    def assign(self, start: int, fds: Sequence[int | None]) -> None:
        """Signal these eventfds from now on; takes them over.

        :raise OSError: EINVAL for anything but an eventfd: writing to some files waits, without end, for
            whoever serves them, and the descriptors come from guests.
        """
        if not all(is_eventfd(fd) for fd in fds if fd is not None):
            raise OSError(errno.EINVAL, "not an eventfd")
        for fd in fds:
            if fd is not None:
                # A counter that nobody reads is no reason to wait.
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NONBLOCK)
        gone = self._fds[start : start + len(fds)]
        self._fds[start : start + len(fds)] = fds
        self.changed()
        for fd in gone:
            if fd is not None:
                os.close(fd)

    def clear(self) -> None:
        """Signal nothing any more."""
        self.assign(0, [None] * len(self._fds))

    def signal(self, vector: int) -> None:
        """Interrupt by a vector, if somebody listens to it."""
        fd = self[vector]
        if fd is not None:
            lib.interrupt_briefly(fd)  # what an eventfd does not take is the client's loss


def is_eventfd(fd: int) -> bool:
    """Whether a descriptor is an eventfd, as Linux names it (fs/eventfd.c)."""
    # A Path would take as long as the rest of a message.
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"  # noqa: PTH115
