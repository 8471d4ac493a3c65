"""The IFCVF driver against registers in memory: which, in what order, and what is left after a failure."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath.drivers import ifcvf, virtio_registers
from datapath.drivers.ifcvf import IfcvfDevice, LiveMigration
from datapath.vdpa import (
    DeviceError,
    DeviceEvent,
    DeviceLostError,
    DeviceSpec,
    DeviceSpecError,
    Ring,
    RingState,
    open_device,
)
from datapath.vfio import Region
from datapath.virtio import Feature, Status, bit
from tests.harness.fake_function import FakeFunction, config_space

FEATURES = bit(Feature.F_VERSION_1) | bit(Feature.NET_F_MRG_RXBUF) | bit(Feature.NET_F_STATUS)


@pytest.fixture
def function() -> Iterator[FakeFunction]:
    function = FakeFunction()
    yield function
    function.close()


@pytest.fixture
def device(function: FakeFunction) -> Iterator[IfcvfDevice]:
    device = IfcvfDevice("ifcvf,fake", function)
    function.log.clear()
    yield device
    device.close()


@pytest.fixture
def rings() -> Iterator[dict[int, Ring]]:
    """Four rings, each with eventfds of its own and addresses above 4 GiB."""
    made = {}
    for index in range(4):
        base = 0x1_2000_0000 + index * 0x10000
        kick, call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        state = RingState(avail=7 + index, used=5 + index)
        made[index] = Ring(256, base, base + 0x1000, base + 0x2000, state, kick, call)
    yield made
    for ring in made.values():
        for fd in (ring.kick, ring.call):
            assert fd is not None
            os.close(fd)


def pair(rings: dict[int, Ring]) -> dict[int, Ring]:
    return {index: rings[index] for index in (0, 1)}


def ring_writes(index: int) -> list[str]:
    high, low = 0x1, 0x2000_0000 + index * 0x10000
    state = (5 + index) * 0x10001
    return [
        f"queue_size[{index}] = 0x100",
        f"queue_desc_low[{index}] = {low:#x}",
        f"queue_desc_high[{index}] = {high:#x}",
        f"queue_avail_low[{index}] = {low + 0x1000:#x}",
        f"queue_avail_high[{index}] = {high:#x}",
        f"queue_used_low[{index}] = {low + 0x2000:#x}",
        f"queue_used_high[{index}] = {high:#x}",
        f"bar4+{LiveMigration.ring_state(index):#x} = {state:#x}",
        f"queue_vector[{index}] = {index + 1:#x}",
        f"queue_enable[{index}] = 0x1",
    ]


def test_open_resets_and_enables_the_function(function: FakeFunction) -> None:
    device = IfcvfDevice("ifcvf,fake", function)
    assert function.log[:3] == ["function reset", "config+0x4 = 0x406", "status = 0x0"]
    assert (device.queue_pairs, device.max_queue_size, device.max_mtu) == (2, 256, 1500)
    device.close()


def test_start_writes_registers_in_order(
    device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]
) -> None:
    device.start(FEATURES, pair(rings))
    assert function.log == [  # it has been reset when it was opened
        "status = 0x1",
        "status = 0x3",
        "driver_feature_select = 0x0",
        "driver_feature = 0x8000",
        "driver_feature_select = 0x1",
        "driver_feature = 0x3",  # ACCESS_PLATFORM, whether the guest knows it or not
        "status = 0xb",
        "eventfds 0..4",
        "config_vector = 0x0",
        "bar4+0x28 = 0x1",
        *ring_writes(0),
        *ring_writes(1),
        "status = 0xf",
    ]
    assert [function.rung(queue) for queue in range(4)] == [1, 1, 0, 0]
    assert function.eventfds[1] == rings[0].call
    assert function.eventfds[2] == rings[1].call
    assert set(function.eventfds) == {0, 1, 2}


def test_kicks_reach_the_doorbell(
    device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]
) -> None:
    device.start(FEATURES, pair(rings))
    assert function.rung(1) == 1
    kick = rings[1].kick
    assert kick is not None
    os.eventfd_write(kick, 1)
    virtio_registers.wait_until(lambda: function.rung(1) == 1, 5, lambda: "no kick")
    assert device.statistics()["kicks.1"] == 1


def test_suspend_stops_reads_and_resets(
    device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]
) -> None:
    device.start(FEATURES, pair(rings))
    function.log.clear()
    # The device fetched three more than it used: they are to be fetched again.
    function.migration[0x20] = 12 | 9 << 16
    function.migration[0x24] = 0 | 0xFFFF << 16
    assert device.suspend() == {0: RingState(9, 9), 1: RingState(0xFFFF, 0xFFFF)}
    assert function.log == [
        "queue_enable[0] = 0x0",
        "queue_enable[1] = 0x0",
        "eventfds off",
        "status = 0x0",
    ]
    device.start(FEATURES, pair(rings))
    assert function.migration[0x20] == 5 | 5 << 16


def test_rings_come_and_go_while_running(
    device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]
) -> None:
    device.start(FEATURES, pair(rings))
    function.log.clear()
    device.start_ring(2, rings[2])
    assert function.log == ["eventfds 3..3", "bar4+0x28 = 0x2", *ring_writes(2)]
    assert function.rung(2) == 1
    function.log.clear()
    function.migration[0x60] = 3 | 2 << 16
    assert device.stop_ring(2) == RingState(2, 2)
    assert function.log == [
        "queue_enable[2] = 0x0",
        "queue_vector[2] = 0xffff",
        "eventfds 3..3",
        "bar4+0x28 = 0x1",
    ]
    assert set(device.suspend()) == {0, 1}


def test_all_rings_may_stop_one_by_one_and_come_back(
    device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]
) -> None:
    device.start(FEATURES, pair(rings))
    device.stop_ring(0)
    device.stop_ring(1)
    device.start_ring(0, rings[0])
    assert function.queues[0]["queue_enable"] == 1
    assert set(device.suspend()) == {0}


def test_another_call_eventfd_changes_one_vector(
    device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]
) -> None:
    device.start(FEATURES, pair(rings))
    function.log.clear()
    device.set_call(1, None)
    assert 2 not in function.eventfds
    device.set_call(1, rings[3].call)
    assert function.eventfds[2] == rings[3].call
    assert function.log == ["eventfds 2..2", "eventfds 2..2"]


@pytest.mark.parametrize(
    ("index", "offset"), [(0, 0x20), (1, 0x24), (2, 0x60), (3, 0x64), (4, 0xA0), (63, 0x7E4)]
)
def test_ring_state_offset(index: int, offset: int) -> None:
    assert LiveMigration.ring_state(index) == offset


def test_features_offered(device: IfcvfDevice) -> None:
    for feature in ("NET_F_MRG_RXBUF", "NET_F_MQ", "F_EVENT_IDX", "F_VERSION_1", "NET_F_MTU", "NET_F_MAC"):
        assert device.features & bit(Feature[feature]), feature
    for feature in ("NET_F_STATUS", "NET_F_CTRL_VQ", "NET_F_GUEST_ANNOUNCE", "VHOST_F_LOG_ALL"):
        assert device.features & bit(Feature[feature]), feature
    for feature in (
        "F_ACCESS_PLATFORM",
        "F_RING_PACKED",
        "F_NOTIFICATION_DATA",
        "F_RING_RESET",
        "NET_F_CTRL_RX",
        "NET_F_CTRL_MAC_ADDR",
        "NET_F_CSUM",  # not offered by the function
    ):
        assert not device.features & bit(Feature[feature]), feature


def test_only_ids_of_ifcvf_are_taken() -> None:
    for ids in ((0x1AF4, 0x1041, 0x1AF4, 0x1100), (0x1AF4, 0x1042, 0x8086, 0x0002)):
        function = FakeFunction(config=config_space(ids))
        with pytest.raises(DeviceError, match=f"1af4:{ids[1]:04x} .subsystem {ids[2]:04x}:.*is not an IFCVF"):
            IfcvfDevice("ifcvf,fake", function)
        assert not function.log, "a device that is not ours was written to"
        function.close()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bar_sizes": {Region.BAR0: 0x2000, Region.CONFIG: 256}}, "BAR 4 has 0 bytes"),
        ({"bar_sizes": {Region.BAR0: 0x1000, Region.BAR4: 4096, Region.CONFIG: 256}}, "structure NOTIFY"),
        ({"vectors": 2}, "1 MSI-X vectors for them"),
        ({"never_reset": True}, "is not reset within"),
    ],
)
def test_unfit_functions_are_refused(
    change: dict[str, object], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtio_registers, "RESET_DEADLINE", 0.05)
    function = FakeFunction(**change)  # type: ignore[arg-type]
    if "never_reset" in change:
        function.registers["status"] = 1
        function.reset = lambda: None  # type: ignore[method-assign]
    before = open_fds()
    with pytest.raises(DeviceError, match=text):
        IfcvfDevice("ifcvf,fake", function)
    assert open_fds() <= before
    function.close()


def open_fds() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir() if entry.exists()}


def assert_idle(function: FakeFunction, device: IfcvfDevice) -> None:
    assert function.status == 0
    assert not function.eventfds
    assert not any(queue.get("queue_enable") for queue in function.queues)
    with pytest.raises(DeviceError, match="does not run"):
        device.set_call(0, None)


@pytest.mark.parametrize(
    ("fault", "text"),
    [("refuse_features", "refuses the features 0x3"), ("no_vectors", "no MSI-X vector 1 for queue 0")],
)
def test_start_refused_leaves_the_function_idle(
    fault: str, text: str, device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]
) -> None:
    setattr(function, fault, True)
    with pytest.raises(DeviceError, match=text):
        device.start(FEATURES, pair(rings))
    assert_idle(function, device)
    setattr(function, fault, False)
    device.start(FEATURES, pair(rings))


def test_start_failing_at_any_access_leaves_the_function_idle(
    device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]
) -> None:
    device.start(FEATURES, pair(rings))
    device.suspend()
    start = function.accesses
    device.start(FEATURES, pair(rings))
    needed = function.accesses - start
    assert needed > 30
    device.suspend()
    for access in range(1, needed + 1):
        function.fail_at = function.accesses + access
        with pytest.raises(DeviceError, match="fault at access"):
            device.start(FEATURES, pair(rings))
        function.fail_at = None
        assert_idle(function, device)


def test_a_kick_that_cannot_be_waited_for_is_refused(
    device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring], tmp_path: Path
) -> None:
    with (tmp_path / "plain").open("w") as plain:
        ring = Ring(256, 0x1000, 0x2000, 0x3000, RingState(0, 0), plain.fileno(), None)
        with pytest.raises(DeviceError, match="ring 0: kick descriptor: Operation not permitted"):
            device.start(FEATURES, {0: ring})
        assert_idle(function, device)
        device.start(FEATURES, {1: rings[1]})
        with pytest.raises(DeviceError, match="ring 0: kick descriptor"):
            device.start_ring(0, ring)
        assert_idle(function, device)
        assert device.suspend() == {}, "it has stopped the other ring too"


def test_suspend_gives_up_on_a_queue_that_does_not_stop(
    device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ifcvf, "STOP_DEADLINE", 0.05)
    device.start(FEATURES, pair(rings))
    function.queues_never_stop = True
    with pytest.raises(DeviceError, match=r"queue 0 does not stop within 0\.05 s"):
        device.suspend()
    assert_idle(function, device)
    function.queues_never_stop = False
    device.start(FEATURES, pair(rings))


@pytest.mark.parametrize("access", [1, 3, 7])
def test_a_function_that_cannot_be_stopped_is_let_go(
    access: int, device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]
) -> None:
    device.start(FEATURES, pair(rings))
    function.fail_at, function.fail_for_ever = function.accesses + access, True
    with pytest.raises(DeviceError, match="fault at access"):
        device.suspend()
    assert function.closed
    assert device.take_event() is DeviceEvent.LOST
    assert device.take_event() is None
    with pytest.raises(DeviceLostError):
        device.start(FEATURES, pair(rings))


def test_what_has_failed_while_idle_is_reset(
    device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]
) -> None:
    function.registers["status"] = Status.DEVICE_NEEDS_RESET
    device.start(FEATURES, pair(rings))
    statuses = [int(line.partition(" = ")[2], 0) for line in function.log if line.startswith("status")]
    assert statuses == [1, 3, 0xB, 0, 1, 3, 0xB, 0xF]
    assert function.status == 0xF


@pytest.mark.parametrize("until_reset", [True, False])
def test_what_has_failed_while_idle_and_refuses_features_is_reset(
    until_reset: bool, device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]
) -> None:
    function.registers["status"] = Status.DEVICE_NEEDS_RESET
    function.refuse_features, function.until_reset = True, until_reset
    if until_reset:
        device.start(FEATURES, pair(rings))
        assert function.status == 0xF
    else:
        with pytest.raises(DeviceError, match="refuses the features"):
            device.start(FEATURES, pair(rings))


def test_events(device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]) -> None:
    assert device.take_event() is None
    device.start(FEATURES, pair(rings))
    os.eventfd_write(function.eventfds[0], 1)
    assert device.take_event() is DeviceEvent.CONFIG_CHANGED
    function.registers["status"] |= Status.DEVICE_NEEDS_RESET
    os.eventfd_write(function.eventfds[0], 1)
    assert device.take_event() is DeviceEvent.NEEDS_RESET
    assert device.take_event() is None
    function.lose()
    assert device.take_event() is DeviceEvent.LOST
    assert device.take_event() is None
    with pytest.raises(DeviceLostError, match="ifcvf,fake: the device is gone"):
        device.suspend()


def test_what_a_device_said_before_a_start_is_forgotten(
    device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]
) -> None:
    device.start(FEATURES, pair(rings))
    os.eventfd_write(function.eventfds[0], 1)
    device.suspend()
    device.start(FEATURES, pair(rings))
    assert device.take_event() is None


@pytest.mark.parametrize(
    ("index", "size", "text"),
    [
        (4, 256, "no ring 4; the device has 2 queue pairs"),
        (0, 512, "ring 0 of 512 descriptors; the device takes powers of two up to 256"),
        (0, 96, "ring 0 of 96 descriptors"),
        (0, 0, "ring 0 of 0 descriptors"),
    ],
)
def test_rings_that_do_not_fit_are_refused(
    index: int, size: int, text: str, device: IfcvfDevice, function: FakeFunction
) -> None:
    ring = Ring(size, 0x1000, 0x2000, 0x3000, RingState(0, 0), None, None)
    with pytest.raises(DeviceError, match=text):
        device.start(FEATURES, {index: ring})
    assert not function.log


def test_a_legacy_guest_is_served(
    device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]
) -> None:
    device.start(bit(Feature.NET_F_MRG_RXBUF), pair(rings))
    assert function.status & Status.DRIVER_OK


@pytest.mark.parametrize("features", [0, bit(Feature.NET_F_STATUS) | bit(Feature.NET_F_CTRL_VQ)])
def test_a_guest_that_has_accepted_nothing_is_refused(
    features: int, device: IfcvfDevice, function: FakeFunction, rings: dict[int, Ring]
) -> None:
    """How long its header is nobody can know: front-ends forget."""
    with pytest.raises(DeviceError, match="its front-end has forgotten it; reset the guest"):
        device.start(features, pair(rings))
    assert not function.log


def test_close_resets_a_running_function(function: FakeFunction, rings: dict[int, Ring]) -> None:
    before = open_fds()
    device = IfcvfDevice("ifcvf,fake", function)
    device.start(FEATURES, pair(rings))
    device.close()
    assert function.status == 0
    assert not function.eventfds
    assert function.closed
    device.close()
    assert open_fds() <= before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ifcvf", "which VF. use pci=.* or vfio-user=PATH"),
        ("ifcvf,pci=0000:06:00.3,vfio-user=/x", "names two VFs; use pci=.* or vfio-user=PATH"),
        ("ifcvf,vfio-user=/x,vdpa=1", "ifcvf takes no option 'vdpa'"),
    ],
)
def test_device_strings_refused(text: str, message: str) -> None:
    with pytest.raises(DeviceSpecError, match=message):
        open_device(DeviceSpec.parse(text))


def test_nobody_at_the_socket(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"vfio-user=.*vf0.sock: cannot connect: No such file or directory"):
        open_device(DeviceSpec.parse(f"ifcvf,vfio-user={tmp_path}/vf0.sock"))
