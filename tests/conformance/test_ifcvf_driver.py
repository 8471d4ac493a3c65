"""The IFCVF driver on an emulated NIC in a process of its own: frames, ring state, and what goes wrong."""

import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from datapath.bus.vfio_user import VfioUserFunction
from datapath.drivers.ifcvf import IfcvfDevice
from datapath.vdpa import (
    DeviceError,
    DeviceEvent,
    DeviceLostError,
    DeviceSpec,
    MemoryRegion,
    RingState,
    open_device,
)
from datapath.vfio import Region
from tests.harness.driven_vf import BASE, RX, TX, DrivenVf
from tests.harness.emulated_nic import EmulatedNic, ask
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import wait_for
from tests.harness.virtqueue import Buffer, Virtqueue
from tests.harness.wire import Wire

#: Seconds that a stopped NIC gets to answer; 5 in production.
DEADLINE = 0.3


#: Kinds of NIC that every test of the data path meets.
KINDS = {"eventfd": ["--doorbell=eventfd"], "mapped": ["--doorbell=mapped", "--prefetch=3"]}


@pytest.fixture(scope="module", params=KINDS)
def nic(
    request: pytest.FixtureRequest, network: NetworkNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EmulatedNic]:
    folder = tmp_path_factory.mktemp(request.param)
    with EmulatedNic(folder, network, 1, *KINDS[request.param]) as running:
        yield running


MakeVf = Callable[..., DrivenVf]


@pytest.fixture
def make_vf(nic: EmulatedNic) -> Iterator[MakeVf]:
    """Opens the VF with rings of a size and start."""
    made: list[DrivenVf] = []

    def make(size: int = 256, start: int = 0) -> DrivenVf:
        made.append(DrivenVf(open_device(DeviceSpec.parse(nic.device(0))), size, start))
        return made[-1]

    yield make
    for vf in made:
        vf.close()


@pytest.fixture
def vf(make_vf: MakeVf) -> DrivenVf:
    return make_vf()


@pytest.fixture
def own_nic(tmp_path: Path) -> Iterator[Callable[..., EmulatedNic]]:
    """Starts a NIC, in a namespace of its own, that one test may ill-treat."""
    with ExitStack() as undo:

        def start(*options: str) -> EmulatedNic:
            namespace = undo.enter_context(NetworkNamespace())
            nic = undo.enter_context(EmulatedNic(tmp_path / "nic", namespace, 1, *options))
            undo.callback(nic.signal, signal.SIGCONT)
            return nic

        yield start


def hasty(nic: EmulatedNic) -> IfcvfDevice:
    """The VF of a NIC with a short deadline."""
    return IfcvfDevice(nic.device(0), VfioUserFunction(str(nic.folder / "vf0.sock"), DEADLINE))


# The data path


def test_what_the_device_says(vf: DrivenVf) -> None:
    device = vf.device
    assert (device.queue_pairs, device.max_mtu) == (1, 1500)
    assert device.max_queue_size >= 256
    assert device.name.startswith("ifcvf,vfio-user=/")


def test_frames_pass_both_ways(vf: DrivenVf, wire: Wire) -> None:
    vf.start()
    vf.offer(64)
    for turn in range(20):
        vf.transmit(3 * turn, 3 * turn + 1, 3 * turn + 2)
        wire.expect(3 * turn, 3 * turn + 1, 3 * turn + 2)
        wire.send(turn)
        assert vf.receive(1) == [turn]
    vf.queues[TX].wait_used(60)
    assert vf.device.statistics()["kicks.1"] >= 1


def test_a_guest_that_is_polled(vf: DrivenVf, wire: Wire) -> None:
    vf.start(kick=False)
    for turn in range(5):
        vf.transmit(turn, kick=False)
        wire.expect(turn)
    assert vf.device.statistics()["kicks.1"] == 0


def test_frames_made_available_before_the_start_are_sent(vf: DrivenVf, wire: Wire) -> None:
    vf.transmit(1, 2, 3, kick=False)
    vf.start()
    wire.expect(1, 2, 3)


def test_small_rings_wrap_with_their_indices(make_vf: MakeVf, wire: Wire) -> None:
    vf = make_vf(size=8, start=0xFFFA)
    vf.start()
    for turn in range(24):
        vf.offer(1)
        vf.transmit(turn)
        wire.expect(turn)
        vf.queues[TX].wait_used()
        wire.send(turn)
        assert vf.receive(1) == [turn]
    states = vf.suspend()
    expected = (0xFFFA + 24) & 0xFFFF
    assert states[TX] == RingState(expected, expected)
    assert states[RX].used == vf.queues[RX].used_index


def test_rings_stop_and_start_one_by_one(vf: DrivenVf, wire: Wire) -> None:
    vf.start()
    vf.offer(16)
    vf.transmit(1)
    wire.expect(1)
    vf.states[TX] = vf.device.stop_ring(TX)
    assert vf.states[TX] == RingState(1, 1)
    vf.transmit(2)
    wire.send(3)
    assert vf.receive(1) == [3], "the other ring goes on"
    assert vf.queues[TX].used_index == 1, "a stopped ring was served"
    vf.device.start_ring(TX, vf.ring(TX))
    wire.expect(2)
    assert set(vf.suspend()) == {RX, TX}


def test_another_call_eventfd(vf: DrivenVf, wire: Wire) -> None:
    vf.start()
    vf.offer(16)
    other = os.eventfd(0, os.EFD_NONBLOCK)
    own = vf.queues[RX].call_fd
    vf.device.set_call(RX, other)
    wire.send(1)
    assert select.select([other], [], [], 5)[0]
    vf.device.set_call(RX, None)
    vf.device.set_call(RX, own)
    wire.send(2)
    assert vf.receive(2) == [1, 2]
    assert os.eventfd_read(other) == 1
    os.close(other)


# Suspend and resume


def test_suspend_and_resume(vf: DrivenVf, wire: Wire) -> None:
    vf.offer(32)
    for turn in range(4):
        vf.start()
        vf.transmit(2 * turn, 2 * turn + 1)
        wire.expect(2 * turn, 2 * turn + 1)
        vf.queues[TX].wait_used(2)
        wire.send(turn)
        assert vf.receive(1) == [turn]
        states = vf.suspend()
        assert states[TX] == RingState(2 * turn + 2, 2 * turn + 2)
        assert states[RX].used == vf.queues[RX].used_index
        vf.transmit(100 + turn)
        assert vf.queues[TX].used_index == states[TX].used, "a suspended VF was at work"
        vf.start()
        wire.expect(100 + turn)
        vf.queues[TX].wait_used()
        vf.suspend()
        vf.states[TX] = RingState(2 * turn + 2, 2 * turn + 2)
        rewind(vf, 2 * turn + 2)


def rewind(vf: DrivenVf, index: int) -> None:
    """Put the transmit ring back, as a guest's reset would."""
    queue = vf.queues[TX]
    queue.seen = index
    queue.set_avail_index(index)
    vf.memory.write(queue.used + 2, index.to_bytes(2, "little"))


def test_buffers_fetched_ahead_are_not_lost(
    own_nic: Callable[..., EmulatedNic], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VF that has fetched more than it used: the ring state shows it, and the buffers come again."""
    raw: list[int] = []
    read = VfioUserFunction.read

    def spy(self: VfioUserFunction, index: Region, offset: int, width: int) -> int:
        value = read(self, index, offset, width)
        if (index, offset) == (Region.BAR4, 0x20):
            raw.append(value)
        return value

    monkeypatch.setattr(VfioUserFunction, "read", spy)
    nic = own_nic("--prefetch=4")
    with (
        closing(DrivenVf(open_device(DeviceSpec.parse(nic.device(0))))) as vf,
        closing(Wire(nic.namespace, "vf0")) as wire,
    ):
        vf.start()
        vf.offer(8)
        wire.send(0, 1)
        numbers = vf.receive(2)
        states = vf.suspend()
        (state,) = raw
        assert state & 0xFFFF > state >> 16, "the NIC fetched nothing ahead: nothing is tested"
        assert states[RX] == RingState(state >> 16, state >> 16)
        left = 8 - states[RX].used
        vf.start()
        sent = list(range(2, 2 + left))
        for number in sent:
            wire.send(number)
        while vf.queues[RX].used_index < 8:
            numbers += vf.receive(1)
        assert numbers == list(range(len(numbers)))


def test_stops_at_any_moment_lose_and_double_nothing(make_vf: MakeVf, wire: Wire) -> None:
    """Whenever the VF or one ring is stopped: what the guest sends arrives once and in order.

    So does what it receives, but for frames that meet no running ring.
    """
    chance = random.Random(2)
    vf = make_vf(size=64, start=0xFF00)
    vf.start()
    received: list[int] = []
    sent = 0
    for _ in range(80):
        burst = range(sent, sent + chance.randint(1, 24))
        sent = burst.stop
        vf.offer(free_entries(vf.queues[RX]))
        for number in burst:
            vf.transmit(number, kick=chance.random() < 0.5)
            wire.send(number)
        vf.queues[TX].kick()
        if chance.random() < 0.5:
            vf.suspend()
            vf.start()
        else:
            index = chance.choice((RX, TX))
            vf.states[index] = vf.device.stop_ring(index)
            vf.device.start_ring(index, vf.ring(index))
        wire.expect(*burst)
        vf.queues[TX].wait_used(len(burst) - len(vf.queues[TX].collect()))
        received += what_is_there(vf)
    assert vf.suspend()[TX] == RingState((0xFF00 + sent) & 0xFFFF, (0xFF00 + sent) & 0xFFFF)
    received += what_is_there(vf)
    assert received == sorted(set(received))
    assert len(received) > sent / 2


def free_entries(queue: Virtqueue) -> int:
    return queue.size - ((queue.avail_index - queue.used_index) & 0xFFFF)


def what_is_there(vf: DrivenVf) -> list[int]:
    """The numbers of the frames that have been received by now."""
    numbers = []
    with suppress(TimeoutError):
        while True:
            numbers += vf.receive(1, deadline=0)
    return numbers


# Reports of the device


def test_link_changes_are_reported(vf: DrivenVf, nic: EmulatedNic) -> None:
    vf.start()
    ask(nic.control, "vf-stop", vf=0)
    assert vf.wait_event() is DeviceEvent.CONFIG_CHANGED
    ask(nic.control, "vf-start", vf=0)
    assert vf.wait_event() is DeviceEvent.CONFIG_CHANGED
    assert vf.device.take_event() is None


def bad_index(vf: DrivenVf) -> None:
    vf.queues[TX].set_avail_index(vf.queues[TX].avail_index + 300)


def bad_head(vf: DrivenVf) -> None:
    vf.queues[TX].publish(999)


def bad_address(vf: DrivenVf) -> None:
    vf.queues[TX].add(Buffer(BASE - 0x1000, 64))


@pytest.mark.parametrize("spoil", [bad_index, bad_head, bad_address])
def test_a_bad_ring_needs_a_reset(spoil: Callable[[DrivenVf], None], make_vf: MakeVf, wire: Wire) -> None:
    vf = make_vf()
    vf.start()
    spoil(vf)
    vf.queues[TX].kick()
    assert vf.wait_event() is DeviceEvent.NEEDS_RESET
    assert set(vf.device.suspend()) == {RX, TX}
    rewind(vf, 0)
    vf.states[TX] = RingState(0, 0)
    vf.start()
    vf.transmit(5)
    wire.expect(5)


def test_memory_taken_back_is_out_of_reach(vf: DrivenVf, nic: EmulatedNic) -> None:
    vf.start()
    vf.suspend()
    assert memory_users(nic) == 1
    vf.device.unmap_memory(vf.region)
    assert memory_users(nic) == 0
    with pytest.raises(DeviceError, match="DMA_UNMAP refused"):
        vf.device.unmap_memory(vf.region)
    vf.device.map_memory(vf.region)


def memory_users(nic: EmulatedNic) -> int:
    """Mappings of guest memory in the NIC."""
    return Path(f"/proc/{nic.pid}/maps").read_text().count("memfd:guest-memory")


def test_the_same_memory_twice_is_refused(vf: DrivenVf) -> None:
    with pytest.raises(DeviceError, match=r"guest memory 0x100000000.*: File exists"):
        vf.device.map_memory(vf.region)
    with pytest.raises(DeviceError, match="the device needs multiples of 4096 bytes"):
        vf.device.map_memory(MemoryRegion(0x10, 0x1000, vf.memory.fd, 0, 0))


# Taking hold, and giving back


def test_nothing_is_left_in_process_or_device(nic: EmulatedNic) -> None:
    def holdings() -> list[int]:
        """Descriptors, threads and memfd mappings, here and in the NIC."""
        numbers = []
        for proc in (Path("/proc/self"), Path(f"/proc/{nic.pid}")):
            numbers += [len(list((proc / name).iterdir())) for name in ("fd", "task")]
            numbers.append((proc / "maps").read_text().count("memfd:"))
        return numbers

    def back_to(before: list[int]) -> bool:
        return all(now <= then for now, then in zip(holdings(), before, strict=True))

    def cycle() -> None:
        with closing(DrivenVf(open_device(DeviceSpec.parse(nic.device(0))))) as vf:
            vf.start()
            vf.device.stop_ring(RX)
        wait_for("an idle VF", lambda: nic.query(0)["state"] == "idle", 5)

    cycle()
    before = holdings()
    for _ in range(5):
        cycle()
    # The NIC may not yet have closed the control connection that was asked last.
    wait_for(f"no more than {before}", lambda: back_to(before), 5)


def test_a_vf_in_use_is_refused(vf: DrivenVf, nic: EmulatedNic, wire: Wire) -> None:
    vf.start()
    with pytest.raises(DeviceError, match=r"vf0\.sock: hung up .* does another client hold it\?"):
        hasty(nic)
    vf.transmit(1)
    wire.expect(1)


@pytest.mark.parametrize("running", [False, True])
def test_a_killed_nic_is_lost(running: bool, own_nic: Callable[..., EmulatedNic]) -> None:
    nic = own_nic()
    with closing(DrivenVf(open_device(DeviceSpec.parse(nic.device(0))))) as vf:
        if running:
            vf.start()
        nic.kill()
        assert vf.wait_event() is DeviceEvent.LOST
        assert vf.wait_event(0.1) is None, "said more than once"
        vf.queues[TX].kick()
        for call in (vf.device.suspend, vf.start, lambda: vf.device.map_memory(vf.region)):
            with pytest.raises(DeviceLostError, match="is gone"):
                call()


def test_a_killed_nic_is_lost_when_asked_first(own_nic: Callable[..., EmulatedNic]) -> None:
    nic = own_nic()
    with closing(DrivenVf(open_device(DeviceSpec.parse(nic.device(0))))) as vf:
        vf.start()
        nic.kill()
        with pytest.raises(DeviceLostError, match=r"vf0\.sock: connection"):
            vf.suspend()
        assert vf.wait_event() is DeviceEvent.LOST


def test_a_stopped_nic_is_given_up_after_its_deadline(own_nic: Callable[..., EmulatedNic]) -> None:
    nic = own_nic()
    with closing(DrivenVf(hasty(nic))) as vf:
        vf.start()
        nic.signal(signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(DeviceError, match=r"vf0.sock: no answer to REGION_READ within 0.3 s"):
            vf.suspend()
        assert time.monotonic() - begin < 2
        assert vf.wait_event() is DeviceEvent.LOST
        with pytest.raises(DeviceLostError):
            vf.start()
    nic.signal(signal.SIGCONT)
    wait_for("the VF to be free", lambda: nic.query(0)["state"] == "idle", 5)
    with closing(DrivenVf(hasty(nic))) as vf:
        vf.start()


def test_a_stopped_nic_fails_a_start(own_nic: Callable[..., EmulatedNic]) -> None:
    nic = own_nic()
    with closing(DrivenVf(hasty(nic))) as vf:
        nic.signal(signal.SIGSTOP)
        with pytest.raises(DeviceError, match="no answer to"):
            vf.start()
        assert vf.wait_event() is DeviceEvent.LOST
    with pytest.raises(DeviceError, match="no answer to VERSION"):
        hasty(nic)
