"""An emulated VF under the recorded orders of QEMU's vfio-user client with a Linux guest: boot to traffic.

The engine is replaced by one that takes notes, so this runs where there is no QEMU with a vfio-user client;
tests/conformance/test_nic_under_qemu.py does the same with a real one.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import pytest

from datapath.emulation.engine import Engine, QueueSetup
from datapath.emulation.ifcvf import Ifcvf
from datapath.emulation.server import CAPABILITIES, Session
from datapath.emulation.virtio_net import FEATURES, NetSpec, consistent
from datapath.vdpa import RingState
from datapath.vfio_user import HEADER, Command, Decoder, Message, RegionAccess, Version
from datapath.virtio import Feature, bit
from tests.harness.recordings import Recorded, recording

BOOT = recording("vfio_user/qemu_boots_on_vf")
#: As in the recording, which was made without offloads and with split rings.
MAC, MTU = bytes.fromhex("020000000001"), 1500
SINCE = (Feature.NET_F_CSUM, Feature.NET_F_GUEST_CSUM, Feature.F_RING_PACKED, Feature.F_IN_ORDER)
FEATURES_THEN = consistent(FEATURES & ~sum(map(bit, SINCE)))
GUEST_MEMORY = 192 << 20
#: Where the data of a REGION_READ's reply begins.
DUMP_AT = HEADER.size + RegionAccess.LAYOUT.size


@dataclass
class NotedEngine:
    """What a packet engine would have been told."""

    pairs: int = 1
    used_pairs: int = 1
    queues: dict[int, QueueSetup] = field(default_factory=dict)
    maps: dict[int, tuple[int, bool]] = field(default_factory=dict)
    calls: dict[int, int | None] = field(default_factory=dict)
    running: bool = False
    features: int = 0
    doorbells: bool = False
    doorbell_fd: int | None = None
    kicks: list[int] = field(default_factory=list)

    def map(self, iova: int, size: int, fd: int | None, offset: int, writable: bool) -> None:
        self.maps[iova] = (size, writable)

    def unmap(self, iova: int, size: int) -> None:
        assert self.maps.pop(iova)[0] == size

    def unmap_all(self) -> None:
        self.maps.clear()

    def start_queue(self, index: int, setup: QueueSetup) -> None:
        self.queues[index] = setup

    def stop_queue(self, index: int) -> RingState:
        self.queues.pop(index, None)
        return RingState(0, 0)

    def open_doorbells(self, mapped: bool) -> None:
        self.doorbells = True

    def close_doorbells(self) -> None:
        self.doorbells = False

    def set_client(self, fd: int | None) -> None: ...
    def set_filter(self, wanted: object) -> None: ...

    def kick(self, index: int) -> None:
        self.kicks.append(index)

    def set_call(self, index: int, fd: int | None) -> None:
        self.calls[index] = fd

    def run(self, on: bool) -> None:
        self.running = on

    def accept(self, features: int) -> None:
        self.features = features

    def use_pairs(self, pairs: int) -> None:
        self.used_pairs = pairs

    def set_log(self, on: bool, base: int, end: int) -> None:
        assert not on

    def reset(self) -> None:
        self.queues.clear()
        self.running = False


@dataclass
class Vf:
    """An emulated VF and the session of its client."""

    engine: NotedEngine
    device: Ifcvf
    session: Session

    def play(self) -> Iterator[tuple[Message, Message, Recorded | None]]:
        """Each recorded command with our answer, and the recorded one where it was kept."""
        for at, recorded in enumerate(BOOT.messages):
            if recorded.sender == "client":
                fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(recorded.fds)]
                (command,) = Decoder().feed(recorded.data, tuple(fds))
                yield command, self.session.handle(command), reply_to(command, at)


def reply_to(command: Message, at: int) -> Recorded | None:
    """The recorded reply to the command at a place of the recording."""
    header = command.pack()[:4]
    replies = (m for m in BOOT.messages[at:] if m.sender == "server" and m.data[:4] == header)
    return next(replies, None)


@pytest.fixture
def vf() -> Iterator[Vf]:
    engine = NotedEngine()
    device = Ifcvf(cast(Engine, engine), NetSpec(MAC, MTU, FEATURES_THEN))
    session = Session(device, cast(Engine, engine), mapped_doorbells=False, client_fd=-1)
    yield Vf(engine, device, session)
    session.close()


def without_window(message: bytes) -> bytes:
    """A reply, less what has come since the recording was made.

    That is a capability at the end of the chain (virtio 1.3 section 4.1.4.9), seen in a dump of
    configuration space: the link to it, and itself.
    """
    if len(message) != DUMP_AT + 256:
        return message
    known = bytearray(message)
    known[DUMP_AT + 0x7D] = 0
    known[DUMP_AT + 0x90 : DUMP_AT + 0xA4] = bytes(20)
    return bytes(known)


def test_every_command_is_taken_and_answered_as_before(vf: Vf) -> None:
    seen: set[int] = set()
    for command, answer, recorded in vf.play():
        assert not answer.is_error, command
        if recorded is not None:
            if command.command == Command.VERSION:  # its limits have changed since
                assert Version.unpack(answer.payload) == Version(capabilities=CAPABILITIES)
            else:
                assert without_window(answer.pack()) == recorded.data
            seen.add(command.command)
    assert seen == {
        Command.VERSION,
        Command.GET_INFO,
        Command.GET_REGION_INFO,
        Command.GET_IRQ_INFO,
        Command.REGION_READ,
    }


def test_the_guests_driver_ends_with_a_running_device(vf: Vf) -> None:
    for _ in vf.play():
        pass
    assert vf.device.net.running
    assert vf.engine.running
    assert sorted(vf.engine.queues) == [0, 1]
    for queue in vf.engine.queues.values():
        assert queue.size == 1024
        assert queue.descriptors < queue.avail < queue.used < GUEST_MEMORY
        assert (queue.event_idx, queue.indirect, queue.mergeable) == (True, True, True)
        assert queue.state == RingState(0, 0)
    # A vector each for the configuration and the two queues; the control queue's place is not used.
    given = [vf.device.vectors[vector] for vector in range(len(vf.device.vectors))]
    assert [fd is not None for fd in given] == [True, True, True, False]
    assert [vf.engine.calls[index] for index in (0, 1)] == given[1:3]


def test_the_guest_kicks_each_queue_by_message(vf: Vf) -> None:
    for _ in vf.play():
        pass
    assert set(vf.engine.kicks) == {0, 1}


def test_memory_is_mapped_as_the_firmware_left_it(vf: Vf) -> None:
    for _ in vf.play():
        pass
    writable = sum(size for iova, (size, may_write) in vf.engine.maps.items() if may_write and iova < 1 << 32)
    assert GUEST_MEMORY - (256 << 10) < writable <= GUEST_MEMORY
    assert vf.engine.doorbells
    vf.session.close()
    assert not vf.engine.doorbells
    assert not vf.engine.maps
    assert not vf.engine.queues
