"""The register model of the emulated IFCVF: configuration space, common configuration, BAR 4.

The engine is replaced by one that takes notes; nothing here moves a packet.
"""

import struct
from typing import cast

import pytest

from datapath.bus.pci import PciIds, virtio_structures
from datapath.emulation.engine import MAX_QUEUE_SIZE, Engine, QueueSetup
from datapath.emulation.ifcvf import MQ, Ifcvf, Layout, ring_state_offset
from datapath.emulation.virtio_net import FEATURES, NetSpec, consistent
from datapath.pci import PciCommand
from datapath.vdpa import RingState
from datapath.vfio import Region
from datapath.virtio import NO_VECTOR, Common, Feature, NetConfig, PciCapability, Status, bit

MAC = bytes.fromhex("020000000001")
MTU = 1500
DEVICE_CONFIG = 0x2000
LAYOUT = Layout(1)
#: By a device with one queue pair.
OFFERED = FEATURES & ~bit(Feature.NET_F_MQ)
ACCEPTABLE = bit(Feature.F_VERSION_1) | bit(Feature.F_EVENT_IDX)


class NotedEngine:
    """What the register model asked for."""

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs
        self.used_pairs = 0
        self.queues: dict[int, QueueSetup] = {}
        self.running = False
        self.log: tuple[bool, int, int] = (False, 0, 0)
        self.calls: dict[int, int | None] = {}
        self.state = RingState(0, 0)
        self.refuse = False
        self.features = 0

    def start_queue(self, index: int, setup: QueueSetup) -> None:
        if self.refuse:
            raise OSError(22, "Invalid argument")
        self.queues[index] = setup

    def stop_queue(self, index: int) -> RingState:
        del self.queues[index]
        return self.state

    def kick(self, index: int) -> None:
        raise AssertionError("nothing was notified")

    def set_call(self, index: int, fd: int | None) -> None:
        self.calls[index] = fd

    def run(self, on: bool) -> None:
        self.running = on

    def accept(self, features: int) -> None:
        self.features = features

    def use_pairs(self, pairs: int) -> None:
        self.used_pairs = pairs

    def set_log(self, on: bool, base: int, end: int) -> None:
        self.log = (on, base, end)

    def reset(self) -> None:
        self.queues.clear()
        self.running = False
        self.features = 0
        self.log = (False, 0, 0)


class Function:
    """The function with shorter words for register accesses."""

    def __init__(self, features: int = FEATURES, pairs: int = 1) -> None:
        self.engine = NotedEngine(pairs)
        self.device = Ifcvf(cast(Engine, self.engine), NetSpec(MAC, MTU, features))
        self.command(PciCommand.MEMORY | PciCommand.MASTER)

    def command(self, value: PciCommand) -> None:
        self.write(Region.CONFIG, 4, 2, value)

    def read(self, region: Region, offset: int, width: int) -> int:
        return int.from_bytes(self.device.read(region, offset, width), "little")

    def write(self, region: Region, offset: int, width: int, value: int) -> None:
        self.device.write(region, offset, value.to_bytes(width, "little"))

    def common(self, offset: int, width: int) -> int:
        return self.read(Region.BAR0, offset, width)

    def set_common(self, offset: int, width: int, value: int) -> None:
        self.write(Region.BAR0, offset, width, value)

    @property
    def status(self) -> Status:
        return Status(self.common(Common.DEVICE_STATUS, 1))

    def negotiate(self, features: int = ACCEPTABLE) -> Status:
        """Up to FEATURES_OK; returns the status that the device then shows."""
        self.set_common(Common.DEVICE_STATUS, 1, 0)
        for select in (0, 1):
            self.set_common(Common.DRIVER_FEATURE_SELECT, 4, select)
            self.set_common(Common.DRIVER_FEATURE, 4, features >> 32 * select & 0xFFFFFFFF)
        self.set_common(Common.DEVICE_STATUS, 1, Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        return self.status

    def enable(self, index: int, on: int = 1) -> None:
        self.set_common(Common.QUEUE_SELECT, 2, index)
        self.set_common(Common.QUEUE_ENABLE, 2, on)

    def start(self) -> None:
        """All the way to DRIVER_OK, with both queues."""
        self.negotiate()
        self.enable(0)
        self.enable(1)
        self.set_common(Common.DEVICE_STATUS, 1, self.status | Status.DRIVER_OK)


@pytest.fixture
def function() -> Function:
    return Function()


def test_identity(function: Function) -> None:
    space = function.device.read(Region.CONFIG, 0, 256)
    assert PciIds.of(space) == PciIds(0x1AF4, 0x1041, 0x8086, 0x001A)
    assert space[9:12] == bytes([0, 0, 2])  # an Ethernet controller
    assert space[0x3D] == 0  # no interrupt pin


def test_structures_are_where_a_driver_finds_them(function: Function) -> None:
    """Judged by the driver's own reader of capabilities."""
    space = function.device.read(Region.CONFIG, 0, 256)
    found = virtio_structures(space, lambda bar: LAYOUT.region_sizes.get(Region(bar), 0))
    assert {kind: structure.bar for kind, structure in found.items()} == {
        PciCapability.COMMON: 0,
        PciCapability.ISR: 0,
        PciCapability.DEVICE: 0,
        PciCapability.NOTIFY: 2,
    }


def test_msix_capability(function: Function) -> None:
    space = function.device.read(Region.CONFIG, 0, 256)
    at = space[0x34]
    while space[at] != 0x11:
        at = space[at + 1]
    control, table, pending = struct.unpack_from("<HII", space, at + 2)
    assert control == LAYOUT.vectors - 1
    assert (table & 7, pending & 7) == (0, 0)
    assert table & ~7 != pending & ~7
    function.write(Region.CONFIG, at + 2, 2, 0xFFFF)
    assert function.read(Region.CONFIG, at + 2, 2) == 0xC000 | LAYOUT.vectors - 1


def test_window_of_configuration_space(function: Function) -> None:
    """Registers without BARs (section 4.1.4.9), as firmware reads them."""
    space = function.device.read(Region.CONFIG, 0, 256)
    at = space[0x34]
    while (space[at], space[at + 3]) != (9, PciCapability.PCI_ACCESS):
        at = space[at + 1]
    assert space[at + 2] == 20
    function.command(PciCommand(0))

    def aim(bar: int, offset: int, length: int) -> None:
        function.write(Region.CONFIG, at + 4, 1, bar)
        function.write(Region.CONFIG, at + 8, 4, offset)
        function.write(Region.CONFIG, at + 12, 4, length)

    aim(0, Common.NUM_QUEUES, 2)
    assert function.read(Region.CONFIG, at + 16, 2) == 3
    aim(0, Common.QUEUE_SELECT, 2)
    function.write(Region.CONFIG, at + 16, 2, 1)
    assert function.read(Region.CONFIG, at + 16, 2) == 1
    for bar, offset, length in (
        (0, 0x4000, 2),
        (0, 0xFFFFFFFE, 2),
        (1, 0, 2),
        (255, 0, 2),
        (0, 1, 2),
        (0, 0, 3),
    ):
        aim(bar, offset, length)
        assert function.read(Region.CONFIG, at + 16, length) == 0
    function.device.net.set_link(False)
    aim(0, 0x1000, 1)
    function.device.read(Region.CONFIG, 0, 256)  # a dump does not clear the ISR byte
    assert function.read(Region.CONFIG, at + 16, 1) == 2


@pytest.mark.parametrize("number", LAYOUT.bars)
def test_bars_can_be_sized(function: Function, number: int) -> None:
    at = 0x10 + 4 * number
    function.write(Region.CONFIG, at, 4, 0xFFFFFFFF)
    function.write(Region.CONFIG, at + 4, 4, 0xFFFFFFFF)
    value = function.read(Region.CONFIG, at, 8)
    assert value & 0xF == 4  # 64-bit memory
    assert -(value & ~0xF) & (1 << 64) - 1 == LAYOUT.bars[number]


def test_ids_cannot_be_written(function: Function) -> None:
    before = function.device.read(Region.CONFIG, 0, 4)
    function.write(Region.CONFIG, 0, 4, 0)
    assert function.device.read(Region.CONFIG, 0, 4) == before


def test_features_are_offered_in_two_words(function: Function) -> None:
    words = []
    for select in (0, 1, 2):
        function.set_common(Common.DEVICE_FEATURE_SELECT, 4, select)
        words.append(function.common(Common.DEVICE_FEATURE, 4))
    assert words == [OFFERED & 0xFFFFFFFF, OFFERED >> 32, 0]


@pytest.mark.parametrize(
    ("features", "accepted"),
    [
        (ACCEPTABLE, True),
        (OFFERED, True),
        (FEATURES, False),
        (bit(Feature.F_EVENT_IDX), True),  # a guest of virtio 0.95: an IFCVF takes it
        (ACCEPTABLE | bit(Feature.NET_F_GUEST_UFO), False),
        (ACCEPTABLE | bit(Feature.F_RING_PACKED), True),
        (ACCEPTABLE | bit(Feature.F_NOTIFICATION_DATA), False),
    ],
)
def test_features_ok(function: Function, features: int, accepted: bool) -> None:
    assert bool(function.negotiate(features) & Status.FEATURES_OK) is accepted


def test_features_are_settled_by_features_ok(function: Function) -> None:
    function.negotiate()
    function.set_common(Common.DRIVER_FEATURE_SELECT, 4, 0)
    function.set_common(Common.DRIVER_FEATURE, 4, 0)
    assert function.common(Common.DRIVER_FEATURE, 4) == ACCEPTABLE & 0xFFFFFFFF


def test_queues_count_the_control_queue(function: Function) -> None:
    assert function.common(Common.NUM_QUEUES, 2) == 3
    for index, size in ((0, MAX_QUEUE_SIZE), (2, MAX_QUEUE_SIZE), (3, 0), (0xFFFF, 0)):
        function.set_common(Common.QUEUE_SELECT, 2, index)
        assert function.common(Common.QUEUE_SIZE, 2) == size


def test_a_queue_is_programmed_as_written(function: Function) -> None:
    function.negotiate()
    function.write(Region.BAR4, ring_state_offset(1), 4, 7 << 16 | 9)
    function.set_common(Common.QUEUE_SELECT, 2, 1)
    function.set_common(Common.QUEUE_SIZE, 2, 256)
    function.set_common(Common.QUEUE_DESC, 4, 0x1000)
    function.set_common(Common.QUEUE_DESC + 4, 4, 0x1)
    function.set_common(Common.QUEUE_DRIVER, 8, 0x2_0000_2000)
    function.set_common(Common.QUEUE_DEVICE + 4, 4, 0x3)
    function.set_common(Common.QUEUE_DEVICE, 4, 0x3000)
    function.enable(1)
    assert function.engine.queues == {
        1: QueueSetup(
            size=256,
            descriptors=0x1_0000_1000,
            avail=0x2_0000_2000,
            used=0x3_0000_3000,
            state=RingState(avail=9, used=7),
            event_idx=True,
            indirect=False,
            mergeable=False,
        )
    }
    function.set_common(Common.QUEUE_DESC, 4, 0)
    assert function.common(Common.QUEUE_DESC, 8) == 0x1_0000_1000  # in use: not to be changed
    assert function.common(Common.QUEUE_NOTIFY_OFF, 2) == 1


@pytest.mark.parametrize("feature", [Feature.F_VERSION_1, Feature.NET_F_MRG_RXBUF, Feature.F_EVENT_IDX])
def test_who_has_the_short_header(function: Function, feature: Feature) -> None:
    function.negotiate(bit(feature))
    function.enable(0)
    assert function.engine.queues[0].short_header is (feature is Feature.F_EVENT_IDX)


def test_disabling_a_queue_publishes_where_it_stood(function: Function) -> None:
    function.start()
    function.engine.state = RingState(avail=12, used=10)
    function.enable(0, 0)
    assert function.common(Common.QUEUE_ENABLE, 2) == 0
    assert function.read(Region.BAR4, 0x20, 4) == 10 << 16 | 12
    assert list(function.engine.queues) == [1]
    assert function.engine.running


def test_ring_states_are_where_dpdk_reads_them() -> None:
    assert [ring_state_offset(index) for index in range(5)] == [0x20, 0x24, 0x60, 0x64, 0xA0]


def test_dirty_log(function: Function) -> None:
    function.write(Region.BAR4, 0x10, 4, 0x1000)
    function.write(Region.BAR4, 0x14, 4, 0x1000)
    function.write(Region.BAR4, 0x18, 4, 0x9000)
    function.write(Region.BAR4, 0x1C, 4, 0x1000)
    function.write(Region.BAR4, 0x00, 4, 1)
    assert function.engine.log == (True, 0x1000_0000_1000, 0x1000_0000_9000)
    function.write(Region.BAR4, 0x00, 4, 0)
    assert function.engine.log[0] is False


def test_registers_of_bar_4(function: Function) -> None:
    function.write(Region.BAR4, 0x28, 4, 1)
    function.write(Region.BAR4, 0x20, 2, 5)  # Linux writes the lower half alone
    function.write(Region.BAR4, 0x40, 4, 1)  # no register
    function.write(Region.BAR4, 0x22, 4, 0xFFFFFFFF)  # across two
    assert [function.read(Region.BAR4, at, 4) for at in (0x20, 0x28, 0x40)] == [5, 1, 0]


def test_reset_forgets(function: Function) -> None:
    function.start()
    function.write(Region.BAR4, 0, 4, 1)
    function.set_common(Common.DEVICE_STATUS, 1, 0)
    assert function.status == 0
    assert (function.engine.queues, function.engine.running) == ({}, False)
    assert function.engine.log[0] is False
    function.set_common(Common.QUEUE_SELECT, 2, 0)
    assert function.common(Common.QUEUE_ENABLE, 2) == 0
    assert function.common(Common.QUEUE_MSIX_VECTOR, 2) == NO_VECTOR


@pytest.mark.parametrize(
    ("register", "value", "shown"),
    [
        (Common.CONFIG_MSIX_VECTOR, 0, 0),
        (Common.CONFIG_MSIX_VECTOR, LAYOUT.vectors, NO_VECTOR),
        (Common.QUEUE_MSIX_VECTOR, LAYOUT.vectors - 1, LAYOUT.vectors - 1),
        (Common.QUEUE_MSIX_VECTOR, 0x1000, NO_VECTOR),
    ],
)
def test_a_vector_that_is_none_reads_back_as_none(
    function: Function, register: int, value: int, shown: int
) -> None:
    function.set_common(register, 2, value)
    assert function.common(register, 2) == shown


def test_no_dma_without_bus_master(function: Function) -> None:
    function.start()
    assert function.engine.running
    function.command(PciCommand.MEMORY)
    assert not function.engine.running
    function.command(PciCommand.MEMORY | PciCommand.MASTER)
    assert function.engine.running


def test_no_registers_without_memory_decoding(function: Function) -> None:
    function.command(PciCommand.MASTER)
    function.set_common(Common.QUEUE_SELECT, 2, 1)
    assert function.common(Common.NUM_QUEUES, 2) == 0xFFFF
    function.command(PciCommand.MEMORY | PciCommand.MASTER)
    assert function.common(Common.QUEUE_SELECT, 2) == 0


def test_function_reset_takes_the_bus_away(function: Function) -> None:
    function.start()
    function.device.reset()
    assert function.read(Region.CONFIG, 4, 2) == 0
    assert not function.engine.running
    function.command(PciCommand.MEMORY | PciCommand.MASTER)
    assert function.status == 0


def test_device_configuration(function: Function) -> None:
    assert function.device.read(Region.BAR0, DEVICE_CONFIG, 6) == MAC
    assert function.read(Region.BAR0, DEVICE_CONFIG + NetConfig.STATUS, 2) == 1
    assert function.read(Region.BAR0, DEVICE_CONFIG + NetConfig.MTU, 2) == MTU
    function.write(Region.BAR0, DEVICE_CONFIG, 4, 0)
    assert function.device.read(Region.BAR0, DEVICE_CONFIG, 6) == MAC


def test_link_goes_down_and_up(function: Function) -> None:
    function.start()
    generation = function.common(Common.CONFIG_GENERATION, 1)
    function.device.net.set_link(False)
    assert function.read(Region.BAR0, DEVICE_CONFIG + NetConfig.STATUS, 2) == 0
    assert function.common(Common.CONFIG_GENERATION, 1) == generation + 1
    assert function.read(Region.BAR0, 0x1000, 1) == 2  # ISR: configuration changed
    assert function.read(Region.BAR0, 0x1000, 1) == 0  # reading it clears it
    assert not function.engine.running
    function.device.net.set_link(True)
    assert function.engine.running


def test_a_failure_needs_a_reset(function: Function) -> None:
    function.start()
    function.device.net.fail("queue 0: bad")
    assert function.status & Status.DEVICE_NEEDS_RESET
    assert not function.engine.running
    function.set_common(Common.DEVICE_STATUS, 1, Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK)
    assert function.status & Status.DEVICE_NEEDS_RESET  # only a reset ends it
    assert not function.engine.running
    function.start()
    assert not function.status & Status.DEVICE_NEEDS_RESET
    assert function.engine.running


def test_a_queue_that_cannot_be_is_a_failure(function: Function) -> None:
    function.engine.refuse = True
    function.start()
    assert function.status & Status.DEVICE_NEEDS_RESET
    assert "queue 0" in (function.device.net.failure or "")


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_any_access_is_answered(function: Function, width: int) -> None:
    """Reads and writes of every place and width: the model may ignore them, but not fall over."""
    function.negotiate()
    for region, size in LAYOUT.region_sizes.items():
        places = range(0, size - width + 1, 1 if region is Region.CONFIG else 4)
        for offset in places:
            assert len(function.device.read(region, offset, width)) == width
    for offset in range(Common.SIZE - width + 1):
        function.set_common(offset, width, 1)


def test_the_engine_hears_what_was_accepted_until_the_reset(function: Function) -> None:
    features = ACCEPTABLE | bit(Feature.NET_F_GUEST_CSUM) | bit(Feature.NET_F_GUEST_TSO4)
    function.negotiate(features)
    assert function.engine.features == 0
    function.set_common(Common.DEVICE_STATUS, 1, function.status | Status.DRIVER_OK)
    assert function.engine.features == features
    function.set_common(Common.DEVICE_STATUS, 1, 0)
    assert function.engine.features == 0


def test_what_needs_a_feature_that_the_driver_has_not_accepted_is_left_out(function: Function) -> None:
    """The kernel refuses to leave segmentation, and not checksums, to whoever reads a TAP."""
    function.negotiate(ACCEPTABLE | bit(Feature.NET_F_GUEST_TSO4) | bit(Feature.NET_F_GUEST_ECN))
    function.set_common(Common.DEVICE_STATUS, 1, function.status | Status.DRIVER_OK)
    assert function.engine.features == ACCEPTABLE


@pytest.mark.parametrize(
    ("without", "gone"),
    [
        (Feature.NET_F_CSUM, ["HOST_TSO4", "HOST_TSO6", "HOST_ECN"]),
        (Feature.NET_F_GUEST_CSUM, ["GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN"]),
        (Feature.NET_F_GUEST_TSO4, []),
        (Feature.NET_F_MRG_RXBUF, []),
    ],
)
def test_what_needs_a_feature_goes_with_it(without: Feature, gone: list[str]) -> None:
    missing = FEATURES & ~consistent(FEATURES & ~bit(without))
    assert missing == bit(without) | sum(bit(Feature[f"NET_F_{name}"]) for name in gone)


def test_what_is_withheld_is_neither_offered_nor_taken() -> None:
    function = Function(consistent(FEATURES & ~bit(Feature.NET_F_CSUM)))
    assert not function.common(Common.DEVICE_FEATURE, 4) & bit(Feature.NET_F_CSUM)
    assert not function.negotiate(ACCEPTABLE | bit(Feature.NET_F_CSUM)) & Status.FEATURES_OK


def test_a_device_with_several_queue_pairs() -> None:
    function = Function(pairs=4)
    assert function.common(Common.DEVICE_FEATURE, 4) & bit(Feature.NET_F_MQ)
    assert function.common(Common.NUM_QUEUES, 2) == 9
    assert function.read(Region.BAR0, DEVICE_CONFIG + NetConfig.MAX_VIRTQUEUE_PAIRS, 2) == 4
    assert len(function.device.vectors) == 10
    sizes = function.device.layout.region_sizes
    assert (sizes[Region.BAR0], sizes[Region.BAR2], sizes[Region.BAR4]) == (0x4000, 0x10000, 0x1000)
    space = function.device.read(Region.CONFIG, 0, 256)
    found = virtio_structures(space, lambda bar: sizes.get(Region(bar), 0))
    assert found[PciCapability.NOTIFY].length == 9 * 4096


def test_ring_states_of_all_pairs() -> None:
    function = Function(pairs=8)
    places = [ring_state_offset(index) for index in range(16)]
    for number, at in enumerate(places):
        function.write(Region.BAR4, at, 4, number << 16 | number)
    assert [function.read(Region.BAR4, at, 4) for at in places] == [n << 16 | n for n in range(16)]
    function.negotiate()
    function.write(Region.BAR4, ring_state_offset(15), 4, 0x00070007)
    function.enable(15)
    assert function.engine.queues[15].state == RingState(7, 7)


@pytest.mark.parametrize(("features", "used"), [(bit(Feature.NET_F_MQ), 3), (0, 1)])
def test_packets_come_in_the_pairs_that_the_driver_uses(features: int, used: int) -> None:
    """BAR 4 + 0x28 says how many; without NET_F_MQ it is one (section 5.1.6.5.5)."""
    function = Function(pairs=4)
    function.negotiate(ACCEPTABLE | features)
    function.write(Region.BAR4, MQ, 4, 3)
    assert function.engine.used_pairs == 0
    function.set_common(Common.DEVICE_STATUS, 1, function.status | Status.DRIVER_OK)
    assert function.engine.used_pairs == used
    function.write(Region.BAR4, MQ, 4, 400)
    assert function.engine.used_pairs == (4 if features else 1)
    function.write(Region.BAR4, MQ, 4, 0)
    assert function.engine.used_pairs == 1
