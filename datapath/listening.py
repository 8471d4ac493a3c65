"""UNIX sockets that others connect to: how they come into being, and how connections are taken.

Owns the rules that every listener of ours keeps: nobody ever connects to a socket that is not served, a
socket that nobody serves any more is replaced, and one that is served is left alone.
"""

import contextlib
import errno
import os
import socket
from pathlib import Path

#: Longest path of a UNIX socket in bytes, its NUL apart (unix(7)).
MAX_PATH = 107


class ListeningSocket:
    """A non-blocking listener. A connection that cannot be taken for want of descriptors is turned away:
    left in the backlog, it would keep the loop busy and its front-end waiting."""

    def __init__(self, listener: socket.socket, path: Path | None = None) -> None:
        """Take a listening socket over, and the name that it has in the file system, if it is ours."""
        listener.setblocking(False)
        self.path = path
        self._socket = listener
        self._reserve: int | None = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    @classmethod
    def bind(cls, path: Path, mode: int = 0o600) -> "ListeningSocket":
        """Listen on a path; see `listen`."""
        return cls(listen(path, mode), path)

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> socket.socket | None:
        """The next connection, non-blocking; None when there is none to serve after all."""
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return None  # else the other side has left again
        connection.setblocking(False)
        return connection

    def _turn_away(self) -> None:
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None
        with contextlib.suppress(OSError):
            self._socket.accept()[0].close()
        with contextlib.suppress(OSError):
            self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Stop listening and remove the name. Idempotent."""
        if self._socket.fileno() == -1:
            return
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        self._socket.close()
        if self._reserve is not None:
            os.close(self._reserve)


def listen(path: Path, mode: int = 0o600) -> socket.socket:
    """A non-blocking listener at `path` that is complete, mode and all, when the name appears.

    It is bound under a temporary name and renamed onto the path.

    :raise OSError: ENAMETOOLONG for a path that no UNIX socket has, EADDRINUSE when somebody answers
        there, EEXIST when it is no socket; else what the system says. `filename` is the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    if len(os.fsencode(temporary)) > MAX_PATH:
        room = MAX_PATH - (len(os.fsencode(temporary)) - len(os.fsencode(path)))
        raise OSError(errno.ENAMETOOLONG, f"a socket's path has at most {room} bytes here", str(path))
    free_address(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        temporary.unlink(missing_ok=True)
        listener.bind(str(temporary))
        temporary.chmod(mode)
        listener.listen()
        temporary.rename(path)
    except BaseException as error:
        listener.close()
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    return listener


def free_address(path: Path) -> None:
    """See that `path` can be bound: it does not exist, or is a socket that nobody serves.

    :raise FileExistsError: when it is not a socket.
    :raise OSError: EADDRINUSE when a server answers.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_socket():
        raise FileExistsError(errno.EEXIST, "not a socket; remove it or choose another path", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog must not hold us: it is served all the same
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except BlockingIOError:
            pass
    raise OSError(errno.EADDRINUSE, "another process serves this socket", str(path))
