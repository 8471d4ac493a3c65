"""Serves one emulated VF as a vfio-user device, to one client at a time.

`Session` answers the messages of one client: it owns what the client gave, memory and eventfds, and takes
it from the VF when the client goes. `VfServer` owns the sockets. The wire format is `datapath.vfio_user`.
A client that breaks the protocol is disconnected; one that asks for what cannot be gets an errno.
"""

import errno
import os
import selectors
import socket
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path

from datapath.descriptors import close_all
from datapath.emulation.engine import MAX_MAPS, Engine
from datapath.emulation.ifcvf import NOTIFY_BAR, Ifcvf
from datapath.listening import ListeningSocket
from datapath.vfio import DeviceFlag, DmaFlag, Irq, IrqFlag, Region, RegionFlag, SetIrqsFlag
from datapath.vfio_user import (
    MAX_FDS,
    Area,
    Capabilities,
    Command,
    Decoder,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    IoFd,
    IrqInfo,
    Message,
    ProtocolError,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    RegionWrites,
    SetIrqs,
    UnmapFlag,
    Version,
)

Log = Callable[[str], None]
#: Region of the doorbells.
DOORBELLS = Region(NOTIFY_BAR)
DOORBELL_SIZE = 2
PAGE = 4096
#: What the device says of itself in VERSION.
CAPABILITIES = Capabilities(max_msg_fds=MAX_FDS, max_dma_maps=MAX_MAPS, write_multiple=True)
#: Commands that descriptors may come with.
WITH_DESCRIPTORS = (Command.DMA_MAP, Command.SET_IRQS)
#: Bytes that are read of one client's socket at a time, a hundred register writes, and how often before it is
#: the others' turn.
READ_SIZE, READS_AT_ONCE = 4096, 4
ASSIGN = SetIrqsFlag.DATA_EVENTFD | SetIrqsFlag.ACTION_TRIGGER
DISABLE = SetIrqsFlag.DATA_NONE | SetIrqsFlag.ACTION_TRIGGER
FIRE = {DISABLE, SetIrqsFlag.DATA_BOOL | SetIrqsFlag.ACTION_TRIGGER}


class RefusedError(Exception):
    """A command that is answered with an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


def _require(condition: bool, number: int = errno.EINVAL) -> None:
    if not condition:
        raise RefusedError(number)


class Session:
    """What one client does to the VF."""

    def __init__(self, device: Ifcvf, engine: Engine, mapped_doorbells: bool, client_fd: int) -> None:
        """Begin, with doorbells that no client before has spoilt or still holds.

        :param client_fd: the client's connection, which stays open until `close`.
        :raise OSError: when descriptors have run out.
        """
        self._device = device
        self._engine = engine
        engine.open_doorbells(mapped_doorbells)
        engine.set_client(client_fd)
        self._negotiated = False
        sizes = device.layout.region_sizes
        self._sizes = {int(region): (region, sizes.get(region, 0)) for region in Region}
        #: ERR and REQ: accepted, never signalled.
        self._other_irqs: dict[int, int] = {}
        self._handlers: dict[int, Callable[[Message], Message]] = {
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.GET_INFO: self._get_info,
            Command.GET_REGION_INFO: self._get_region_info,
            Command.GET_REGION_IO_FDS: self._get_region_io_fds,
            Command.GET_IRQ_INFO: self._get_irq_info,
            Command.SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.REGION_WRITE_MULTI: self._region_writes,
            Command.DEVICE_RESET: self._device_reset,
        }

    def handle(self, message: Message) -> Message:
        """Carry a command out; returns the answer, to be sent if it is wanted.

        :raise ProtocolError: when the conversation cannot go on. Descriptors are taken over in any case.
        """
        taken = False
        try:
            answer = self._answer(message)
            taken = message.command == Command.SET_IRQS and not answer.is_error  # the vectors have them now
            return answer
        finally:
            if not taken:
                for fd in message.fds:
                    os.close(fd)

    def _answer(self, message: Message) -> Message:
        if message.is_reply:
            raise ProtocolError("a reply to a command that was not sent")
        if message.fds and message.command not in WITH_DESCRIPTORS:
            # Those of another, most likely, that was sent in one go with this one: see `Decoder`.
            raise ProtocolError(f"command {message.command} came with descriptors, which it takes none of")
        if not self._negotiated:
            return self._version(message)
        try:
            return self._handlers.get(message.command, self._unknown)(message)
        except RefusedError as refusal:
            return message.error(refusal.errno)
        except ProtocolError:  # a payload that is malformed: the next message may not be
            return message.error(errno.EINVAL)
        except OSError as error:
            return message.error(error.errno or errno.EIO)

    def close(self) -> None:
        """Take back all that the client gave; the VF is as after power-on."""
        self._device.reset()
        self._device.vectors.clear()
        self._engine.unmap_all()
        self._engine.close_doorbells()
        self._engine.set_filter(None)  # it was for this client's guest
        self._engine.set_client(None)
        for fd in self._other_irqs.values():
            os.close(fd)
        self._other_irqs.clear()

    def _version(self, message: Message) -> Message:
        if message.command != Command.VERSION:
            raise ProtocolError(f"command {message.command} before VERSION")
        proposed = Version.unpack(message.payload)
        if proposed.major != Version().major:
            raise ProtocolError(f"the client speaks version {proposed.major}.{proposed.minor}")
        self._negotiated = True
        return message.reply(Version(capabilities=CAPABILITIES).pack())

    def _unknown(self, message: Message) -> Message:
        raise RefusedError(errno.EINVAL if message.command == Command.VERSION else errno.ENOSYS)

    # Memory

    def _dma_map(self, message: Message) -> Message:
        request = DmaMap.unpack(message.payload)
        _require(bool(request.flags & (DmaFlag.READ | DmaFlag.WRITE)) and len(message.fds) <= 1)
        fd = message.fds[0] if message.fds else None
        writable = bool(request.flags & DmaFlag.WRITE)
        self._engine.map(request.address, request.size, fd, request.offset, writable)
        return message.reply()

    def _dma_unmap(self, message: Message) -> Message:
        request = DmaUnmap.unpack(message.payload)
        _require(not request.flags & ~UnmapFlag.ALL, errno.EOPNOTSUPP)
        if request.flags & UnmapFlag.ALL:
            _require(request.address == 0 and request.size == 0)
            self._engine.unmap_all()
        else:
            self._engine.unmap(request.address, request.size)
        return message.reply(request.pack())

    # Regions

    def _get_info(self, message: Message) -> Message:
        DeviceInfo.unpack(message.payload)
        return message.reply(DeviceInfo(DeviceFlag.PCI | DeviceFlag.RESET, len(Region), len(Irq)).pack())

    def _get_region_info(self, message: Message) -> Message:
        request = RegionInfo.unpack(message.payload)
        _require(request.index < len(Region) and request.argsz >= RegionInfo.LAYOUT.size)
        size = self._device.layout.region_sizes.get(Region(request.index), 0)
        flags = RegionFlag.READ | RegionFlag.WRITE if size else RegionFlag(0)
        doorbell_fd = self._engine.doorbell_fd
        if request.index != DOORBELLS or doorbell_fd is None:
            return message.reply(RegionInfo(request.index, flags, size).pack_reply(request.argsz))
        areas = tuple(Area(offset, PAGE) for offset in self._device.doorbell_offsets())
        info = RegionInfo(request.index, flags | RegionFlag.MMAP, size, areas=areas)
        payload = info.pack_reply(request.argsz)
        # The descriptor goes along with the areas only: a client keeps one for each region.
        return message.reply(payload, (doorbell_fd,) if request.argsz >= info.full_size else ())

    def _get_region_io_fds(self, message: Message) -> Message:
        request = RegionIoFds.unpack(message.payload)
        _require(request.index < len(Region) and request.argsz >= RegionIoFds.LAYOUT.size)
        offsets = self._device.doorbell_offsets()
        if request.index != DOORBELLS or self._engine.doorbell_fd is not None:
            offsets = []
        entries = tuple(IoFd(offset, DOORBELL_SIZE, index) for index, offset in enumerate(offsets))
        offer = RegionIoFds(request.index, entries)
        fits = request.argsz >= offer.full_size
        return message.reply(
            offer.pack_reply(request.argsz), self._engine.kick_fds[: len(entries)] if fits else ()
        )

    def _region_read(self, message: Message) -> Message:
        request = RegionAccess.unpack(message.payload)
        region = self._accessed(request.region, request.offset, request.count)
        data = self._device.read(region, request.offset, request.count)
        return message.reply(RegionAccess(request.offset, region, request.count, data).pack())

    def _region_write(self, message: Message) -> Message:
        request = RegionAccess.unpack(message.payload)
        region = self._accessed(request.region, request.offset, request.count)
        if len(request.data) != request.count:
            raise RefusedError(errno.EINVAL)
        self._device.write(region, request.offset, request.data)
        return message.reply(message.payload[: RegionAccess.LAYOUT.size])

    def _region_writes(self, message: Message) -> Message:
        request = RegionWrites.unpack(message.payload)
        for offset, index, data in request.writes:
            self._device.write(self._accessed(index, offset, len(data)), offset, data)
        return message.reply(RegionWrites.COUNT.pack(len(request.writes)))

    def _accessed(self, index: int, offset: int, count: int) -> Region:
        region, size = self._sizes.get(index, (Region.CONFIG, 0))
        if not 0 < count <= size - offset:
            raise RefusedError(errno.EINVAL)
        return region

    # Interrupts

    def _irq_count(self, index: int) -> int:
        """How many interrupts there are of a kind; no INTx, as the interrupt pin is 0."""
        _require(index < len(Irq))
        counts = {Irq.MSIX: len(self._device.vectors), Irq.ERR: 1, Irq.REQ: 1}
        return counts.get(Irq(index), 0)

    def _get_irq_info(self, message: Message) -> Message:
        request = IrqInfo.unpack(message.payload)
        count = self._irq_count(request.index)
        return message.reply(IrqInfo(request.index, IrqFlag.EVENTFD if count else 0, count).pack())

    def _set_irqs(self, message: Message) -> Message:
        request = SetIrqs.unpack(message.payload)
        fds = message.fds
        count = self._irq_count(request.index)
        _require(request.start + request.count <= count and len(fds) in (0, request.count))
        if request.flags == DISABLE and request.count == 0:
            _require(request.start == 0 and not fds)
            self._assign(request.index, 0, (None,) * count)
        elif request.flags == ASSIGN:
            _require(request.count > 0)
            self._assign(request.index, request.start, fds or (None,) * request.count)
        elif request.flags in FIRE and request.index == Irq.MSIX:
            _require(not fds)
            self._fire(request)
        else:  # masking is the client's: it takes the eventfd of a masked vector away
            raise RefusedError(errno.EINVAL)
        return message.reply()

    def _assign(self, index: int, start: int, fds: tuple[int, ...] | tuple[None, ...]) -> None:
        if index == Irq.MSIX:
            self._device.vectors.assign(start, fds)
            return
        for fd in fds:
            if index in self._other_irqs:
                os.close(self._other_irqs.pop(index))
            if fd is not None:
                self._other_irqs[index] = fd

    def _fire(self, request: SetIrqs) -> None:
        """Signal vectors as if the device did: a loopback test."""
        wanted = request.data if request.flags & SetIrqsFlag.DATA_BOOL else b"\1" * request.count
        for vector, on in enumerate(wanted, request.start):
            if on:
                self._device.vectors.signal(vector)

    def _device_reset(self, message: Message) -> Message:
        self._device.reset()
        return message.reply()


class VfServer:
    """The socket of a VF, in a `selectors` loop whose keys' data is called with the event mask."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        path: Path,
        open_session: Callable[[int], Session],
        log: Log,
    ) -> None:
        """Listen.

        :raise OSError: when the path cannot be bound.
        """
        self.path = path
        self._selector = selector
        self._open_session = open_session
        self._log = log
        self._connection: socket.socket | None = None
        self._session: Session | None = None
        self._decoder = Decoder()
        self._backlog: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._listener = ListeningSocket.bind(path)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def attached(self) -> bool:
        """Whether a client is connected."""
        return self._connection is not None

    def close(self) -> None:
        """Disconnect, stop listening, remove the socket."""
        self._disconnect("the NIC ends")
        self._selector.unregister(self._listener)
        self._listener.close()

    def _accept(self, _mask: int) -> None:
        connection = self._listener.accept()
        if connection is None:
            return
        if self._connection is not None:
            # One VF, one owner. Closing at once tells the other more than silence would.
            self._log("a second client was turned away: one is connected")
            connection.close()
            return
        try:
            self._session = self._open_session(connection.fileno())
        except OSError as error:
            self._log(f"a client was turned away: {error.strerror}")
            connection.close()
            return
        self._connection = connection
        self._selector.register(connection, selectors.EVENT_READ, self._ready)
        self._log("a client has connected")

    def _ready(self, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE:
                self._flush()
            if mask & selectors.EVENT_READ:
                self._receive()
        except ProtocolError as error:
            self._disconnect(f"the client broke the protocol: {error}")
        except OSError as error:
            self._disconnect(f"the client is gone: {error.strerror}")
        except Exception as error:
            # A mistake of ours, which one client has found: it must not end the other VFs.
            traceback.print_exc()
            self._disconnect(f"cannot serve the client: {error!r}")

    def _receive(self) -> None:
        """Take messages, until none is left, the client has replies to read first, or others had to wait."""
        assert self._connection is not None
        for _ in range(READS_AT_ONCE):
            if self._backlog:
                return
            try:
                data, fds, flags, _ = socket.recv_fds(
                    self._connection, READ_SIZE, MAX_FDS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            if flags & socket.MSG_CTRUNC:
                close_all(fds)
                raise ProtocolError(f"more than {MAX_FDS} descriptors with one message")
            if not data:
                close_all(fds)
                self._disconnect("the client has disconnected")
                return
            self._carry_out(self._decoder.feed(data, tuple(fds)))
            self._decoder.check()
            if len(data) < READ_SIZE and not fds:
                return  # there is hardly more; if there is, the loop comes back

    def _carry_out(self, messages: list[Message]) -> None:
        """Handle messages, then send the answers: a client that waits does so for the last one."""
        assert self._session is not None
        left = iter(messages)
        answers = bytearray()
        try:
            for message in left:
                answer = self._session.handle(message)
                if not message.wants_reply:
                    continue
                if answer.fds:  # go with what is sent by itself
                    self._answer_with(answers)
                    self._backlog.append((answer.pack(), answer.fds))
                else:
                    answers += answer.pack()
        finally:
            self._answer_with(answers)
            for message in left:
                close_all(message.fds)
            self._flush()

    def _answer_with(self, answers: bytearray) -> None:
        """Move answers without descriptors to those that are to be sent."""
        if answers:
            self._backlog.append((bytes(answers), ()))
            answers.clear()

    def _flush(self) -> None:
        """Send what there is to send; what the client does not take now, later."""
        assert self._connection is not None
        while self._backlog:
            data, fds = self._backlog[0]
            try:
                if fds:
                    sent = socket.send_fds(self._connection, [data], fds, socket.MSG_NOSIGNAL)
                else:
                    sent = self._connection.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                break
            if sent < len(data):
                self._backlog[0] = (data[sent:], ())
            else:
                self._backlog.popleft()
        events = selectors.EVENT_WRITE if self._backlog else selectors.EVENT_READ
        if self._selector.get_key(self._connection).events != events:
            self._selector.modify(self._connection, events, self._ready)

    def _disconnect(self, reason: str) -> None:
        if self._connection is None or self._session is None:
            return
        self._log(reason)
        self._selector.unregister(self._connection)
        self._session.close()
        self._session = None
        self._connection.close()
        self._connection = None
        self._backlog.clear()
        for fd in self._decoder.abandon():
            os.close(fd)
