"""Threads that talk to the firmware: what they do side by side, what fails, what does not come back."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from datapath.drivers.mlx5.workers import Workers
from datapath.vdpa import DeviceError, DeviceLostError


class FakeGlue:
    """What workers want of the glue."""

    name = "mlx5,ibdev=mlx5_9"

    def __init__(self) -> None:
        self.given_up: str | None = None

    def give_up(self, reason: str) -> None:
        self.given_up = reason

    def check_alive(self) -> None:
        if self.given_up:
            raise DeviceLostError(f"{self.name}: {self.given_up}")


MakeWorkers = Callable[..., Workers]


@pytest.fixture
def glue() -> FakeGlue:
    return FakeGlue()


@pytest.fixture
def make(glue: FakeGlue) -> Iterator[MakeWorkers]:
    made: list[Workers] = []

    def make(count: int = 0, deadline: float = 5.0) -> Workers:
        made.append(Workers(glue, count, deadline))  # type: ignore[arg-type]  # what they want of it
        return made[-1]

    yield make
    for workers in made:
        workers.close()


def mine() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "mlx5"}


def test_results_come_in_the_order_of_the_tasks(make: MakeWorkers) -> None:
    workers = make(3)
    assert workers.run(lambda: 1, lambda: 2, lambda: 3, lambda: 4) == [1, 2, 3, 4]
    assert workers.run() == []


@pytest.mark.parametrize(("count", "side_by_side"), [(0, 1), (1, 1), (2, 2), (8, 4)])
def test_so_many_at_a_time(count: int, side_by_side: int, make: MakeWorkers) -> None:
    """Of four tasks; that no more are is seen when those wait for another that cannot come."""
    meeting, most, now, lock = threading.Barrier(side_by_side), 0, 0, threading.Lock()

    def meet() -> None:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        meeting.wait(5)
        with lock:
            now -= 1

    make(count).run(meet, meet, meet, meet)
    assert most == side_by_side


def test_threads_are_started_when_there_is_something_to_do(make: MakeWorkers) -> None:
    before = mine()
    workers = make(8)
    assert mine() == before
    workers.run(lambda: None)
    assert len(mine() - before) == 1
    workers.run(*[lambda: None] * 20)
    assert len(mine() - before) == 8
    workers.close()
    assert mine() == before


def test_the_first_error_is_raised_when_all_are_done(make: MakeWorkers) -> None:
    done: list[int] = []

    def fail() -> None:
        raise DeviceError("it fails")

    with pytest.raises(DeviceError, match="it fails"):
        make().run(fail, lambda: done.append(1))
    assert done == [1]


def test_one_that_does_not_come_back_is_given_up(make: MakeWorkers, glue: FakeGlue) -> None:
    workers, release = make(2, deadline=0.2), threading.Event()
    begin = time.monotonic()
    with pytest.raises(DeviceLostError) as lost:
        workers.run(release.wait, lambda: True)
    assert str(lost.value) == "mlx5,ibdev=mlx5_9: its firmware has not answered within 0.2 s"
    assert time.monotonic() - begin >= 0.2
    assert glue.given_up
    with pytest.raises(DeviceLostError, match="has not answered"):
        workers.run(lambda: True)
    workers.close()  # returns, though one still hangs
    release.set()


def test_whoever_has_not_begun_is_not_begun_after_that(make: MakeWorkers) -> None:
    """Commands that are given up must not be given later: their memory may be another's then."""
    workers, release, begun = make(1, deadline=0.2), threading.Event(), threading.Event()
    hanging = threading.Event()

    def hang() -> None:
        hanging.set()
        release.wait(5)

    with pytest.raises(DeviceLostError):
        workers.run(hang, begun.set)
    assert hanging.is_set()
    before = mine()
    release.set()
    workers.close()
    for thread in before:
        thread.join(5)
    assert not begun.is_set()


def test_as_long_as_something_is_done_there_is_time(make: MakeWorkers) -> None:
    """The deadline is of each, not of all."""
    workers = make(1, deadline=0.3)
    assert workers.run(*[lambda: time.sleep(0.15)] * 4) == [None] * 4


def test_more_time_where_it_is_asked_for(make: MakeWorkers) -> None:
    assert make(1, deadline=0.1).run(lambda: time.sleep(0.4), more=5.0) == [None]


def test_somebody_is_called_meanwhile(make: MakeWorkers) -> None:
    called, enough = [], threading.Event()

    def meanwhile() -> None:
        called.append(threading.current_thread())
        enough.set()

    make().run(lambda: enough.wait(5), meanwhile=meanwhile)
    assert set(called) == {threading.current_thread()}
