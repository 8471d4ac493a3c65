"""The shadow-ring relay between a guest and an emulated VF in a process of its own: when it is there, what it
marks as written, and that entering and leaving it loses nothing."""

import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from datapath.vdpa import DeviceSpec, LogMode, RingState, open_device
from datapath.virtio import Feature, bit
from tests.harness.dirty_log import PAGE, DirtyLog
from tests.harness.driven_vf import BASE, BUFFERS, FEATURES, MEMORY_SIZE, RX, TX, DrivenVf
from tests.harness.emulated_nic import EmulatedNic
from tests.harness.netns import NetworkNamespace
from tests.harness.pingpong import PingPong
from tests.harness.processes import wait_for
from tests.harness.wire import Wire

EVENT_IDX = bit(Feature.F_EVENT_IDX)
#: Length of a game, by the kind of doorbell: a mapped one is polled by the NIC, which takes its time.
ROUNDS = {"eventfd": 100_000, "mapped": 5_000}
#: Drivers that an emulated IFCVF serves: as what it is, and as any virtio-net function.
DRIVERS = ("ifcvf", "virtio")


@pytest.fixture(scope="module", params=["eventfd", "mapped"])
def nic(
    request: pytest.FixtureRequest, network: NetworkNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EmulatedNic]:
    # A VF that is reset receives nothing for some milliseconds: with --keep it loses nothing either, so that
    # whatever is missing was lost by us.
    options = [f"--doorbell={request.param}", "--prefetch=3", "--keep"]
    with EmulatedNic(tmp_path_factory.mktemp("nic"), network, 1, *options) as running:
        yield running


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    callspec = request.node.callspec
    return ROUNDS[callspec.params["nic"]]


@pytest.fixture
def log() -> Iterator[DirtyLog]:
    with closing(DirtyLog(BASE, MEMORY_SIZE)) as made:
        yield made


@pytest.fixture
def another_log() -> Iterator[DirtyLog]:
    with closing(DirtyLog(BASE, MEMORY_SIZE)) as made:
        yield made


MakeVf = Callable[..., DrivenVf]


@pytest.fixture
def make_vf(nic: EmulatedNic, log: DirtyLog, another_log: DirtyLog) -> Iterator[MakeVf]:
    """Opens the VF with a driver, for the relay to log, and rings of a size and start."""
    made: list[DrivenVf] = []

    def make(driver: str, size: int = 256, start: int = 0) -> DrivenVf:
        spec = DeviceSpec.parse(nic.device(0, driver))
        made.append(DrivenVf(open_device(spec, LogMode.SOFTWARE), size, start))
        return made[-1]

    yield make
    for vf in made:
        vf.close()


def exchange(vf: DrivenVf, wire: Wire, turns: range) -> None:
    """Frames both ways, one at a time."""
    for turn in turns:
        vf.transmit(turn)
        wire.expect(turn)
        wire.send(turn)
        assert vf.receive(1) == [turn]


# When


@pytest.mark.parametrize("features", [FEATURES, FEATURES | EVENT_IDX], ids=["flags", "event-idx"])
def test_a_function_without_ring_state_is_shadowed_where_it_does_not_begin_at_0(
    make_vf: MakeVf, wire: Wire, features: int
) -> None:
    vf = make_vf("virtio", start=0xFFF0)
    vf.start(features)
    assert vf.device.shadowed
    vf.offer(64)
    exchange(vf, wire, range(40))
    statistics = vf.device.statistics()
    assert statistics["relayed.0"] >= 40
    assert statistics["relayed.1"] >= 40
    vf.queues[TX].wait_used(40)
    states = vf.suspend()
    assert states[TX] == RingState(0xFFF0 + 40 & 0xFFFF, 0xFFF0 + 40 & 0xFFFF)
    assert states[RX].used == vf.queues[RX].used_index
    assert not vf.device.shadowed


def test_a_function_without_ring_state_begins_directly_at_0(make_vf: MakeVf, wire: Wire) -> None:
    vf = make_vf("virtio")
    vf.start()
    assert not vf.device.shadowed
    vf.offer(64)
    exchange(vf, wire, range(5))
    vf.queues[TX].wait_used(5)
    assert vf.suspend()[TX] == RingState(5, 5)
    vf.start()
    assert vf.device.shadowed, "it cannot go on where it stopped"
    exchange(vf, wire, range(5, 10))


def test_a_function_with_ring_state_is_not_shadowed(make_vf: MakeVf, wire: Wire) -> None:
    vf = make_vf("ifcvf", start=7)
    vf.start()
    assert not vf.device.shadowed
    vf.offer(8)
    exchange(vf, wire, range(5))
    assert vf.device.statistics()["relayed.0"] == 0


@pytest.mark.parametrize("driver", DRIVERS)
def test_rings_stop_and_start_one_by_one(make_vf: MakeVf, wire: Wire, log: DirtyLog, driver: str) -> None:
    vf = make_vf(driver, start=3)
    vf.device.start_logging(log.bitmap)
    vf.start()
    vf.offer(16)
    exchange(vf, wire, range(3))
    vf.states[TX] = vf.device.stop_ring(TX)
    assert vf.states[TX] == RingState(6, 6)
    vf.transmit(9)
    wire.send(3)
    assert vf.receive(1) == [3], "the other ring goes on"
    assert vf.queues[TX].used_index == 6, "a stopped ring was served"
    vf.device.start_ring(TX, vf.ring(TX))
    wire.expect(9)
    exchange(vf, wire, range(10, 13))
    assert set(vf.suspend()) == {RX, TX}


# What is marked


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("features", [FEATURES, FEATURES | EVENT_IDX], ids=["flags", "event-idx"])
def test_what_the_function_and_the_relay_write_is_marked(
    make_vf: MakeVf, wire: Wire, log: DirtyLog, driver: str, features: int
) -> None:
    vf = make_vf(driver)
    vf.start(features)
    vf.offer(8)  # two a page
    exchange(vf, wire, range(2))
    vf.device.start_logging(log.bitmap)
    assert vf.device.shadowed
    log.take()
    wire.send(5, 6, 7)
    assert vf.receive(3) == [5, 6, 7]
    vf.transmit(8)
    wire.expect(8)
    vf.queues[TX].wait_used()
    vf.suspend()
    received = {BASE + BUFFERS + PAGE, BASE + BUFFERS + 2 * PAGE}
    used = {vf.queues[index].used for index in (RX, TX)}
    assert log.take() == received | used


def test_nothing_is_marked_after_logging(make_vf: MakeVf, wire: Wire, log: DirtyLog) -> None:
    vf = make_vf("ifcvf")
    vf.device.start_logging(log.bitmap)
    vf.start()
    vf.offer(32)
    exchange(vf, wire, range(3))
    assert log.take()
    vf.device.stop_logging()
    assert not vf.device.shadowed
    log.take()
    exchange(vf, wire, range(3, 6))
    vf.suspend()
    assert log.take() == set()


def test_a_bitmap_takes_over_from_another(
    make_vf: MakeVf, wire: Wire, log: DirtyLog, another_log: DirtyLog
) -> None:
    vf = make_vf("ifcvf")
    vf.device.start_logging(log.bitmap)
    vf.start()
    vf.offer(32)
    exchange(vf, wire, range(3))
    vf.device.start_logging(another_log.bitmap)
    log.take()
    exchange(vf, wire, range(3, 6))
    assert (log.take(), bool(another_log.take())) == (set(), True)


def test_a_bad_ring_is_told_once_and_not_of_the_next_run(make_vf: MakeVf) -> None:
    vf = make_vf("virtio", start=7)
    vf.start()
    queue = vf.queues[TX]
    queue.set_avail_index(5000)
    queue.kick()
    wait_for("the relay to see it", lambda: vf.device.fault, 5)
    vf.states = vf.device.suspend()
    queue.set_avail_index(queue.used_index)
    vf.start()
    assert vf.device.take_event() is None
    assert vf.device.fault is None


def test_the_end_of_logging_stops_nothing_that_stays_shadowed(
    make_vf: MakeVf, wire: Wire, log: DirtyLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    vf = make_vf("virtio")
    vf.device.start_logging(log.bitmap)
    vf.start()
    vf.offer(8)
    exchange(vf, wire, range(3))
    monkeypatch.setattr(vf.device, "suspend", lambda: pytest.fail("it was stopped"))
    vf.device.stop_logging()
    assert vf.device.shadowed
    exchange(vf, wire, range(3, 5))
    monkeypatch.undo()


# Entering and leaving


@pytest.mark.parametrize("features", [FEATURES, FEATURES | EVENT_IDX], ids=["flags", "event-idx"])
def test_ping_pong_while_the_relay_comes_and_goes(
    make_vf: MakeVf, wire: Wire, log: DirtyLog, rounds: int, tmp_path: Path, features: int
) -> None:
    vf = make_vf("ifcvf", 64, start=0xFF00)
    vf.start(features)
    chance, changes = random.Random(1), 0
    with PingPong(tmp_path, vf, wire.socket, rounds, event_idx=bool(features & EVENT_IDX)) as game:
        while game.running:
            vf.device.start_logging(log.bitmap)
            pause(game, chance)
            vf.device.stop_logging()
            pause(game, chance)
            changes += 2
        score = game.score()
    assert (score.rounds, score.again, score.doubles) == (rounds, 0, 0)
    assert changes >= rounds // 1000
    assert vf.device.statistics()["relayed.0"] >= rounds // 20


@pytest.mark.parametrize("features", [FEATURES, FEATURES | EVENT_IDX], ids=["flags", "event-idx"])
def test_ping_pong_while_a_function_without_ring_state_stops_and_starts(
    make_vf: MakeVf, wire: Wire, rounds: int, tmp_path: Path, features: int
) -> None:
    vf = make_vf("virtio", 64)
    vf.start(features)
    chance, changes = random.Random(2), 0
    with PingPong(tmp_path, vf, wire.socket, rounds // 5, event_idx=bool(features & EVENT_IDX)) as game:
        while game.running:
            pause(game, chance)
            vf.suspend()
            vf.start(features)
            changes += 1
        score = game.score()
    assert (score.rounds, score.again, score.doubles) == (rounds // 5, 0, 0)
    assert changes >= rounds // 5000


def pause(game: PingPong, chance: random.Random) -> None:
    """Let the game go on for some milliseconds."""
    with suppress(subprocess.TimeoutExpired):
        game.popen.wait(chance.uniform(0, 0.02))
