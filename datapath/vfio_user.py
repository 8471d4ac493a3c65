"""The vfio-user wire format, for the client (a bus) and the device (an emulated NIC) alike.

A sans-I/O codec: bytes and descriptors in, typed messages out, and back. `Decoder` cuts a stream into
`Message`s; each payload is a frozen dataclass with `pack` and `unpack`. Whatever is malformed raises
`ProtocolError` and nothing else. Layouts and numbers are those of QEMU's docs/interop/vfio-user.rst;
indices and flags that are the kernel's stand in `datapath.vfio`.

Owns no socket and closes no descriptor: see `Message.fds` and `Decoder.abandon`.
"""

import json
import struct
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import NamedTuple, Self

from datapath.vfio import RegionFlag, SetIrqsFlag


class ProtocolError(ValueError):
    """Bytes or descriptors that are not vfio-user."""


class Command(IntEnum):
    """Message types that a PCI client and device exchange; any other number is answered ENOSYS."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    GET_INFO = 4
    GET_REGION_INFO = 5
    GET_REGION_IO_FDS = 6
    GET_IRQ_INFO = 7
    SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15


class HeaderFlag(IntFlag):
    """Flags of the message header; the low four bits are the type: 0 a command, 1 a reply."""

    REPLY = 0x01
    NO_REPLY = 0x10
    ERROR = 0x20


#: Messages that are not answered.
UNANSWERED = int(HeaderFlag.REPLY | HeaderFlag.NO_REPLY)


class UnmapFlag(IntFlag):
    """Flags of DMA_UNMAP."""

    GET_DIRTY_BITMAP = 1
    ALL = 2


#: Protocol version spoken here. QEMU refuses a reply above the 0.0 that it proposes.
MAJOR, MINOR = 0, 0
HEADER = struct.Struct("=HHIII")
#: Descriptors that one message may carry, as announced in VERSION.
MAX_FDS = 16
#: Bytes that one REGION_READ or REGION_WRITE may move, as announced in VERSION.
MAX_DATA = 1 << 20
#: Largest message: the data of a REGION_WRITE behind its header and fixed part.
MAX_MESSAGE = HEADER.size + 16 + MAX_DATA


class Message(NamedTuple):
    """One message as it travels."""

    id: int
    command: int
    flags: int = 0
    #: Positive errno of an error reply.
    errno: int = 0
    payload: bytes = b""
    #: Descriptors that came along; they belong to whoever takes the message.
    fds: tuple[int, ...] = ()

    @property
    def is_reply(self) -> bool:
        return bool(self.flags & HeaderFlag.REPLY)

    @property
    def is_error(self) -> bool:
        return bool(self.flags & HeaderFlag.ERROR)

    @property
    def wants_reply(self) -> bool:
        return not self.flags & UNANSWERED

    def pack(self) -> bytes:
        """The bytes to send; `fds` go along with the first of them."""
        size = HEADER.size + len(self.payload)
        return HEADER.pack(self.id, self.command, size, self.flags, self.errno) + self.payload

    def reply(self, payload: bytes = b"", fds: tuple[int, ...] = ()) -> "Message":
        """The answer to this command."""
        return Message(self.id, self.command, HeaderFlag.REPLY, 0, payload, fds)

    def error(self, errno: int) -> "Message":
        """The refusal of this command."""
        return Message(self.id, self.command, HeaderFlag.REPLY | HeaderFlag.ERROR, errno)


class Decoder:
    """Cuts a byte stream into messages, many at a time.

    Descriptors end what one read gives (unix(7): ancillary data are a barrier), so that they belong to the
    message which comes last in it, as long as no sender puts another one behind it in the same call. QEMU,
    libvfio-user and this project send each message that has descriptors by itself; a command that takes none
    and has some is refused, `emulation.server`.
    """

    def __init__(self, max_message: int = MAX_MESSAGE, max_fds: int = MAX_FDS) -> None:
        self._max_message = max_message
        self._max_fds = max_fds
        self._buffer = bytearray()
        self._fds: tuple[int, ...] = ()

    def feed(self, data: bytes, fds: tuple[int, ...] = ()) -> list[Message]:
        """Take what one read gave and return the messages that it completes.

        :param fds: descriptors that came along; they belong to the last message that `data` has bytes of.
        :raise ProtocolError: for a header that is none, or too many bytes or descriptors for one
            message; the stream is then of no more use, see `abandon`. Complete messages before the
            bad one are returned first, and `check` tells of it.
        """
        self._buffer += data
        messages: list[Message] = []
        try:
            at = self._cut(messages)
        except ProtocolError:
            self._fds += fds
            raise
        del self._buffer[:at]
        if fds and messages and not self._buffer:
            messages[-1] = messages[-1]._replace(fds=messages[-1].fds + fds)
        else:
            self._fds += fds
        if fds and len(messages[-1].fds if messages and not self._buffer else self._fds) > self._max_fds:
            self._fds = (*(fd for message in messages for fd in message.fds), *self._fds)
            raise ProtocolError(f"more than {self._max_fds} descriptors with one message")
        return messages

    def check(self) -> None:
        """See that what is left after the last messages can become one; to be called before the next read.

        :raise ProtocolError: as `feed`.
        """
        if len(self._buffer) >= HEADER.size:
            _, _, size, flags, _ = HEADER.unpack_from(self._buffer)
            self._check(size, flags)

    def abandon(self) -> tuple[int, ...]:
        """Forget an incomplete message; returns its descriptors, for the caller to close."""
        fds, self._fds = self._fds, ()
        self._buffer.clear()
        return fds

    def _cut(self, messages: list[Message]) -> int:
        """Add the complete messages of the buffer to `messages`; returns where they end."""
        at, end = 0, len(self._buffer)
        while end - at >= HEADER.size:
            number, command, size, flags, error = HEADER.unpack_from(self._buffer, at)
            try:
                self._check(size, flags)
            except ProtocolError:
                if messages:
                    return at  # what follows is told of when these have been handled
                raise
            if end - at < size:
                break
            payload = bytes(self._buffer[at + HEADER.size : at + size])
            messages.append(Message(number, command, flags, error, payload, self._fds))
            self._fds = ()
            at += size
        return at

    def _check(self, size: int, flags: int) -> None:
        if not HEADER.size <= size <= self._max_message:
            raise ProtocolError(f"message of {size} bytes, allowed are {HEADER.size} to {self._max_message}")
        if flags & ~0x3F or flags & 0xF > HeaderFlag.REPLY:
            raise ProtocolError(f"message flags {flags:#x}")


def _exactly(layout: struct.Struct, payload: bytes, what: str) -> tuple[int, ...]:
    """Unpack a payload that is one fixed structure."""
    if len(payload) != layout.size:
        raise ProtocolError(f"{what}: {len(payload)} bytes instead of {layout.size}")
    return layout.unpack(payload)


def _prefix(layout: struct.Struct, payload: bytes, what: str) -> tuple[int, ...]:
    """Unpack the fixed structure that a payload starts with."""
    if len(payload) < layout.size:
        raise ProtocolError(f"{what}: {len(payload)} bytes, at least {layout.size} needed")
    return layout.unpack_from(payload)


@dataclass(frozen=True)
class Capabilities:
    """What a peer says of itself in VERSION; the defaults hold for what it leaves out."""

    max_msg_fds: int = 1
    max_data_xfer_size: int = MAX_DATA
    max_dma_maps: int = 65535
    pgsizes: int = 4096
    #: Whether REGION_WRITE_MULTI is understood.
    write_multiple: bool = False


@dataclass(frozen=True)
class Version:
    """VERSION, command and reply: numbers and a JSON text that ends in NUL."""

    major: int = MAJOR
    minor: int = MINOR
    capabilities: Capabilities = field(default=Capabilities(max_msg_fds=MAX_FDS))

    LAYOUT = struct.Struct("=HH")

    def pack(self) -> bytes:
        # Compact: QEMU receives the reply into a buffer of its own request's size (about 200 bytes).
        text = json.dumps({"capabilities": vars(self.capabilities)}, separators=(",", ":"))
        return self.LAYOUT.pack(self.major, self.minor) + text.encode() + b"\0"

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        major, minor = _prefix(cls.LAYOUT, payload, "VERSION")
        return cls(major, minor, cls._capabilities(payload[cls.LAYOUT.size :]))

    @staticmethod
    def _capabilities(text: bytes) -> Capabilities:
        if not text:
            return Capabilities()
        if not text.endswith(b"\0"):
            raise ProtocolError("VERSION: the JSON text does not end in NUL")
        try:
            document = json.loads(text.rstrip(b"\0").decode())
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"VERSION: not JSON: {error}") from error
        values = document.get("capabilities", {}) if isinstance(document, dict) else None
        if not isinstance(values, dict):
            raise ProtocolError("VERSION: JSON without an object of capabilities")
        known = {name: values[name] for name in vars(Capabilities()) if name in values}
        for name, value in known.items():
            wanted = type(getattr(Capabilities(), name))
            if type(value) is not wanted or not 0 <= value < 1 << 64:
                raise ProtocolError(f"VERSION: capability {name} is {value!r}")
        return Capabilities(**known)


@dataclass(frozen=True)
class DmaMap:
    """DMA_MAP: memory at `address` is that of the message's descriptor from `offset` on.

    Without a descriptor the device may reach the range by messages only.
    """

    flags: int
    offset: int
    address: int
    size: int

    LAYOUT = struct.Struct("=IIQQQ")

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.LAYOUT.size, self.flags, self.offset, self.address, self.size)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _, flags, offset, address, size = _exactly(cls.LAYOUT, payload, "DMA_MAP")
        return cls(flags, offset, address, size)


@dataclass(frozen=True)
class DmaUnmap:
    """DMA_UNMAP, command and reply."""

    flags: int
    address: int
    size: int

    LAYOUT = struct.Struct("=IIQQ")

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.LAYOUT.size, self.flags, self.address, self.size)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        # More may follow: room for a dirty bitmap, which a client asks for by flag.
        _, flags, address, size = _prefix(cls.LAYOUT, payload, "DMA_UNMAP")
        return cls(flags, address, size)


@dataclass(frozen=True)
class DeviceInfo:
    """GET_INFO, command (all zero but `argsz`) and reply."""

    flags: int = 0
    regions: int = 0
    irqs: int = 0

    LAYOUT = struct.Struct("=IIII")

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.LAYOUT.size, self.flags, self.regions, self.irqs)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _, flags, regions, irqs = _exactly(cls.LAYOUT, payload, "GET_INFO")
        return cls(flags, regions, irqs)


class Area(NamedTuple):
    """A range of a region, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class RegionInfo:
    """GET_REGION_INFO, command (`index` and `argsz`) and reply.

    `areas` is the sparse-mmap capability: the only ranges that may be mapped, at `offset` plus their
    own in the reply's descriptor. None: no such capability.
    """

    index: int
    flags: int = 0
    size: int = 0
    offset: int = 0
    areas: tuple[Area, ...] | None = None
    #: Bytes of reply that the client has room for; in a reply, those that the whole answer needs.
    argsz: int = 32

    LAYOUT = struct.Struct("=IIIIQQ")
    CAPABILITY = struct.Struct("=HHI")
    SPARSE = struct.Struct("=II")
    AREA = struct.Struct("=QQ")
    SPARSE_MMAP = 1

    @property
    def full_size(self) -> int:
        """Bytes of the reply with its capabilities."""
        if self.areas is None:
            return self.LAYOUT.size
        return self.LAYOUT.size + self.CAPABILITY.size + self.SPARSE.size + self.AREA.size * len(self.areas)

    def pack(self) -> bytes:
        """The command: no capabilities, `argsz` as given."""
        return self.LAYOUT.pack(self.argsz, self.flags, self.index, 0, self.size, self.offset)

    def pack_reply(self, room: int) -> bytes:
        """The reply to a client with room for so many bytes; without capabilities if they do not fit.

        The flag goes with them: QEMU refuses one without a place (hw/vfio-user/device.c), and asks again
        by `argsz` alone.
        """
        if self.areas is None or room < self.full_size:
            return self.LAYOUT.pack(self.full_size, self.flags, self.index, 0, self.size, self.offset)
        flags = self.flags | RegionFlag.CAPS
        parts = [
            self.LAYOUT.pack(self.full_size, flags, self.index, self.LAYOUT.size, self.size, self.offset),
            self.CAPABILITY.pack(self.SPARSE_MMAP, 1, 0),
            self.SPARSE.pack(len(self.areas), 0),
            *(self.AREA.pack(area.offset, area.size) for area in self.areas),
        ]
        return b"".join(parts)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        argsz, flags, index, capability, size, offset = _prefix(cls.LAYOUT, payload, "GET_REGION_INFO")
        areas = cls._sparse_areas(payload, capability) if flags & RegionFlag.CAPS and capability else None
        return cls(index, flags, size, offset, areas, argsz)

    @classmethod
    def _sparse_areas(cls, payload: bytes, at: int) -> tuple[Area, ...] | None:
        """Walk the chain of capabilities; each must lie behind the one before."""
        floor = cls.LAYOUT.size
        while at:
            if at < floor or at + cls.CAPABILITY.size > len(payload):
                raise ProtocolError(f"GET_REGION_INFO: capability at {at} of {len(payload)} bytes")
            number, _, following = cls.CAPABILITY.unpack_from(payload, at)
            floor = at + cls.CAPABILITY.size
            if number == cls.SPARSE_MMAP:
                return cls._unpack_areas(payload[floor:])
            at = following
        return None

    @classmethod
    def _unpack_areas(cls, body: bytes) -> tuple[Area, ...]:
        count, _ = _prefix(cls.SPARSE, body, "sparse mmap capability")
        if len(body) < cls.SPARSE.size + count * cls.AREA.size:
            raise ProtocolError(f"sparse mmap capability: {count} areas in {len(body)} bytes")
        ends = cls.SPARSE.size + count * cls.AREA.size
        return tuple(Area(*pair) for pair in cls.AREA.iter_unpack(body[cls.SPARSE.size : ends]))


@dataclass(frozen=True)
class IoFd:
    """One way to write a region without a message: an entry of GET_REGION_IO_FDS."""

    offset: int
    size: int
    #: Which of the reply's descriptors.
    fd_index: int
    type: int = 0
    flags: int = 0
    #: Value that the write must have, if `flags` says so (KVM_IOEVENTFD_FLAG_DATAMATCH).
    datamatch: int = 0

    LAYOUT = struct.Struct("=QQIIIIQ")
    #: What libvfio-user (include/vfio-user.h) sends in its place, with fields for shadow memory before
    #: the last; `RegionIoFds` tells them apart by their size.
    LIBVFIO_USER_LAYOUT = struct.Struct("=QQIIIIQQ")
    #: `fd_index` of an entry without a descriptor, which libvfio-user sends.
    NO_FD = 0xFFFFFFFF
    #: `type` of an eventfd that is written in place of the register.
    IOEVENTFD = 0

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            self.offset, self.size, self.fd_index, self.type, self.flags, 0, self.datamatch
        )

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        long = len(payload) == cls.LIBVFIO_USER_LAYOUT.size
        layout = cls.LIBVFIO_USER_LAYOUT if long else cls.LAYOUT
        offset, size, fd_index, kind, flags, *_, datamatch = _exactly(layout, payload, "ioeventfd entry")
        return cls(offset, size, fd_index, kind, flags, datamatch)


@dataclass(frozen=True)
class RegionIoFds:
    """GET_REGION_IO_FDS, command (`index` and `argsz`) and reply."""

    index: int
    entries: tuple[IoFd, ...] = ()
    #: Bytes of reply that the client has room for; in a reply, those that the whole answer needs.
    argsz: int = 16 + 40 * MAX_FDS
    #: Entries that there are, in a reply; `entries` is empty when they do not fit.
    count: int = 0

    LAYOUT = struct.Struct("=IIII")

    def pack(self) -> bytes:
        """The command."""
        return self.LAYOUT.pack(self.argsz, 0, self.index, 0)

    @property
    def full_size(self) -> int:
        """Bytes of the reply with its entries."""
        return self.LAYOUT.size + IoFd.LAYOUT.size * len(self.entries)

    def pack_reply(self, room: int) -> bytes:
        """The reply to a client with room for so many bytes; without entries if they do not fit."""
        fixed = self.LAYOUT.pack(self.full_size, 0, self.index, len(self.entries))
        if room < self.full_size:
            return fixed
        return fixed + b"".join(entry.pack() for entry in self.entries)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        argsz, _, index, count = _prefix(cls.LAYOUT, payload, "GET_REGION_IO_FDS")
        body = payload[cls.LAYOUT.size :]
        if not body:
            return cls(index, (), argsz, count)
        strides = (IoFd.LAYOUT.size, IoFd.LIBVFIO_USER_LAYOUT.size)
        stride = next((size for size in strides if len(body) == count * size), 0)
        if not stride:
            raise ProtocolError(f"GET_REGION_IO_FDS: {count} entries in {len(body)} bytes")
        entries = (IoFd.unpack(body[at : at + stride]) for at in range(0, len(body), stride))
        return cls(index, tuple(entries), argsz, count)


@dataclass(frozen=True)
class IrqInfo:
    """GET_IRQ_INFO, command (`index`) and reply."""

    index: int
    flags: int = 0
    count: int = 0

    LAYOUT = struct.Struct("=IIII")

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.LAYOUT.size, self.flags, self.index, self.count)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _, flags, index, count = _exactly(cls.LAYOUT, payload, "GET_IRQ_INFO")
        return cls(index, flags, count)


@dataclass(frozen=True)
class SetIrqs:
    """SET_IRQS; eventfds travel as the message's descriptors, not in `data`.

    With DATA_EVENTFD, no descriptor at all takes the eventfds of the range away.
    """

    flags: int
    index: int
    start: int = 0
    count: int = 0
    data: bytes = b""

    LAYOUT = struct.Struct("=IIIII")

    def pack(self) -> bytes:
        size = self.LAYOUT.size + len(self.data)
        return self.LAYOUT.pack(size, self.flags, self.index, self.start, self.count) + self.data

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _, flags, index, start, count = _prefix(cls.LAYOUT, payload, "SET_IRQS")
        data = payload[cls.LAYOUT.size :]
        if len(data) != (count if flags & SetIrqsFlag.DATA_BOOL else 0):
            raise ProtocolError(f"SET_IRQS: {len(data)} bytes of data, flags {flags:#x}, count {count}")
        return cls(flags, index, start, count, data)


@dataclass(frozen=True)
class RegionAccess:
    """REGION_READ and REGION_WRITE, command and reply; a read's command and a write's reply lack `data`."""

    offset: int
    region: int
    count: int
    data: bytes = b""

    LAYOUT = struct.Struct("=QII")

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.offset, self.region, self.count) + self.data

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        offset, region, count = _prefix(cls.LAYOUT, payload, "region access")
        data = payload[cls.LAYOUT.size :]
        if data and len(data) != count:
            raise ProtocolError(f"region access: {len(data)} bytes of data, count {count}")
        if count > MAX_DATA:
            raise ProtocolError(f"region access: {count} bytes, at most {MAX_DATA}")
        return cls(offset, region, count, data)


class RegionWrite(NamedTuple):
    """One of `RegionWrites`: 1 to 8 bytes."""

    offset: int
    region: int
    data: bytes


@dataclass(frozen=True)
class RegionWrites:
    """REGION_WRITE_MULTI: register writes, carried out in their order; the reply says how many there were."""

    writes: tuple[RegionWrite, ...]

    COUNT = struct.Struct("=Q")
    LAYOUT = struct.Struct("=QII8s")

    def pack(self) -> bytes:
        entries = [self.LAYOUT.pack(offset, region, len(data), data) for offset, region, data in self.writes]
        return self.COUNT.pack(len(entries)) + b"".join(entries)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        (count,) = _prefix(cls.COUNT, payload, "region writes")
        if len(payload) != cls.COUNT.size + count * cls.LAYOUT.size:
            raise ProtocolError(f"region writes: {len(payload)} bytes for {count} writes")
        writes = []
        for offset, region, size, data in cls.LAYOUT.iter_unpack(payload[cls.COUNT.size :]):
            if not 0 < size <= len(data):
                raise ProtocolError(f"region writes: one of {size} bytes")
            writes.append(RegionWrite(offset, region, data[:size]))
        return cls(tuple(writes))
