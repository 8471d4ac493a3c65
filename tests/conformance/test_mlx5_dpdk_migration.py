"""DPDK's mlx5 vDPA driver on the emulated ConnectX: a guest moves from one device to another.

Each device is in a process of its own, with a cable of its own.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from datapath.virtio import ring_bytes
from tests.harness.dirty_log import PAGE
from tests.harness.dpdk_front_end import PROTOCOL, Cable, DpdkFrontEnd
from tests.harness.dpdk_vdpa import DpdkVdpa
from tests.harness.front_end import MEMORY_SIZE
from tests.harness.traffic import RX, TX

pytestmark = pytest.mark.dpdk

#: Buffers that a guest offers, which are all of its memory for them but a few.
OFFERED = 240
#: Frames that a guest sends at once: more than the cable holds.
STREAM = 100


@pytest.fixture
def cables() -> Iterator[list[Cable]]:
    with Cable() as one, Cable() as other:
        yield [one, other]


@pytest.fixture
def cable(cables: list[Cable]) -> Cable:
    """That of the first device."""
    return cables[0]


@pytest.fixture
def arguments() -> str:
    """The driver's; tests may want others."""
    return ""


@pytest.fixture
def peers(tmp_path: Path, cables: list[Cable], arguments: str) -> Iterator[list[DpdkVdpa]]:
    options = {"latency_us": 0}
    with ExitStack() as stack:
        made = [
            stack.enter_context(
                DpdkVdpa(tmp_path / name, arguments=arguments, cable=cable.fd, options=options)
            )
            for name, cable in zip(("one", "other"), cables, strict=True)
        ]
        for peer in made:
            peer.answer(0)
        yield made


@pytest.fixture
def front_ends() -> Iterator[list[DpdkFrontEnd]]:
    """Those to be closed."""
    made: list[DpdkFrontEnd] = []
    yield made
    for front_end in made:
        front_end.close()


@pytest.fixture
def guest(peers: list[DpdkVdpa], front_ends: list[DpdkFrontEnd]) -> DpdkFrontEnd:
    """A guest on the first device."""
    front_ends.append(DpdkFrontEnd.dial(peers[0].socket, PROTOCOL))
    front_ends[0].begin()
    front_ends[0].offer(OFFERED)
    return front_ends[0]


def used_pages(guest: DpdkFrontEnd, *indices: int) -> set[int]:
    """The pages of used rings."""
    return {
        page
        for queue in (guest.queues[index] for index in indices)
        for page in range(queue.used // PAGE * PAGE, queue.used + ring_bytes(queue.size)[2], PAGE)
    }


def pages(frames: dict[int, int]) -> set[int]:
    return {address // PAGE * PAGE for address in frames.values()}


def test_just_what_was_received_is_marked(guest: DpdkFrontEnd, cable: Cable) -> None:
    cable.send(1, 2)
    guest.receive(2)
    guest.start_logging()
    assert guest.take_log() == set()
    guest.transmit(3, 4)
    assert cable.receive(2) == [3, 4]
    assert guest.take_log() == set(), "sending writes no buffer"
    for begin in (10, 20, 30):
        cable.send(*range(begin, begin + 5))
        frames = guest.receive(5)
        assert list(frames) == list(range(begin, begin + 5))
        assert guest.take_log() == pages(frames)
    guest.stop()
    assert guest.take_log() == used_pages(guest, RX, TX)


def test_who_does_not_log_finds_nothing_marked(guest: DpdkFrontEnd, cable: Cable) -> None:
    cable.send(1, 2)
    guest.receive(2)
    guest.stop()
    assert guest.take_log() == set()


def move(guest: DpdkFrontEnd, to: DpdkVdpa, cable: Cable, number: int) -> tuple[DpdkFrontEnd, dict[int, int]]:
    """Move a guest while frames pass, its memory by what it wrote and by what is marked and no other page.

    :param number: of the first frame that passes.
    :returns: where it is now, and the frames that it received and looked at before.
    """
    guest.memory.take_written()
    cable.send(*range(number, number + 5))  # which come before it is logged, meanwhile or afterwards
    guest.start_logging()
    there = DpdkFrontEnd.dial(to.socket, PROTOCOL)
    there.memory.write(0, guest.memory.read(0, MEMORY_SIZE))
    cable.send(*range(number + 5, number + 10))
    frames = guest.receive(10)
    guest.offer(10)
    guest.transmit(*range(number, number + STREAM))
    cable.send(*range(number + 10, number + 13))  # which may be received, or lost as the queue stops
    bases = guest.stop()
    assert bases == [queue.used_index for queue in guest.queues]
    assert bases[TX] != guest.queues[TX].avail_index, "nothing is left for the other device to send"
    for page in guest.memory.take_written() | guest.take_log():
        there.memory.write(page, guest.memory.read(page, PAGE))
    assert there.memory.read(0, MEMORY_SIZE) == guest.memory.read(0, MEMORY_SIZE), "a page was not marked"
    there.take_over(guest, bases)
    return there, frames


@pytest.mark.parametrize(
    ("arguments", "moves"),
    [
        ("", 2),
        pytest.param("", 30, marks=pytest.mark.full),
        pytest.param("event_mode=2", 10, marks=pytest.mark.full),
        pytest.param("max_conf_threads=4", 10, marks=pytest.mark.full),
        pytest.param("queues=1,queue_size=256", 10, marks=pytest.mark.full),
    ],
)
def test_a_guest_moves(
    guest: DpdkFrontEnd,
    peers: list[DpdkVdpa],
    front_ends: list[DpdkFrontEnd],
    cables: list[Cable],
    moves: int,
) -> None:
    """What it sends passes once and in order; what it receives comes once at most, and in order."""
    for turn in range(1, moves + 1):
        number, old, new = 1000 * turn, cables[1 - turn % 2], cables[turn % 2]
        there, frames = move(guest, peers[turn % 2], old, number)
        front_ends.append(there)
        guest.close()
        front_ends.remove(guest)
        guest = there
        sent = old.take_all()
        sent += new.receive(STREAM - len(sent))
        assert sent == list(range(number, number + STREAM))
        new.send(*range(number + 20, number + 30))
        while number + 29 not in frames:
            more = guest.receive(1)
            assert not frames.keys() & more.keys()
            frames |= more
        assert list(frames) == sorted(frames)
        assert {*range(number, number + 10), *range(number + 20, number + 30)} <= frames.keys()
        guest.offer(len(frames) - 10)
        assert old.take_all() == new.take_all() == []
    assert [peer.finish() for peer in peers] == [0, 0]
