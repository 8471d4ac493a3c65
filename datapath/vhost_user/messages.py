"""The vhost-user wire format, without I/O: bytes and descriptors in, typed messages out, and back.

Whatever decides whether a message is well formed lives in this file, as one table (`LAYOUTS`): its
payload, how many descriptors come with it, whether it is always answered. What a message means is
`backend.py`'s. Source: QEMU docs/interop/vhost-user.rst ("Message Specification", "Front-end message
types"); all integers have the host's byte order.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from datapath.descriptors import close_all

HEADER = struct.Struct("=III")
#: Largest payload of a message that we know: a device configuration of 256 bytes behind its header.
MAX_PAYLOAD = 12 + 256
#: Most descriptors that one message carries: one a memory region.
MAX_FDS = 8
MAX_REGIONS = 8

VERSION = 0x1
VERSION_MASK = 0x3
REPLY = 0x4
NEED_REPLY = 0x8

#: In the payload of SET_VRING_KICK, CALL and ERR: no descriptor comes with it.
NO_FD = 0x100


class ProtocolError(Exception):
    """The front-end broke the protocol; the text says how. The connection cannot go on."""


class Request(IntEnum):
    """Ids of the front-end's messages."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(IntEnum):
    """Ids of the back-end's own messages, on the channel that SET_BACKEND_REQ_FD gives."""

    VRING_HOST_NOTIFIER_MSG = 3


class ProtocolFeature(IntEnum):
    """Bit numbers of the protocol features."""

    MQ = 0
    LOG_SHMFD = 1
    RARP = 2
    REPLY_ACK = 3
    NET_MTU = 4
    BACKEND_REQ = 5
    CROSS_ENDIAN = 6
    CRYPTO_SESSION = 7
    PAGEFAULT = 8
    CONFIG = 9
    BACKEND_SEND_FD = 10
    HOST_NOTIFIER = 11
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    INBAND_NOTIFICATIONS = 14
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16
    XEN_MMAP = 17
    SHARED_OBJECT = 18
    DEVICE_STATE = 19


@dataclass(frozen=True)
class VringState:
    """A ring and a number: its size, its base, whether it is enabled."""

    index: int
    num: int


@dataclass(frozen=True)
class VringAddress:
    """Where a ring's parts are, in the front-end's address space; `log` is guest physical."""

    index: int
    flags: int
    descriptors: int
    used: int
    avail: int
    log: int


@dataclass(frozen=True)
class VringFd:
    """A ring's eventfd, which comes as the message's descriptor; without one, the ring is polled."""

    index: int
    has_fd: bool


@dataclass(frozen=True)
class Region:
    """A memory region as the front-end describes it; sizes and addresses in bytes."""

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int


@dataclass(frozen=True)
class LogArea:
    """Where the dirty log lies in the descriptor that comes with it, in bytes."""

    size: int
    offset: int


@dataclass(frozen=True)
class VringArea:
    """Where a ring's doorbell lies in the descriptor that comes with it, in bytes; without one, nowhere."""

    index: int
    has_fd: bool
    size: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Codec:
    """How one payload type is written: both directions, for bytes of a length already checked."""

    unpack: Callable[[bytes], Any]
    pack: Callable[[Any], bytes]
    #: Exact payload size in bytes; None when the payload says itself.
    size: int | None


_U64 = struct.Struct("=Q")
_STATE = struct.Struct("=II")
_ADDRESS = struct.Struct("=IIQQQQ")
_LOG = struct.Struct("=QQ")
_REGION = struct.Struct("=QQQQ")
_TABLE_HEAD = struct.Struct("=II")
_SLOT_HEAD = struct.Struct("=Q")
_AREA = struct.Struct("=QQQ")


def _unpack_table(data: bytes) -> tuple[Region, ...]:
    if len(data) < _TABLE_HEAD.size:
        raise ProtocolError(f"a memory table of {len(data)} bytes has no header")
    count, _ = _TABLE_HEAD.unpack_from(data)
    expected = _TABLE_HEAD.size + count * _REGION.size
    if not count <= MAX_REGIONS or len(data) != expected:
        raise ProtocolError(
            f"a memory table of {len(data)} bytes claims {count} regions (0 to {MAX_REGIONS})"
        )
    return tuple(Region(*fields) for fields in _REGION.iter_unpack(data[_TABLE_HEAD.size :]))


def _pack_table(regions: Sequence[Region]) -> bytes:
    return _TABLE_HEAD.pack(len(regions), 0) + b"".join(map(_pack_region, regions))


def _pack_region(region: Region) -> bytes:
    return _REGION.pack(region.guest_address, region.size, region.user_address, region.mmap_offset)


def _unpack_vring_fd(data: bytes) -> VringFd:
    (word,) = _U64.unpack(data)
    if word & ~0x1FF:
        raise ProtocolError(f"ring word {word:#x} has bits above the 'no descriptor' bit")
    return VringFd(word & 0xFF, not word & NO_FD)


def _record(form: struct.Struct, kind: type, *names: str) -> Codec:
    """The codec of a structure whose fields are a dataclass's, `names` giving their order on the wire."""
    return Codec(
        unpack=lambda data: kind(**dict(zip(names, form.unpack(data), strict=True))),
        pack=lambda value: form.pack(*(getattr(value, name) for name in names)),
        size=form.size,
    )


EMPTY = Codec(lambda data: None, lambda value: b"", 0)
U64 = Codec(lambda data: _U64.unpack(data)[0], _U64.pack, _U64.size)
STATE = _record(_STATE, VringState, "index", "num")
ADDRESS = _record(_ADDRESS, VringAddress, "index", "flags", "descriptors", "used", "avail", "log")
LOG = _record(_LOG, LogArea, "size", "offset")
VRING_FD = Codec(
    _unpack_vring_fd, lambda value: _U64.pack(value.index | (0 if value.has_fd else NO_FD)), _U64.size
)
MEMORY_TABLE = Codec(_unpack_table, _pack_table, None)
MEMORY_SLOT = Codec(
    lambda data: Region(*_REGION.unpack_from(data, _SLOT_HEAD.size)),
    lambda value: _SLOT_HEAD.pack(0) + _pack_region(value),
    _SLOT_HEAD.size + _REGION.size,
)
#: The payload of a message that we do not serve: kept as it came.
RAW = Codec(bytes, bytes, None)


@dataclass(frozen=True)
class Layout:
    """How a request looks on the wire."""

    payload: Codec
    #: The reply that always comes; None where one comes only when it is asked for (REPLY_ACK).
    reply: Codec | None = None
    #: How many descriptors may come with it, given its payload.
    fds: Callable[[Any], tuple[int, ...]] = lambda payload: (0,)


def _one(_payload: object) -> tuple[int, ...]:
    return (1,)


def _none_or_one(_payload: object) -> tuple[int, ...]:
    return (0, 1)


def _one_unless_polled(payload: VringFd) -> tuple[int, ...]:
    return (int(payload.has_fd),)


def _one_each(regions: Sequence[Region]) -> tuple[int, ...]:
    return (len(regions),)


#: Every request that the back-end serves. GET_CONFIG and the others that are absent are `Request`s all
#: the same: see `EXPECT_REPLY`.
LAYOUTS: Mapping[int, Layout] = {
    Request.GET_FEATURES: Layout(EMPTY, reply=U64),
    Request.SET_FEATURES: Layout(U64),
    Request.SET_OWNER: Layout(EMPTY),
    Request.RESET_OWNER: Layout(EMPTY),
    Request.SET_MEM_TABLE: Layout(MEMORY_TABLE, fds=_one_each),
    # A descriptor, and with it a reply, comes only with LOG_SHMFD.
    Request.SET_LOG_BASE: Layout(LOG, reply=U64, fds=_none_or_one),
    Request.SET_LOG_FD: Layout(EMPTY, fds=_one),
    Request.SET_VRING_NUM: Layout(STATE),
    Request.SET_VRING_ADDR: Layout(ADDRESS),
    Request.SET_VRING_BASE: Layout(STATE),
    Request.GET_VRING_BASE: Layout(STATE, reply=STATE),
    Request.SET_VRING_KICK: Layout(VRING_FD, fds=_one_unless_polled),
    Request.SET_VRING_CALL: Layout(VRING_FD, fds=_one_unless_polled),
    Request.SET_VRING_ERR: Layout(VRING_FD, fds=_one_unless_polled),
    Request.GET_PROTOCOL_FEATURES: Layout(EMPTY, reply=U64),
    Request.SET_PROTOCOL_FEATURES: Layout(U64),
    Request.GET_QUEUE_NUM: Layout(EMPTY, reply=U64),
    Request.SET_VRING_ENABLE: Layout(STATE),
    # The address is the first six bytes of the number, as it lies in memory.
    Request.SEND_RARP: Layout(U64),
    Request.NET_SET_MTU: Layout(U64),
    Request.SET_BACKEND_REQ_FD: Layout(EMPTY, fds=_one),
    Request.GET_MAX_MEM_SLOTS: Layout(EMPTY, reply=U64),
    Request.ADD_MEM_REG: Layout(MEMORY_SLOT, fds=_one),
    # Older QEMU sends a descriptor with it, which the specification does not ask for: tolerated, closed.
    Request.REM_MEM_REG: Layout(MEMORY_SLOT, fds=_none_or_one),
    Request.SET_STATUS: Layout(U64),
    Request.GET_STATUS: Layout(EMPTY, reply=U64),
}

#: Requests that we do not serve and whose sender waits for an answer of their own kind: it would wait for
#: ever if they were ignored, so they end the connection.
EXPECT_REPLY: frozenset[int] = frozenset(
    {
        Request.IOTLB_MSG,
        Request.GET_CONFIG,
        Request.CREATE_CRYPTO_SESSION,
        Request.POSTCOPY_ADVISE,
        Request.POSTCOPY_END,
        Request.GET_INFLIGHT_FD,
        Request.GET_SHARED_OBJECT,
        Request.SET_DEVICE_STATE_FD,
        Request.CHECK_DEVICE_STATE,
    }
)


def request_name(request: int) -> str:
    """A request's name for people; its number when it has none."""
    try:
        return Request(request).name
    except ValueError:
        return f"request {request}"


def encode_area(area: VringArea) -> bytes:
    """The bytes of VRING_HOST_NOTIFIER_MSG, which asks for an answer."""
    word = area.index | (0 if area.has_fd else NO_FD)
    body = _AREA.pack(word, area.size, area.offset)
    return HEADER.pack(BackendRequest.VRING_HOST_NOTIFIER_MSG, VERSION | NEED_REPLY, len(body)) + body


def decode_area(data: bytes) -> VringArea:
    """What a front-end makes of the bytes of VRING_HOST_NOTIFIER_MSG.

    :raise ProtocolError: when they are none.
    """
    header = (BackendRequest.VRING_HOST_NOTIFIER_MSG, VERSION | NEED_REPLY, _AREA.size)
    if len(data) != HEADER.size + _AREA.size or HEADER.unpack_from(data) != header:
        raise ProtocolError(f"not VRING_HOST_NOTIFIER_MSG: {data.hex()}")
    word, size, offset = _AREA.unpack_from(data, HEADER.size)
    return VringArea(word & 0xFF, not word & NO_FD, size, offset)


#: Bytes of a front-end's answer to a message of the back-end's.
ANSWER_SIZE = HEADER.size + _U64.size


def encode_answer(request: BackendRequest, result: int) -> bytes:
    """The bytes of a front-end's answer: 0 when all is well."""
    return HEADER.pack(request, VERSION | REPLY, _U64.size) + _U64.pack(result)


def decode_answer(request: BackendRequest, data: bytes) -> int:
    """What the front-end answers to a message of the back-end's: 0 when all is well.

    :raise ProtocolError: when it is no answer to it.
    """
    if HEADER.unpack_from(data) != (request, VERSION | REPLY, _U64.size) or len(data) != ANSWER_SIZE:
        raise ProtocolError(f"not the answer to {request.name}: {data.hex()}")
    (result,) = _U64.unpack_from(data, HEADER.size)
    return int(result)


@dataclass
class Message:
    """One message. It owns the descriptors that came with it until somebody takes them."""

    request: int
    #: What `LAYOUTS` says for the request; the bytes as they came for one that is not there.
    payload: Any = None
    need_reply: bool = False
    fds: list[int] = field(default_factory=list)

    def take_fd(self) -> int:
        """Hand the first descriptor over to the caller, who closes it from now on."""
        return self.fds.pop(0)

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        close_all(self.fds)
        self.fds.clear()


class Decoder:
    """Cuts what a front-end sends into messages, many at a time.

    Descriptors end what one read gives (unix(7): ancillary data are a barrier), so they belong to the
    message that begins last in it, as long as no sender puts another one behind it in the same call. QEMU and
    DPDK send each message by itself.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()
        #: Of the message that begins first in the bytes, and of the one that begins last.
        self._fds: list[int] = []
        self._last_fds: list[int] = []

    @property
    def idle(self) -> bool:
        """Whether no message is half read."""
        return not self._bytes and not self._fds

    def feed(self, data: bytes, fds: Iterable[int] = ()) -> Iterator[Message]:
        """Take what one read brought; yields the messages that are whole now.

        The decoder owns the descriptors until their message is yielded; see `close`.

        :raise ProtocolError: when a message is malformed, once those before it have been yielded.
        """
        self._bytes += data
        self._last_fds = list(fds)
        return self._cut()

    def _cut(self) -> Iterator[Message]:
        while len(self._bytes) >= HEADER.size:
            request, flags, size = HEADER.unpack_from(self._bytes)
            end = HEADER.size + size
            _check_header(request, flags, size)
            if len(self._bytes) < end:
                break
            body = bytes(self._bytes[HEADER.size : end])
            del self._bytes[:end]
            if not self._bytes:
                self._take_last()
            payload = _decode_payload(request, body, len(self._fds))
            fds, self._fds = self._fds, []
            yield Message(request, payload, bool(flags & NEED_REPLY), fds)
        if self._bytes:
            self._take_last()

    def _take_last(self) -> None:
        """The message that begins last is the first one now."""
        self._fds += self._last_fds
        self._last_fds = []
        if len(self._fds) > MAX_FDS:
            raise ProtocolError(f"more than {MAX_FDS} descriptors with one message")

    def close(self) -> None:
        """Close the descriptors of messages that were not yielded."""
        for fds in (self._fds, self._last_fds):
            close_all(fds)
            fds.clear()


def _check_header(request: int, flags: int, size: int) -> None:
    """:raise ProtocolError: for a header that no front-end sends."""
    if flags & VERSION_MASK != VERSION or flags & REPLY:
        raise ProtocolError(f"{request_name(request)}: flags {flags:#x} are no version 1 request")
    if size > MAX_PAYLOAD:
        raise ProtocolError(f"{request_name(request)}: payload of {size} bytes, over {MAX_PAYLOAD}")


def _decode_payload(request: int, data: bytes, fd_count: int) -> Any:
    layout = LAYOUTS.get(request)
    if layout is None:
        return data
    name = request_name(request)
    if layout.payload.size is not None and len(data) != layout.payload.size:
        raise ProtocolError(f"{name}: payload of {len(data)} bytes instead of {layout.payload.size}")
    payload = layout.payload.unpack(data)
    allowed = layout.fds(payload)
    if fd_count not in allowed:
        raise ProtocolError(f"{name}: {fd_count} descriptors instead of {' or '.join(map(str, allowed))}")
    return payload


def encode_request(message: Message) -> bytes:
    """The bytes of a front-end's message; its descriptors travel beside them with the first byte."""
    layout = LAYOUTS.get(message.request)
    body = (layout.payload if layout else RAW).pack(message.payload)
    return HEADER.pack(message.request, VERSION | (NEED_REPLY if message.need_reply else 0), len(body)) + body


def encode_reply(request: int, payload: Any) -> bytes:
    """The bytes of a back-end's answer: of the request's own kind, else the u64 of REPLY_ACK."""
    layout = LAYOUTS.get(request)
    body = ((layout.reply if layout else None) or U64).pack(payload)
    return HEADER.pack(request, VERSION | REPLY, len(body)) + body


def decode_reply(request: int, data: bytes) -> Any:
    """What a front-end makes of the bytes that answer `request`.

    :raise ProtocolError: when they are not a well-formed answer to it.
    """
    if len(data) < HEADER.size:
        raise ProtocolError(f"a reply of {len(data)} bytes")
    answered, flags, size = HEADER.unpack_from(data)
    codec = ((layout := LAYOUTS.get(request)) and layout.reply) or U64
    body = data[HEADER.size :]
    if (answered, flags, size) != (request, VERSION | REPLY, len(body)) or size != codec.size:
        raise ProtocolError(f"{request_name(request)}: not its reply: {data.hex()}")
    return codec.unpack(body)
