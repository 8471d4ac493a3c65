"""The driver for any virtio-net function against registers in memory: what it takes, and how it gets along
with a function that has nothing but what virtio defines."""

import dataclasses
import itertools
import mmap
import os
import struct
from collections.abc import Iterator

import pytest

from datapath.drivers.dma_addresses import ADDRESS_END, DmaAddresses
from datapath.drivers.private_rings import PrivateRings
from datapath.drivers.virtio_pci import VirtioPciDevice
from datapath.native._native import ffi
from datapath.vdpa import DeviceError, DeviceEvent, DeviceLostError, MemoryRegion, Ring, RingState
from datapath.vfio import Region
from datapath.virtio import Feature, Status, bit, ring_bytes
from tests.harness.fake_function import FakeFunction, config_space

PLAIN = (0x1AF4, 0x1041, 0x1AF4, 0x1100)
FEATURES = bit(Feature.F_VERSION_1) | bit(Feature.F_EVENT_IDX)
MQ, CTRL_VQ = bit(Feature.NET_F_MQ), bit(Feature.NET_F_CTRL_VQ)
IN_ORDER, PACKED = bit(Feature.F_IN_ORDER), bit(Feature.F_RING_PACKED)
BASE = 0x1_0000_0000
MEMORY_SIZE = 0x20000


class Guest:
    """Guest memory with two rings, and their eventfds."""

    def __init__(self) -> None:
        fd = os.memfd_create("guest")
        os.ftruncate(fd, MEMORY_SIZE)
        self._view = mmap.mmap(fd, MEMORY_SIZE)
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(self._view)))
        self.region = MemoryRegion(BASE, MEMORY_SIZE, fd, 0, address)
        self.eventfds = [[os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)] for _ in range(2)]

    def ring(self, index: int, at: int = 0) -> Ring:
        """A ring both of whose indices are `at`."""
        start = BASE + index * 0x8000
        avail, used = start + 0x2000, start + 0x4000
        for part in (avail, used):
            self.set_index(part, at)
        kick, call = self.eventfds[index]
        return Ring(256, start, avail, used, RingState(at, at), kick, call)

    def write(self, address: int, data: bytes) -> None:
        self._view[address - BASE : address - BASE + len(data)] = data

    def set_index(self, part: int, index: int) -> None:
        struct.pack_into("<H", self._view, part + 2 - BASE, index)

    def close(self) -> None:
        for pair in self.eventfds:
            for fd in pair:
                os.close(fd)
        os.close(self.region.fd)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture
def function() -> Iterator[FakeFunction]:
    function = FakeFunction(config=config_space(PLAIN))
    yield function
    function.close()


@pytest.fixture
def device(function: FakeFunction, guest: Guest) -> Iterator[VirtioPciDevice]:
    device = VirtioPciDevice("virtio,fake", function)
    device.map_memory(guest.region)
    function.log.clear()
    yield device
    device.close()


def rings(guest: Guest, at: int = 0) -> dict[int, Ring]:
    return {index: guest.ring(index, at) for index in (0, 1)}


# What it takes


@pytest.mark.parametrize(
    "ids",
    [PLAIN, (0x1AF4, 0x1000, 0x1AF4, 0x0001), (0x1AF4, 0x1041, 0x15B3, 0x0001)],
    ids=["modern", "transitional", "another-subsystem"],
)
def test_ids_that_are_taken(ids: tuple[int, int, int, int]) -> None:
    VirtioPciDevice("virtio,fake", FakeFunction(config=config_space(ids))).close()


@pytest.mark.parametrize(
    "ids", [(0x1AF4, 0x1042, 0x1AF4, 0x1100), (0x8086, 0x1041, 0x8086, 0x001A)], ids=["block", "vendor"]
)
def test_ids_that_are_refused(ids: tuple[int, int, int, int]) -> None:
    function = FakeFunction(config=config_space(ids))
    with pytest.raises(DeviceError, match="is not a virtio network function"):
        VirtioPciDevice("virtio,fake", function)
    assert function.log == [], "it was touched"
    function.close()


def test_a_legacy_device_is_refused() -> None:
    function = FakeFunction(config=config_space(PLAIN), features=bit(Feature.NET_F_MAC))
    with pytest.raises(DeviceError, match="legacy virtio device"):
        VirtioPciDevice("virtio,fake", function)
    function.close()


def test_a_legacy_guest_is_refused(device: VirtioPciDevice, function: FakeFunction, guest: Guest) -> None:
    with pytest.raises(DeviceError, match="VERSION_1, and the function needs it; boot a guest"):
        device.start(bit(Feature.NET_F_MAC) | bit(Feature.F_EVENT_IDX), rings(guest))
    assert function.log == [], "it was touched"


def test_one_pair_until_somebody_speaks_to_the_control_queue(device: VirtioPciDevice) -> None:
    assert device.queue_pairs == 1


# Features


def test_who_is_called_while_memory_is_mapped(
    device: VirtioPciDevice, function: FakeFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    monkeypatch.setattr(function, "call_meanwhile", given.append)
    device.call_meanwhile(device.close)
    assert given == [device.close]


@pytest.mark.parametrize("insists", [True, False])
def test_access_platform_is_the_drivers_affair(guest: Guest, insists: bool) -> None:
    offered = FEATURES | (bit(Feature.F_ACCESS_PLATFORM) if insists else 0)
    function = FakeFunction(config=config_space(PLAIN), features=offered)
    device = VirtioPciDevice("virtio,fake", function)
    assert not device.features & bit(Feature.F_ACCESS_PLATFORM)
    device.map_memory(guest.region)
    device.start(FEATURES, rings(guest))
    at = function.log.index("driver_feature_select = 0x1")
    assert function.log[at + 1] == f"driver_feature = {0x3 if insists else 0x1:#x}"
    device.close()


@pytest.mark.parametrize("has_control_queue", [True, False])
def test_several_pairs_are_neither_offered_nor_asked_for(guest: Guest, has_control_queue: bool) -> None:
    """MQ needs CTRL_VQ (section 5.1.3.1), which is the front-end's, whatever queue the function has."""
    own = CTRL_VQ if has_control_queue else 0
    function = FakeFunction(config=config_space(PLAIN), features=FEATURES | MQ | own)
    device = VirtioPciDevice("virtio,fake", function)
    assert device.features & (MQ | CTRL_VQ) == CTRL_VQ
    device.map_memory(guest.region)
    device.start(device.features, rings(guest))
    assert accepted(function) & (MQ | CTRL_VQ) == own
    device.close()


# Where rings begin


def statuses(function: FakeFunction) -> list[str]:
    """What has been written to the status register."""
    return [entry for entry in function.log if entry.startswith("status")]


def test_features_are_negotiated_beforehand(
    device: VirtioPciDevice, function: FakeFunction, guest: Guest
) -> None:
    device.prepare(FEATURES)
    assert function.status == Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
    told = statuses(function)
    device.prepare(FEATURES)
    assert statuses(function) == told, "again"
    device.start(FEATURES, rings(guest))
    assert len(statuses(function)) == len(told) + 1, "only DRIVER_OK was missing"
    assert function.status & Status.DRIVER_OK
    device.prepare(FEATURES | IN_ORDER)
    assert len(statuses(function)) == len(told) + 1, "it runs"


def test_features_change_by_a_reset_only(
    device: VirtioPciDevice, function: FakeFunction, guest: Guest
) -> None:
    device.prepare(bit(Feature.F_VERSION_1))
    device.start(FEATURES, rings(guest))
    told = [entry for entry in function.log if entry.startswith(("status", "driver_feature ="))]
    low = FEATURES & 0xFFFFFFFF
    assert told[-7:-3] == ["status = 0x0", "status = 0x1", "status = 0x3", f"driver_feature = {low:#x}"]
    assert told[-2:] == ["status = 0xb", "status = 0xf"]


@pytest.mark.parametrize("status", [0, 0xB | Status.DEVICE_NEEDS_RESET], ids=["reset", "failed"])
def test_a_function_that_did_not_stay_prepared_begins_anew(
    status: int, device: VirtioPciDevice, function: FakeFunction, guest: Guest
) -> None:
    device.prepare(FEATURES)
    function.registers["status"] = status
    device.start(FEATURES, rings(guest))
    assert function.status == 0xF
    assert statuses(function)[-5:] == [f"status = {value:#x}" for value in (0, 1, 3, 0xB, 0xF)]


def test_what_cannot_be_prepared_is_told_by_the_start(
    device: VirtioPciDevice, function: FakeFunction, guest: Guest
) -> None:
    function.refuse_features = True
    device.prepare(FEATURES)
    with pytest.raises(DeviceError, match="refuses the features"):
        device.start(FEATURES, rings(guest))
    function.refuse_features = False
    device.start(FEATURES, rings(guest))


def test_memory_that_is_refused_ends_the_start_and_not_the_device(
    function: FakeFunction, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise DeviceError("refused")

    device = VirtioPciDevice("virtio,fake", function)
    monkeypatch.setattr(function, "dma_map_later", lambda memory: refuse)
    device.map_memory(guest.region)
    with pytest.raises(DeviceError, match="refused"):
        device.start(FEATURES, rings(guest))
    device.unmap_memory(guest.region)
    monkeypatch.undo()
    device.map_memory(guest.region)
    device.start(FEATURES, rings(guest))
    device.close()


def test_rings_at_0_are_the_guests_own(device: VirtioPciDevice, function: FakeFunction, guest: Guest) -> None:
    mine = rings(guest)
    device.start(FEATURES, mine)
    assert not device.shadowed
    for index, ring in mine.items():
        assert function.queues[index]["queue_avail_low"] == ring.avail & 0xFFFFFFFF
        assert function.eventfds[index + 1] == ring.call


@pytest.mark.parametrize("at", [1, 0x8000, 0xFFFF])
def test_rings_elsewhere_are_private(
    device: VirtioPciDevice, function: FakeFunction, guest: Guest, at: int
) -> None:
    mine = rings(guest, at)
    device.start(FEATURES, mine)
    assert device.shadowed
    private = next(memory for memory in function.mapped if memory != guest.region)
    for index, ring in mine.items():
        registers = function.queues[index]
        address = registers["queue_avail_low"] | registers["queue_avail_high"] << 32
        assert private.guest_address <= address < private.guest_address + private.size
        assert registers["queue_desc_low"] == ring.descriptors & 0xFFFFFFFF, "the guest's own descriptors"
        assert function.eventfds[index + 1] != ring.call


def test_one_ring_elsewhere_takes_the_other_with_it(device: VirtioPciDevice, guest: Guest) -> None:
    device.start(FEATURES, {0: guest.ring(0, 0), 1: guest.ring(1, 5)})
    assert device.shadowed


# The order of used buffers


def accepted(function: FakeFunction) -> int:
    """The features that the function was told last."""
    words = {}
    for before, after in itertools.pairwise(function.log):
        for select in (0, 1):
            if before == f"driver_feature_select = {select:#x}":
                words[select] = int(after.removeprefix("driver_feature = "), 16)
    return words[0] | words[1] << 32


def test_a_function_keeps_the_order_of_rings_that_are_the_guests_own(guest: Guest) -> None:
    """A shadowed ring begins in the middle of the guest's descriptor table, which IN_ORDER does not allow."""
    function = FakeFunction(config=config_space(PLAIN), features=FEATURES | IN_ORDER)
    device = VirtioPciDevice("virtio,fake", function)
    assert device.features & IN_ORDER
    device.map_memory(guest.region)
    device.start(FEATURES | IN_ORDER, rings(guest))
    assert accepted(function) & IN_ORDER
    device.suspend()
    device.start(FEATURES | IN_ORDER, rings(guest, 5))
    assert not accepted(function) & IN_ORDER
    device.close()


# Packed rings


def packed_device(guest: Guest) -> VirtioPciDevice:
    function = FakeFunction(config=config_space(PLAIN), features=FEATURES | PACKED)
    device = VirtioPciDevice("virtio,fake", function)
    assert device.features & PACKED
    device.map_memory(guest.region)
    return device


def packed_rings(guest: Guest, at: int = 0x8000) -> dict[int, Ring]:
    state = RingState(at, at)
    return {index: dataclasses.replace(guest.ring(index), packed=True, state=state) for index in (0, 1)}


def descriptor(flags: int, address: int = 0x1000) -> bytes:
    return struct.pack("<QIHH", address, 64, 0, flags)


AVAIL, USED = 0x80, 0x8000


@pytest.mark.parametrize(
    ("written", "untouched"),
    [
        ([], True),
        ([descriptor(AVAIL)], True),
        ([descriptor(AVAIL)] * 256, True),
        ([descriptor(AVAIL | USED)], False),
        ([descriptor(AVAIL | USED), descriptor(AVAIL)], False),
        ([descriptor(USED)] * 256, False),
        ([descriptor(0)] * 256, False),
        ([descriptor(AVAIL | 1), descriptor(AVAIL)] * 128, False),
    ],
)
def test_packed_rings_go_on_only_where_nothing_was_used(
    guest: Guest, written: list[bytes], untouched: bool
) -> None:
    device = packed_device(guest)
    mine = packed_rings(guest)
    device.start(FEATURES | PACKED, mine)
    assert not device.shadowed
    guest.write(mine[0].descriptors, b"".join(written))
    states = device.suspend()
    assert states[1] == RingState(0x8000, 0x8000)
    assert (states[0] == RingState(0x8000, 0x8000)) is untouched
    mine[0] = dataclasses.replace(mine[0], state=states[0])
    if untouched:
        device.start(FEATURES | PACKED, mine)
    else:
        with pytest.raises(DeviceError, match="have been in use, and virtio has no register"):
            device.start(FEATURES | PACKED, mine)
    device.close()


def test_packed_rings_of_which_a_front_end_has_forgotten_that_they_were_in_use(guest: Guest) -> None:
    """As QEMU does when its back-end has died."""
    device = packed_device(guest)
    mine = packed_rings(guest)
    guest.write(mine[1].descriptors, descriptor(AVAIL | USED))
    with pytest.raises(DeviceError, match="packed rings have been in use"):
        device.start(FEATURES | PACKED, mine)
    device.close()


@pytest.mark.parametrize("at", [0, 1, 0x8001])
def test_packed_rings_begin_at_the_start_only(guest: Guest, at: int) -> None:
    device = packed_device(guest)
    with pytest.raises(DeviceError, match="packed rings have been in use"):
        device.start(FEATURES | PACKED, packed_rings(guest, at))
    device.close()


def test_only_packed_rings_have_any_size(guest: Guest) -> None:
    device = packed_device(guest)
    odd = {index: dataclasses.replace(ring, size=5) for index, ring in packed_rings(guest).items()}
    device.start(FEATURES | PACKED, odd)
    device.suspend()
    split = {index: dataclasses.replace(ring, size=5) for index, ring in rings(guest).items()}
    with pytest.raises(DeviceError, match="ring 0 of 5 descriptors; the device takes powers of two"):
        device.start(FEATURES, split)
    device.close()


# How rings stop


def test_it_stops_by_a_reset_where_the_guest_sees_it(
    device: VirtioPciDevice, function: FakeFunction, guest: Guest
) -> None:
    mine = rings(guest)
    device.start(FEATURES, mine)
    guest.set_index(mine[0].avail, 40)  # receive buffers that wait for frames
    guest.set_index(mine[0].used, 17)
    for part in (mine[1].avail, mine[1].used):
        guest.set_index(part, 9)
    function.log.clear()
    assert device.suspend() == {0: RingState(17, 17), 1: RingState(9, 9)}
    assert "queue_enable[0] = 0x0" not in function.log, "virtio does not allow it"
    assert function.log[0] == "status = 0x0"
    assert function.status == 0


def test_one_ring_stops_and_starts_by_all_of_them(
    device: VirtioPciDevice, function: FakeFunction, guest: Guest
) -> None:
    mine = rings(guest)
    device.start(FEATURES, mine)
    guest.set_index(mine[0].avail, 3)
    guest.set_index(mine[0].used, 3)
    function.log.clear()
    assert device.stop_ring(1) == RingState(0, 0)
    assert function.status & Status.DRIVER_OK
    assert (function.queues[0].get("queue_enable"), function.queues[1].get("queue_enable")) == (1, None)
    assert device.shadowed, "ring 0 goes on at 3"
    assert os.eventfd_read(guest.eventfds[0][1]) == 1, "an interrupt may have been lost"
    device.start_ring(1, mine[1])
    assert [function.queues[index].get("queue_enable") for index in (0, 1)] == [1, 1]
    assert set(device.suspend()) == {0, 1}


def test_guest_memory_that_has_shrunk_is_an_error(
    device: VirtioPciDevice, function: FakeFunction, guest: Guest
) -> None:
    device.start(FEATURES, rings(guest))
    os.ftruncate(guest.region.fd, 0)
    with pytest.raises(DeviceError, match="has shrunk away"):
        device.suspend()
    assert function.status == 0


# What goes wrong


def test_a_function_that_reads_as_all_ones_is_lost(device: VirtioPciDevice, function: FakeFunction) -> None:
    function.registers["status"] = 0xFF
    os.eventfd_write(device._config_fd, 1)
    assert device.take_event() is DeviceEvent.LOST
    with pytest.raises(DeviceLostError):
        device.suspend()


def test_private_rings_keep_clear_of_guest_memory(device: VirtioPciDevice, guest: Guest) -> None:
    device.start(FEATURES, rings(guest))
    far = (1 << 39) - 0x1000
    with pytest.raises(DeviceError, match="is where the private rings are"):
        device.map_memory(MemoryRegion(far, 0x1000, guest.region.fd, 0, guest.region.address))


def test_idle_private_rings_make_room_for_guest_memory(
    device: VirtioPciDevice, function: FakeFunction, guest: Guest
) -> None:
    """A front-end that comes next may have its memory elsewhere."""
    device.start(FEATURES, rings(guest, 5))
    [before] = [memory for memory in function.mapped if memory != guest.region]
    device.suspend()
    far = MemoryRegion(before.guest_address, 0x1000, guest.region.fd, 0, guest.region.address)
    device.map_memory(far)
    assert before not in function.mapped
    device.start(FEATURES, rings(guest, 5))
    [after] = [memory for memory in function.mapped if memory not in (guest.region, far)]
    assert after.guest_address + after.size <= far.guest_address


SIZE = sum(-(-part // 4096) * 4096 for part in ring_bytes(256)[1:])


@pytest.mark.parametrize(
    ("ranges", "guest_at", "wanted"),
    [
        (((0, (1 << 39) - 1),), [], (1 << 39) - 2 * SIZE),
        (((0, (1 << 64) - 1),), [], ADDRESS_END - 2 * SIZE),
        (((0, 0xFFFF), (0x100000, 0x100FFF)), [], 0x10000 - 2 * SIZE),
        (((0, (1 << 39) - 1),), [(1 << 39) - 0x1000, (1 << 39) - 0x3000], (1 << 39) - 0x3000 - 2 * SIZE),
    ],
    ids=["iommu", "no-iommu", "too-small-range", "beside-guest-memory"],
)
def test_where_private_rings_are(
    monkeypatch: pytest.MonkeyPatch, ranges: object, guest_at: list[int], wanted: int
) -> None:
    function = FakeFunction()
    monkeypatch.setattr(FakeFunction, "iova_ranges", lambda _: ranges)
    addresses = DmaAddresses(function)
    for start in guest_at:
        addresses.take(MemoryRegion(start, 0x1000, -1, 0, 0))
    private = PrivateRings(function, addresses, 2, 256)
    assert private.memory.guest_address == wanted
    assert addresses.place(2 * SIZE, "others") <= wanted - 2 * SIZE
    private.close()
    assert addresses.place(2 * SIZE, "others") == wanted
    function.close()


def test_no_room_for_private_rings_is_an_error_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known when the device is opened."""
    function = FakeFunction(pairs=1, config=config_space(PLAIN))
    monkeypatch.setattr(FakeFunction, "iova_ranges", lambda _: ((0, 0xFFF),))
    with pytest.raises(
        DeviceError, match=f"no DMA addresses for {2 * SIZE} bytes of private rings.*0x0-0xfff"
    ):
        VirtioPciDevice("virtio,fake", function)
    function.close()


def test_bar_4_is_not_touched(device: VirtioPciDevice, function: FakeFunction, guest: Guest) -> None:
    function.bar_sizes[Region.BAR4] = 0
    device.start(FEATURES, rings(guest, 5))
    device.suspend()
    assert not [entry for entry in function.log if entry.startswith("bar4")]
