"""A front-end that maps the pages of doorbells, as QEMU does with page-per-vq, and its end of the channel."""

import mmap
import os
import socket

from datapath.vhost_user.backend import NOTIFIER_FEATURES
from datapath.vhost_user.messages import (
    HEADER,
    BackendRequest,
    Request,
    VringArea,
    decode_area,
    encode_answer,
)
from datapath.vhost_user.protocol_features import PROTOCOL_FEATURES
from tests.harness.front_end import SocketFrontEnd

#: Bytes of VRING_HOST_NOTIFIER_MSG.
AREA_MESSAGE = HEADER.size + 24
WITH_NOTIFIERS = PROTOCOL_FEATURES | NOTIFIER_FEATURES


class NotifierFrontEnd(SocketFrontEnd):
    """Its queues are kicked in their pages while they are mapped, and by their eventfds otherwise."""

    def __init__(self, sock: socket.socket, protocol: int = WITH_NOTIFIERS) -> None:
        super().__init__(sock, protocol)
        self.channel, self._theirs = socket.socketpair()
        self.channel.settimeout(5)

    def connect(self) -> None:
        super().connect()
        self.tell(Request.SET_BACKEND_REQ_FD, None, self._theirs.fileno())
        self._theirs.close()

    def take_area(self) -> VringArea:
        """The next message of the back-end's, carried out and not answered yet.

        :raise TimeoutError: when none comes.
        """
        data, fds, _, _ = socket.recv_fds(self.channel, AREA_MESSAGE, 1)
        area = decode_area(data)
        assert len(fds) == int(area.has_fd)
        self.queues[area.index].page = None
        for fd in fds:
            page = mmap.mmap(fd, area.size, offset=area.offset)
            os.close(fd)
            self.queues[area.index].page = page, area.index
        return area

    def answer(self, result: int = 0) -> None:
        """Tell the back-end that all went well, or not."""
        self.channel.sendall(encode_answer(BackendRequest.VRING_HOST_NOTIFIER_MSG, result))

    def serve(self, count: int, result: int = 0) -> list[VringArea]:
        """Carry out and answer that many messages."""
        areas = []
        for _ in range(count):
            areas.append(self.take_area())
            self.answer(result)
        return areas

    def close(self) -> None:
        self.channel.close()
        self._theirs.close()
        super().close()
