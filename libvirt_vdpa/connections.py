"""Connections to one libvirt, so many that no two calls share one at the same time.

Two threads may use one connection, says libvirt; but the second one's call may be sent only when the first
one's has been answered, or when a message comes (seen with 9.0 in every tenth run: the thread that waits for
answers is told to send for others by g_main_loop_quit, which does nothing to one that is about to wait). The
first one's may wait for a migration's end, and the second one's be what ends it.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

import libvirt

#: Connections that are kept for the next calls.
MOST_IDLE = 2
#: Seconds between signs of life, and how many may be missing.
KEEPALIVE_INTERVAL = 5
KEEPALIVE_COUNT = 3


class Connections:
    """Connections that calls are made by, each by one at a time. Used in any thread."""

    def __init__(self, connect: Callable[[], libvirt.virConnect]) -> None:
        """None is there yet.

        :param connect: makes another one, and raises libvirt.libvirtError when there is none to be had.
        """
        self._connect = connect
        self._lock = threading.Lock()
        self._idle: list[libvirt.virConnect] = []
        self._closed = False

    @contextlib.contextmanager
    def one(self) -> Iterator[libvirt.virConnect]:
        """A connection that nobody else uses meanwhile.

        :raise libvirt.libvirtError: when there is none to be had.
        """
        connection = self._take() or self._connect()
        try:
            yield connection
        finally:
            self._give_back(connection)

    def close(self) -> None:
        """Close those that nobody uses now, and the others when they are given back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            close(connection)

    def _take(self) -> libvirt.virConnect | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if is_alive(connection):
                return connection
            close(connection)

    def _give_back(self, connection: libvirt.virConnect) -> None:
        with self._lock:
            kept = not self._closed and len(self._idle) < MOST_IDLE
            if kept:
                self._idle.append(connection)
        if not kept:
            close(connection)


def is_alive(connection: libvirt.virConnect) -> bool:
    """Whether libvirt can be reached by a connection; one that cannot say so is as good as dead."""
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False


def close(connection: libvirt.virConnect) -> None:
    """Let go of a connection, whatever has become of it."""
    with contextlib.suppress(libvirt.libvirtError):
        connection.close()


def keep_alive(connection: libvirt.virConnect) -> None:
    """Notice a libvirtd that is gone without a word; a driver within this process needs none of that."""
    try:
        connection.setKeepAlive(KEEPALIVE_INTERVAL, KEEPALIVE_COUNT)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
            raise
