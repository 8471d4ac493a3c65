"""What a start, a stop and a pause cost, as the back-end's timing sees them; by clocks of the test's own."""

import pytest

from datapath.vhost_user.messages import Request
from datapath.vhost_user.timing import GAP, MAX_PAUSES, Timing


class Clock:
    """Both clocks of a `Timing`; one is ahead of the other."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timing = Timing(lambda: self.now, lambda: 1000 + self.now)

    def message(self, request: Request, seconds: float = 0.001, *, does: str | None = None) -> None:
        """A message whose handling takes a while, half of it in the device if that does something."""
        with self.timing.message(request):
            self.now += seconds / 2
            if does is None:
                self.now += seconds / 2
                return
            around = {
                "map": self.timing.memory,
                "start": self.timing.starting_rings,
                "stop": self.timing.stopping_rings,
            }[does]
            with around():
                self.now += seconds / 2


@pytest.fixture
def clock() -> Clock:
    return Clock()


def start(clock: Clock) -> None:
    clock.message(Request.SET_FEATURES)
    clock.message(Request.ADD_MEM_REG, 0.020, does="map")
    clock.message(Request.SET_VRING_KICK)
    clock.now += 0.5  # the front-end's own time
    clock.message(Request.SET_STATUS, 0.004, does="start")


def test_a_start_is_what_came_since_the_last_silence(clock: Clock) -> None:
    clock.message(Request.SET_OWNER, 0.3)
    clock.now += GAP + 1
    start(clock)
    told = clock.timing.describe()["start"]
    assert told == {
        "at": pytest.approx(1000 + clock.now),
        "handlers_ms": pytest.approx(26),
        "memory_ms": pytest.approx(10),
        "device_ms": pytest.approx(2),
        "messages": 4,
    }
    clock.message(Request.SET_VRING_CALL)
    assert clock.timing.describe()["start"] == told
    assert clock.timing.describe()["stop"] is None


@pytest.mark.parametrize("status_first", [True, False])
def test_a_stop_ends_with_its_last_message(clock: Clock, status_first: bool) -> None:
    start(clock)
    clock.now += 5
    bases = [Request.GET_VRING_BASE] * 2
    order = [Request.SET_STATUS, *bases] if status_first else [*bases, Request.SET_STATUS]
    for at, request in enumerate(order):
        stops = at == (0 if status_first else 1)
        clock.message(request, 0.002, does="stop" if stops else None)
    told = clock.timing.describe()["stop"]
    assert told == {
        "at": pytest.approx(1000 + clock.now),
        "handlers_ms": pytest.approx(6),
        "memory_ms": 0,
        "device_ms": pytest.approx(1),
        "messages": 3,
    }
    start(clock)
    assert clock.timing.describe()["stop"] == told


def test_pauses_are_told_with_their_reason(clock: Clock) -> None:
    start(clock)
    clock.message(Request.SET_MEM_TABLE, does="stop")
    began = clock.timing.pauses()[-1]
    assert began == {
        "begin": pytest.approx(1000 + clock.now - 0.0005),
        "end": None,
        "reason": "SET_MEM_TABLE",
    }
    clock.now += 3
    start(clock)
    assert clock.timing.pauses()[-1] == {**began, "end": pytest.approx(1000 + clock.now)}
    clock.timing.stopped()
    assert clock.timing.pauses()[-1]["reason"] == "the session ended"
    for _ in range(2 * MAX_PAUSES):
        start(clock)
        clock.timing.stopped()
    assert len(clock.timing.pauses()) == MAX_PAUSES


def test_the_first_start_waits_from_its_first_message(clock: Clock) -> None:
    start(clock)
    [pause] = clock.timing.pauses()
    assert pause == {"begin": 1000, "end": pytest.approx(1000 + clock.now), "reason": "start"}


def test_rings_that_are_led_another_way_pause(clock: Clock) -> None:
    def reroute(seconds: float, did: bool) -> None:
        with clock.timing.rerouting("logging began", lambda: did):
            clock.now += seconds

    reroute(1, True)  # nothing runs
    start(clock)
    before = clock.timing.pauses()
    reroute(1, False)
    assert clock.timing.pauses() == before
    reroute(0.003, True)
    assert clock.timing.pauses()[-1] == {
        "begin": pytest.approx(1000 + clock.now - 0.003),
        "end": pytest.approx(1000 + clock.now),
        "reason": "logging began",
    }


def test_a_start_that_fails_is_none(clock: Clock) -> None:
    timing = clock.timing
    failed = pytest.raises(OSError, match="broken")
    with failed, timing.message(Request.SET_STATUS), timing.starting_rings():
        raise OSError("broken")
    assert clock.timing.describe()["start"] is None
    assert clock.timing.pauses() == []
