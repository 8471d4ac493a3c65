"""The vhost-user codec and state machine judged by real front-ends: QEMU 7.2, QEMU 11.1, DPDK's virtio-user.

Their recorded messages must decode and encode again to the same bytes; played in their order to our own
back-end they must all be taken, and be answered as the recorded back-end answered, byte for byte. In half
of the recordings that back-end is DPDK's, so both ends are foreign.
"""

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from datapath.vdpa import RingState
from datapath.vhost_user.backend import Backend
from datapath.vhost_user.messages import (
    HEADER,
    Decoder,
    Message,
    Region,
    Request,
    VringAddress,
    decode_reply,
    encode_reply,
    encode_request,
)
from datapath.vhost_user.protocol_features import PROTOCOL_FEATURES
from tests.harness.recording_device import RecordingDevice, names
from tests.harness.recordings import Recorded, Recording, recording, recordings

RECORDINGS = recordings("vhost_user")
each_recording = pytest.mark.parametrize("source", RECORDINGS, ids=lambda source: source.name)

#: Offset of `idx` in an available or used ring.
INDEX = 2


def number_of(message: Recorded) -> int:
    """The request id of a message."""
    return int(HEADER.unpack_from(message.data)[0])


def decode(recorded: Recorded, fds: list[int]) -> Message:
    """One message through the decoder."""
    (message,) = Decoder().feed(recorded.data, fds)
    return message


def eventfds(count: int) -> list[int]:
    """As many descriptors as a message came with."""
    return [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]


@each_recording
def test_front_ends_messages_are_written_identically(source: Recording) -> None:
    for recorded in source.sent_by("front-end"):
        message = decode(recorded, eventfds(recorded.fds))
        assert message.request in set(Request)
        assert len(message.fds) == recorded.fds
        assert encode_request(message) == recorded.data
        message.close()


def sent(name: str, request: Request) -> list[Message]:
    """The front-end's messages of one kind, without their descriptors."""
    found = []
    for recorded in recording(f"vhost_user/{name}").sent_by("front-end"):
        if number_of(recorded) == request:
            message = decode(recorded, eventfds(recorded.fds))
            message.close()
            found.append(message)
    return found


def test_fields_of_qemu() -> None:
    """Known from how the guest was started: 192 MiB at 0, 64 MiB more at 4 GiB, 256 descriptors a ring."""
    first, second = sent("qemu_7", Request.ADD_MEM_REG)
    assert (first.payload.guest_address, first.payload.size, first.payload.mmap_offset) == (0, 192 << 20, 0)
    assert (second.payload.guest_address, second.payload.size) == (4 << 30, 64 << 20)
    assert first.need_reply
    table = sent("qemu_7_dpdk", Request.SET_MEM_TABLE)[1].payload
    assert [(region.guest_address, region.size) for region in table] == [(0, 192 << 20), (4 << 30, 64 << 20)]
    ring = sent("qemu_7", Request.SET_VRING_ADDR)[0].payload
    # The driver's layout in memory: table, available ring, used ring; the log names the used ring.
    assert ring.avail == ring.descriptors + 16 * 256
    assert ring.used == ring.avail + 6 + 2 * 256 + (-(6 + 2 * 256) % 64)
    assert ring.log == ring.used - first.payload.user_address
    assert [(m.payload.index, m.payload.num) for m in sent("qemu_7", Request.SET_VRING_NUM)[:2]] == [
        (0, 256),
        (1, 256),
    ]
    log = sent("qemu_7", Request.SET_LOG_BASE)[0].payload
    assert (log.size, log.offset) == ((4 << 30) // 4096 // 8 + (64 << 20) // 4096 // 8, 0)
    logged = [message.payload.flags for message in sent("qemu_7", Request.SET_VRING_ADDR)]
    assert logged[-6:] == [1, 1, 0, 0, 1, 1]  # log, cancelled, log again


@each_recording
def test_replies_are_written_identically(source: Recording) -> None:
    for reply in source.sent_by("back-end"):
        request = number_of(reply)
        if request == Request.SET_LOG_BASE and len(reply.data) == HEADER.size:
            continue  # DPDK's answer is empty where the specification has an u64; QEMU looks at the id only
        assert encode_reply(request, decode_reply(request, reply.data)) == reply.data


@dataclass
class Player:
    """Plays a recorded front-end to a `Backend`, with guest memory of its own behind the recorded table."""

    source: Recording
    device: RecordingDevice = field(init=False)
    backend: Backend = field(init=False)
    reports: list[str] = field(default_factory=list)
    #: The memory given for each region; a region that is sent again gets the same.
    memory: dict[Region, int] = field(default_factory=dict)
    bases: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pairs = self._told(Request.GET_QUEUE_NUM, 1)
        self.device = RecordingDevice(features=self._told(Request.GET_FEATURES, 0), queue_pairs=pairs)
        self.backend = Backend(self.device, report=self.reports.append)

    def _told(self, request: Request, otherwise: int) -> int:
        """What the recorded back-end answered to a request for a number."""
        for reply in self.source.sent_by("back-end"):
            if number_of(reply) == request:
                return int(decode_reply(request, reply.data))
        return otherwise

    def play(self) -> Iterator[tuple[Recorded, bytes | None, Recorded | None]]:
        """Each message with our answer and the recorded one."""
        messages = self.source.messages
        for at, recorded in enumerate(messages):
            if recorded.sender != "front-end":
                continue
            following = messages[at + 1] if at + 1 < len(messages) else None
            expected = following if following is not None and following.sender == "back-end" else None
            self._foresee(at)
            yield recorded, self.backend.handle(self._message(recorded)), expected

    def _foresee(self, at: int) -> None:
        """Have the device stop each ring where the recorded back-end will have stopped it."""
        self.device.states.clear()
        for reply in self.source.messages[at:]:
            if reply.sender == "back-end" and number_of(reply) == Request.GET_VRING_BASE:
                state = decode_reply(Request.GET_VRING_BASE, reply.data)
                self.device.states.setdefault(state.index, RingState(state.num, state.num))

    def _message(self, recorded: Recorded) -> Message:
        """The message with descriptors of the kind that it needs."""
        bare = decode(recorded, spare := eventfds(recorded.fds))
        if bare.request == Request.SET_MEM_TABLE:
            fds = [self._memory_for(region) for region in bare.payload]
        elif bare.request == Request.ADD_MEM_REG:
            fds = [self._memory_for(bare.payload)]
        elif bare.request == Request.SET_LOG_BASE:
            fds = [os.memfd_create("log")]
            os.ftruncate(fds[0], bare.payload.offset + bare.payload.size)
        elif bare.request == Request.SET_BACKEND_REQ_FD:
            fds = [socket.socket(socket.AF_UNIX).detach()]
        else:
            fds = [os.dup(fd) for fd in spare]
        if bare.request == Request.SET_VRING_BASE:
            self.bases[bare.payload.index] = bare.payload.num
        elif bare.request == Request.SET_VRING_ADDR:
            self._write_index(bare.payload)
        bare.close()
        return Message(bare.request, bare.payload, bare.need_reply, fds)

    def _memory_for(self, region: Region) -> int:
        if region not in self.memory:
            self.memory[region] = os.memfd_create("guest")
            os.ftruncate(self.memory[region], region.mmap_offset + region.size)
        return os.dup(self.memory[region])

    def _write_index(self, address: VringAddress) -> None:
        """Let the used ring stand where the front-end said in SET_VRING_BASE, as in a real guest."""
        for region, fd in self.memory.items():
            offset = address.used - region.user_address
            if 0 <= offset < region.size:
                index = struct.pack("<H", self.bases[address.index])
                os.pwrite(fd, index, region.mmap_offset + offset + INDEX)

    def close(self) -> None:
        """Release the back-end, the device and the memory."""
        self.backend.close()
        self.device.close()
        for fd in self.memory.values():
            os.close(fd)


@pytest.fixture
def player(request: pytest.FixtureRequest) -> Iterator[Player]:
    """A player of the recording that the test names by `indirect` parametrization."""
    player = Player(request.param)
    yield player
    player.close()


played = pytest.mark.parametrize("player", RECORDINGS, indirect=True, ids=lambda source: source.name)


def open_fds() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@played
def test_every_message_is_answered_as_it_was(player: Player) -> None:
    for message, answer, expected in player.play():
        request = number_of(message)
        if expected is None:
            assert answer is None, Request(request)
            continue
        assert answer is not None, Request(request)
        if request == Request.SET_LOG_BASE:
            assert HEADER.unpack_from(answer)[:2] == HEADER.unpack_from(expected.data)[:2]
        elif request == Request.GET_PROTOCOL_FEATURES:
            theirs = decode_reply(request, expected.data)
            assert theirs & PROTOCOL_FEATURES == theirs
            assert decode_reply(request, answer) == PROTOCOL_FEATURES
        else:
            assert answer == expected.data, Request(request)


@played
def test_nothing_runs_and_nothing_is_held_after_the_conversation(player: Player) -> None:
    before = open_fds()
    ran = False
    for _ in player.play():
        ran = ran or player.backend.running
    assert ran
    assert not player.backend.running
    assert not player.device.rings
    player.backend.close()
    assert not player.device.mapped
    assert open_fds() == before + len(player.memory)


@played
def test_rings_run_where_the_front_end_put_them(player: Player) -> None:
    addresses: dict[int, VringAddress] = {}
    for recorded, _, _ in player.play():
        if number_of(recorded) == Request.SET_VRING_ADDR:
            message = decode(recorded, [])
            addresses[message.payload.index] = message.payload
        for index, ring in player.device.rings.items():
            [home] = [
                region
                for region in player.memory
                if 0 <= addresses[index].descriptors - region.user_address < region.size
            ]
            delta = home.guest_address - home.user_address
            found = (ring.descriptors - delta, ring.avail - delta, ring.used - delta)
            wanted = addresses[index]
            assert found == (wanted.descriptors, wanted.avail, wanted.used)
            assert ring.state.used == player.bases[index]


#: What the device is told in the course of each conversation, memory apart.
ONE_START = ["start", "suspend"]
LOGGED_TWICE = ["start_logging", "stop_logging", "start_logging"]
ORDERS = {
    # boot, stop and cont, link down and up, reset and boot, managed save
    "qemu_7": ONE_START * 3 + ["start", *LOGGED_TWICE, "suspend"],
    "qemu_7_incoming": ONE_START,
    # QEMU 8.1 and later asks for one ring's base after the other while the others still run.
    "qemu_11_dpdk": ["start", "stop_ring", "suspend"] * 2
    + ["start", "start_logging", "stop_ring", "suspend"],
    "qemu_7_dpdk": ONE_START * 2 + ["start", "start_logging", "suspend"],
    "virtio_user_dpdk": ["start", "stop_ring", "suspend"],
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_device_is_told_no_more_than_it_needs(name: str) -> None:
    player = Player(recording(f"vhost_user/{name}"))
    for _ in player.play():
        pass
    assert names(player.device) == ORDERS[name]
    player.close()


def test_a_second_pair_joins_when_the_guest_enables_it() -> None:
    player = Player(recording("vhost_user/qemu_11_two_pairs"))
    for _ in player.play():
        pass
    boot, joined, end = ["start"], ["start_ring"] * 2, ["stop_ring"] * 3 + ["suspend"]
    assert names(player.device) == boot + joined + end + boot + end + boot + joined + LOGGED_TWICE + end
    player.close()
