"""A vhost-user front-end: the sequences of messages that QEMU sends, over whatever carries them.

`FrontEnd` knows the sequences; `SocketFrontEnd` talks to a real back-end, and the unit tests have one that
calls the state machine.
"""

import abc
import array
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from datapath.vhost_user.backend import F_PROTOCOL_FEATURES
from datapath.vhost_user.messages import (
    HEADER,
    LAYOUTS,
    Message,
    ProtocolFeature,
    Region,
    Request,
    VringAddress,
    VringFd,
    VringState,
    decode_reply,
    encode_request,
)
from datapath.vhost_user.protocol_features import PROTOCOL_FEATURES
from datapath.virtio import Feature, Status, bit
from tests.harness.virtqueue import MemfdMemory, Virtqueue

#: Where guest physical address 0 lies in the front-end's address space.
USER = 0x7F0000000000
MEMORY_SIZE = 0x200000
#: Guest physical addresses of the two rings; buffers go above BUFFERS.
RING_STRIDE = 0x8000
BUFFERS = 0x100000
DRIVER_OK = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
VIRTIO = bit(Feature.F_VERSION_1) | bit(Feature.NET_F_MAC)


class FrontEnd(abc.ABC):
    """One front-end with guest memory and a pair of rings; a class of its own may have more."""

    pairs = 1

    def __init__(self, protocol: int = PROTOCOL_FEATURES) -> None:
        self.protocol = protocol
        self.need_reply = False
        self.memory = MemfdMemory(MEMORY_SIZE)
        self.queues: list[Virtqueue] = []
        self.lay_rings_out(0)

    def lay_rings_out(self, address: int) -> None:
        """Lay new rings out from a guest physical address on.

        The first ones lie at 0, which is not special; to QEMU's own devices it means that there is no ring.
        """
        for queue in self.queues:
            queue.close()
        self.queues = [Virtqueue(self.memory, address + RING_STRIDE * index) for index in self.indices]

    @property
    def indices(self) -> range:
        """The numbers of its rings."""
        return range(2 * self.pairs)

    @abc.abstractmethod
    def tell(self, request: int, payload: Any = None, *fds: int) -> Any:
        """Send a message (the descriptors stay the caller's) and return the decoded reply, if one is due."""

    def has(self, feature: ProtocolFeature) -> bool:
        """Whether this front-end negotiates a protocol feature."""
        return bool(self.protocol & bit(feature))

    def replies(self, request: int) -> bool:
        """Whether a reply to such a request, sent now, is due."""
        layout = LAYOUTS.get(request)
        return bool(layout and layout.reply) or (self.need_reply and self.has(ProtocolFeature.REPLY_ACK))

    def connect(self) -> None:
        """What QEMU sends at once."""
        self.tell(Request.GET_FEATURES)
        self.tell(Request.GET_PROTOCOL_FEATURES)
        self.tell(Request.SET_PROTOCOL_FEATURES, self.protocol)
        self.tell(Request.SET_OWNER)

    def share_memory(self) -> None:
        """Guest memory as one region."""
        region = Region(self.memory.base, self.memory.size, USER, 0)
        if self.has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            self.tell(Request.ADD_MEM_REG, region, self.memory.fd)
        else:
            self.tell(Request.SET_MEM_TABLE, (region,), self.memory.fd)

    def address(self, index: int, flags: int = 0) -> VringAddress:
        """Where a ring lies, in this front-end's address space."""
        queue = self.queues[index]
        return VringAddress(
            index, flags, USER + queue.descriptors, USER + queue.used, USER + queue.avail, queue.used
        )

    def set_up_ring(self, index: int, base: int = 0) -> None:
        """A ring's size, base, addresses and eventfds: what starts it."""
        queue = self.queues[index]
        self.tell(Request.SET_VRING_NUM, VringState(index, queue.size))
        self.tell(Request.SET_VRING_BASE, VringState(index, base))
        self.tell(Request.SET_VRING_ADDR, self.address(index))
        self.tell(Request.SET_VRING_KICK, VringFd(index, True), queue.kick_fd)
        self.tell(Request.SET_VRING_CALL, VringFd(index, True), queue.call_fd)

    def enable(self, on: bool = True) -> None:
        """All rings on or off."""
        for index in self.indices:
            self.tell(Request.SET_VRING_ENABLE, VringState(index, int(on)))

    def driver_ok(self) -> None:
        """The guest's driver is ready; unsaid where STATUS was not negotiated."""
        if self.has(ProtocolFeature.STATUS):
            self.tell(Request.SET_STATUS, DRIVER_OK)

    def start(self, features: int = VIRTIO, *, share: bool = True) -> None:
        """START as QEMU sends it: rings enabled first, DRIVER_OK last."""
        self.enable()
        self.tell(Request.SET_FEATURES, features | F_PROTOCOL_FEATURES)
        if share:
            self.share_memory()
        for index, queue in enumerate(self.queues):
            self.set_up_ring(index, queue.used_index)
        self.driver_ok()
        self.settle()

    def settle(self) -> None:
        """Wait until all that was said so far has been carried out: messages are handled in order."""
        self.tell(Request.GET_FEATURES)

    def stop(self, *, status_first: bool = False) -> list[int]:
        """STOP as QEMU 8.1 sends it, or with the status before the bases, as 7.2 does; the bases."""
        if status_first and self.has(ProtocolFeature.STATUS):
            self.tell(Request.SET_STATUS, 0)
        states = [self.tell(Request.GET_VRING_BASE, VringState(index, 0)) for index in self.indices]
        if not status_first and self.has(ProtocolFeature.STATUS):
            self.tell(Request.SET_STATUS, 0)
        return [state.num for state in states]

    def close(self) -> None:
        """Release the memory and the rings."""
        for queue in self.queues:
            queue.close()
        self.memory.close()


class SocketFrontEnd(FrontEnd):
    """A front-end on a connected socket."""

    def __init__(self, sock: socket.socket, protocol: int = PROTOCOL_FEATURES) -> None:
        super().__init__(protocol)
        self.socket = sock
        sock.settimeout(10)

    @classmethod
    def dial(cls, path: Path, protocol: int = PROTOCOL_FEATURES, deadline: float = 5.0) -> Self:
        """Connect as a client does, again and again until `deadline` seconds have gone."""
        end = time.monotonic() + deadline
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(str(path))
            except OSError:
                sock.close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
            else:
                return cls(sock, protocol)

    def tell(self, request: int, payload: Any = None, *fds: int) -> Any:
        self.send(encode_request(Message(request, payload, self.need_reply)), fds)
        return decode_reply(request, self.read_reply()) if self.replies(request) else None

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Bytes and descriptors, whatever they are."""
        content = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([data], content)

    def read_reply(self) -> bytes:
        """One message from the back-end.

        :raise ConnectionError: when it ended the connection.
        """
        header = self._read(HEADER.size)
        return header + self._read(HEADER.unpack(header)[2])

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                raise ConnectionError("the back-end ended the connection")
            data += piece
        return data

    def ended(self) -> bool:
        """Whether the back-end ends the connection within the socket's time-out."""
        try:
            while self.socket.recv(4096):
                pass
        except ConnectionResetError:
            pass
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self.socket.close()
        super().close()


def duplicates(fds: Sequence[int]) -> list[int]:
    """Copies for a receiver that takes what it is given."""
    return [os.dup(fd) for fd in fds]
