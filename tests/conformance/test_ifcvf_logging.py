"""The dirty log of an emulated IFCVF in a process of its own, by the VF itself or by the relay: what is
marked, and that nothing is lost, doubled or delayed while logging comes and goes.

The NIC keeps no frame for a VF that is reset, so these tests also show that the VF is not.
"""

import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from datapath.vdpa import DeviceError, DeviceSpec, DirtyBitmap, LogMode, open_device
from datapath.virtio import Feature, bit, ring_bytes
from tests.harness.dirty_log import PAGE, DirtyLog, OddLog
from tests.harness.driven_vf import BASE, BUFFERS, FEATURES, MEMORY_SIZE, RX, TX, DrivenVf
from tests.harness.emulated_nic import EmulatedNic
from tests.harness.netns import NetworkNamespace
from tests.harness.pingpong import PingPong
from tests.harness.wire import Wire

EVENT_IDX = bit(Feature.F_EVENT_IDX)
MODES = (LogMode.HARDWARE, LogMode.SOFTWARE)
ROUNDS = 20_000


@pytest.fixture(scope="module")
def nic(network: NetworkNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedNic]:
    with EmulatedNic(tmp_path_factory.mktemp("nic"), network, 1, "--prefetch=3") as running:
        yield running


@pytest.fixture
def logs() -> Iterator[list[DirtyLog]]:
    """Two, to choose from."""
    made = [DirtyLog(BASE, MEMORY_SIZE) for _ in range(2)]
    yield made
    for log in made:
        log.close()


@pytest.fixture
def log(logs: list[DirtyLog]) -> DirtyLog:
    return logs[0]


MakeVf = Callable[..., DrivenVf]


@pytest.fixture
def make_vf(nic: EmulatedNic, logs: list[DirtyLog]) -> Iterator[MakeVf]:
    """Opens the VF with a log mode and rings of a size and start; it is closed before the logs go."""
    made: list[DrivenVf] = []

    def make(mode: LogMode, size: int = 256, start: int = 0) -> DrivenVf:
        made.append(DrivenVf(open_device(DeviceSpec.parse(nic.device(0)), mode), size, start))
        return made[-1]

    yield make
    for vf in made:
        vf.close()


def receive(vf: DrivenVf, wire: Wire, *numbers: int) -> None:
    for number in numbers:
        wire.send(number)
        assert vf.receive(1) == [number]


def used_pages(vf: DrivenVf, *indices: int) -> set[int]:
    """The pages of whole used rings."""
    return {
        page
        for index in indices
        for page in range(
            vf.queues[index].used // PAGE * PAGE,
            vf.queues[index].used + ring_bytes(vf.queues[index].size)[2],
            PAGE,
        )
    }


def buffer_page(number: int) -> int:
    """The page of the n-th buffer that a guest has used; two are on each."""
    return BASE + BUFFERS + number // 2 * PAGE


# What is marked by hardware


@pytest.mark.parametrize("mode", [LogMode.HARDWARE, LogMode.AUTO])
def test_the_vf_marks_buffers_and_we_the_used_rings(
    make_vf: MakeVf, wire: Wire, log: DirtyLog, mode: LogMode
) -> None:
    vf = make_vf(mode)
    assert vf.device.log_modes == MODES
    vf.start()
    vf.offer(16)
    receive(vf, wire, 0, 1)
    vf.device.start_logging(log.bitmap)
    assert (vf.device.log_mode, vf.device.shadowed) == (LogMode.HARDWARE, False)
    assert log.take() == set()
    receive(vf, wire, 2, 3, 4)
    assert log.take() == {buffer_page(2), buffer_page(4)}, "frames that came in, exactly"
    vf.transmit(5)
    wire.expect(5)
    vf.queues[TX].wait_used()
    assert log.take() == set(), "sending writes no buffer"
    vf.suspend()
    assert log.take() == used_pages(vf, RX, TX)
    statistics = vf.device.statistics()
    assert (statistics["log_missed"], statistics["logged_pages"]) == (0, 2)


@pytest.mark.parametrize(("size", "pages"), [(256, 1), (1024, 3)])
def test_a_ring_that_stops_has_all_of_its_used_ring_marked(
    make_vf: MakeVf, wire: Wire, log: DirtyLog, size: int, pages: int
) -> None:
    vf = make_vf(LogMode.HARDWARE, size)
    vf.device.start_logging(log.bitmap)
    vf.start()
    vf.states[TX] = vf.device.stop_ring(TX)
    assert len(used_pages(vf, TX)) == pages
    assert log.take() == used_pages(vf, TX)
    vf.device.start_ring(TX, vf.ring(TX))
    vf.suspend()
    assert log.take() == used_pages(vf, RX, TX)


def test_logging_outlives_stops_and_starts(make_vf: MakeVf, wire: Wire, log: DirtyLog) -> None:
    """A reset takes the registers' content away."""
    vf = make_vf(LogMode.HARDWARE)
    vf.offer(16)
    vf.device.start_logging(log.bitmap)
    for turn in range(3):
        vf.start()
        receive(vf, wire, turn)
        assert log.take() == {buffer_page(turn)}
        vf.suspend()
        assert log.take() == used_pages(vf, RX, TX)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_marked_after_logging(make_vf: MakeVf, wire: Wire, log: DirtyLog, mode: LogMode) -> None:
    vf = make_vf(mode)
    vf.start()
    vf.offer(16)
    vf.device.start_logging(log.bitmap)
    receive(vf, wire, 0)
    assert vf.device.statistics()["logged_pages"] >= 1
    vf.device.stop_logging()
    assert vf.device.log_mode is None
    assert vf.device.statistics()["logged_pages"] >= 1
    log.take()
    receive(vf, wire, 1, 2)
    vf.suspend()
    assert log.take() == set()


@pytest.mark.parametrize("mode", MODES)
def test_another_bitmap_takes_over(make_vf: MakeVf, wire: Wire, logs: list[DirtyLog], mode: LogMode) -> None:
    vf = make_vf(mode)
    vf.start()
    vf.offer(32)
    vf.device.start_logging(logs[0].bitmap)
    receive(vf, wire, 0)
    vf.device.start_logging(logs[1].bitmap)
    assert vf.device.log_mode is mode
    assert logs[0].take() == {buffer_page(0)} | used_pages(vf, RX, TX), "what was written until then"
    logs[1].take()
    receive(vf, wire, 1, 2)
    assert logs[0].take() == set()
    assert logs[1].take() >= {buffer_page(1), buffer_page(2)}


def test_the_same_bitmap_again_stops_nothing(
    make_vf: MakeVf, wire: Wire, log: DirtyLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    vf = make_vf(LogMode.HARDWARE)
    vf.start()
    vf.offer(16)
    vf.device.start_logging(log.bitmap)
    again = os.dup(log.bitmap.fd)
    monkeypatch.setattr(vf.device, "_reroute", lambda _: pytest.fail("rings were stopped"))
    vf.device.start_logging(DirtyBitmap(again, 0, log.bitmap.address, log.bitmap.size))
    os.close(again)
    receive(vf, wire, 0)
    assert log.take() == {buffer_page(0)}


# Bitmaps as they come


def test_a_bitmap_that_ends_within_a_page(make_vf: MakeVf, wire: Wire) -> None:
    vf, log = make_vf(LogMode.HARDWARE), OddLog((BASE + MEMORY_SIZE) // PAGE // 8 + 8)
    assert log.bitmap.size % PAGE
    vf.start()
    vf.offer(8)
    vf.device.start_logging(log.bitmap)
    receive(vf, wire, 0)
    assert log.is_marked(buffer_page(0))
    vf.device.stop_logging()
    log.close()


@pytest.mark.parametrize("offset", [8, PAGE + 16])
def test_a_bitmap_that_begins_within_a_page_is_the_relays(make_vf: MakeVf, wire: Wire, offset: int) -> None:
    vf, log = make_vf(LogMode.AUTO), OddLog((BASE + MEMORY_SIZE) // PAGE // 8 + 8, offset)
    vf.start()
    vf.offer(8)
    vf.device.start_logging(log.bitmap)
    assert vf.device.log_mode is LogMode.SOFTWARE
    receive(vf, wire, 0)
    vf.suspend()
    assert log.is_marked(buffer_page(0))
    vf.device.stop_logging()
    log.close()


def test_where_only_hardware_may_log_and_cannot_nothing_is_logged(
    make_vf: MakeVf, wire: Wire, log: DirtyLog
) -> None:
    vf, odd = make_vf(LogMode.HARDWARE), OddLog((BASE + MEMORY_SIZE) // PAGE // 8 + 8, 8)
    vf.start()
    vf.offer(8)
    vf.device.start_logging(log.bitmap)
    with pytest.raises(DeviceError, match="begins within a page"):
        vf.device.start_logging(odd.bitmap)
    assert vf.device.log_mode is None
    receive(vf, wire, 0)
    vf.suspend()
    assert log.take() == set()
    odd.close()


# Under traffic


@pytest.mark.parametrize("features", [FEATURES, FEATURES | EVENT_IDX], ids=["flags", "event-idx"])
@pytest.mark.parametrize("mode", MODES)
def test_ping_pong_while_logging_comes_and_goes(
    make_vf: MakeVf, wire: Wire, logs: list[DirtyLog], tmp_path: Path, features: int, mode: LogMode
) -> None:
    vf = make_vf(mode, 64, start=0xFF00)
    vf.start(features)
    chance, changes = random.Random(1), 0
    with PingPong(tmp_path, vf, wire.socket, ROUNDS, event_idx=bool(features & EVENT_IDX)) as game:
        while game.running:
            for log in chance.sample(logs, chance.choice((1, 2))):
                vf.device.start_logging(log.bitmap)
                assert vf.device.log_mode is mode
                pause(game, chance)
            vf.device.stop_logging()
            pause(game, chance)
            changes += 1
        score = game.score()
    assert (score.rounds, score.again, score.doubles) == (ROUNDS, 0, 0)
    assert changes >= ROUNDS // 5000


def pause(game: PingPong, chance: random.Random) -> None:
    """Let the game go on for some milliseconds."""
    with suppress(subprocess.TimeoutExpired):
        game.popen.wait(chance.uniform(0, 0.02))


class Sender(threading.Thread):
    """Sends numbered frames to the guest, no more ahead of it than a NIC has room for."""

    AHEAD = 100

    def __init__(self, wire: Wire, count: int) -> None:
        super().__init__()
        self._wire = wire
        self._count = count
        self._room = threading.Semaphore(self.AHEAD)

    def run(self) -> None:
        for number in range(self._count):
            self._room.acquire()
            self._wire.send(number)

    def received(self, count: int) -> None:
        self._room.release(count)


@pytest.mark.parametrize("mode", MODES)
def test_no_frame_is_lost_or_doubled_while_logging_comes_and_goes(
    make_vf: MakeVf, wire: Wire, logs: list[DirtyLog], mode: LogMode
) -> None:
    """Nobody waits for an answer here: frames come while rings are stopped, too."""
    vf, count = make_vf(mode), 20_000
    vf.start()
    vf.offer(250)
    sender, over = Sender(wire, count), threading.Event()
    changes: list[int] = []

    def change() -> None:
        chance = random.Random(3)
        while not over.wait(chance.uniform(0, 0.01)):
            vf.device.start_logging(chance.choice(logs).bitmap)
            vf.device.stop_logging()
            changes.append(1)

    changer = threading.Thread(target=change)
    sender.start()
    changer.start()
    try:
        for first in range(0, count, 50):
            assert vf.receive(50) == list(range(first, first + 50))
            vf.offer(50)
            sender.received(50)
    finally:
        over.set()
        sender.received(count)
        changer.join()
        sender.join()
    assert len(changes) > 10
