"""What a ConnectX' queue completes interrupts its guest: event queue and completions on the emulated device.

A guest of these tests looks at its ring only when it is interrupted, so that one interrupt too few shows.
"""

import ctypes
import os
import random
import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from datapath.drivers.mlx5.event_queue import EventQueue
from datapath.drivers.mlx5.options import EventMode
from datapath.drivers.mlx5.virtqueue import VirtioNetQueue
from datapath.mlx5_mailbox import get
from datapath.mlx5_prm import CQE, CQE_RECEIVED_SEND
from datapath.native.completions import Completions
from datapath.vdpa import DeviceError
from tests.harness.mlx5_world import LOW, TX, World, open_world
from tests.harness.processes import wait_for
from tests.harness.virtqueue import Virtqueue

SIZE = 256
#: Bytes from one queue's ring to the next.
RING_SPACE = 0x4000
#: As many completions as a counter of 16 bits does not count.
MORE_THAN_COUNTED = 66_000
#: Queue pairs of a large device.
MANY = 32


class Listening:
    """The thread that listens, and what event queues are made with."""

    def __init__(self, world: World, mode: EventMode) -> None:
        self.world = world
        #: Their memory is in use as long as the device is open.
        self._kept: list[EventQueue] = []
        glue, context = world.glue, world.context
        self._uar = glue.alloc_uar(context)
        self._channel = glue.create_event_channel(context)
        self._event_queue_number = glue.event_queue_number(context)
        self.completions = Completions(
            2 * world.capable.queue_pairs,
            mode=mode,
            event_us=mode == EventMode.ADAPTIVE_TIMER,
            no_traffic_time=16,
            core=None,
            channel_fd=self._channel.fd,
            uar=self._uar.address,
        )

    def event_queue(self, index: int) -> EventQueue:
        given = self._uar, self._channel, self._event_queue_number
        made = EventQueue(self.world.domain, self.world.capable, *given, index, SIZE)
        self._kept.append(made)
        return made


class Telling:
    """A transmit queue that tells what it has completed, and its guest."""

    def __init__(self, listening: Listening, index: int = TX) -> None:
        self.listening = listening
        self.world = listening.world
        self.completions = listening.completions
        self.index = index
        self.events = listening.event_queue(index)
        self.ring = Virtqueue(self.world.memory, LOW + RING_SPACE * index)

    def listen(self) -> None:
        self.completions.add(self.index, self.events.source, self.ring.call_fd)

    def start(self, start: int = 0) -> VirtioNetQueue:
        """Make the queue and run it."""
        world = self.world
        around = replace(world.around, event_qp=self.events.number)
        queue = VirtioNetQueue(world.domain, world.capable, self.index, world.ring(self.ring, start), around)
        queue.run()
        return queue

    def send(self, count: int = 1) -> None:
        for _ in range(count):
            self.world.send(self.ring)

    def wait_used(self, count: int = 1) -> None:
        """Wait until the guest has found so many used buffers; it looks when it is interrupted."""
        found = 0
        while found < count:
            called = select.select([self.ring.call_fd], [], [], 5.0)[0]
            assert called, f"no interrupt after {found} of {count} frames; used index {self.ring.used_index}"
            os.eventfd_read(self.ring.call_fd)
            found += len(self.ring.collect())

    def finish(self, queue: VirtioNetQueue) -> int:
        """Stop as the driver does; where the ring stands."""
        stood = queue.suspend()
        self.completions.remove(self.index)
        queue.close()
        return stood.used

    def counted(self) -> tuple[int, int]:
        """Completions and interrupts."""
        told = self.completions.statistics()
        return told[f"completions.{self.index}"], told[f"interrupts.{self.index}"]


Listen = Callable[..., Listening]


@pytest.fixture
def listen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listen]:
    kept = []
    with ExitStack() as undo:

        def listening(mode: EventMode, pairs: int = 1) -> Listening:
            monkeypatch.setenv("MLX5_EMULATION", f"latency_us=0,pairs={pairs}")
            world = open_world()
            undo.callback(world.glue.close, world.context)
            made = Listening(world, mode)
            kept.append(made)
            undo.callback(made.completions.close)
            return made

        yield listening


@pytest.fixture(params=EventMode)
def telling(listen: Listen, request: pytest.FixtureRequest) -> Iterator[Telling]:
    telling = Telling(listen(request.param))
    yield telling
    telling.completions.close()
    telling.ring.close()


def test_each_frame_interrupts(telling: Telling) -> None:
    telling.start()
    telling.listen()
    for _ in range(100):
        telling.send()
        telling.wait_used()
    completions, interrupts = telling.counted()
    assert 1 < interrupts <= 1 + completions <= 101


def test_bursts_are_told_of_together(telling: Telling) -> None:
    telling.start()
    telling.listen()
    for _ in range(50):
        telling.send(100)
        telling.wait_used(100)
    completions, interrupts = telling.counted()
    assert 1 < interrupts <= 1 + completions <= 5001


def test_what_was_completed_before_anybody_listened(telling: Telling) -> None:
    telling.start()
    telling.send(3)
    wait_for("frames sent", lambda: telling.ring.used_index == 3, 5.0)
    telling.listen()
    telling.wait_used(3)


def test_an_idle_thread_is_woken(telling: Telling) -> None:
    telling.start()
    telling.listen()
    telling.send()
    telling.wait_used()
    wait_for("the thread to sleep", _is_idle, 5.0)
    telling.send()
    telling.wait_used()


def _is_idle() -> bool:
    """Whether the thread that listens does not run for some time."""
    before = _switches()
    time.sleep(0.05)
    return _switches() == before


def _switches() -> int:
    """How often the thread that listens has gone to sleep or been made to wait."""
    tasks = Path("/proc/self/task").iterdir()
    (task,) = (task for task in tasks if (task / "comm").read_text() == "completions\n")
    lines = (task / "status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "_ctxt_switches" in line)


def test_another_eventfd_while_frames_pass(telling: Telling) -> None:
    telling.start()
    telling.listen()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    for _ in range(50):
        telling.send(5)
        other, telling.ring.call_fd = telling.ring.call_fd, other
        telling.completions.set_call(TX, telling.ring.call_fd)
        # What came to the former one is looked at, as by a guest that changes it.
        seen = len(telling.ring.collect())
        telling.send()
        telling.wait_used(6 - seen)
    os.close(other)


def test_none_listens_for_a_while(telling: Telling) -> None:
    telling.start()
    telling.listen()
    for _ in range(50):
        telling.send(5)
        telling.completions.set_call(TX, None)
        telling.send(5)
        telling.completions.remove(TX)
        telling.send(5)
        telling.listen()
        telling.wait_used(15)


def test_it_serves_one_queue_after_the_other(telling: Telling) -> None:
    start = 0
    for life in range(20):
        if life:
            telling.events.reset()
        queue = telling.start(start)
        telling.listen()
        telling.send(10)
        telling.wait_used(10)
        start = telling.finish(queue)
        assert start == 10 * (life + 1)


def test_messages_that_nobody_took_do_not_stay(telling: Telling) -> None:
    """They count for the life in which they came: in the next an event is raised for what comes then."""
    start = 0
    for _ in range(3):
        queue = telling.start(start)
        telling.send(2)
        wait_for("frames sent", lambda: telling.ring.used_index == start + 2, 5.0)  # noqa: B023
        wait_for("a message", lambda: _has_message(telling), 5.0)
        start = telling.finish(queue)
        telling.events.reset()
        queue = telling.start(start)
        telling.listen()
        telling.ring.collect()
        for _ in range(3):
            telling.send()
            telling.wait_used()
        start = telling.finish(queue)
        telling.events.reset()


def _has_message(telling: Telling) -> bool:
    entry = ctypes.string_at(telling.events.source.entry, CQE.size)
    return get(CQE, entry, "opcode") == CQE_RECEIVED_SEND


def test_the_last_frames_of_a_queue_interrupt(telling: Telling) -> None:
    start = 0
    for _ in range(20):
        queue = telling.start(start)
        telling.listen()
        telling.send(3)
        wait_for("frames sent", lambda: telling.ring.used_index == start + 3, 5.0)  # noqa: B023
        start = telling.finish(queue)
        telling.wait_used(3)
        telling.events.reset()


@pytest.mark.full
@pytest.mark.parametrize("mode", [EventMode.FIXED_TIMER, EventMode.INTERRUPTS])
def test_more_completions_than_are_counted(listen: Listen, mode: EventMode) -> None:
    telling = Telling(listen(mode))
    telling.start()
    telling.listen()
    while telling.counted()[0] < MORE_THAN_COUNTED:
        telling.send()
        telling.wait_used()


class Guest:
    """One of many, which sends at times, and whose queue comes and goes."""

    def __init__(self, telling: Telling) -> None:
        self._telling = telling
        self._queue = telling.start()
        telling.listen()
        self._sent = 0
        self._seen = 0

    @property
    def fd(self) -> int:
        return self._telling.ring.call_fd

    @property
    def waits(self) -> bool:
        return self._seen < self._sent

    def send(self, count: int) -> None:
        self._telling.send(count)
        self._sent += count

    def interrupted(self) -> None:
        os.eventfd_read(self.fd)
        self._seen += len(self._telling.ring.collect())

    def start_anew(self) -> None:
        stood = self._telling.finish(self._queue)
        self._telling.events.reset()
        self._queue = self._telling.start(stood)
        self._telling.listen()

    def look_away(self) -> None:
        """The eventfd is changed, as when a guest masks its interrupt for a while."""
        self._telling.completions.set_call(self._telling.index, None)
        self._telling.completions.set_call(self._telling.index, self.fd)


@pytest.mark.full
@pytest.mark.parametrize("mode", EventMode)
def test_many_queues_that_come_and_go(listen: Listen, mode: EventMode) -> None:
    listening = listen(mode, pairs=MANY)
    guests = [Guest(Telling(listening, 2 * pair + TX)) for pair in range(MANY)]
    chosen = random.Random(mode)
    for _ in range(2000):
        for guest in chosen.choices(guests, k=4):
            action = chosen.choices((guest.start_anew, guest.look_away, None), (1, 4, 15))[0]
            if not guest.waits:
                guest.send(chosen.randrange(1, 20))
            if action is not None:
                action()
        _serve(guests, 0)
    while any(guest.waits for guest in guests):
        _serve(guests, 5.0)


def _serve(guests: list[Guest], seconds: float) -> None:
    """Have those guests look that have been interrupted."""
    by_fd = {guest.fd: guest for guest in guests}
    ready = select.select(list(by_fd), [], [], seconds)[0]
    assert ready or not seconds, f"{sum(guest.waits for guest in guests)} guests wait in vain"
    for fd in ready:
        by_fd[fd].interrupted()


#: What makes something -> what gives it back; and what else is called to make an event queue.
PAIRS = {"create": "destroy", "register_umem": "deregister_umem"}
CALLS = (*PAIRS, "subscribe", "modify")


def test_one_that_is_not_made_leaves_nothing(listen: Listen) -> None:
    """Each call failing in turn: memory, a queue, two queue pairs, a subscription, six moves."""
    listening = listen(EventMode.INTERRUPTS)
    made = [_made_until(listening, number) for number in range(1, 13)]
    assert made == [False] * (1 + 3 + 1 + 6) + [True]


def _made_until(listening: Listening, number: int) -> bool:
    """Make an event queue with the n-th call failing; whether it was made. Nothing is left in any case."""
    glue, alive, calls = listening.world.glue, list[object](), 0

    def counting(real: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number:
                raise DeviceError("it fails")
            result = real(*given)
            alive.append(result)
            return result

        return call

    def forgetting(real: Callable[..., object]) -> Callable[..., object]:
        def call(what: object) -> None:
            real(what)
            alive.remove(what)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(glue, name, counting(getattr(glue, name)))
        for name in PAIRS.values():
            patch.setattr(glue, name, forgetting(getattr(glue, name)))
        try:
            listening.event_queue(TX).close()
        except DeviceError:
            return False
        finally:
            assert [what for what in alive if what is not None] == []
    return True
