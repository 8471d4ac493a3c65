"""The driver for ConnectX on the emulated one: frames, ring state, guest memory, and what is refused."""

import mmap
import os
import random
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace

import pytest

from datapath.mlx5_prm import Opcode
from datapath.vdpa import (
    DeviceError,
    DeviceEvent,
    LogMode,
    MemoryRegion,
    RingState,
    open_device,
)
from datapath.virtio import Feature, bit
from tests.harness.driven_vf import BASE, FEATURES, RX, TX, DrivenVf
from tests.harness.emulated_connectx import Card, Witness
from tests.harness.extra_memory import ExtraMemory
from tests.harness.processes import wait_for
from tests.harness.virtqueue import Virtqueue

FIRST = 0


@pytest.fixture
def card() -> Iterator[Card]:
    with Card() as made:
        yield made


MakeVf = Callable[..., DrivenVf]


@pytest.fixture
def make_vf() -> Iterator[MakeVf]:
    """Opens a card's device with rings of a size and start."""
    made: list[DrivenVf] = []

    def make(card: Card, size: int = 256, start: int = 0, **options: int) -> DrivenVf:
        device = open_device(card.spec(**options))
        made.append(DrivenVf(device, size, start, card.pairs))
        return made[-1]

    yield make
    for vf in made:
        vf.close()


@pytest.fixture
def vf(card: Card, make_vf: MakeVf) -> DrivenVf:
    return make_vf(card)


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> Witness:
    return Witness(monkeypatch)


# The data path


def test_what_the_device_says(card: Card, vf: DrivenVf) -> None:
    device = vf.device
    assert device.name == f"mlx5,ibdev={card.name}"
    assert (device.queue_pairs, device.max_queue_size, device.serves_legacy) == (1, 1024, True)
    assert (device.log_modes, device.log_mode) == ((LogMode.HARDWARE,), None)
    assert device.shadowed is False
    assert device.fault is None
    assert device.take_event() is None


@pytest.mark.parametrize("event_mode", [0, 1, 2])
def test_frames_pass_both_ways_with_interrupts(event_mode: int, card: Card, make_vf: MakeVf) -> None:
    vf, cable = make_vf(card, event_mode=event_mode), card.cables[FIRST]
    vf.start()
    vf.offer(64)
    for turn in range(20):
        vf.transmit(3 * turn, 3 * turn + 1, 3 * turn + 2)
        cable.expect(3 * turn, 3 * turn + 1, 3 * turn + 2)
        cable.send(turn)
        assert vf.receive(1) == [turn]
    assert len(vf.queues[TX].wait_used(60)) == 60
    numbers = vf.device.statistics()
    assert numbers["kicks.1"] >= 1
    assert min(numbers["interrupts.0"], numbers["interrupts.1"], numbers["completions.1"]) >= 1


def test_after_a_rest_the_guest_is_interrupted_still(card: Card, make_vf: MakeVf) -> None:
    """Nobody looks for completions then, until the device says that there is one."""
    vf, cable = make_vf(card, event_us=1, no_traffic_time=1), card.cables[FIRST]
    vf.start()
    vf.offer(64)
    for turn in range(20):
        cable.send(turn)
        assert vf.receive(1) == [turn]


def test_a_guest_that_is_polled(card: Card, make_vf: MakeVf) -> None:
    vf, cable = make_vf(card), card.cables[FIRST]
    vf.start(kick=False, call=False)
    for turn in range(5):
        vf.transmit(turn, kick=False)
        cable.expect(turn)
    assert vf.device.statistics()["kicks.1"] == 0


def test_frames_made_available_before_the_start_are_sent(card: Card, vf: DrivenVf) -> None:
    vf.transmit(1, 2, 3, kick=False)
    vf.start()
    card.cables[FIRST].expect(1, 2, 3)


@pytest.mark.parametrize("resumes", [0, 1])
def test_small_rings_wrap_with_their_indices(resumes: int, card: Card, make_vf: MakeVf) -> None:
    card.configure(resumes=resumes)
    vf, cable = make_vf(card, size=8, start=0xFFFA), card.cables[FIRST]
    vf.start()
    for turn in range(24):
        vf.offer(1)
        vf.transmit(turn)
        cable.expect(turn)
        vf.queues[TX].wait_used()
        cable.send(turn)
        assert vf.receive(1) == [turn]
        if turn == 7:
            vf.suspend()
            vf.start()
    expected = (0xFFFA + 24) & 0xFFFF
    assert vf.suspend() == {index: RingState(expected, expected) for index in (RX, TX)}


# Suspend and resume


@pytest.mark.parametrize("resumes", [0, 1])
def test_suspend_and_start_again(resumes: int, card: Card, make_vf: MakeVf, witness: Witness) -> None:
    card.configure(resumes=resumes)
    vf, cable = make_vf(card), card.cables[FIRST]
    vf.offer(32)
    vf.start()
    for turn in range(4):
        vf.transmit(2 * turn, 2 * turn + 1)
        cable.expect(2 * turn, 2 * turn + 1)
        cable.send(turn)
        assert vf.receive(1) == [turn]
        states = vf.suspend()
        assert states == {
            TX: RingState(2 * turn + 2, 2 * turn + 2),
            RX: RingState(turn + 1, turn + 1),
        }
        used = vf.queues[TX].used_index
        witness.take()
        vf.start()
        made = witness.take().count(Opcode.CREATE_GENERAL_OBJECT.name)
        assert made == (0 if resumes else 2), "queues that were made"
        assert vf.queues[TX].used_index == used


def test_a_suspended_device_touches_nothing(card: Card, vf: DrivenVf) -> None:
    vf.start()
    vf.offer(4)
    states = vf.suspend()
    vf.transmit(1)
    card.cables[FIRST].send(2)
    assert card.cables[FIRST].drain(0.05) == []
    assert (vf.queues[TX].used_index, vf.queues[RX].used_index) == (states[TX].used, states[RX].used)


def test_a_ring_that_has_changed_gets_another_queue(card: Card, vf: DrivenVf, witness: Witness) -> None:
    """A guest's driver that was unloaded and loaded again lays its rings out anew."""
    vf.start()
    vf.transmit(1)
    card.cables[FIRST].expect(1)
    vf.suspend()
    old = vf.queues[TX]
    vf.queues[TX] = Virtqueue(vf.memory, BASE + 0x10000, 128)
    old.close()
    vf.states[TX] = RingState(0, 0)
    witness.take()
    vf.start()
    assert witness.take().count(Opcode.CREATE_GENERAL_OBJECT.name) == 1
    vf.transmit(2, 3)
    card.cables[FIRST].expect(2, 3)
    assert vf.suspend()[TX] == RingState(2, 2)


@pytest.mark.parametrize("resumes", [0, 1])
def test_stops_at_any_moment_lose_and_double_nothing(resumes: int, card: Card, make_vf: MakeVf) -> None:
    """Whenever the device or one ring is stopped: what the guest sends arrives once and in order.

    So does what it receives, but for frames that meet no running ring.
    """
    card.configure(resumes=resumes)
    chance = random.Random(2)
    vf, cable = make_vf(card, size=64, start=0xFF00), card.cables[FIRST]
    vf.start()
    received: list[int] = []
    sent = 0
    for _ in range(50):
        burst = range(sent, sent + chance.randint(1, 24))
        sent = burst.stop
        vf.offer(free_entries(vf.queues[RX]))
        for number in burst:
            vf.transmit(number, kick=chance.random() < 0.5)
            cable.send(number)
        vf.queues[TX].kick()
        if chance.random() < 0.7:
            for index, state in vf.suspend().items():
                assert state == RingState(vf.queues[index].used_index, vf.queues[index].used_index)
            vf.start()
        else:
            index = chance.choice((RX, TX))
            vf.states[index] = vf.device.stop_ring(index)
            vf.device.start_ring(index, vf.ring(index))
        cable.expect(*burst)
        vf.queues[TX].wait_used(len(burst) - len(vf.queues[TX].collect()))
        received += what_is_there(vf)
    end = (0xFF00 + sent) & 0xFFFF
    assert vf.suspend()[TX] == RingState(end, end)
    received += what_is_there(vf)
    assert received == sorted(set(received))
    assert len(received) > sent / 2
    assert vf.device.statistics()["completed_descriptors.1"] == sent


def free_entries(queue: Virtqueue) -> int:
    return queue.size - ((queue.avail_index - queue.used_index) & 0xFFFF)


def what_is_there(vf: DrivenVf) -> list[int]:
    """The numbers of the frames that have been received by now."""
    numbers = []
    with suppress(TimeoutError):
        while True:
            numbers += vf.receive(1, deadline=0)
    return numbers


# Rings one by one


def test_rings_stop_and_start_one_by_one(card: Card, vf: DrivenVf) -> None:
    cable = card.cables[FIRST]
    vf.start()
    vf.offer(16)
    vf.transmit(1)
    cable.expect(1)
    vf.states[TX] = vf.device.stop_ring(TX)
    assert vf.states[TX] == RingState(1, 1)
    vf.transmit(2)
    cable.send(3)
    assert vf.receive(1) == [3], "the other ring goes on"
    assert vf.queues[TX].used_index == 1, "a stopped ring was served"
    vf.device.start_ring(TX, vf.ring(TX))
    cable.expect(2)
    assert set(vf.suspend()) == {RX, TX}


def test_several_pairs(make_vf: MakeVf) -> None:
    """Each has its own cable; one of them that stops leaves the others alone."""
    with Card(pairs=3) as card:
        vf = make_vf(card, max_conf_threads=4)
        vf.start(FEATURES | bit(Feature.NET_F_MQ))
        for pair, cable in enumerate(card.cables):
            vf.offer(8, pair)
            vf.transmit(pair, pair=pair)
            cable.expect(pair)
            cable.send(10 + pair)
            assert vf.receive(1, pair=pair) == [10 + pair]
        for index in (2, 3):
            vf.states[index] = vf.device.stop_ring(index)
        assert {vf.states[2], vf.states[3]} == {RingState(1, 1)}
        for pair in (0, 2):
            vf.transmit(20 + pair, pair=pair)
            card.cables[pair].expect(20 + pair)
            card.cables[pair].send(30 + pair)
            assert vf.receive(1, pair=pair) == [30 + pair]
        vf.transmit(21, pair=1)
        for index in (3, 2):
            vf.device.start_ring(index, vf.ring(index))
        card.cables[1].expect(21)
        card.cables[1].send(31)
        assert vf.receive(1, pair=1) == [31]
        assert set(vf.suspend()) == set(range(6))


def test_all_rings_stopped_one_by_one_make_an_idle_device(card: Card, vf: DrivenVf) -> None:
    vf.start()
    for index in (RX, TX):
        vf.device.stop_ring(index)
    assert vf.device.suspend() == {}
    vf.start()
    vf.transmit(1)
    card.cables[FIRST].expect(1)


def test_another_call_eventfd(card: Card, vf: DrivenVf) -> None:
    vf.start()
    vf.offer(16)
    other = os.eventfd(0, os.EFD_NONBLOCK)
    own = vf.queues[RX].call_fd
    vf.device.set_call(RX, other)
    card.cables[FIRST].send(1)
    assert select.select([other], [], [], 5)[0]
    vf.device.set_call(RX, None)
    vf.device.set_call(RX, own)
    card.cables[FIRST].send(2)
    assert vf.receive(2) == [1, 2]
    os.close(other)


def test_a_ring_that_was_polled_is_interrupted(card: Card, vf: DrivenVf, witness: Witness) -> None:
    """Its queue told nobody, so it is made anew to tell; not one frame is lost or doubled by that."""
    cable = card.cables[FIRST]
    vf.start(call=False)
    vf.offer(16)
    cable.send(1, 2)
    wait_for("two frames", lambda: vf.queues[RX].used_index == 2, 5)
    witness.take()
    vf.device.set_call(RX, vf.queues[RX].call_fd)
    assert witness.take().count(Opcode.CREATE_GENERAL_OBJECT.name) == 1
    cable.send(3, 4)
    assert vf.receive(4) == [1, 2, 3, 4]
    vf.device.set_call(RX, None)
    cable.send(5)
    wait_for("a fifth frame", lambda: vf.queues[RX].used_index == 5, 5)


# Memory


@pytest.mark.parametrize("running", [False, True])
def test_memory_beyond_a_hole(running: bool, card: Card, vf: DrivenVf) -> None:
    """What is mapped later is reached, running or not; what is taken back is not."""
    cable = card.cables[FIRST]
    with ExtraMemory(BASE + 0x40000000) as extra:
        if running:
            vf.start()
            vf.transmit(1)
            cable.expect(1)
        vf.device.map_memory(extra.region)
        if not running:
            vf.start()
        vf.queues[TX].add(extra.frame(2))
        vf.queues[TX].kick()
        cable.expect(2)
        if not running:
            vf.suspend()
        vf.device.unmap_memory(extra.region)
        if not running:
            vf.start()
        vf.transmit(3)
        cable.expect(3)
        vf.queues[TX].add(extra.frame(4))
        vf.queues[TX].kick()
        assert vf.wait_event() is DeviceEvent.NEEDS_RESET
        assert cable.drain() == []


def test_what_cannot_be_mapped(vf: DrivenVf) -> None:
    with pytest.raises(DeviceError, match="0x100000000"):
        vf.device.map_memory(vf.region)
    with pytest.raises(DeviceError, match="guest memory 0x0 is not mapped"):
        vf.device.unmap_memory(MemoryRegion(0, 4096, -1, 0, vf.region.address))
    vf.start()
    with pytest.raises(DeviceError, match="0x100000000"):
        vf.device.map_memory(vf.region)


def test_a_start_without_memory_is_refused(card: Card, vf: DrivenVf) -> None:
    vf.device.unmap_memory(vf.region)
    with pytest.raises(DeviceError) as refused:
        vf.start()
    assert one_line(refused)
    vf.device.map_memory(vf.region)
    vf.start()
    vf.transmit(1)
    card.cables[FIRST].expect(1)


# Errors of queues


def break_head(vf: DrivenVf) -> None:
    """A head that there is no descriptor of."""
    vf.queues[TX].publish(999)


def mend_head(vf: DrivenVf) -> None:
    """What the guest should have written there: one more descriptor, of a frame."""
    queue = vf.queues[TX]
    queue.set_avail_index(queue.avail_index - 1)
    vf.transmit(77, kick=False)


def test_a_queue_that_has_met_an_error_is_made_anew(card: Card, vf: DrivenVf, witness: Witness) -> None:
    cable = card.cables[FIRST]
    vf.start()
    vf.transmit(1)
    cable.expect(1)
    vf.queues[TX].wait_used()
    break_head(vf)
    vf.queues[TX].kick()
    assert select.select([vf.device.event_fd], [], [], 5)[0]
    mend_head(vf)
    witness.take()
    assert vf.wait_event(0.2) is None
    assert witness.take().count(Opcode.CREATE_GENERAL_OBJECT.name) == 1
    cable.expect(77)
    vf.transmit(2)
    cable.expect(2)
    assert vf.device.fault is None
    numbers = vf.device.statistics()
    assert (numbers["renewed.1"], numbers["bad_descriptor_errors.1"]) == (1, 1)
    assert vf.suspend()[TX] == RingState(3, 3)


def test_three_errors_within_seconds_need_a_reset(card: Card, vf: DrivenVf) -> None:
    cable = card.cables[FIRST]
    vf.start()
    vf.offer(8)
    vf.transmit(1)
    cable.expect(1)
    vf.queues[TX].wait_used()
    break_head(vf)
    vf.queues[TX].kick()
    assert vf.wait_event() is DeviceEvent.NEEDS_RESET
    assert vf.device.fault == "ring 1: 3 errors within 3 s, now of type 1"
    assert vf.device.statistics()["renewed.1"] == 2
    cable.send(2)
    assert vf.receive(1) == [2], "the other ring goes on"
    assert vf.suspend()[TX] == RingState(1, 1)
    mend_head(vf)
    vf.start()
    cable.expect(77)
    assert vf.device.fault is None


# Numbers


def test_statistics(card: Card, vf: DrivenVf) -> None:
    cable = card.cables[FIRST]
    vf.start()
    vf.offer(8)
    vf.transmit(1, 2, 3)
    cable.expect(1, 2, 3)
    cable.send(4, 5)
    assert vf.receive(2) == [4, 5]
    vf.suspend()
    numbers = vf.device.statistics()
    of_one_ring = {name.removesuffix(".1") for name in numbers if name.endswith(".1")}
    assert of_one_ring >= {
        "kicks",
        "kick_errors",
        "completions",
        "interrupts",
        "received_descriptors",
        "completed_descriptors",
        "completion_errors",
        "bad_descriptor_errors",
        "exceeded_max_chain",
        "invalid_buffer",
    }
    assert {"logged_pages", "log_missed"} <= set(numbers)
    assert (numbers["completed_descriptors.0"], numbers["completed_descriptors.1"]) == (2, 3)
    assert numbers["bad_descriptor_errors.1"] == 0
    vf.start()
    vf.transmit(6)
    cable.expect(6)
    vf.suspend()
    assert vf.device.statistics()["completed_descriptors.1"] == 4, "counted on over queues that are made anew"


def test_the_doorbell_page_notifies(card: Card, vf: DrivenVf) -> None:
    """Whoever maps it rings without the relay; it is one page for all rings."""
    notifier = vf.device.notifier(TX)
    assert notifier is not None
    assert notifier.size == os.sysconf("SC_PAGE_SIZE")
    vf.start(kick=False)
    with closing_map(notifier.fd, notifier.size, notifier.offset) as page:
        vf.queues[TX].page = (page, TX)
        for number in range(3):
            vf.transmit(number)
            card.cables[FIRST].expect(number)
        vf.queues[TX].page = None
    assert vf.device.statistics()["kicks.1"] == 0
    assert vf.device.notifier(TX) == notifier


def closing_map(fd: int, size: int, offset: int) -> "closing[mmap.mmap]":
    return closing(mmap.mmap(fd, size, offset=offset))


# What is refused


def one_line(refused: "pytest.ExceptionInfo[DeviceError]") -> bool:
    text = str(refused.value)
    return "\n" not in text and text.startswith("mlx5,ibdev=")


def test_rings_that_are_refused(card: Card, vf: DrivenVf) -> None:
    good = vf.ring(TX)
    for index, ring, why in (
        (
            TX,
            replace(good, size=2048),
            "ring 1 of 2048 descriptors; the device takes powers of two up to 1024",
        ),
        (TX, replace(good, size=96), "ring 1 of 96 descriptors"),
        (TX, replace(good, packed=True), "ring 1: packed rings are not served"),
        (2, good, "no ring 2; the device has 1 queue pairs"),
    ):
        with pytest.raises(DeviceError, match=why) as refused:
            vf.device.start(FEATURES, {index: ring})
        assert one_line(refused)
    with pytest.raises(DeviceError, match="its front-end has forgotten it; reset the guest") as refused:
        vf.device.start(0, {TX: good})
    assert one_line(refused)
    vf.start()
    with pytest.raises(DeviceError, match="is running already"):
        vf.start()
    with pytest.raises(DeviceError, match="ring 1 runs already"):
        vf.device.start_ring(TX, good)
    vf.transmit(1)
    card.cables[FIRST].expect(1)
    vf.suspend()
    with pytest.raises(DeviceError, match="ring 1 does not run"):
        vf.device.stop_ring(TX)
    with pytest.raises(DeviceError, match="ring 1 does not run"):
        vf.device.set_call(TX, None)
    with pytest.raises(DeviceError, match="or the device does not"):
        vf.device.start_ring(TX, good)


def test_devices_that_are_refused(card: Card) -> None:
    with pytest.raises(DeviceError, match="use log mode 'hardware' or 'auto'") as refused:
        open_device(card.spec(), LogMode.SOFTWARE)
    assert one_line(refused)
    with pytest.raises(DeviceError, match=f"no such RDMA device; there are: {card.name}") as refused:
        open_device(card.spec(ibdev="mlx5_nowhere"))
    assert one_line(refused)


HOLDER = """
import sys
from datapath.vdpa import DeviceSpec, open_device
device = open_device(DeviceSpec.parse(sys.argv[1]))
print("open", flush=True)
sys.stdin.read()
device.close()
"""


def test_a_device_that_another_process_holds_is_refused(card: Card) -> None:
    arguments = [sys.executable, "-c", HOLDER, str(card.spec()), "--name=guest-7"]
    with subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[card.cables[FIRST].near.fileno()],
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(
            DeviceError, match=rf"is held by port 'guest-7' \(process {other.pid}\)"
        ) as refused:
            open_device(card.spec())
        assert one_line(refused)
        other.communicate()
    with closing(open_device(card.spec())), pytest.raises(DeviceError, match="is held by this process"):
        open_device(card.spec())


# A process without privileges

UNPRIVILEGED = """
import os, sys
from datapath.vdpa import DeviceSpec, open_device
from tests.harness.dirty_log import DirtyLog
from tests.harness.driven_vf import BASE, MEMORY_SIZE, RX, TX, DrivenVf
vf = DrivenVf(open_device(DeviceSpec.parse(sys.argv[1])))
os.setgroups([])
os.setuid(65534)
status = open("/proc/self/status").read()
assert "CapEff:\\t0000000000000000" in status, status
for turn in range(2):
    log = DirtyLog(BASE, MEMORY_SIZE)
    vf.start()
    vf.device.start_logging(log.bitmap)
    vf.transmit(turn)
    vf.queues[TX].wait_used()
    vf.states[RX] = vf.device.stop_ring(RX)
    vf.device.start_ring(RX, vf.ring(RX))
    vf.suspend()
    vf.device.stop_logging()
    log.close()
vf.close()
print("done")
"""


@pytest.mark.parametrize("resumes", [0, 1])
def test_a_process_that_has_dropped_its_capabilities(resumes: int, card: Card) -> None:
    card.configure(resumes=resumes)
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, str(card.spec(max_conf_threads=4))],
        pass_fds=[card.cables[FIRST].near.fileno()],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.stdout, done.stderr) == ("done\n", "")
    card.cables[FIRST].expect(0, 1)
