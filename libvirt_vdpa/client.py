"""A client of the control sockets of ports, emulated NICs and the daemon, with a deadline on everything.

qemu.qmp does the talking; this adds the deadlines and turns its many exceptions into one.
"""

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError, Runstate

# A peer that is not there yet, or goes away, is told to our caller; qemu.qmp logs it as an error besides.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

#: Name and data of an event.
EventHandler = Callable[[str, dict[str, object]], None]


class ControlError(Exception):
    """A control socket that is not there, does not answer, or refuses; the text says which."""


class CommandRefusedError(ControlError):
    """The peer understood the command and refused it; the text is the peer's own."""


class ControlClient:
    """One connection to a control socket. Async context manager; `connect` makes one to keep."""

    def __init__(self, path: Path | str, time_limit: float = 5.0) -> None:
        """Nothing is connected yet.

        :param time_limit: seconds for each of connecting, executing a command and closing.
        """
        self.path = str(path)
        self._time_limit = time_limit
        #: Process and user at the other end, as the kernel knows them; both 0 before there is one.
        self.peer = (0, 0)
        self._client = QMPClient()
        self._listener: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "ControlClient":
        await self.connect()
        return self

    async def __aexit__(self, *_details: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Connect and negotiate.

        :raise ControlError: when there is no server, or none that speaks QMP in time.
        """
        try:
            async with asyncio.timeout(self._time_limit):
                connection = await self._reach()
                self.peer = peer_of(connection)
                await self._client.connect(connection)
        except TimeoutError:
            raise ControlError(f"{self.path}: no greeting within {self._time_limit:g} s") from None
        except (QMPError, OSError) as error:
            raise ControlError(f"{self.path}: {error}") from None

    async def _reach(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, self.path)
        except BaseException:
            connection.close()
            raise
        return connection

    def listen(self, handler: EventHandler) -> None:
        """Have `handler` called for every event from now on."""
        events = EventListener()
        self._client.register_listener(events)

        async def forward() -> None:
            async for message in events:
                data = message.get("data")
                handler(str(message["event"]), data if isinstance(data, dict) else {})

        self._listener = asyncio.create_task(forward())

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Execute a command and return its value.

        :raise CommandRefusedError: when the server says no.
        :raise ControlError: when it does not answer in time, or is gone.
        """
        try:
            async with asyncio.timeout(self._time_limit):
                return await self._client.execute(command, arguments)
        except TimeoutError:
            text = f"{self.path}: no answer to {command} within {self._time_limit:g} s"
            raise ControlError(text) from None
        except ExecuteError as error:
            raise CommandRefusedError(str(error)) from None
        except (QMPError, OSError, EOFError) as error:
            raise ControlError(f"{self.path}: {error or 'the connection ended'}") from None

    async def query(self, command: str) -> dict[str, object]:
        """Execute a command whose answer is an object.

        :raise ControlError: as `execute`, and for any other kind of answer.
        """
        answer = await self.execute(command)
        if not isinstance(answer, dict):
            raise ControlError(f"{self.path}: the answer to {command} is not an object")
        return answer

    async def closed(self) -> None:
        """Wait until the connection has ended, by whoever."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def close(self) -> None:
        """Disconnect. Idempotent, raises nothing."""
        if self._listener is not None:
            self._listener.cancel()
            self._listener = None
        # The reason why a connection ended was told by the command that met it.
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(self._time_limit):
                await self._client.disconnect()


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Process and user that listen at the other end of a UNIX socket (SO_PEERCRED, unix(7))."""
    form = struct.Struct("3i")
    pid, uid, _gid = form.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, form.size))
    return pid, uid
