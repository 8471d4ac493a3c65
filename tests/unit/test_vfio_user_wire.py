"""The vfio-user codec: layouts, bounds, and that nothing but ProtocolError comes out of it."""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.vfio import Irq, Region, RegionFlag, SetIrqsFlag
from datapath.vfio_user import (
    HEADER,
    MAX_DATA,
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
    RegionWrite,
    RegionWrites,
    SetIrqs,
    Version,
)

# What QEMU 10.2's vfio-user-pci sends, per docs/interop/vfio-user.rst and hw/vfio-user/proxy.c.
QEMU_JSON = (
    b'{"capabilities": {"max_msg_fds": 16, "max_data_xfer_size": 1048576, "max_dma_maps": 65535, '
    b'"pgsizes": 4096, "migration": {"pgsize": 4096, "max_bitmap_size": 268435456}, '
    b'"write_multiple": true}}\0'
)


def test_version_of_qemu_is_understood() -> None:
    version = Version.unpack(struct.pack("=HH", 0, 0) + QEMU_JSON)
    assert version.capabilities == Capabilities(max_msg_fds=16, write_multiple=True)


def test_version_reply_fits_the_buffer_of_qemu() -> None:
    reply = Message(0, Command.VERSION).reply(Version().pack())
    assert len(reply.pack()) <= 214


def test_version_without_json_has_the_defaults() -> None:
    assert Version.unpack(bytes(4)).capabilities == Capabilities(max_msg_fds=1)


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b"nonsense\0",
        b"[]\0",
        b'{"capabilities": []}\0',
        b'{"capabilities": {"max_msg_fds": "many"}}\0',
        b'{"capabilities": {"max_msg_fds": true}}\0',
        b'{"capabilities": {"max_msg_fds": -1}}\0',
        b"\xff\0",
        b"[" * 100000 + b"\0",
        b"1" * 10000 + b"\0",
    ],
)
def test_bad_version_is_refused(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        Version.unpack(bytes(4) + text)


PAYLOADS = [
    (DmaMap(3, 0x1000, 1 << 40, 0x200000), 32),
    (DmaUnmap(0, 1 << 40, 0x200000), 24),
    (DeviceInfo(3, 9, 5), 16),
    (RegionInfo(Region.BAR2, 3, 0x4000, 0), 32),
    (RegionIoFds(Region.BAR2, argsz=96), 16),
    (IoFd(0x1000, 2, 1), 40),
    (IrqInfo(Irq.MSIX, 1, 4), 16),
    (SetIrqs(SetIrqsFlag.DATA_BOOL | SetIrqsFlag.ACTION_TRIGGER, Irq.MSIX, 1, 2, b"\0\1"), 22),
    (RegionAccess(0x14, Region.BAR0, 1, b"\x0f"), 17),
    (RegionWrites((RegionWrite(2, 0, b"\x0f"), RegionWrite(8, 1, b"12345678"))), 56),
]


@pytest.mark.parametrize(("value", "size"), PAYLOADS)
def test_payload_survives_the_wire(value: DmaMap, size: int) -> None:
    packed = value.pack()
    assert len(packed) == size
    assert type(value).unpack(packed) == value


@pytest.mark.parametrize(("value", "size"), PAYLOADS)
def test_short_payload_is_refused(value: DmaMap, size: int) -> None:
    with pytest.raises(ProtocolError):
        type(value).unpack(value.pack()[: min(size, 16) - 1])


def test_layouts_are_those_of_the_specification() -> None:
    assert DmaMap(1, 2, 3, 4).pack() == struct.pack("=IIQQQ", 32, 1, 2, 3, 4)
    assert RegionAccess(8, 7, 2, b"ab").pack() == struct.pack("=QII", 8, 7, 2) + b"ab"
    assert RegionWrites((RegionWrite(8, 7, b"ab"),)).pack() == struct.pack("=QQII8s", 1, 8, 7, 2, b"ab")
    assert IoFd(1, 2, 3).pack() == struct.pack("=QQIIIIQ", 1, 2, 3, 0, 0, 0, 0)
    assert Message(5, Command.GET_INFO).error(errno.EINVAL).pack() == struct.pack(
        "=HHIII", 5, 4, 16, 0x21, 22
    )


def test_sparse_areas_need_room_in_the_reply() -> None:
    info = RegionInfo(
        2, RegionFlag.READ | RegionFlag.MMAP, 0x4000, 0, (Area(0, 0x3000), Area(0x3000, 0x1000))
    )
    small = RegionInfo.unpack(info.pack_reply(32))
    assert (small.argsz, small.areas) == (32 + 16 + 32, None)
    assert not small.flags & RegionFlag.CAPS
    full = RegionInfo.unpack(info.pack_reply(small.argsz))
    assert full.areas == info.areas


@pytest.mark.parametrize("at", [1, 31, 48, 1 << 31])
def test_capability_outside_the_reply_is_refused(at: int) -> None:
    with pytest.raises(ProtocolError):
        RegionInfo.unpack(RegionInfo.LAYOUT.pack(48, RegionFlag.CAPS, 0, at, 0, 0) + bytes(8))


@pytest.mark.parametrize("count", [0, 2, (1 << 64) - 1])
def test_writes_are_as_many_as_said(count: int) -> None:
    payload = RegionWrites((RegionWrite(0, 0, b"abcd"),)).pack()
    with pytest.raises(ProtocolError, match=f"32 bytes for {count} writes"):
        RegionWrites.unpack(struct.pack("=Q", count) + payload[8:])


@pytest.mark.parametrize("size", [0, 9])
def test_each_write_has_one_to_eight_bytes(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"one of {size} bytes"):
        RegionWrites.unpack(struct.pack("=QQII8x", 1, 0, 0, size))


def test_capability_chain_cannot_loop() -> None:
    fixed = RegionInfo.LAYOUT.pack(64, RegionFlag.CAPS, 0, 32, 0, 0)
    with pytest.raises(ProtocolError):
        RegionInfo.unpack(fixed + RegionInfo.CAPABILITY.pack(2, 1, 32) + bytes(24))


def test_io_fds_need_room_in_the_reply() -> None:
    offered = RegionIoFds(2, (IoFd(0, 2, 0), IoFd(0x1000, 2, 1)))
    small = RegionIoFds.unpack(offered.pack_reply(16))
    assert (small.argsz, small.count, small.entries) == (96, 2, ())
    assert RegionIoFds.unpack(offered.pack_reply(96)).entries == offered.entries


def test_eventfds_do_not_travel_in_the_data_of_set_irqs() -> None:
    with pytest.raises(ProtocolError):
        SetIrqs.unpack(SetIrqs(SetIrqsFlag.DATA_EVENTFD, Irq.MSIX, 0, 1, bytes(4)).pack())


@pytest.mark.parametrize("size", [1, 20, 4096])
def test_the_descriptors_of_messages_are_kept_apart(size: int) -> None:
    """As the kernel gives them: with the last bytes of a read, whatever that read can take."""
    ours, theirs = socket.socketpair()
    sent = [os.eventfd(0) for _ in range(3)]
    decoder = Decoder()
    found: list[Message] = []
    with ours, theirs:
        for number, fds in enumerate([(), (sent[0],), (), (), (sent[1], sent[2]), ()]):
            socket.send_fds(theirs, [Message(number, Command.DMA_MAP, payload=bytes(32)).pack()], fds)
        while len(found) < 6:
            data, received, _, _ = socket.recv_fds(ours, size, 8)
            found += decoder.feed(data, tuple(received))
    try:
        assert [(message.id, len(message.fds)) for message in found] == [
            (number, count) for number, count in enumerate([0, 1, 0, 0, 2, 0])
        ]
    finally:
        for fd in [*sent, *(fd for message in found for fd in message.fds)]:
            os.close(fd)


@pytest.mark.parametrize(
    ("size", "flags"),
    [(15, 0), (0, 0), (0xFFFFFFFF, 0), (MAX_DATA + 33, 0), (16, 2), (16, 0x40)],
)
def test_bad_header_ends_the_stream(size: int, flags: int) -> None:
    decoder = Decoder()
    with pytest.raises(ProtocolError):
        decoder.feed(HEADER.pack(1, 1, size, flags, 0), (5,))
    assert decoder.abandon() == (5,)


def test_messages_before_a_bad_header_are_not_lost() -> None:
    decoder = Decoder()
    decoder.feed(Message(1, 4).pack()[:8], (5,))
    assert [m.fds for m in decoder.feed(Message(1, 4).pack()[8:] + bytes(16))] == [(5,)]
    with pytest.raises(ProtocolError):
        decoder.check()
    with pytest.raises(ProtocolError):
        decoder.feed(b"")


def test_too_many_descriptors_end_the_stream() -> None:
    decoder = Decoder(max_fds=2)
    decoder.feed(b"\0", (3, 4))
    with pytest.raises(ProtocolError):
        decoder.feed(b"\0", (5,))
    assert decoder.abandon() == (3, 4, 5)


UNPACKERS: list[Callable[[bytes], object]] = [
    *(kind.unpack for kind in (Version, DmaMap, DmaUnmap, DeviceInfo, RegionInfo)),
    *(kind.unpack for kind in (IoFd, RegionIoFds, IrqInfo, SetIrqs, RegionAccess, RegionWrites)),
]


@given(st.binary(max_size=200), st.sampled_from(UNPACKERS))
def test_any_payload_is_understood_or_refused(payload: bytes, unpack: Callable[[bytes], object]) -> None:
    with contextlib.suppress(ProtocolError):
        unpack(payload)


@given(st.binary(max_size=120), st.integers(8, 200))
def test_any_region_chain_is_understood_or_refused(body: bytes, at: int) -> None:
    fixed = RegionInfo.LAYOUT.pack(200, RegionFlag.CAPS, 0, at, 0, 0)
    with contextlib.suppress(ProtocolError):
        RegionInfo.unpack(fixed + body)


CHUNK = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda size, flags, body: HEADER.pack(1, 9, size, flags, 0) + body,
        st.integers(0, 64),
        st.sampled_from([0, 0x01, 0x10, 0x21, 0x02]),
        st.binary(max_size=48),
    ),
)


@given(st.lists(st.tuples(CHUNK, st.lists(st.integers(3, 99), max_size=3))))
def test_any_stream_loses_no_descriptor(chunks: list[tuple[bytes, list[int]]]) -> None:
    """Whatever comes in, every descriptor comes out once: with a message, or when abandoned."""
    decoder = Decoder(max_message=64, max_fds=8)
    given_fds: list[int] = []
    taken: list[int] = []
    for data, fds in chunks:
        given_fds += fds
        try:
            for message in decoder.feed(data, tuple(fds)):
                taken += message.fds
        except ProtocolError:
            break
    taken += decoder.abandon()
    assert taken == given_fds
