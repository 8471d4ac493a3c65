"""A PCI function behind a vfio-user socket: the client side of QEMU's docs/interop/vfio-user.rst.

Owns the connection and every descriptor and mapping that came over it. `Channel` sends commands and
waits for replies; `VfioUserFunction` is what a driver sees. The wire format is `datapath.vfio_user`.

Each command has a deadline. What has come by then counts, however late we look: the deadline is the
device's, not that of a thread which was not let run. A device that misses it is not waited for again until
the late reply has come, so that whoever gives such a device up is not held for a deadline per command.

Register writes are posted, without a reply, as QEMU's are: to start a device takes dozens of them, while a
guest stands still. One that the device refuses is not heard of; whether a register holds what was written is
the driver's to read. What a driver does `together` travels in as few messages of the socket as its order
allows, and is waited for once.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import select
import socket
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from datapath.bus.function import WIDTHS, PciFunction, RegionDescription
from datapath.descriptors import close_all, closed_early
from datapath.native._native import ffi
from datapath.native.relay import Doorbell
from datapath.pci import CONFIG_SIZE
from datapath.vdpa import DeviceError, DeviceLostError, HostNotifier, MemoryRegion
from datapath.vfio import DeviceFlag, DmaFlag, Irq, IrqFlag, Region, SetIrqsFlag
from datapath.vfio_user import (
    MAJOR,
    MAX_FDS,
    MINOR,
    Area,
    Capabilities,
    Command,
    Decoder,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    HeaderFlag,
    IoFd,
    IrqInfo,
    Message,
    ProtocolError,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    SetIrqs,
    Version,
)

#: Seconds that a device has to answer a command.
DEADLINE = 5.0
#: Bytes to read of the socket at a time.
READ_SIZE = 4096
#: Seconds to look whether the answer to a command that missed its deadline has come by now.
LATE_TIME = 0.001
#: Flag of an ioeventfd that signals only when one certain value is written (linux/kvm.h).
KVM_IOEVENTFD_FLAG_DATAMATCH = 1


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

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Send what comes with what is waited for next, or at the end. After a failure it is forgotten."""
        self._collected = []
        try:
            yield
            self._send_collected()
        finally:
            self._collected = None
            self._forget_asked()

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
        elif not message.fds:
            self._collected.append(message)
        else:
            self._send_collected()  # descriptors go with a message that is sent by itself
            self._send([message])

    def _send_collected(self) -> None:
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

    def _forget_asked(self) -> None:
        """Drop the answers that nobody has taken, or that come yet; but one that is late is awaited."""
        for message in self._answers.values():
            close_all(message.fds)
        self._answers.clear()
        late = self._late
        self._asked = {} if late is None else {late.id: late.command}

    def _unread(self) -> int:
        """Bytes that have come and wait to be read."""
        count = fcntl.ioctl(self._socket, termios.FIONREAD, bytes(4))
        return int.from_bytes(count, sys.byteorder)

    def _missed(self, request: Message) -> DeviceError:
        """A command has missed its deadline: note it, and return the error to raise."""
        self._late = request
        self._forget_asked()
        return DeviceError(f"{self.name}: no answer to {_name(request)} within {self._deadline:g} s")

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


class VfioUserFunction(PciFunction):
    """The PCI function that a vfio-user device serves."""

    def __init__(self, path: str, deadline: float = DEADLINE) -> None:
        """Connect, agree on a version and learn what the function has.

        :param deadline: seconds that the device has to answer each command.
        :raise DeviceError: when nobody listens on `path`, or it is no PCI function.
        """
        self._resources = contextlib.ExitStack()
        self._channel = Channel(path, deadline)
        self.name = self._channel.name
        self._resources.callback(self._channel.close)
        self._regions: dict[Region, RegionInfo] = {}
        self._region_fds: dict[Region, int] = {}
        self._areas: dict[tuple[Region, Area], int] = {}
        self._io_fds: dict[Region, list[tuple[IoFd, int]]] = {}
        self._dma_maps: set[tuple[int, int]] = set()
        #: Of what is done together: commands whose answers are due at the end of it; None otherwise.
        self._due: list[Message] | None = None
        try:
            self._limits = self._negotiate()
            with self._understanding(Command.GET_INFO):
                self._info = DeviceInfo.unpack(
                    self._channel.command_without_fds(Command.GET_INFO, DeviceInfo().pack())
                )
            if not self._info.flags & DeviceFlag.PCI:
                raise DeviceError(f"{self.name}: is not a PCI function")
            self._lost = self._resources.enter_context(select.epoll())
            self._lost.register(self._channel, select.EPOLLRDHUP)
        except BaseException:
            self.close()
            raise

    # Regions

    def region(self, index: Region) -> RegionDescription:
        return RegionDescription.of(self._region(index))

    def read(self, index: Region, offset: int, width: int) -> int:
        self._check_access(index, offset, width)
        return int.from_bytes(self._read(index, offset, width), "little")

    def write(self, index: Region, offset: int, width: int, value: int) -> None:
        self._check_access(index, offset, width)
        request = RegionAccess(offset, index, width, value.to_bytes(width, "little"))
        self._channel.post(Command.REGION_WRITE, request.pack())

    def read_later(self, index: Region, offset: int, width: int) -> Callable[[], int]:
        if self._due is None:
            return super().read_later(index, offset, width)
        self._check_access(index, offset, width)
        request = self._channel.ask(Command.REGION_READ, RegionAccess(offset, index, width).pack())
        return lambda: int.from_bytes(self._data_of(self._channel.answer(request), width), "little")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        self._due = []
        try:
            with self._channel.collecting():
                yield
                for request in self._due:
                    close_all(self._channel.answer(request).fds)
        finally:
            self._due = None

    def config_space(self) -> bytes:
        return self._read(Region.CONFIG, 0, CONFIG_SIZE)

    # Interrupts

    def irq_count(self, index: Irq) -> int:
        if index >= self._info.irqs:
            return 0
        with self._understanding(Command.GET_IRQ_INFO):
            payload = self._channel.command_without_fds(Command.GET_IRQ_INFO, IrqInfo(index).pack())
            info = IrqInfo.unpack(payload)
        return info.count if info.flags & IrqFlag.EVENTFD else 0

    def set_eventfds(self, index: Irq, start: int, fds: Sequence[int | None]) -> None:
        # A message either takes eventfds away or carries one for each interrupt of its range.
        for given, run in groupby(enumerate(fds, start), lambda entry: entry[1] is not None):
            entries = list(run)
            step = max(self._limits.max_msg_fds, 1) if given else len(entries)
            for at in range(0, len(entries), step):
                part = entries[at : at + step]
                request = SetIrqs(
                    SetIrqsFlag.DATA_EVENTFD | SetIrqsFlag.ACTION_TRIGGER, index, part[0][0], len(part)
                )
                given_fds = tuple(fd for _, fd in part if fd is not None)
                if self._due is None:
                    self._channel.command_without_fds(Command.SET_IRQS, request.pack(), given_fds)
                else:
                    self._due.append(self._channel.ask(Command.SET_IRQS, request.pack(), given_fds))

    def disable_irqs(self, index: Irq) -> None:
        request = SetIrqs(SetIrqsFlag.DATA_NONE | SetIrqsFlag.ACTION_TRIGGER, index)
        self._channel.command_without_fds(Command.SET_IRQS, request.pack())

    # Memory

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        return ((0, (1 << 64) - 1),)  # vfio-user knows no IOMMU that could want less

    def dma_map(self, memory: MemoryRegion) -> None:
        where = f"{self.name}: memory {memory.guest_address:#x}+{memory.size:#x}"
        if len(self._dma_maps) >= self._limits.max_dma_maps:
            raise DeviceError(
                f"{where}: {len(self._dma_maps) + 1} mappings are needed,"
                f" the device allows {self._limits.max_dma_maps}"
            )
        page = self._page_size()
        if (memory.guest_address | memory.size | memory.fd_offset) % page:
            raise DeviceError(
                f"{where} at file offset {memory.fd_offset:#x}: the device needs multiples of {page} bytes"
            )
        request = DmaMap(DmaFlag.READ | DmaFlag.WRITE, memory.fd_offset, memory.guest_address, memory.size)
        self._channel.command_without_fds(Command.DMA_MAP, request.pack(), (memory.fd,))
        self._dma_maps.add((memory.guest_address, memory.size))

    def dma_unmap(self, memory: MemoryRegion) -> None:
        request = DmaUnmap(0, memory.guest_address, memory.size)
        self._channel.command_without_fds(Command.DMA_UNMAP, request.pack())
        self._dma_maps.discard((memory.guest_address, memory.size))

    # The whole function

    def reset(self) -> None:
        if self._info.flags & DeviceFlag.RESET:
            self._channel.command_without_fds(Command.DEVICE_RESET)

    def doorbell(self, index: Region, offset: int, value: int) -> Doorbell:
        for entry, fd in self._offered_io_fds(index):
            matches = not entry.flags & KVM_IOEVENTFD_FLAG_DATAMATCH or entry.datamatch == value
            if entry.type == IoFd.IOEVENTFD and entry.offset == offset and entry.size in (0, 2) and matches:
                return Doorbell(fd=fd)
        info = self._region(index)
        for at, size in self.region(index).mappable:
            if at <= offset and offset + 2 <= at + size:
                return Doorbell(address=self._map(index, info, Area(at, size)) + offset - at)
        raise DeviceError(
            f"{self.name}: no doorbell at {index.name}+{offset:#x}: the device offers neither an eventfd"
            " (GET_REGION_IO_FDS) nor a mappable area there, and kicks do not share the command socket"
        )

    def page(self, index: Region, offset: int) -> HostNotifier | None:
        info = self._region(index)
        fd = self._region_fds.get(index)
        if fd is None or not self.region(index).has_page(offset):
            return None
        return HostNotifier(fd, info.offset + offset, mmap.PAGESIZE)

    @property
    def lost_fd(self) -> int:
        return self._lost.fileno()

    def close(self) -> None:
        self._resources.close()

    # Inside

    @contextlib.contextmanager
    def _understanding(self, command: Command) -> Iterator[None]:
        """A reply whose content is malformed ends the connection."""
        try:
            yield
        except ProtocolError as error:
            raise self._channel.lose(f"malformed answer to {command.name}: {error}") from error

    def _negotiate(self) -> Capabilities:
        try:
            payload = self._channel.command_without_fds(Command.VERSION, Version().pack())
        except DeviceLostError as error:
            raise DeviceError(
                f"{self.name}: hung up before it told its version; does another client hold it?"
            ) from error
        with self._understanding(Command.VERSION):
            version = Version.unpack(payload)
        if version.major != MAJOR or version.minor > MINOR:
            raise DeviceError(
                f"{self.name}: the device speaks vfio-user {version.major}.{version.minor},"
                f" this side {MAJOR}.{MINOR}"
            )
        return version.capabilities

    def _read(self, index: Region, offset: int, size: int) -> bytes:
        request = RegionAccess(offset, index, size)
        return self._data_of(self._channel.command(Command.REGION_READ, request.pack()), size)

    def _data_of(self, reply: Message, size: int) -> bytes:
        """What a REGION_READ has read."""
        close_all(reply.fds)
        with self._understanding(Command.REGION_READ):
            data = RegionAccess.unpack(reply.payload).data
            if len(data) != size:
                raise ProtocolError(f"{len(data)} bytes instead of {size}")
        return data

    def _region(self, index: Region) -> RegionInfo:
        if index not in self._regions:
            self._regions[index] = self._ask_region(index)
        return self._regions[index]

    def _ask_region(self, index: Region) -> RegionInfo:
        """Ask once for the size of the answer, and again if it carries more than the fixed part."""
        if index >= self._info.regions:
            return RegionInfo(index)
        info = RegionInfo(index)
        while True:
            request = RegionInfo(index, argsz=info.argsz)
            with self._understanding(Command.GET_REGION_INFO):
                reply = self._channel.command(Command.GET_REGION_INFO, request.pack())
                self._keep_region_fd(index, reply.fds)
                info = RegionInfo.unpack(reply.payload)
                if info.argsz > request.argsz and request.argsz > RegionInfo.LAYOUT.size:
                    raise ProtocolError(
                        f"{info.argsz} bytes needed, after {request.argsz} had been asked for"
                    )
            if info.argsz <= request.argsz:
                return info

    def _keep_region_fd(self, index: Region, fds: tuple[int, ...]) -> None:
        """A device may send the region's descriptor with either answer, or with both."""
        for fd in fds:
            if index in self._region_fds:
                os.close(fd)
            else:
                self._region_fds[index] = fd
                self._resources.callback(os.close, fd)

    def _check_access(self, index: Region, offset: int, width: int) -> None:
        if width not in WIDTHS or offset % width or not 0 <= offset <= self._region(index).size - width:
            raise DeviceError(f"{self.name}: no {width}-byte register at {index.name}+{offset:#x}")

    def _page_size(self) -> int:
        """Alignment of a mapping: the smallest page that the device knows, at least one of ours."""
        smallest = self._limits.pgsizes & -self._limits.pgsizes
        return max(smallest, mmap.PAGESIZE)

    def _offered_io_fds(self, index: Region) -> list[tuple[IoFd, int]]:
        if index not in self._io_fds:
            self._io_fds[index] = self._ask_io_fds(index)
        return self._io_fds[index]

    def _ask_io_fds(self, index: Region) -> list[tuple[IoFd, int]]:
        offered = RegionIoFds(index)
        while True:
            request = RegionIoFds(index, argsz=offered.argsz)
            try:
                reply = self._channel.command(Command.GET_REGION_IO_FDS, request.pack())
            except RefusedError:
                return []  # an optional command
            for fd in reply.fds:
                self._resources.callback(os.close, fd)
            with self._understanding(Command.GET_REGION_IO_FDS):
                offered = RegionIoFds.unpack(reply.payload)
                if offered.argsz <= request.argsz:
                    return [(entry, reply.fds[entry.fd_index]) for entry in _valid(offered, reply.fds)]
                if request.argsz > RegionIoFds(index).argsz:
                    raise ProtocolError(
                        f"{offered.argsz} bytes needed, after {request.argsz} had been asked for"
                    )

    def _map(self, index: Region, info: RegionInfo, area: Area) -> int:
        """The address of a mapped area."""
        if (index, area) not in self._areas:
            fd = self._region_fds.get(index)
            if fd is None:
                raise DeviceError(
                    f"{self.name}: {index.name} is said to be mappable, but came without descriptor"
                )
            try:
                mapping = mmap.mmap(fd, area.size, offset=info.offset + area.offset)
            except (OSError, ValueError, OverflowError) as error:
                raise DeviceError(
                    f"{self.name}: cannot map {index.name}+{area.offset:#x}, {area.size:#x} bytes: {error}"
                ) from error
            self._resources.callback(mapping.close)
            self._areas[index, area] = int(ffi.cast("uintptr_t", ffi.from_buffer(mapping)))
        return self._areas[index, area]


def _valid(offered: RegionIoFds, fds: tuple[int, ...]) -> list[IoFd]:
    """The entries that have a descriptor.

    :raise ProtocolError: for one whose descriptor did not come along.
    """
    entries = [entry for entry in offered.entries if entry.fd_index != IoFd.NO_FD]
    for entry in entries:
        if entry.fd_index >= len(fds):
            raise ProtocolError(f"entry for descriptor {entry.fd_index} of {len(fds)}")
    return entries
