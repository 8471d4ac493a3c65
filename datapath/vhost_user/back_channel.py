"""The channel of the back-end's own requests (SET_BACKEND_REQ_FD): requests out, answers in, in order.

Nobody waits on it: QEMU reads it in its main loop only (from 8.0 on), so as long as it waits for a reply of
ours it answers nothing here. Source: QEMU docs/interop/vhost-user.rst, "Back-end message types". Owns the
socket.
"""

import array
import os
import socket
from collections import deque

from datapath.vhost_user.messages import (
    ANSWER_SIZE,
    BackendRequest,
    ProtocolError,
    VringArea,
    decode_answer,
    encode_area,
)


class BackChannelError(Exception):
    """The channel cannot be used any more."""


class BackChannel:
    """A connected channel; every request asks for an answer (REPLY_ACK)."""

    def __init__(self, fd: int) -> None:
        """Take a descriptor over.

        :raise ProtocolError: when it is no socket; it is closed then.
        """
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
        except OSError as error:
            os.close(fd)
            raise ProtocolError(f"the back channel cannot be used: {error.strerror}") from error
        self._data = b""
        self._asked: deque[VringArea] = deque()

    def tell_area(self, area: VringArea, fd: int | None = None) -> None:
        """Say where a ring's doorbell is, in the file `fd`, or that it is nowhere.

        :raise BackChannelError: when the front-end does not take it.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else []
        data = encode_area(area)
        try:
            sent = self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise BackChannelError(f"it fails: {error.strerror}") from error
        if sent < len(data):
            raise BackChannelError("it is full")
        self._asked.append(area)

    @property
    def waiting(self) -> bool:
        """Whether answers are due."""
        return bool(self._asked)

    def take_answers(self) -> list[tuple[VringArea, bool]]:
        """The requests that have been answered since, and whether the front-end agreed.

        :raise BackChannelError: when what came is no answer, or nothing will come any more.
        """
        answered = []
        while self._asked:
            try:
                piece = self._socket.recv(ANSWER_SIZE - len(self._data), socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                raise BackChannelError(f"it fails: {error.strerror}") from error
            if not piece:
                raise BackChannelError("the front-end has closed it")
            self._data += piece
            if len(self._data) == ANSWER_SIZE:
                answered.append((self._asked.popleft(), self._take_answer() == 0))
        return answered

    def _take_answer(self) -> int:
        data, self._data = self._data, b""
        try:
            return decode_answer(BackendRequest.VRING_HOST_NOTIFIER_MSG, data)
        except ProtocolError as error:
            raise BackChannelError(str(error)) from error

    def close(self) -> None:
        """Close the socket; whatever has been asked may still be carried out."""
        self._socket.close()
