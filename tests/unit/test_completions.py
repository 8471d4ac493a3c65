"""Completions of a ConnectX, written to memory as the device would: what is counted, told and armed."""

import mmap
import os
import select
import socket
import struct
import weakref
from collections.abc import Callable, Iterator

import pytest

from datapath.mlx5_mailbox import pack, unpack
from datapath.mlx5_prm import CQ_ARM, CQ_DOORBELL, CQE, CQE_INVALID, CQE_RECEIVED_SEND
from datapath.native._native import ffi
from datapath.native.completions import Completions, CompletionSource
from tests.harness.processes import wait_for

ADAPTIVE, FIXED, INTERRUPTS = 0, 1, 2
QUEUES, SIZE, NUMBER = 4, 256, 0x123456
#: Where things are in a queue's memory.
CQ_RECORD, QP_RECORD = 64, 128
CQE_REQUEST_FAILED, CQE_RESPONSE_FAILED = 13, 14
ARM = 0x20
#: More than a test takes: what is asked for of the device is not forgotten meanwhile.
PERIOD_US = 1_000_000


class Queue:
    """A completion queue and its receiver as they lie in memory, with the eventfd of a guest."""

    def __init__(self, consumed: int = 0, received: int = 0) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        base = int(ffi.cast("uintptr_t", ffi.from_buffer(self._memory)))
        self.source = CompletionSource(base, base + CQ_RECORD, base + QP_RECORD, NUMBER, SIZE)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self.call)
        #: Interrupts that there must have been, and those seen.
        self.expected = self.seen = 0
        self._memory[CQ_RECORD : CQ_RECORD + 4] = struct.pack(">I", consumed)
        self._memory[QP_RECORD : QP_RECORD + 4] = struct.pack(">I", received + SIZE & 0xFFFF)
        self._memory[:64] = pack(CQE, wqe_counter=received - 1 & 0xFFFF, owner=1)

    def complete(self, counter: int, opcode: int = CQE_RECEIVED_SEND) -> None:
        """Write an entry: its last word in one store."""
        (word,) = struct.unpack("=I", pack(CQE, wqe_counter=counter & 0xFFFF, opcode=opcode)[60:])
        with memoryview(self._memory) as view, view.cast("I") as words:
            words[15] = word

    @property
    def records(self) -> tuple[int, int]:
        """The consumer index, and how many receives are posted."""
        (consumed,) = struct.unpack_from(">I", self._memory, CQ_RECORD)
        (posted,) = struct.unpack_from(">I", self._memory, QP_RECORD)
        return consumed, posted

    @property
    def armed(self) -> bytes:
        return self._memory[CQ_RECORD + 4 : CQ_RECORD + 8]

    def interrupted(self) -> int:
        """Wait for an interrupt that was not expected yet; how many there have been since the last call."""
        before = self.expected
        self.expected += 1
        self._wait()
        return self.expected - before

    def _wait(self) -> None:
        while self.seen < self.expected:
            assert select.select([self.call], [], [], 5.0)[0], "no interrupt"
            self.seen += os.eventfd_read(self.call)
        self.expected = self.seen

    def silent(self) -> bool:
        """Whether there is no interrupt but those expected."""
        self._wait()
        return not select.select([self.call], [], [], 0.02)[0]


class Device:
    """The page to arm by, the event channel, and the thread that is tested."""

    def __init__(self, mode: int, event_us: int = 0, no_traffic_time: int = 0) -> None:
        self.page = mmap.mmap(-1, mmap.PAGESIZE)
        self._kept: list[Queue] = []
        self._end, self.channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.completions = Completions(
            QUEUES,
            mode=mode,
            event_us=event_us,
            no_traffic_time=no_traffic_time,
            core=None,
            channel_fd=self._end.fileno(),
            uar=int(ffi.cast("uintptr_t", ffi.from_buffer(self.page))),
        )

    def add(self, index: int, queue: Queue, **other: int) -> None:
        """Add a queue, whose memory stays as long as the thread is there; it interrupts at once."""
        self._kept.append(queue)
        queue.expected += 1
        self.completions.add(index, queue.source._replace(**other), queue.call)

    def close(self) -> None:
        self.completions.close()
        self._end.close()
        self.channel.close()

    def raise_event(self, cookie: int) -> None:
        self.channel.send(struct.pack("=Q", cookie))

    def wait_armed(self) -> dict[str, int | bytes]:
        """What is stored to the page; it is taken away."""
        wait_for("a queue to be armed", lambda: self.page[ARM : ARM + 8] != bytes(8), 5.0)
        stored = self.page[ARM : ARM + 8]
        self.page[ARM : ARM + 8] = bytes(8)
        return unpack(CQ_DOORBELL, stored)

    def count(self, index: int) -> tuple[int, int, int]:
        """Completions, errors and interrupts."""
        told = self.completions.statistics()
        return (
            told[f"completions.{index}"],
            told[f"event_errors.{index}"],
            told[f"interrupts.{index}"],
        )

    @property
    def broken(self) -> bool:
        return bool(select.select([self.completions.broken_fd], [], [], 0)[0])


Start = Callable[..., Device]


@pytest.fixture
def start() -> Iterator[Start]:
    devices: list[Device] = []

    def started(*given: int) -> Device:
        devices.append(Device(*given))
        return devices[-1]

    yield started
    for device in devices:
        device.close()


@pytest.fixture(params=[ADAPTIVE, FIXED, INTERRUPTS])
def device(request: pytest.FixtureRequest, start: Start) -> Device:
    return start(request.param)


def test_what_has_been_completed_before_it_is_added(device: Device) -> None:
    queue = Queue()
    queue.complete(4)
    device.add(1, queue)
    assert queue.interrupted() == 1
    assert queue.records == (5, 5 + SIZE)
    assert device.count(1) == (5, 0, 2)
    assert device.wait_armed() == {"arm_sn": 0, "solicited_only": 0, "consumer_index": 5, "cqn": NUMBER}


def test_it_is_armed_in_one_store(device: Device) -> None:
    queue = Queue()
    device.add(3, queue)
    assert device.wait_armed() == {"arm_sn": 0, "solicited_only": 0, "consumer_index": 0, "cqn": NUMBER}
    queue.complete(0)
    device.raise_event(3)
    assert queue.interrupted() == 1
    assert device.wait_armed() == {"arm_sn": 1, "solicited_only": 0, "consumer_index": 1, "cqn": NUMBER}
    assert queue.armed == pack(CQ_ARM, arm_sn=1, consumer_index=1)
    assert queue.silent()


def test_an_event_for_nothing_is_answered_by_the_same_arming(device: Device) -> None:
    queue = Queue()
    device.add(0, queue)
    first = device.wait_armed()
    device.raise_event(0)
    assert device.wait_armed() == first
    assert queue.silent()


def test_armings_are_numbered_over_the_life_of_a_queue(device: Device) -> None:
    queue = Queue()
    told = []
    for counter in (0, 1, 2, 2, 3, 4):
        queue.complete(counter)
        device.add(0, queue)
        told.append(device.wait_armed()["arm_sn"])
        device.completions.remove(0)
    assert told == [0, 1, 2, 2, 3, 0]


def test_events_of_nobody(device: Device) -> None:
    queue = Queue()
    device.add(0, queue)
    device.wait_armed()
    for cookie in (1, QUEUES, 2**64 - 1):
        device.raise_event(cookie)
    queue.complete(0)
    device.raise_event(0)
    assert queue.interrupted() == 1


def test_counters_wrap(device: Device) -> None:
    queue = Queue(consumed=0xFFFFFFF0, received=0xFFF0)
    device.add(0, queue)
    device.wait_armed()
    queue.complete(0x10)
    device.raise_event(0)
    assert queue.interrupted() == 1
    assert queue.records == (0x11, 0x11 + SIZE)
    assert device.count(0) == (0x21, 0, 2)
    assert device.wait_armed()["consumer_index"] == 0x11


def test_no_more_receives_are_posted_than_sixteen_bits_count(device: Device) -> None:
    queue = Queue(received=0xFF00)
    queue.complete(0xFFFF)
    device.add(0, queue)
    assert queue.interrupted() == 1
    assert queue.records == (0x100, SIZE)


@pytest.mark.parametrize("opcode", [CQE_REQUEST_FAILED, CQE_RESPONSE_FAILED])
def test_an_error_is_counted_and_told(device: Device, opcode: int) -> None:
    queue = Queue()
    queue.complete(0, opcode)
    device.add(2, queue)
    assert queue.interrupted() == 1
    assert device.count(2) == (1, 1, 2)
    wait_for("the error to be told", lambda: device.broken, 5.0)


def test_an_entry_that_was_never_written(device: Device) -> None:
    queue = Queue()
    queue.complete(7, CQE_INVALID)
    device.add(0, queue)
    device.wait_armed()
    assert device.count(0) == (0, 0, 1)
    assert queue.silent()


def test_it_is_looked_at_again_when_it_is_removed(start: Start) -> None:
    device, queue = start(INTERRUPTS), Queue()
    device.add(0, queue)
    device.wait_armed()
    queue.complete(2)
    device.completions.remove(0)
    device.completions.remove(0)
    assert (queue.interrupted() > 0, device.count(0)[0]) == (True, 3)
    queue.complete(5)
    device.raise_event(0)
    assert queue.silent()
    device.add(0, queue)
    assert queue.interrupted() == 1
    assert device.count(0)[0] == 6


def test_it_is_interrupted_at_first_and_at_last_in_any_case(device: Device) -> None:
    """What was completed before may not have been told of, and what is completed last may be later."""
    queue = Queue()
    device.add(0, queue)
    assert queue.silent(), "but for one"
    device.completions.remove(0)
    assert queue.interrupted() == 1


def test_interrupts_that_are_owed(device: Device) -> None:
    queue = Queue()
    device.add(0, queue)
    device.completions.set_call(0, None)
    device.wait_armed()
    device.completions.set_call(0, queue.call)
    assert queue.silent(), "nothing was completed"
    device.completions.set_call(0, None)
    queue.complete(0)
    device.raise_event(0)
    wait_for("it to be seen", lambda: device.count(0)[0] == 1, 5.0)
    assert queue.silent()
    device.completions.set_call(0, queue.call)
    assert queue.interrupted() == 1
    device.completions.set_call(0, queue.call)
    assert queue.silent()


def test_a_full_eventfd_that_blocks_holds_nobody_up(device: Device) -> None:
    full, other = Queue(), Queue()
    os.set_blocking(full.call, True)
    os.eventfd_write(full.call, 2**64 - 2)
    for index, queue in enumerate((full, other)):
        queue.complete(0)
        device.add(index, queue)
    assert other.interrupted() == 1
    assert device.count(0) == (1, 0, 0)


def test_it_looks_for_as_long_as_it_is_told_to(start: Start) -> None:
    device, queue = start(FIXED, 0, 0xFFFF), Queue()
    device.add(0, queue)
    queue.complete(0)
    assert queue.interrupted() == 1, "without an event"


@pytest.mark.parametrize("mode", [ADAPTIVE, FIXED])
def test_a_long_period_holds_no_call_up(start: Start, mode: int) -> None:
    device, queue = start(mode, PERIOD_US, 0xFFFF), Queue()
    device.add(0, queue)
    queue.complete(0)
    device.completions.remove(0)
    assert queue.interrupted() > 0
    device.completions.close()


def test_a_channel_that_fails_is_told(device: Device) -> None:
    queue = Queue()
    device.add(0, queue)
    device.wait_armed()
    device.channel.close()
    wait_for("the failure to be told", lambda: device.broken, 5.0)
    queue.complete(0)
    device.completions.remove(0)
    assert queue.interrupted() == 1


def test_a_page_that_is_gone_is_told(start: Start) -> None:
    """As the page of a function that was pulled out: to store to it raises SIGBUS."""
    device, queue = start(INTERRUPTS), Queue()
    file = os.memfd_create("page")
    os.ftruncate(file, mmap.PAGESIZE)
    page = mmap.mmap(file, mmap.PAGESIZE)
    completions = Completions(
        QUEUES,
        mode=INTERRUPTS,
        event_us=0,
        no_traffic_time=0,
        core=None,
        channel_fd=device.channel.fileno(),
        uar=int(ffi.cast("uintptr_t", ffi.from_buffer(page))),
    )
    os.ftruncate(file, 0)
    os.close(file)
    completions.add(0, queue.source, queue.call)
    assert select.select([completions.broken_fd], [], [], 5.0)[0]
    completions.close()


def test_what_cannot_be(start: Start) -> None:
    device, queue = start(INTERRUPTS), Queue()
    device.add(0, queue)
    with pytest.raises(OSError, match="busy"):
        device.add(0, queue)
    bad = [
        {"size": 0},
        {"size": 96},
        {"size": 65536},
        {"entry": 0},
        {"cq_record": queue.source.cq_record + 4},
    ]
    for fields in bad:
        with pytest.raises(OSError, match="Invalid"):
            device.add(1, queue, **fields)
    with pytest.raises(OSError, match="Invalid"):
        device.add(QUEUES, queue)
    with pytest.raises(OSError, match="No such"):
        device.completions.set_call(1, queue.call)
    with pytest.raises(OSError, match="Invalid"):
        start(INTERRUPTS + 1)


def test_its_processor(start: Start) -> None:
    """One that this process may not use is no processor."""
    device = start(INTERRUPTS)
    given = {"mode": 2, "event_us": 0, "no_traffic_time": 0, "channel_fd": device.channel.fileno()}
    page = int(ffi.cast("uintptr_t", ffi.from_buffer(device.page)))
    Completions(1, **given, core=min(os.sched_getaffinity(0)), uar=page).close()
    for core in (1023, 5000):
        with pytest.raises(OSError, match="Invalid"):
            Completions(1, **given, core=core, uar=page)


def test_closed(start: Start) -> None:
    device = start(FIXED)
    device.completions.close()
    device.completions.close()
    with pytest.raises(ValueError, match="closed"):
        device.completions.statistics()
