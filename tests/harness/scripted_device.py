"""A vfio-user device whose answers a test writes: for what a well-behaved device never does.

Serves one client in a thread. `answers` maps a command to what is done with it; the default is the
smallest device that a client accepts. Owns the thread, the sockets and the descriptors that it received.
"""

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from datapath.vfio import DeviceFlag, IrqFlag, Region, RegionFlag
from datapath.vfio_user import (
    MAX_FDS,
    Area,
    Capabilities,
    Command,
    Decoder,
    DeviceInfo,
    IrqInfo,
    Message,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    Version,
)
from tests.harness.closeable import Closeable

BAR_SIZE = 0x3000
#: Offset of BAR 0 in the descriptor that it is mapped from, and its one mappable area.
BAR_OFFSET = 0x1000
AREA = Area(0x1000, 0x1000)

Answer = Callable[[Message], Message | bytes | None]


class ScriptedDevice(Closeable):
    """What is sent for a command: a message, raw bytes, or nothing at all (None)."""

    def __init__(self, path: Path, capabilities: Capabilities | None = None) -> None:
        self.path = path
        self.capabilities = capabilities or Capabilities(max_msg_fds=MAX_FDS)
        self.received: list[Message] = []
        self.answers: dict[int, Answer] = {
            Command.VERSION: lambda message: message.reply(Version(capabilities=self.capabilities).pack()),
            Command.GET_INFO: lambda message: message.reply(
                DeviceInfo(DeviceFlag.PCI | DeviceFlag.RESET, 9, 5).pack()
            ),
            Command.GET_REGION_INFO: self._region_info,
            Command.GET_IRQ_INFO: lambda message: message.reply(
                IrqInfo(IrqInfo.unpack(message.payload).index, IrqFlag.EVENTFD, 64).pack()
            ),
            Command.GET_REGION_IO_FDS: lambda message: message.error(errno.ENOSYS),
            Command.REGION_READ: self.register,
            Command.REGION_WRITE: lambda message: message.reply(message.payload[:16]),
        }
        self.bar = os.memfd_create("bar")
        os.ftruncate(self.bar, BAR_OFFSET + BAR_SIZE)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def refuse(self, command: Command, number: int) -> None:
        """Answer a command with an error from now on."""
        self.answers[command] = lambda message: message.error(number)

    def commands(self, command: Command) -> list[Message]:
        """What has been received of a kind."""
        return [message for message in self.received if message.command == command and not message.is_reply]

    def send(self, data: bytes) -> None:
        """Send something nobody asked for."""
        assert self._client is not None
        self._client.sendall(data)

    def hang_up(self) -> None:
        """End the connection as a device does that dies."""
        assert self._client is not None
        self._client.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        # Until the client hangs up or this object is closed.
        with contextlib.suppress(OSError):
            self._client, _ = self._listener.accept()
            decoder = Decoder()
            while True:
                data, fds, _, _ = socket.recv_fds(self._client, 4096, MAX_FDS)
                if not data:
                    return
                for message in decoder.feed(data, tuple(fds)):
                    self.received.append(message)
                    self._answer(message)

    def _answer(self, message: Message) -> None:
        assert self._client is not None
        answer = self.answers.get(message.command, Message.reply)
        sent = answer(message) if message.wants_reply else None
        if isinstance(sent, Message):
            socket.send_fds(self._client, [sent.pack()], sent.fds)
        elif sent is not None:
            self._client.sendall(sent)

    def _region_info(self, message: Message) -> Message:
        asked = RegionInfo.unpack(message.payload)
        if asked.index == Region.CONFIG:
            info = RegionInfo(asked.index, RegionFlag.READ | RegionFlag.WRITE, 256)
        elif asked.index == Region.BAR0:
            flags = RegionFlag.READ | RegionFlag.WRITE | RegionFlag.MMAP
            info = RegionInfo(asked.index, flags, BAR_SIZE, BAR_OFFSET, (AREA,))
        else:
            info = RegionInfo(asked.index)
        fds = (self.bar,) if info.areas and asked.argsz >= info.full_size else ()
        return message.reply(info.pack_reply(asked.argsz), fds)

    @staticmethod
    def register(message: Message) -> Message:
        """Each byte reads as the low byte of its offset."""
        asked = RegionAccess.unpack(message.payload)
        data = bytes((asked.offset + n) & 0xFF for n in range(asked.count))
        return message.reply(RegionAccess(asked.offset, asked.region, asked.count, data).pack())

    @staticmethod
    def io_fds(*entries: tuple[RegionIoFds, tuple[int, ...]]) -> Answer:
        """An answer to GET_REGION_IO_FDS, by region."""
        offered = {info.index: (info, fds) for info, fds in entries}

        def answer(message: Message) -> Message:
            asked = RegionIoFds.unpack(message.payload)
            info, fds = offered.get(asked.index, (RegionIoFds(asked.index), ()))
            room = asked.argsz >= info.full_size
            return message.reply(info.pack_reply(asked.argsz), fds if room else ())

        return answer

    def close(self) -> None:
        """End thread, sockets and descriptors."""
        for sock in (self._listener, self._client):
            if sock is not None:
                # Wakes the thread, which close alone would not.
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        for sock in (self._listener, self._client):
            if sock is not None:
                sock.close()
        for message in self.received:
            for fd in message.fds:
                os.close(fd)
        os.close(self.bar)
