"""The control socket of a port and of an emulated NIC: a small QMP server in one `selectors` loop.

It speaks the QEMU Machine Protocol (QEMU docs/interop/qmp-spec.rst), as virtvdpad does, so qmp-shell and
qemu.qmp are clients. Written by hand because qemu.qmp's server side needs asyncio, which a port process
does without to stay small. Owns the framing (`JsonStream`), the sockets of its clients and the replies;
what the commands do belongs to the program that registers them.
"""

import json
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datapath.listening import ListeningSocket
from datapath.loop import dispatch

#: Longest command in bytes; the daemon's longest carries a domain XML, a port's none.
MAX_COMMAND = 64 * 1024
#: Bytes of unread replies and events after which a client is dropped.
MAX_BACKLOG = 1024 * 1024

Arguments = dict[str, Any]
Handler = Callable[[Arguments], object]


class CommandError(Exception):
    """A command that cannot be carried out; the text is what the client sees."""


class StreamError(ValueError):
    """Bytes that are not a stream of JSON objects."""


def greeting() -> dict[str, object]:
    """What a QMP server says first; clients want a `version.qemu` of three numbers."""
    version = {"qemu": {"major": 0, "minor": 1, "micro": 0}, "package": "libvirt-vdpa"}
    return {"QMP": {"version": version, "capabilities": []}}


def encode(message: Mapping[str, object]) -> bytes:
    """One message as QMP sends it: a line of JSON."""
    return json.dumps(message).encode() + b"\r\n"


def event(name: str, data: Mapping[str, object]) -> dict[str, object]:
    """Something that happened now, as QMP tells it."""
    seconds, fraction = divmod(time.time(), 1)
    stamp = {"seconds": int(seconds), "microseconds": int(fraction * 1_000_000)}
    return {"event": name, "data": data, "timestamp": stamp}


def failure(kind: str, text: str) -> dict[str, object]:
    """An error reply: its class ("GenericError", "CommandNotFound") and what the client sees."""
    return {"error": {"class": kind, "desc": text}}


class JsonStream:
    """Cuts a byte stream into JSON objects; clients need not end them with a newline."""

    def __init__(self, limit: int = MAX_COMMAND) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._scanned = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Add bytes, yield the objects that are whole.

        :raise StreamError: for anything but JSON objects, or one longer than the limit.
        """
        self._buffer += data
        while (end := self._end_of_object()) is not None:
            text = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._scanned = 0
            try:
                yield json.loads(text)
            except (ValueError, RecursionError) as error:
                raise StreamError(f"not JSON: {error}") from error
        if len(self._buffer) > self._limit:
            raise StreamError(f"a command is longer than {self._limit} bytes")

    def _end_of_object(self) -> int | None:
        """Index after the closing brace of the first object, or None while it is incomplete."""
        if self._depth == 0:
            stripped = self._buffer.lstrip()
            self._scanned = len(self._buffer) - len(stripped)
            if stripped and stripped[:1] != b"{":
                raise StreamError("a command must be a JSON object")
        for position in range(self._scanned, len(self._buffer)):
            byte = self._buffer[position]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif byte == ord("\\"):
                    self._escaped = True
                elif byte == ord('"'):
                    self._in_string = False
            elif byte == ord('"'):
                self._in_string = True
            elif byte in b"{[":
                self._depth += 1
            elif byte in b"}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._depth = 0
                    return position + 1
        self._scanned = len(self._buffer)
        return None


class _Client:
    """One connected QMP client: its stream, whether it negotiated, and what it has not read yet."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.stream = JsonStream()
        self.negotiated = False
        self.backlog = bytearray()


class ControlServer:
    """Serves commands on a UNIX socket until `close`.

    Sockets are registered in `selector` with a callable taking the event mask as their data; the
    program's loop calls it.
    """

    def __init__(
        self, selector: selectors.BaseSelector, path: str | Path, commands: Mapping[str, Handler]
    ) -> None:
        """Listen on `path`, open to its owner alone.

        :raise OSError: when the path cannot be bound.
        """
        self._selector = selector
        self._commands: dict[str, Handler] = {**commands, "query-commands": self._query_commands}
        self._clients: set[_Client] = set()
        self._listener = ListeningSocket.bind(Path(path))
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def event(self, name: str, data: Mapping[str, object]) -> None:
        """Tell every client that has negotiated."""
        message = encode(event(name, data))
        for client in [client for client in self._clients if client.negotiated]:
            self._send(client, message)

    def serve_waiting(self) -> None:
        """Serve whoever has come or asked by now, without waiting, and nothing else of the program's loop.

        For a call that keeps the loop from its work longer than clients wait. Not from within a command.
        """
        ours = {self._listener, *(client.connection for client in self._clients)}
        dispatch(self._selector, 0, only=ours)

    def close(self) -> None:
        """Drop every client and remove the socket."""
        for client in list(self._clients):
            self._drop(client)
        if self._listener.fileno() != -1:
            self._selector.unregister(self._listener)
            self._listener.close()

    def _accept(self, _mask: int) -> None:
        connection = self._listener.accept()
        if connection is None:
            return
        client = _Client(connection)
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, lambda mask: self._ready(client, mask))
        self._send(client, encode(greeting()))

    def _ready(self, client: _Client, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush(client)
        if mask & selectors.EVENT_READ and client in self._clients:
            self._receive(client)

    def _receive(self, client: _Client) -> None:
        try:
            data = client.connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        try:
            for message in client.stream.feed(data):
                self._send(client, encode(self._answer(client, message)))
        except StreamError as error:
            self._send(client, encode(failure("GenericError", str(error))))
            self._drop(client)

    def _answer(self, client: _Client, message: dict[str, Any]) -> dict[str, object]:
        reply = self._execute(client, message)
        if "id" in message:
            reply["id"] = message["id"]
        return reply

    def _execute(self, client: _Client, message: dict[str, Any]) -> dict[str, object]:
        name = message.get("execute")
        arguments = message.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return failure("GenericError", 'a command is {"execute": NAME, "arguments": {…}}')
        if not client.negotiated:
            if name != "qmp_capabilities":
                return failure("CommandNotFound", "qmp_capabilities comes first")
            client.negotiated = True
            return {"return": {}}
        if name not in self._commands:
            return failure("CommandNotFound", f"The command {name} has not been found")
        try:
            return {"return": self._commands[name](arguments)}
        except CommandError as error:
            return failure("GenericError", str(error))

    def _query_commands(self, _arguments: Arguments) -> object:
        return [{"name": name} for name in sorted(self._commands)]

    def _send(self, client: _Client, data: bytes) -> None:
        client.backlog += data
        self._flush(client)

    def _flush(self, client: _Client) -> None:
        if client not in self._clients:
            return
        try:
            while client.backlog:
                del client.backlog[: client.connection.send(client.backlog)]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if len(client.backlog) > MAX_BACKLOG:
            self._drop(client)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.backlog else 0)
        key = self._selector.get_key(client.connection)
        if key.events != events:
            self._selector.modify(client.connection, events, key.data)

    def _drop(self, client: _Client) -> None:
        if client in self._clients:
            self._clients.remove(client)
            self._selector.unregister(client.connection)
            client.connection.close()
