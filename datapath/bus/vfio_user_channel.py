"""A connection to a vfio-user device: sends commands, and waits for replies.

Owns the connection, and the descriptors of replies that nobody has taken. The wire format is
`datapath.vfio_user`.

Each command has a deadline. What has come by then counts, however late we look: the deadline is the
device's, not that of a thread which was not let run. A device that misses it is not waited for again until
the late reply has come, so that whoever gives such a device up is not held for a deadline per command.

Register writes are posted, without a reply, as QEMU's are: to start a device takes dozens of them, while a
guest stands still. What is collected travels in as few messages of the socket as its order allows.
"""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import termios
import time
from collections.abc import Collection, Iterator, Sequence

from datapath.descriptors import close_all, closed_early
from datapath.vdpa import DeviceError, DeviceLostError
from datapath.vfio_user import (
    MAX_FDS,
    Command,
    Decoder,
    HeaderFlag,
    Message,
    ProtocolError,
    RegionWrite,
    RegionWrites,
)

#: Seconds that a device has to answer a command.
DEADLINE = 5.0
#: Bytes to read of the socket at a time.
READ_SIZE = 4096
#: Seconds to look whether the answer to a command that missed its deadline has come by now.
LATE_TIME = 0.001
#: Register writes that go in one message at most; QEMU's is 200.
MAX_WRITES = 200


class RefusedError(DeviceError):
    """The device answered a command with an error."""


class Channel:
    """One connection: commands out, their replies in, one at a time."""

    def __init__(self, path: str, deadline: float = DEADLINE) -> None:
        """Connect.

        :raise DeviceError: when nobody listens there.
        """
        self.name = f"vfio-user={path}"
        self._deadline = deadline
        self._decoder = Decoder()
        self._next_id = 0
        #: What waits to be sent with what comes next; None while everything is sent at once.
        self._collected: list[Message] | None = None
        #: Register writes that wait to be sent as one message, after what is collected.
        self._writes: list[RegionWrite] = []
        #: Answers that are asked for later: the commands by id, and those that have come.
        self._asked: dict[int, int] = {}
        self._answers: dict[int, Message] = {}
        #: The command that missed its deadline, while its reply has not come.
        self._late: Message | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(deadline)
            self._socket.connect(path)
            self._socket = socket.socket(fileno=closed_early(self._socket.detach()))
        except OSError as error:
            self._socket.close()
            reason = error.strerror or str(error)
            raise DeviceError(f"{self.name}: cannot connect: {reason}; is the device running?") from error

    def fileno(self) -> int:
        return self._socket.fileno()

    def command(self, command: Command, payload: bytes = b"", fds: tuple[int, ...] = ()) -> Message:
        """Send a command and return its reply; the reply's descriptors are the caller's.

        :raise RefusedError: when the device answers with an error.
        :raise DeviceError: when it misses the deadline.
        :raise DeviceLostError: when the connection is gone.
        """
        return self.answer(self.ask(command, payload, fds))

    def ask(self, command: Command, payload: bytes = b"", fds: tuple[int, ...] = ()) -> Message:
        """Send a command, or collect it; its reply is to be had from `answer`.

        :raise DeviceError: when one before it has missed its deadline.
        :raise DeviceLostError: when the connection is gone, or the device takes nothing.
        """
        request = Message(self._number(), command, 0, 0, payload, fds)
        self._asked[request.id] = command
        self._issue(request)
        return request

    def answer(self, request: Message) -> Message:
        """The reply to what was asked, once; raises what `command` does."""
        self._send_collected()
        if request.id not in self._asked and request.id not in self._answers:
            raise self._unanswered(request)  # given up meanwhile
        reply = self._await(request, time.monotonic() + self._deadline)
        if reply.is_error:
            close_all(reply.fds)
            raise RefusedError(f"{self.name}: {_name(request)} refused: {os.strerror(reply.errno)}")
        return reply

    def post(self, command: Command, payload: bytes = b"") -> None:
        """Send a command that is not answered; it is carried out before those that follow.

        :raise DeviceError: when one before it has missed its deadline.
        :raise DeviceLostError: when the connection is gone, or the device takes nothing.
        """
        self._issue(Message(self._number(), command, HeaderFlag.NO_REPLY, 0, payload))

    def post_write(self, write: RegionWrite) -> None:
        """Post a register write, while commands are collected, together with those that follow it at once.

        For a device that takes several in a message; raises nothing.
        """
        self._writes.append(write)
        if len(self._writes) == MAX_WRITES:
            self._collect_writes()

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Send what comes with what is waited for next, or at the end. After a failure it is forgotten."""
        before = {*self._asked, *self._answers}
        self._collected = []
        try:
            yield
            self._send_collected()
        except BaseException:
            self._forget_asked(but=before)
            raise
        finally:
            self._collected = None
            self._writes.clear()

    def command_without_fds(self, command: Command, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        """Like `command`, for replies that carry no descriptors: returns the payload."""
        reply = self.command(command, payload, fds)
        close_all(reply.fds)
        return reply.payload

    def close(self) -> None:
        self._forget_asked()
        close_all(self._decoder.abandon())
        self._socket.close()

    def lose(self, reason: str) -> DeviceLostError:
        """Give the connection up (the descriptor stays, hung up) and return the error to raise."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        return DeviceLostError(f"{self.name}: {reason}")

    def _number(self) -> int:
        self._next_id = (self._next_id + 1) & 0xFFFF
        return self._next_id

    def _issue(self, message: Message) -> None:
        if self._late is not None:
            close_all(self._await(self._late, time.monotonic() + LATE_TIME).fds)
        if self._collected is None:
            self._send([message])
            return
        self._collect_writes()
        if not message.fds:
            self._collected.append(message)
        else:
            self._send_collected()  # descriptors go with a message that is sent by itself
            self._send([message])

    def _collect_writes(self) -> None:
        if self._writes and self._collected is not None:
            payload = RegionWrites(tuple(self._writes)).pack()
            self._writes.clear()
            command = Command.REGION_WRITE_MULTI
            self._collected.append(Message(self._number(), command, HeaderFlag.NO_REPLY, 0, payload))

    def _send_collected(self) -> None:
        self._collect_writes()
        if self._collected:
            messages, self._collected = self._collected, []
            self._send(messages)

    def _send(self, messages: Sequence[Message]) -> None:
        """Send messages in one go; only one that is alone may have descriptors."""
        data = b"".join([message.pack() for message in messages])
        last = messages[-1]
        try:
            self._socket.settimeout(self._deadline)
            if last.fds:
                sent = socket.send_fds(self._socket, [data], last.fds)
                data = data[sent:]
            self._socket.sendall(data)
        except TimeoutError as error:
            # Part of a message may have gone: nothing that follows would be understood.
            raise self.lose(f"does not take {_name(last)}") from error
        except OSError as error:
            raise self.lose(f"connection lost at {_name(last)}: {error.strerror}") from error

    def _await(self, request: Message, deadline: float) -> Message:
        """The reply to `request`; whatever else arrives meanwhile is kept, refused or dropped."""
        had_come: int | None = None
        while request.id not in self._answers:
            left = deadline - time.monotonic()
            if left <= 0:
                if had_come is None:
                    had_come = self._unread()
                elif had_come <= 0:
                    raise self._missed(request)  # also by a device that sends, but not this
            taken, messages = self._receive(request, max(left, 0))
            had_come = None if had_come is None else had_come - taken
            for message in messages:
                if message.is_reply and self._asked.get(message.id) == message.command:
                    self._answers[message.id] = message
                    del self._asked[message.id]
                    continue
                close_all(message.fds)
                if message.wants_reply:
                    # DMA_READ and DMA_WRITE: guest memory is given as descriptors instead.
                    self._send([message.error(errno.ENOSYS)])
        if self._late is request:
            self._late = None
        return self._answers.pop(request.id)

    def _forget_asked(self, but: Collection[int] = ()) -> None:
        """Drop the answers that nobody has taken, or that come yet; but one that is late is awaited."""
        for number in self._answers.keys() - but:
            close_all(self._answers.pop(number).fds)
        kept = {*but} if self._late is None else {*but, self._late.id}
        self._asked = {number: command for number, command in self._asked.items() if number in kept}

    def _unanswered(self, request: Message) -> DeviceError:
        return DeviceError(f"{self.name}: no answer to {_name(request)} within {self._deadline:g} s")

    def _unread(self) -> int:
        """Bytes that have come and wait to be read."""
        count = fcntl.ioctl(self._socket, termios.FIONREAD, bytes(4))
        return int.from_bytes(count, sys.byteorder)

    def _missed(self, request: Message) -> DeviceError:
        """A command has missed its deadline: note it, and return the error to raise."""
        self._late = request
        self._forget_asked()
        return self._unanswered(request)

    def _receive(self, request: Message, wait: float) -> tuple[int, list[Message]]:
        """Read once; the number of bytes, and the messages that they complete.

        :param wait: seconds for something to come; 0: what is not there yet has missed the deadline.
        """
        try:
            self._decoder.check()
            self._socket.settimeout(wait)
            data, fds, _, _ = socket.recv_fds(self._socket, READ_SIZE, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            return 0, []  # the last look comes after it
        except BlockingIOError as error:
            raise self._missed(request) from error
        except OSError as error:
            raise self.lose(f"connection lost at {_name(request)}: {error.strerror}") from error
        except ProtocolError as error:
            raise self._misunderstood(request, error) from error
        if not data:
            close_all(fds)
            raise self.lose(f"connection closed by the device at {_name(request)}")
        try:
            return len(data), self._decoder.feed(data, tuple(fds))
        except ProtocolError as error:
            raise self._misunderstood(request, error) from error

    def _misunderstood(self, request: Message, error: ProtocolError) -> DeviceLostError:
        return self.lose(f"the answer to {_name(request)} is not vfio-user: {error}")


def _name(message: Message) -> str:
    """A command's name, for messages of errors."""
    try:
        return Command(message.command).name
    except ValueError:
        return f"command {message.command}"
