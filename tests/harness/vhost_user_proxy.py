"""A vhost-user proxy between a front-end that knows no dirty logging and our port.

DPDK's virtio-user never migrates. Here everything it says passes through, descriptors too, and in between
the proxy says to the back-end what QEMU says when a migration begins, is given up, or comes to its end, and
when a back-end has died and another one is there; those replies the front-end never sees. Kicks, interrupts
and packets do not come this way.

Owns the listening socket, both connections, the thread that forwards, and copies of the descriptors that the
front-end has sent: so a test sees the memory that is shared, and all can be said again.
"""

import array
import contextlib
import dataclasses
import mmap
import os
import queue
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datapath.descriptors import close_all
from datapath.vhost_user.backend import F_LOG_ALL
from datapath.vhost_user.messages import (
    HEADER,
    LAYOUTS,
    MAX_FDS,
    Decoder,
    LogArea,
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
from datapath.virtio import bit
from tests.harness.closeable import Closeable
from tests.harness.processes import HarnessError, wait_for

#: Flag of SET_VRING_ADDR: writes to the used ring are to be logged (QEMU docs/interop/vhost-user.rst).
VRING_F_LOG = 1
#: Seconds that a back-end may take for an answer, and after which the proxy looks for another back-end.
PATIENCE, LOOK = 10.0, 0.02
#: What is said to a back-end that takes a session over, in the order of QEMU's vhost_dev_start(); what names
#: a ring is said of each.
SAID_AGAIN = (
    Request.SET_PROTOCOL_FEATURES,
    Request.SET_OWNER,
    Request.SET_VRING_ENABLE,
    Request.SET_FEATURES,
    Request.SET_MEM_TABLE,
    Request.SET_VRING_NUM,
    Request.SET_VRING_BASE,
    Request.SET_VRING_ADDR,
    Request.SET_VRING_KICK,
    Request.SET_VRING_CALL,
    Request.SET_STATUS,
)

Replies = queue.SimpleQueue[bytes]


@dataclasses.dataclass(frozen=True)
class SharedRegion:
    """Guest memory as the front-end shares it, mapped here too."""

    region: Region
    view: mmap.mmap


class VhostUserProxy(Closeable):
    """Serves one front-end at a time on a path, each with a connection of its own to the back-end."""

    def __init__(self, path: Path, back_end: Path) -> None:
        self.path = path
        self.memory: list[SharedRegion] = []
        self.addresses: dict[int, VringAddress] = {}
        self.sizes: dict[int, int] = {}
        #: Rings whose kick has come.
        self.started: set[int] = set()
        self._back_end_path = back_end
        self._features: int | None = None
        self._reply_ack = False
        #: The log, its size and offset, while logging is on.
        self._log: tuple[int, LogArea] | None = None
        #: The last of each kind of message, for each ring.
        self._said: dict[tuple[int, int | None], Message] = {}
        self._lock = threading.Lock()
        #: Who waits for the replies to come, in their order: the front-end (None), or a caller of `ask`.
        self._waiting: deque[Replies | None] = deque()
        self._back: socket.socket | None = None
        self._error: BaseException | None = None
        self._stop_reader, self._stop_writer = os.pipe()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    # What a test says to the back-end

    def ask(self, request: Request, payload: Any = None, *fds: int) -> Any:
        """Say something to the back-end on the front-end's behalf; its decoded answer where one is due.

        :raise HarnessError: when nobody is connected, or no answer comes.
        """
        replies: Replies = queue.SimpleQueue()
        layout = LAYOUTS[request]
        need = layout.reply is None and self._reply_ack
        with self._lock:
            if self._back is None:
                raise HarnessError("the proxy has no front-end")
            _send(self._back, encode_request(Message(request, payload, need)), fds)
            if layout.reply is None and not need:
                return None
            self._waiting.append(replies)
        try:
            return decode_reply(request, replies.get(timeout=PATIENCE))
        except queue.Empty:
            raise HarnessError(f"{request.name} was not answered: {self._error}") from None

    def start_logging(self, log: int, size: int, offset: int = 0) -> None:
        """What QEMU sends when a migration begins; on return the log is complete."""
        assert self._features is not None
        self._log = log, LogArea(size, offset)
        self._name_log()
        self._switch(self._features | F_LOG_ALL, logged=True)

    def stop_logging(self) -> None:
        """What QEMU sends when a migration is given up."""
        assert self._features is not None
        self._log = None
        self._switch(self._features, logged=False)

    def stop_rings(self) -> dict[int, int]:
        """Stop all rings as at the end of a migration; their bases. The front-end is not told."""
        return {
            index: self.ask(Request.GET_VRING_BASE, VringState(index, 0)).num
            for index in sorted(self.started)
        }

    def reconnect(self, *, log_first: bool = False) -> None:
        """The back-end has died, and another serves its path: begin the session anew as QEMU does, rings at
        their used index. While logging, the log comes last.

        :param log_first: or it comes before the rings.
        :raise OSError: when nobody serves the path.
        """
        wait_for("the proxy to see the end of the back-end", lambda: self._back is None, PATIENCE)
        back = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        back.connect(str(self._back_end_path))
        with self._lock:
            self._waiting.clear()
            self._back = back
        for request in SAID_AGAIN:
            for _, message in sorted(self._said.items(), key=lambda item: item[0][1] or 0):
                if message.request == request:
                    self.ask(request, self._said_again(message), *message.fds)
            if request == Request.SET_MEM_TABLE and self._log is not None and log_first:
                self._name_log()
        if self._log is not None and not log_first:
            self._name_log()
        self.ask(Request.GET_FEATURES)

    def _said_again(self, message: Message) -> Any:
        payload = message.payload
        match message.request:
            case Request.SET_PROTOCOL_FEATURES:
                return payload | bit(ProtocolFeature.LOG_SHMFD)
            case Request.SET_FEATURES:
                return payload | (F_LOG_ALL if self._log else 0)
            case Request.SET_VRING_BASE:
                return VringState(payload.index, self.used_index(payload.index))
            case Request.SET_VRING_ADDR if self._log is not None:
                return self._logged(payload)
        return payload

    def used_index(self, ring: int) -> int:
        """The used index of a ring as the guest sees it."""
        at = self.addresses[ring].used + 2
        for shared in self.memory:
            offset = at - shared.region.user_address
            if 0 <= offset < shared.region.size:
                return int.from_bytes(shared.view[offset : offset + 2], "little")
        raise HarnessError(f"{at:#x} is not in the front-end's memory")

    def wait_until_running(self, rings: int = 2) -> None:
        """Wait until the front-end has started its rings."""
        wait_for("a front-end behind the proxy", lambda: len(self.started) >= rings, 60)

    def guest_address(self, user: int) -> int:
        """Where something lies in guest memory that the front-end has at `user`."""
        for shared in self.memory:
            offset = user - shared.region.user_address
            if 0 <= offset < shared.region.size:
                return shared.region.guest_address + offset
        raise HarnessError(f"{user:#x} is not in the front-end's memory")

    def _switch(self, features: int, *, logged: bool) -> None:
        self.ask(Request.SET_FEATURES, features)
        for address in self.addresses.values():
            self.ask(Request.SET_VRING_ADDR, self._logged(address) if logged else address)
        self.ask(Request.GET_FEATURES)

    def _name_log(self) -> None:
        assert self._log is not None
        fd, area = self._log
        self.ask(Request.SET_LOG_BASE, area, fd)

    def _logged(self, address: VringAddress) -> VringAddress:
        """A ring's addresses with the wish to have its used ring logged."""
        return dataclasses.replace(address, flags=VRING_F_LOG, log=self.guest_address(address.used))

    # What passes through

    def _serve(self) -> None:
        """Front-end after front-end, until `close`."""
        try:
            while self._wait([self._listener]):
                front, _ = self._listener.accept()
                back = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                back.connect(str(self._back_end_path))
                self._back = back
                with front, contextlib.suppress(ConnectionError):
                    self._forward(front)
                self._forget()
        except BaseException as error:
            self._error = error
            raise

    def _wait(
        self, sockets: Sequence[socket.socket], seconds: float | None = None
    ) -> list[socket.socket] | None:
        """Those that can be read, after `seconds` maybe none; None: it is time to end."""
        descriptors = [self._stop_reader, *(sock.fileno() for sock in sockets)]
        ready, _, _ = select.select(descriptors, [], [], seconds)
        return None if self._stop_reader in ready else [sock for sock in sockets if sock.fileno() in ready]

    def _forward(self, front: socket.socket) -> None:
        """Until the front-end leaves; a back-end that leaves may come again (`reconnect`).

        :raise ConnectionError: when the front-end has left.
        """
        decoder = Decoder()
        while True:
            back = self._back
            ready = self._wait([front] if back is None else [front, back], LOOK)
            if ready is None:
                return
            if back is not None and back in ready:
                try:
                    self._answer(front, _receive_reply(back))
                except ConnectionError:
                    self._lose(back)
            if front in ready:
                for message in decoder.feed(*_receive(front)):
                    with contextlib.closing(message):
                        self._pass_on(message)

    def _lose(self, back: socket.socket) -> None:
        with self._lock:
            if self._back is back:
                self._back = None
                back.close()

    def _answer(self, front: socket.socket, reply: bytes) -> None:
        with self._lock:
            waiting = self._waiting.popleft()
        if waiting is None:
            front.sendall(reply)
        else:
            waiting.put(reply)

    def _pass_on(self, message: Message) -> None:
        self._learn(message)
        layout = LAYOUTS.get(message.request)
        due = layout is not None and layout.reply is not None
        with self._lock:
            if self._back is None:
                raise ConnectionError("there is no back-end")
            _send(self._back, encode_request(message), message.fds)
            if due or (message.need_reply and self._reply_ack):
                self._waiting.append(None)

    def _learn(self, message: Message) -> None:
        """Remember what the front-end has said, and add what it would say if it logged."""
        payload = message.payload
        self._remember(message)
        match message.request:
            case Request.SET_PROTOCOL_FEATURES:
                message.payload = payload | bit(ProtocolFeature.LOG_SHMFD)
                self._reply_ack = bool(payload & bit(ProtocolFeature.REPLY_ACK))
            case Request.SET_FEATURES:
                self._features = payload
                message.payload = payload | (F_LOG_ALL if self._log else 0)
            case Request.SET_MEM_TABLE:
                self._forget_memory()
                self.memory = [_shared(region, fd) for region, fd in zip(payload, message.fds, strict=True)]
            case Request.SET_VRING_NUM:
                self.sizes[payload.index] = payload.num
            case Request.SET_VRING_ADDR:
                self.addresses[payload.index] = payload
            case Request.SET_VRING_KICK:
                self.started.add(payload.index)
            case Request.GET_VRING_BASE:
                self.started.discard(payload.index)

    def _remember(self, message: Message) -> None:
        if message.request in SAID_AGAIN:
            of_ring = isinstance(message.payload, VringState | VringAddress | VringFd)
            key = message.request, message.payload.index if of_ring else None
            if key in self._said:
                self._said[key].close()
            fds = [os.dup(fd) for fd in message.fds]
            self._said[key] = Message(message.request, message.payload, fds=fds)

    def _forget(self) -> None:
        """The front-end has left. Its memory stays to be looked at until the next one's comes."""
        with self._lock:
            if self._back is not None:
                self._back.close()
            self._back = None
            self._waiting.clear()
        for message in self._said.values():
            message.close()
        self._said.clear()
        self._log = None
        self.started.clear()
        self.addresses.clear()

    def _forget_memory(self) -> None:
        for shared in self.memory:
            with contextlib.suppress(BufferError):  # whoever looks at it lets it go
                shared.view.close()
        self.memory = []

    def close(self) -> None:
        """End the connection and stop listening."""
        os.write(self._stop_writer, b"x")
        self._thread.join()
        self._forget_memory()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        close_all([self._stop_reader, self._stop_writer])


def _shared(region: Region, fd: int) -> SharedRegion:
    return SharedRegion(region, mmap.mmap(fd, region.size, offset=region.mmap_offset))


def _send(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """A whole message; its descriptors go with the first byte."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = sock.sendmsg([data], rights)
    sock.sendall(data[sent:])


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """What has come of messages, with the descriptors of the last.

    :raise ConnectionError: when the other side has left.
    """
    fds = array.array("i")
    data, ancillary, _, _ = sock.recvmsg(
        4096, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content)
    if not data:
        raise ConnectionError("one side has left")
    return data, list(fds)


def _receive_reply(sock: socket.socket) -> bytes:
    """A whole reply; the back-end sends no descriptors.

    :raise ConnectionError: when it has left.
    """
    header = sock.recv(HEADER.size, socket.MSG_WAITALL)
    if len(header) < HEADER.size:
        raise ConnectionError("the back-end has left")
    _, _, size = HEADER.unpack(header)
    return header + (sock.recv(size, socket.MSG_WAITALL) if size else b"")
