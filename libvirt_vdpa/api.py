"""The daemon's control socket: QMP for any number of clients.

qemu.qmp brings the protocol's machinery, but its own server stops after one peer; here each accepted
socket gets an `AsyncProtocol` of its own. Commands of one client are executed in order. A client that
leaves takes its commands with it: they are cancelled, and undo what they have begun.

Owns sockets and framing; what the commands do is daemon.py's table.
"""

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import Message, QMPError, Runstate
from qemu.qmp.protocol import AsyncProtocol

from datapath.control import (
    Arguments,
    CommandError,
    JsonStream,
    StreamError,
    encode,
    event,
    failure,
    greeting,
)
from datapath.listening import listen
from libvirt_vdpa.client import ControlError

logger = logging.getLogger(__name__)

#: Longest command in bytes; a hook's carries a domain XML.
MAX_COMMAND = 8 * 1024 * 1024
#: Commands of one client that wait for their turn; more are not read.
MAX_COMMANDS = 16
#: Messages that a client may leave unread before it is dropped.
MAX_UNREAD = 1024
#: Seconds that a client has to read what is left for it when its connection ends.
FLUSH_LIMIT = 1.0
#: Seconds of rest after a connection that could not be accepted.
ACCEPT_PAUSE = 0.1

Command = Callable[[Arguments], Awaitable[object]]


class Connection(AsyncProtocol[Message]):
    """One client."""

    def __init__(self, commands: Mapping[str, Command]) -> None:
        super().__init__()
        self._commands = commands
        self._stream = JsonStream(MAX_COMMAND)
        self._received: deque[dict[str, Any]] = deque()
        self._waiting: asyncio.Queue[Message] = asyncio.Queue(MAX_COMMANDS)
        self._worker: asyncio.Task[None] | None = None
        self._negotiated = False

    async def serve(self, accepted: socket.socket) -> None:
        """Serve a client until it leaves."""
        try:
            await self.connect(accepted)
            while self.runstate is Runstate.RUNNING:
                await self.runstate_changed()
        except (QMPError, OSError):
            pass
        finally:
            # Raises whatever ended the connection, mostly the client's end of file.
            with contextlib.suppress(QMPError, OSError, EOFError, StreamError):
                await self.disconnect()
            if self._worker is not None:
                with contextlib.suppress(asyncio.CancelledError):
                    await self._worker

    def drop(self) -> None:
        """End the connection soon."""
        self._schedule_disconnect()

    def event(self, message: Message) -> None:
        """Tell the client of an event, once it has negotiated."""
        if self.runstate is not Runstate.RUNNING or not self._negotiated:
            return
        if self._outgoing.qsize() >= MAX_UNREAD:
            logger.warning("a client of the control socket does not read; it is dropped")
            self.drop()
            return
        self._outgoing.put_nowait(message)

    # What AsyncProtocol calls

    async def _establish_session(self) -> None:
        self._do_send(Message(greeting()))
        self._worker = asyncio.create_task(self._work())
        await super()._establish_session()

    async def _bh_disconnect(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
        await super()._bh_disconnect()

    async def _bh_flush_writer(self) -> None:
        try:
            async with asyncio.timeout(FLUSH_LIMIT):
                await super()._bh_flush_writer()
        except TimeoutError:
            assert self._writer is not None
            self._writer.transport.abort()

    async def _do_recv(self) -> Message:
        """The next command.

        :raise EOFError: when the client has left.
        :raise StreamError: when it sent anything but JSON objects; it has been told.
        """
        assert self._reader is not None
        while not self._received:
            data = await self._reader.read(self.readbuflen)
            if not data:
                raise EOFError
            try:
                self._received.extend(self._stream.feed(data))
            except StreamError as error:
                self._do_send(Message(failure("GenericError", str(error))))
                raise
        return Message(self._received.popleft())

    def _do_send(self, msg: Message) -> None:
        assert self._writer is not None
        self._writer.write(encode(dict(msg)))

    async def _send(self, msg: Message) -> None:
        await super()._send(msg)
        assert self._writer is not None
        await self._writer.drain()

    async def _on_message(self, msg: Message) -> None:
        await self._waiting.put(msg)

    # Commands

    async def _work(self) -> None:
        while True:
            command = await self._waiting.get()
            reply = await self._execute(command)
            if "id" in command:
                reply["id"] = command["id"]
            self._outgoing.put_nowait(Message(reply))
            # A client that does not read gets no further answers, rather than all our memory.
            await self._outgoing.join()

    async def _execute(self, command: Message) -> dict[str, object]:
        name = command.get("execute")
        arguments = command.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return failure("GenericError", 'a command is {"execute": NAME, "arguments": {…}}')
        if not self._negotiated:
            if name != "qmp_capabilities":
                return failure("CommandNotFound", "qmp_capabilities comes first")
            self._negotiated = True
            return {"return": {}}
        if name not in self._commands:
            return failure("CommandNotFound", f"The command {name} has not been found")
        try:
            return {"return": await self._commands[name](arguments)}
        except (CommandError, ControlError) as error:
            return failure("GenericError", str(error))
        except Exception:
            logger.exception("command %s", name)
            return failure("GenericError", f"{name} failed inside virtvdpad; its log has the details")


class ApiServer:
    """The listener and its clients."""

    def __init__(self, commands: Mapping[str, Command]) -> None:
        self._commands: dict[str, Command] = {**commands, "query-commands": self._query_commands}
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._listener: socket.socket | None = None
        self._acceptor: asyncio.Task[None] | None = None
        self._path = Path()

    def start(self, path: Path) -> None:
        """Listen, for root alone.

        :raise OSError: when the path cannot be bound, or somebody else serves it.
        """
        self._path = path
        self._listener = listen(path, mode=0o600)
        self._acceptor = asyncio.create_task(self._accept(self._listener))

    async def stop(self) -> None:
        """Remove the socket, drop all clients, wait until their commands have undone what they must."""
        if self._listener is not None:
            self._path.unlink(missing_ok=True)
            assert self._acceptor is not None
            self._acceptor.cancel()
            await asyncio.wait({self._acceptor})
            self._listener.close()
        tasks = list(self._connections)
        for connection in self._connections.values():
            connection.drop()
        if tasks:
            await asyncio.wait(tasks)

    def event(self, name: str, data: Mapping[str, object]) -> None:
        """Tell all clients."""
        message = Message(event(name, data))
        for connection in self._connections.values():
            connection.event(message)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors: those that are served go on
                logger.error("control socket: %s", error)
                await asyncio.sleep(ACCEPT_PAUSE)
                continue
            accepted.setblocking(False)
            connection = Connection(self._commands)
            task = asyncio.create_task(connection.serve(accepted))
            self._connections[task] = connection
            task.add_done_callback(self._connections.pop)

    async def _query_commands(self, _arguments: Arguments) -> object:
        return [{"name": name} for name in sorted(self._commands)]
