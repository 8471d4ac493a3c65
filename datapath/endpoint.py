"""Where a port's front-end comes from: a listening socket, or one that we connect to.

Owns the listener or the attempts to connect, and the name in the file system; the connections that come
of it are the port's. QEMU docs/interop/vhost-user.rst has both roles, and "Backend program conventions".
"""

import abc
import socket
import time
from pathlib import Path

from datapath.listening import ListeningSocket

#: Seconds between attempts to connect: QEMU waits for us with its guest not yet started.
RETRY_INTERVAL = 0.05
#: The same once the front-end was there and has gone: it may be gone for good.
IDLE_RETRY_INTERVAL = 0.5


class EndpointError(Exception):
    """A socket that cannot be had, or a front-end that never came; the text names it."""


class NoMoreFrontEndsError(EndpointError):
    """The last front-end has gone, as it may: nothing is left to do."""


class Endpoint(abc.ABC):
    """A source of front-ends, for a loop that watches `fileno` and calls `poll` at `deadline`."""

    #: "listen" or "connect".
    role: str

    @abc.abstractmethod
    def fileno(self) -> int | None:
        """Descriptor that is readable when `poll` has something to do, if there is one."""

    @abc.abstractmethod
    def poll(self, connected: bool) -> socket.socket | None:
        """The next front-end, if there is one; `connected` tells whether the port still has another.

        :raise EndpointError: when no front-end can come any more.
        """

    @abc.abstractmethod
    def deadline(self, connected: bool) -> float | None:
        """When to call `poll` without `fileno` being readable (time.monotonic), or None."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the name and the socket."""


class Listener(Endpoint):
    """We listen, the front-end connects, and connects again after a disconnect."""

    role = "listen"

    def __init__(self, listener: ListeningSocket) -> None:
        self._listener = listener

    @classmethod
    def bind(cls, path: Path) -> "Listener":
        """Listen on a path of our own.

        :raise EndpointError: when it cannot be had.
        """
        try:
            return cls(ListeningSocket.bind(path, mode=0o660))
        except OSError as error:
            raise EndpointError(f"socket {path}: {error.strerror}") from error

    def fileno(self) -> int | None:
        return self._listener.fileno()

    def poll(self, connected: bool) -> socket.socket | None:
        return self._listener.accept()

    def deadline(self, connected: bool) -> float | None:
        return None

    def close(self) -> None:
        self._listener.close()


class Connector(Endpoint):
    """The front-end listens, we connect; a front-end that has gone is looked for until we are ended."""

    role = "connect"

    def __init__(self, path: Path, timeout: float) -> None:
        """Look for a front-end on `path`, the first time for `timeout` seconds at most."""
        self._path = path
        self._timeout = timeout
        self._next = time.monotonic()
        self._give_up: float | None = self._next + timeout

    def fileno(self) -> int | None:
        return None

    def poll(self, connected: bool) -> socket.socket | None:
        now = time.monotonic()
        if connected or now < self._next:
            return None
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(str(self._path))
        except OSError as error:
            connection.close()
            if self._give_up is not None and now >= self._give_up:
                waited = f"no front-end listens there after {self._timeout:g} s"
                raise EndpointError(f"socket {self._path}: {waited}: {error.strerror}") from error
            self._next = now + (RETRY_INTERVAL if self._give_up is not None else IDLE_RETRY_INTERVAL)
            return None
        self._give_up = None
        self._next = now + RETRY_INTERVAL
        return connection

    def deadline(self, connected: bool) -> float | None:
        return None if connected else self._next

    def close(self) -> None:
        """Nothing is held between attempts, and the name is the front-end's."""


class Given(Endpoint):
    """A connection that we were handed; there is no other after it."""

    role = "connect"

    def __init__(self, connection: socket.socket) -> None:
        self._connection: socket.socket | None = connection

    def fileno(self) -> int | None:
        return None

    def poll(self, connected: bool) -> socket.socket | None:
        connection, self._connection = self._connection, None
        if connection is None and not connected:
            raise NoMoreFrontEndsError("the connection that was handed over has ended")
        return connection

    def deadline(self, connected: bool) -> float | None:
        return None if connected else time.monotonic()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def from_fd(fd: int) -> Endpoint:
    """The endpoint of `--fd`: a listening or a connected socket, whichever it is.

    :raise EndpointError: when it is neither.
    """
    try:
        sock = socket.socket(fileno=fd)
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            sock.detach()
            raise EndpointError(f"--fd={fd}: not a UNIX stream socket")
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise EndpointError(f"--fd={fd}: {error.strerror}") from error
    return Listener(ListeningSocket(sock)) if listening else Given(sock)
