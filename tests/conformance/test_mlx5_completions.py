"""What a ConnectX' queue completes interrupts its guest: event queue and completions on the emulated device.

A guest of these tests looks at its ring only when it is interrupted, so that one interrupt too few shows.
"""

import ctypes
import os
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
#: As many completions as a counter of 16 bits does not count.
MORE_THAN_COUNTED = 66_000


class Telling:
    """A transmit queue that tells what it has completed, and the thread that listens."""

    def __init__(self, world: World, mode: EventMode) -> None:
        self.world = world
        glue, context = world.glue, world.context
        self._uar = glue.alloc_uar(context)
        self._channel = glue.create_event_channel(context)
        self._event_queue_number = glue.event_queue_number(context)
        self.events = self.event_queue()
        self.completions = Completions(
            TX + 1,
            mode=mode,
            event_us=mode == EventMode.ADAPTIVE_TIMER,
            no_traffic_time=16,
            core=None,
            channel_fd=self._channel.fd,
            uar=self._uar.address,
        )
        self.ring = Virtqueue(world.memory, LOW)

    def event_queue(self) -> EventQueue:
        given = self._uar, self._channel, self._event_queue_number
        return EventQueue(self.world.domain, self.world.capable, *given, TX, SIZE)

    def listen(self) -> None:
        self.completions.add(TX, self.events.source, self.ring.call_fd)

    def start(self, start: int = 0) -> VirtioNetQueue:
        """Make the queue and run it."""
        world = self.world
        around = replace(world.around, event_qp=self.events.number)
        queue = VirtioNetQueue(world.domain, world.capable, TX, world.ring(self.ring, start), around)
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
        self.completions.remove(TX)
        queue.close()
        return stood.used

    def counted(self) -> tuple[int, int]:
        """Completions and interrupts."""
        told = self.completions.statistics()
        return told[f"completions.{TX}"], told[f"interrupts.{TX}"]

    def close(self) -> None:
        self.completions.close()
        self.ring.close()


Tell = Callable[[EventMode], Telling]


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tell]:
    monkeypatch.setenv("MLX5_EMULATION", "latency_us=0")
    # The device uses an event queue's memory until it is closed.
    kept = []
    with ExitStack() as undo:

        def telling(mode: EventMode) -> Telling:
            world = open_world()
            undo.callback(world.glue.close, world.context)
            made = Telling(world, mode)
            kept.append(made)
            undo.callback(made.close)
            return made

        yield telling


@pytest.fixture(params=EventMode)
def telling(tell: Tell, request: pytest.FixtureRequest) -> Telling:
    return tell(request.param)


def test_each_frame_interrupts(telling: Telling) -> None:
    telling.start()
    telling.listen()
    for _ in range(100):
        telling.send()
        telling.wait_used()
    completions, interrupts = telling.counted()
    assert 0 < interrupts <= completions <= 100


def test_bursts_are_told_of_together(telling: Telling) -> None:
    telling.start()
    telling.listen()
    for _ in range(50):
        telling.send(100)
        telling.wait_used(100)
    completions, interrupts = telling.counted()
    assert 0 < interrupts <= completions <= 5000


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
def test_more_completions_than_are_counted(tell: Tell, mode: EventMode) -> None:
    telling = tell(mode)
    telling.start()
    telling.listen()
    while telling.counted()[0] < MORE_THAN_COUNTED:
        telling.send()
        telling.wait_used()


#: What makes something -> what gives it back; and what else is called to make an event queue.
PAIRS = {"create": "destroy", "register_umem": "deregister_umem"}
CALLS = (*PAIRS, "subscribe", "modify")


def test_one_that_is_not_made_leaves_nothing(tell: Tell) -> None:
    """Each call failing in turn: memory, a queue, two queue pairs, a subscription, six moves."""
    telling = tell(EventMode.INTERRUPTS)
    made = [_made_until(telling, number) for number in range(1, 13)]
    assert made == [False] * (1 + 3 + 1 + 6) + [True]


def _made_until(telling: Telling, number: int) -> bool:
    """Make an event queue with the n-th call failing; whether it was made. Nothing is left in any case."""
    glue, alive, calls = telling.world.glue, list[object](), 0

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
            telling.event_queue().close()
        except DeviceError:
            return False
        finally:
            assert [what for what in alive if what is not None] == []
    return True
