"""A virtio NIC that is not ours, driven through kernel VFIO."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from datapath.bus.vfio import VfioFunction
from datapath.drivers.virtio_pci import open_device
from datapath.vdpa import DeviceError, DeviceEvent, DeviceLostError, DeviceSpec, RingState
from datapath.virtio import NET_HEADER_SIZE, Feature, bit
from tests.harness.driven_vf import BASE, FEATURES, MEMORY_SIZE, RX, TX, DrivenVf
from tests.harness.host_pci import KernelLog, begin_removal, bind, bound, exists, rescan
from tests.harness.nested_hardware import FUNCTIONS
from tests.harness.nested_monitor import NestedMonitor
from tests.harness.processes import wait_for
from tests.harness.raw_nic import SharedMemory
from tests.harness.virtqueue import Buffer
from tests.harness.wire import Wire, number_of

FIRST = FUNCTIONS[0]
DEVICE = f"virtio,pci={FIRST}"
EVENT_IDX = FEATURES | bit(Feature.F_EVENT_IDX)


@pytest.fixture(scope="module", autouse=True)
def function() -> Iterator[None]:
    with bound(FIRST):
        yield


@pytest.fixture
def wire() -> Iterator[Wire]:
    """The other end of the function's cable."""
    with closing(Wire(None, "w1")) as made:
        yield made


@pytest.fixture
def vf() -> Iterator[DrivenVf]:
    with closing(DrivenVf(open_device(DeviceSpec.parse(DEVICE)))) as driven:
        yield driven


def both_ways(vf: DrivenVf, wire: Wire, number: int, count: int = 8) -> None:
    """So many frames out, and so many in."""
    numbers = range(number, number + count)
    vf.transmit(*numbers)
    wire.expect(*numbers)
    vf.queues[TX].wait_used(count)
    vf.offer(count)
    wire.send(*numbers)
    assert vf.receive(count) == list(numbers)


@pytest.mark.parametrize("features", [FEATURES, EVENT_IDX], ids=["flags", "event-idx"])
def test_frames_pass_both_ways(vf: DrivenVf, wire: Wire, features: int) -> None:
    vf.start(features)
    both_ways(vf, wire, 100)
    both_ways(vf, wire, 200)


@pytest.mark.parametrize("features", [FEATURES, EVENT_IDX], ids=["flags", "event-idx"])
def test_rings_go_on_where_they_stood(vf: DrivenVf, wire: Wire, features: int) -> None:
    vf.start(features)
    for turn in range(1, 5):
        both_ways(vf, wire, 100 * turn)
        assert vf.suspend() == {RX: RingState(8 * turn, 8 * turn), TX: RingState(8 * turn, 8 * turn)}
        vf.start(features)
    both_ways(vf, wire, 900)


def test_what_was_offered_before_a_suspend_is_filled_after_it(vf: DrivenVf, wire: Wire) -> None:
    vf.start()
    both_ways(vf, wire, 100)
    vf.offer(8)
    vf.suspend()
    vf.transmit(1, 2, 3)
    vf.start()
    wire.expect(1, 2, 3)
    wire.send(4, 5, 6)
    assert vf.receive(3) == [4, 5, 6]


def test_rings_that_begin_anywhere(wire: Wire) -> None:
    """Near the wrap of the indices; the function itself knows only rings that begin at 0."""
    with closing(DrivenVf(open_device(DeviceSpec.parse(DEVICE)), start=65530)) as vf:
        vf.start()
        both_ways(vf, wire, 100)
        both_ways(vf, wire, 200)
        state = RingState(10, 10)
        assert vf.suspend() == {RX: state, TX: state}


def test_a_suspended_function_touches_nothing(vf: DrivenVf, wire: Wire) -> None:
    vf.start()
    vf.offer(8)
    both_ways(vf, wire, 100)
    vf.suspend()
    before = vf.memory.read(BASE, MEMORY_SIZE)
    wire.send(1, 2, 3)
    with closing(KernelLog()) as log:
        vf.device.unmap_memory(vf.region)
        assert log.find("DMAR") == []
    assert vf.memory.read(BASE, MEMORY_SIZE) == before
    vf.device.map_memory(vf.region)
    vf.start()
    both_ways(vf, wire, 200)


def test_a_reset_that_nobody_told_the_driver_of(vf: DrivenVf, wire: Wire) -> None:
    """The function stops; a suspend and a start, as after any error, and it goes on, nothing lost."""
    vf.start()
    both_ways(vf, wire, 100)
    (Path("/sys/bus/pci/devices") / FIRST / "reset").write_text("1")
    vf.transmit(1, 2)
    vf.suspend()
    vf.start()
    wire.expect(1, 2)
    vf.queues[TX].wait_used(2)
    both_ways(vf, wire, 200)


def test_a_function_that_is_closed_while_it_runs(vf: DrivenVf, wire: Wire) -> None:
    vf.start()
    vf.offer(8)
    vf.device.close()
    before = vf.memory.read(BASE, MEMORY_SIZE)
    with closing(DrivenVf(open_device(DeviceSpec.parse(DEVICE)))) as again:
        again.start()
        both_ways(again, wire, 100)
    assert vf.memory.read(BASE, MEMORY_SIZE) == before


def test_a_buffer_that_has_been_taken_away(vf: DrivenVf, wire: Wire) -> None:
    """What the guest offers, but no longer has, is not written."""
    elsewhere = SharedMemory(0x3_0000_0000)
    vf.device.map_memory(elsewhere.region)
    vf.start()
    for _ in range(2):
        vf.queues[RX].add(Buffer(elsewhere.region.guest_address, 2048, writable=True))
    vf.queues[RX].kick()
    wire.send(1)
    vf.queues[RX].wait_used()
    received = elsewhere.memfd.read(elsewhere.region.guest_address, 2048)
    assert number_of(received[NET_HEADER_SIZE:]) == 1
    vf.device.unmap_memory(elsewhere.region)
    with closing(KernelLog()) as log:
        wire.send(2)
        assert "Write" in log.expect("DMAR", "[01:00.0]", "fault addr 0x300000000")
    assert elsewhere.memfd.read(elsewhere.region.guest_address, 2048) == received
    elsewhere.close()


def come_back() -> None:
    rescan(FIRST)
    bind(FIRST, "vfio-pci")


@pytest.mark.parametrize("shadowed", [False, True], ids=["direct", "shadowed"])
def test_removal_while_it_runs(vf: DrivenVf, wire: Wire, shadowed: bool) -> None:
    vf.start()
    both_ways(vf, wire, 100)
    if shadowed:
        vf.suspend()
        vf.start()
    assert vf.device.take_event() is None
    removal = begin_removal(FIRST)
    try:
        assert vf.wait_event() == DeviceEvent.LOST
        vf.transmit(1)  # the guest does not know yet
        with pytest.raises(DeviceLostError, match="the device is gone"):
            vf.suspend()
        vf.device.close()
        assert removal.wait(10.0) == 0
        assert not exists(FIRST)
    finally:
        vf.device.close()  # or it would not come back either
        come_back()
    with closing(DrivenVf(open_device(DeviceSpec.parse(DEVICE)))) as again:
        again.start()
        both_ways(again, wire, 200)


def test_unplugging_while_it_runs(vf: DrivenVf, wire: Wire, monitor: NestedMonitor) -> None:
    vf.start()
    both_ways(vf, wire, 100)
    monitor.unplug(1)
    assert vf.wait_event(30.0) == DeviceEvent.LOST
    vf.device.close()
    monitor.wait_for("DEVICE_DELETED", device="vf1")
    monitor.plug(1)
    wait_for("the function to come back", lambda: exists(FIRST), 30.0)
    bind(FIRST, "vfio-pci")
    with closing(DrivenVf(open_device(DeviceSpec.parse(DEVICE)))) as again:
        again.start()
        both_ways(again, wire, 200)


def test_more_memory_than_the_iommu_translates(vf: DrivenVf) -> None:
    region = vf.region
    beyond = type(region)(1 << 39, region.size, region.fd, region.fd_offset, region.address)
    with pytest.raises(DeviceError, match=r"memory 0x8000000000\+0x200000: the host's IOMMU maps only 0x0-"):
        vf.device.map_memory(beyond)


def test_a_function_that_another_driver_has_opened(vf: DrivenVf) -> None:
    with pytest.raises(DeviceError, match="another process has it"):
        VfioFunction(FIRST)
