"""What a vfio-user client may say to an emulated VF: anything is answered, refused, or ends the session."""

import errno
import os
import struct
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.emulation.engine import Engine
from datapath.emulation.ifcvf import Ifcvf
from datapath.emulation.server import Session
from datapath.emulation.virtio_net import NetSpec
from datapath.pci import COMMAND, PciCommand
from datapath.vdpa import RingState
from datapath.vfio import Region
from datapath.vfio_user import (
    Command,
    Message,
    ProtocolError,
    RegionAccess,
    RegionWrite,
    RegionWrites,
    Version,
)
from datapath.virtio import Common


class NoEngine:
    """An engine without thread and memory."""

    pairs = 1
    kick_fds = (-1, -1)
    doorbell_fd: int | None = None

    def __init__(self) -> None:
        self.maps: dict[int, int] = {}

    def map(self, iova: int, size: int, fd: int | None, offset: int, writable: bool) -> None:
        if iova in self.maps:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        self.maps[iova] = size

    def unmap(self, iova: int, size: int) -> None:
        if self.maps.pop(iova, None) != size:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def unmap_all(self) -> None:
        self.maps.clear()

    def start_queue(self, index: int, setup: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def stop_queue(self, index: int) -> RingState:
        return RingState(0, 0)

    def open_doorbells(self, mapped: bool) -> None: ...
    def close_doorbells(self) -> None: ...
    def set_client(self, fd: int | None) -> None: ...
    def set_filter(self, wanted: object) -> None: ...
    def kick(self, index: int) -> None: ...

    def set_call(self, index: int, fd: int | None) -> None:
        assert fd is None

    def run(self, on: bool) -> None: ...
    def accept(self, features: int) -> None: ...
    def use_pairs(self, pairs: int) -> None: ...
    def set_log(self, on: bool, base: int, end: int) -> None: ...
    def reset(self) -> None: ...


def session(negotiated: bool = True) -> Session:
    engine = cast(Engine, NoEngine())
    new = Session(Ifcvf(engine, NetSpec(b"\2\0\0\0\0\1", 1500)), engine, mapped_doorbells=False, client_fd=-1)
    if negotiated:
        new.handle(Message(0, Command.VERSION, payload=Version().pack()))
    return new


#: Numbers that tend to be edges.
NUMBER = st.sampled_from(
    [0, 1, 2, 3, 4, 7, 9, 16, 20, 24, 32, 255, 256, 0x1000, 0x3000, 0x4000, 1 << 31, (1 << 32) - 1]
)
WORDS = st.lists(NUMBER, max_size=10).map(lambda words: struct.pack(f"={len(words)}I", *words))
PAYLOAD = st.one_of(
    st.binary(max_size=64), st.builds(lambda words, tail: words + tail, WORDS, st.binary(max_size=8))
)
COMMANDS = st.one_of(st.sampled_from(sorted(Command)), st.integers(0, 0xFFFF))


@given(st.lists(st.tuples(COMMANDS, PAYLOAD), max_size=20))
def test_any_conversation_is_survived(conversation: list[tuple[int, bytes]]) -> None:
    """Nothing but an answer to the very command comes out."""
    talk = session()
    for number, (command, payload) in enumerate(conversation):
        answer = talk.handle(Message(number, command, payload=payload))
        assert (answer.id, answer.command, answer.is_reply) == (number, command, True)
        assert answer.is_error == bool(answer.errno)
    talk.close()


@given(COMMANDS, PAYLOAD)
def test_nothing_comes_before_version(command: int, payload: bytes) -> None:
    talk = session(negotiated=False)
    if command == Command.VERSION:
        return
    with pytest.raises(ProtocolError):
        talk.handle(Message(1, command, payload=payload))


@pytest.mark.parametrize("command", [Command.VERSION, Command.GET_INFO, Command.DMA_UNMAP, 0x7F])
def test_descriptors_that_went_astray_end_the_session(command: int) -> None:
    """They were another message's, sent in one go with this one: that one would go on without."""
    fd = os.open(os.devnull, os.O_RDONLY)
    with pytest.raises(ProtocolError, match="came with descriptors"):
        session(negotiated=command != Command.VERSION).handle(
            Message(1, command, payload=Version().pack(), fds=(fd,))
        )
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_a_reply_out_of_the_blue_ends_the_session() -> None:
    with pytest.raises(ProtocolError):
        session().handle(Message(1, Command.DMA_MAP).reply())


def test_many_writes_are_carried_out_in_order_up_to_one_that_cannot_be() -> None:
    talk = session()

    def write(*values: tuple[int, int], region: Region = Region.BAR0) -> Message:
        writes = (RegionWrite(offset, region, struct.pack("<H", value)) for offset, value in values)
        payload = RegionWrites(tuple(writes)).pack()
        return talk.handle(Message(1, Command.REGION_WRITE_MULTI, payload=payload))

    def size_of_selected() -> int:
        asked = RegionAccess(Common.QUEUE_SIZE, Region.BAR0, 2).pack()
        answer = talk.handle(Message(2, Command.REGION_READ, payload=asked))
        return int.from_bytes(RegionAccess.unpack(answer.payload).data, "little")

    write((COMMAND, PciCommand.MEMORY), region=Region.CONFIG)
    select, size = Common.QUEUE_SELECT, Common.QUEUE_SIZE
    answer = write((select, 1), (size, 64), (select, 0), (size, 32))
    assert (answer.is_error, answer.payload) == (False, struct.pack("=Q", 4))
    assert size_of_selected() == 32
    assert write((select, 1), (1 << 40, 0), (select, 0)).errno == errno.EINVAL
    assert size_of_selected() == 64
