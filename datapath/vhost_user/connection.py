"""The socket of one front-end: reads messages for its `Backend`, writes the replies.

Owns the socket and the bytes under way; the only place where vhost-user meets I/O. Never blocks.
"""

import array
import socket

from datapath.descriptors import close_all
from datapath.vhost_user.backend import Backend
from datapath.vhost_user.messages import MAX_FDS, Decoder, ProtocolError

#: Room for one descriptor more than any message may carry, so that too many are seen, not cut off.
_ANCILLARY = socket.CMSG_SPACE((MAX_FDS + 1) * array.array("i").itemsize)
#: Bytes that are read at a time, a few dozen messages.
_READ_SIZE = 1024
#: Messages that are handled, or somewhat more, before the loop gets its turn again.
_BATCH = 64


class DisconnectedError(Exception):
    """The front-end has closed its end, or does not read what it asked for."""


class Connection:
    """A connected front-end. `close` releases the socket and the back-end's state with it."""

    def __init__(self, sock: socket.socket, backend: Backend) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.backend = backend
        self._decoder = Decoder()

    def receive(self) -> None:
        """Handle the messages that have arrived.

        :raise DisconnectedError: when the front-end has gone.
        :raise ProtocolError: when it broke the protocol.
        :raise DeviceError: when the device failed.
        """
        handled = 0
        while handled < _BATCH:
            try:
                data, ancillary, flags, _ = self.socket.recvmsg(
                    _READ_SIZE, _ANCILLARY, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError as error:
                raise DisconnectedError(f"the front-end's socket fails: {error}") from error
            fds = self._descriptors(data, ancillary, flags) if ancillary or not data else []
            for message in self._decoder.feed(data, fds):
                handled += 1
                reply = self.backend.handle(message)
                if reply is not None:
                    self._write(reply)
            if len(data) < _READ_SIZE and not fds:
                return  # there is hardly more; if there is, the loop comes back

    def _descriptors(self, data: bytes, ancillary: list[tuple[int, int, bytes]], flags: int) -> list[int]:
        """What came with a read.

        :raise ProtocolError: when there were too many descriptors.
        :raise DisconnectedError: when the read was the end.
        """
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if flags & socket.MSG_CTRUNC:
            close_all(fds)
            raise ProtocolError(f"more than {MAX_FDS} descriptors with one message")
        if not data:
            close_all(fds)
            half = "" if self._decoder.idle else " in the middle of a message"
            raise DisconnectedError(f"the front-end disconnected{half}")
        return list(fds)

    def _write(self, reply: bytes) -> None:
        try:
            sent = self.socket.send(reply, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise DisconnectedError(f"the front-end's socket fails: {error}") from error
        if sent < len(reply):
            raise DisconnectedError("the front-end does not read its replies")

    @property
    def gone(self) -> bool:
        """Whether the front-end has closed its end, whatever it sent before that."""
        try:
            return not self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """End the connection: the back-end first, so that the VF is idle when the peer sees the end."""
        self._decoder.close()
        self.backend.close()
        self.socket.close()
