"""The dirty log of a ConnectX: it marks what it receives, its driver the used rings that have stopped."""

import threading
from collections.abc import Callable, Iterator

import pytest

from datapath.vdpa import LogMode, open_device
from datapath.virtio import ring_bytes
from tests.harness.dirty_log import PAGE, DirtyLog, OddLog
from tests.harness.driven_vf import BASE, BUFFERS, MEMORY_SIZE, RX, TX, DrivenVf
from tests.harness.emulated_connectx import Cable, Card, Witness


@pytest.fixture(params=[0, 1], ids=["made-anew", "resumes"])
def card(request: pytest.FixtureRequest) -> Iterator[Card]:
    with Card(resumes=request.param) as made:
        yield made


@pytest.fixture
def cable(card: Card) -> Cable:
    return card.cables[0]


@pytest.fixture
def logs() -> Iterator[list[DirtyLog]]:
    made = [DirtyLog(BASE, MEMORY_SIZE) for _ in range(2)]
    yield made
    for log in made:
        log.close()


@pytest.fixture
def log(logs: list[DirtyLog]) -> DirtyLog:
    return logs[0]


MakeVf = Callable[..., DrivenVf]


@pytest.fixture
def make_vf(card: Card, logs: list[DirtyLog]) -> Iterator[MakeVf]:
    """Opens the device with rings of a size; it is closed before the logs go."""
    made: list[DrivenVf] = []

    def make(size: int = 256) -> DrivenVf:
        made.append(DrivenVf(open_device(card.spec()), size))
        return made[-1]

    yield make
    for vf in made:
        vf.close()


@pytest.fixture
def vf(make_vf: MakeVf) -> DrivenVf:
    return make_vf()


def receive(vf: DrivenVf, cable: Cable, *numbers: int) -> None:
    for number in numbers:
        cable.send(number)
        assert vf.receive(1) == [number]


def used_pages(vf: DrivenVf, *indices: int) -> set[int]:
    """The pages of whole used rings."""
    rings = [vf.queues[index] for index in indices]
    return {page for ring in rings for page in range(ring.used, ring.used + ring_bytes(ring.size)[2], PAGE)}


def buffer_page(number: int) -> int:
    """The page of the n-th buffer that a guest has used; two are on each."""
    return BASE + BUFFERS + number // 2 * PAGE


def test_the_device_marks_buffers_and_we_the_used_rings(vf: DrivenVf, cable: Cable, log: DirtyLog) -> None:
    vf.start()
    vf.offer(16)
    receive(vf, cable, 0, 1)
    vf.device.start_logging(log.bitmap)
    assert (vf.device.log_mode, vf.device.shadowed) == (LogMode.HARDWARE, False)
    assert log.take() == set()
    receive(vf, cable, 2, 3, 4)
    assert log.take() == {buffer_page(2), buffer_page(4)}, "frames that came in, exactly"
    vf.transmit(5)
    cable.expect(5)
    vf.queues[TX].wait_used()
    assert log.take() == set(), "sending writes no buffer"
    vf.suspend()
    assert log.take() == used_pages(vf, RX, TX)
    numbers = vf.device.statistics()
    assert (numbers["log_missed"], numbers["logged_pages"]) == (0, 2)


@pytest.mark.parametrize(("size", "pages"), [(256, 1), (1024, 3)])
def test_a_ring_that_stops_has_all_of_its_used_ring_marked(
    make_vf: MakeVf, log: DirtyLog, size: int, pages: int
) -> None:
    vf = make_vf(size)
    vf.device.start_logging(log.bitmap)
    vf.start()
    vf.states[TX] = vf.device.stop_ring(TX)
    assert len(used_pages(vf, TX)) == pages
    assert log.take() == used_pages(vf, TX)
    vf.device.start_ring(TX, vf.ring(TX))
    vf.suspend()
    assert log.take() == used_pages(vf, RX, TX)


def test_logging_outlives_stops_and_starts(vf: DrivenVf, cable: Cable, log: DirtyLog) -> None:
    vf.offer(16)
    vf.device.start_logging(log.bitmap)
    for turn in range(3):
        vf.start()
        receive(vf, cable, turn)
        assert log.take() == {buffer_page(turn)}
        vf.suspend()
        assert log.take() == used_pages(vf, RX, TX)


def test_a_ring_that_is_started_later_marks_too(vf: DrivenVf, cable: Cable, log: DirtyLog) -> None:
    """One that stopped before logging began, and one that stopped while another bitmap was in use."""
    vf.start()
    vf.offer(16)
    receive(vf, cable, 0)
    vf.states[RX] = vf.device.stop_ring(RX)
    vf.device.start_logging(log.bitmap)
    vf.device.start_ring(RX, vf.ring(RX))
    receive(vf, cable, 1, 2)
    assert log.take() == {buffer_page(1), buffer_page(2)}


@pytest.mark.parametrize("idle", [False, True])
def test_nothing_is_marked_after_logging(idle: bool, vf: DrivenVf, cable: Cable, log: DirtyLog) -> None:
    vf.start()
    vf.offer(16)
    vf.device.start_logging(log.bitmap)
    receive(vf, cable, 0)
    assert vf.device.statistics()["logged_pages"] == 1
    if idle:
        vf.suspend()
    vf.device.stop_logging()
    assert vf.device.log_mode is None
    # Taken with the last look at the bitmap, two used rings among it where they have stopped.
    assert vf.device.statistics()["logged_pages"] == (3 if idle else 1)
    vf.device.stop_logging()
    if idle:
        vf.start()
    log.take()
    receive(vf, cable, 1, 2)
    vf.suspend()
    assert log.take() == set()


@pytest.mark.parametrize("idle", [False, True])
def test_another_bitmap_takes_over(idle: bool, vf: DrivenVf, cable: Cable, logs: list[DirtyLog]) -> None:
    """Used rings are marked where rings mark when they stop."""
    vf.start()
    vf.offer(32)
    vf.device.start_logging(logs[0].bitmap)
    receive(vf, cable, 0)
    if idle:
        vf.suspend()
        assert logs[0].take() == {buffer_page(0)} | used_pages(vf, RX, TX)
    vf.device.start_logging(logs[1].bitmap)
    assert vf.device.log_mode is LogMode.HARDWARE
    if idle:
        vf.start()
    else:
        assert logs[0].take() == {buffer_page(0)}
    receive(vf, cable, 1, 2)
    assert logs[0].take() == set()
    assert logs[1].take() == {buffer_page(1), buffer_page(2)}
    vf.suspend()
    assert logs[1].take() == used_pages(vf, RX, TX)


def test_the_same_bitmap_again_changes_nothing(
    vf: DrivenVf, cable: Cable, log: DirtyLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    vf.start()
    vf.offer(16)
    vf.device.start_logging(log.bitmap)
    witness = Witness(monkeypatch)
    vf.device.start_logging(log.bitmap)
    assert witness.take() == []
    receive(vf, cable, 0)
    assert log.take() == {buffer_page(0)}


@pytest.mark.parametrize("offset", [0, 8, PAGE + 16])
def test_a_bitmap_lies_where_it_likes(offset: int, vf: DrivenVf, cable: Cable) -> None:
    odd = OddLog((BASE + MEMORY_SIZE) // PAGE // 8 + 8, offset)
    vf.start()
    vf.offer(8)
    vf.device.start_logging(odd.bitmap)
    receive(vf, cable, 0)
    assert odd.is_marked(buffer_page(0))
    vf.suspend()
    vf.device.stop_logging()
    assert all(odd.is_marked(page) for page in used_pages(vf, RX, TX))
    odd.close()


def test_pages_beyond_the_bitmap_are_missed(vf: DrivenVf, cable: Cable) -> None:
    """Below the guest's memory it ends: frames pass, nothing is marked, used rings are counted."""
    short = OddLog(BASE // PAGE // 8)
    vf.start()
    vf.offer(8)
    vf.device.start_logging(short.bitmap)
    receive(vf, cable, 0, 1)
    vf.suspend()
    assert vf.device.log_missed == len(used_pages(vf, RX, TX))
    assert vf.device.statistics()["log_missed"] == vf.device.log_missed
    vf.device.stop_logging()
    assert vf.device.log_missed == len(used_pages(vf, RX, TX)), "it is told of on"
    short.close()


def test_a_device_that_closes_leaves_the_bitmap_alone(vf: DrivenVf, cable: Cable, log: DirtyLog) -> None:
    vf.start()
    vf.device.start_logging(log.bitmap)
    vf.device.close()
    assert vf.device.log_mode is None


class Sender(threading.Thread):
    """Sends numbered frames to the guest, no more ahead of it than its ring has buffers for."""

    def __init__(self, cable: Cable, count: int, ahead: int) -> None:
        super().__init__()
        self._cable = cable
        self._count = count
        self._room = threading.Semaphore(ahead)

    def run(self) -> None:
        for number in range(self._count):
            self._room.acquire()
            self._cable.send(number)

    def received(self, count: int) -> None:
        self._room.release(count)


def test_every_frame_is_marked_somewhere_while_bitmaps_change(
    vf: DrivenVf, cable: Cable, logs: list[DirtyLog]
) -> None:
    """Frames come all the while: none is lost or doubled, and the page of each is marked, before or after."""
    count, at_once = 4000, 50
    vf.device.start_logging(logs[0].bitmap)
    vf.start()
    vf.offer(at_once)
    sender = Sender(cable, count, at_once)
    sender.start()
    try:
        for turn, first in enumerate(range(0, count, at_once)):
            vf.device.start_logging(logs[(turn + 1) % 2].bitmap)
            assert vf.receive(at_once) == list(range(first, first + at_once))
            marked = logs[0].take() | logs[1].take()
            assert marked >= {buffer_page(number % 512) for number in range(first, first + at_once)}
            vf.offer(at_once)
            sender.received(at_once)
    finally:
        sender.received(count)
        sender.join()
