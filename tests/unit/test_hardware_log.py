"""A dirty log that an IFCVF keeps by itself, against registers in memory: their order, and what is done when
something about it fails."""

import mmap
import os
from collections.abc import Iterator
from functools import partial

import pytest

from datapath.drivers.dma_addresses import overlap
from datapath.drivers.hardware_log import HardwareLog
from datapath.drivers.ifcvf import IfcvfDevice
from datapath.drivers.virtio_pci import VirtioPciDevice
from datapath.native._native import ffi, lib
from datapath.vdpa import DeviceError, DirtyBitmap, LogMode, MemoryRegion, Ring, RingState
from datapath.vfio import Region
from datapath.virtio import Feature, Status, bit, ring_bytes
from tests.harness.dirty_log import PAGE, DirtyLog
from tests.harness.fake_function import BAR_SIZES, FakeFunction, config_space

FEATURES = bit(Feature.F_VERSION_1) | bit(Feature.F_EVENT_IDX)
BASE = 0x1_0000_0000
SIZE = 0x20000
OFF = "bar4+0x0 = 0x0"
ON = "bar4+0x0 = 0x1"


class Guest:
    """Guest memory with two rings of 256 descriptors, and the log of its pages."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, SIZE)
        self._view = mmap.mmap(self.fd, SIZE)
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(self._view)))
        self.region = MemoryRegion(BASE, SIZE, self.fd, 0, address)
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.logs = [DirtyLog(BASE, SIZE) for _ in range(2)]
        self.rings = {
            index: Ring(256, at, at + 0x2000, at + 0x4800, RingState(0, 0), None, self.calls[index])
            for index, at in enumerate((BASE, BASE + 0x8000))
        }

    def used_pages(self, *indices: int) -> set[int]:
        length = ring_bytes(256)[2]
        return {
            page
            for index in indices
            for page in range(self.rings[index].used // PAGE * PAGE, self.rings[index].used + length, PAGE)
        }

    def close(self) -> None:
        for log in self.logs:
            log.close()
        for fd in (self.fd, *self.calls):
            os.close(fd)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture
def function() -> Iterator[FakeFunction]:
    function = FakeFunction(pairs=1)
    yield function
    function.close()


@pytest.fixture
def device(function: FakeFunction, guest: Guest) -> Iterator[IfcvfDevice]:
    device = IfcvfDevice("ifcvf,fake", function)
    device.map_memory(guest.region)
    yield device
    device.close()


def log_writes(function: FakeFunction, bitmap: DirtyBitmap) -> list[str]:
    """What tells the function to log in a bitmap."""
    [mapped] = [memory for memory in function.mapped if memory.fd == bitmap.fd]
    end = mapped.guest_address + bitmap.size
    return [
        f"bar4+0x10 = {mapped.guest_address & 0xFFFFFFFF:#x}",
        f"bar4+0x14 = {mapped.guest_address >> 32:#x}",
        f"bar4+0x18 = {end & 0xFFFFFFFF:#x}",
        f"bar4+0x1c = {end >> 32:#x}",
        ON,
    ]


def is_mapped(function: FakeFunction, bitmap: DirtyBitmap) -> bool:
    return any(memory.fd == bitmap.fd for memory in function.mapped)


def mark(bitmap: DirtyBitmap, page: int) -> None:
    """Mark a page, as a function would."""
    number = page // PAGE
    ffi.cast("uint8_t *", bitmap.address)[number // 8] |= 1 << number % 8


def refuse(function: FakeFunction, monkeypatch: pytest.MonkeyPatch, *bitmaps: DirtyBitmap) -> None:
    """The function has no room for these bitmaps."""
    map_it = FakeFunction.dma_map

    def dma_map(self: FakeFunction, memory: MemoryRegion) -> None:
        if any(memory.fd == bitmap.fd for bitmap in bitmaps):
            raise DeviceError("fake: one mapping too many")
        map_it(self, memory)

    monkeypatch.setattr(FakeFunction, "dma_map", dma_map)


# Opening


def test_what_could_fail_is_tried_when_the_function_is_opened(function: FakeFunction) -> None:
    device = IfcvfDevice("ifcvf,fake", function)
    assert device.log_modes == (LogMode.HARDWARE, LogMode.SOFTWARE)
    begun = function.log.index(ON)
    assert function.log[begun + 1 :] == [OFF, *(f"bar4+{at:#x} = 0x0" for at in (0x10, 0x14, 0x18, 0x1C))]
    [private] = function.mapped
    assert private.size >= 2 * PAGE, "the private rings, and no more the page that was tried"
    device.close()


@pytest.mark.parametrize("mode", [LogMode.AUTO, LogMode.HARDWARE])
@pytest.mark.parametrize("fault", ["registers", "control", "memory"])
def test_a_function_without_a_log(
    function: FakeFunction, monkeypatch: pytest.MonkeyPatch, mode: LogMode, fault: str
) -> None:
    read, map_it = FakeFunction.read, FakeFunction.dma_map

    def read_nothing(self: FakeFunction, index: Region, offset: int, width: int) -> int:
        nothing = range(0x10, 0x20) if fault == "registers" else range(4)
        return 0 if index == Region.BAR4 and offset in nothing else read(self, index, offset, width)

    def map_no_page(self: FakeFunction, memory: MemoryRegion) -> None:
        if memory.size == PAGE:
            raise DeviceError("fake: one mapping too many")
        map_it(self, memory)

    if fault != "memory":
        monkeypatch.setattr(FakeFunction, "read", read_nothing)
    else:
        monkeypatch.setattr(FakeFunction, "dma_map", map_no_page)
    if mode is LogMode.AUTO:
        device = IfcvfDevice("ifcvf,fake", function, mode)
        assert device.log_modes == (LogMode.SOFTWARE,)
        device.close()
        return
    with pytest.raises(DeviceError, match=r"its dirty log cannot be used: fake: .*use log mode 'software'"):
        IfcvfDevice("ifcvf,fake", function, mode)


def test_plain_virtio_has_no_log() -> None:
    function = FakeFunction(
        pairs=1, config=config_space((0x1AF4, 0x1041, 0x1AF4, 0x1100)), bar_sizes=dict(BAR_SIZES)
    )
    with pytest.raises(DeviceError, match=r"^fake: has no dirty log of its own; use log mode 'software' or"):
        VirtioPciDevice("virtio,fake", function, LogMode.HARDWARE)
    device = VirtioPciDevice("virtio,fake", function)
    assert device.log_modes == (LogMode.SOFTWARE,)
    device.close()


# Registers


def test_rings_run_on_when_logging_begins_and_ends(
    device: IfcvfDevice, function: FakeFunction, guest: Guest
) -> None:
    device.start(FEATURES, guest.rings)
    function.log.clear()
    bitmap = guest.logs[0].bitmap
    device.start_logging(bitmap)
    assert function.log == log_writes(function, bitmap)
    assert (device.log_mode, device.shadowed) == (LogMode.HARDWARE, False)
    function.log.clear()
    device.stop_logging()
    assert function.log == [OFF]
    assert not is_mapped(function, bitmap)
    assert device.log_mode is None


def test_every_start_tells_the_function_again_and_every_stop_ends_it(
    device: IfcvfDevice, function: FakeFunction, guest: Guest
) -> None:
    bitmap = guest.logs[0].bitmap
    function.log.clear()
    device.start_logging(bitmap)
    assert function.log == [], "a reset would take it away"
    for _ in range(2):
        function.log.clear()
        device.start(FEATURES, guest.rings)
        writes = log_writes(function, bitmap)
        at = function.log.index(writes[0])
        assert function.log[at : at + 5] == writes
        assert function.log.index("queue_enable[0] = 0x1") > at
        assert guest.logs[0].take() == set()
        function.log.clear()
        device.suspend()
        assert function.log == [
            "queue_enable[0] = 0x0",
            "queue_enable[1] = 0x0",
            OFF,
            "eventfds off",
            "status = 0x0",
        ]
        assert guest.logs[0].take() == guest.used_pages(0, 1)


def test_another_bitmap_is_begun_with_while_rings_stand_still(
    device: IfcvfDevice, function: FakeFunction, guest: Guest
) -> None:
    first, second = (log.bitmap for log in guest.logs)
    device.start(FEATURES, guest.rings)
    device.start_logging(first)
    for call in guest.calls:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(call)
    function.migration[0x20], function.migration[0x24] = 9 | 7 << 16, 5 | 5 << 16
    function.log.clear()
    device.start_logging(second)
    assert function.log[:8] == [
        "queue_enable[0] = 0x0",
        "queue_enable[1] = 0x0",
        OFF,
        *log_writes(function, second),
    ]
    assert function.log[-1] == "queue_enable[1] = 0x1"
    assert "bar4+0x20 = 0x70007" in function.log, "it goes on where it stood"
    assert not any(entry.startswith("status") for entry in function.log), "the function was reset"
    assert function.status & Status.DRIVER_OK
    assert not is_mapped(function, first)
    assert guest.logs[0].take() == guest.used_pages(0, 1)
    assert all(os.eventfd_read(call) == 1 for call in guest.calls), "an interrupt may have been lost"


def test_going_over_to_the_relay_and_back_resets_nothing(function: FakeFunction, guest: Guest) -> None:
    device = IfcvfDevice("ifcvf,fake", function, LogMode.SOFTWARE)
    device.map_memory(guest.region)
    device.start(FEATURES, guest.rings)
    function.migration[0x20] = 3 | 3 << 16
    function.log.clear()
    device.start_logging(guest.logs[0].bitmap)
    assert (device.log_mode, device.shadowed) == (LogMode.SOFTWARE, True)
    assert "bar4+0x20 = 0x0" in function.log, "private rings begin at 0"
    device.stop_logging()
    assert not device.shadowed
    assert not any(entry.startswith(("status", "function reset")) for entry in function.log)
    assert function.status & Status.DRIVER_OK
    assert device.suspend().keys() == {0, 1}
    device.close()


def test_the_guest_waits_for_few_reads(
    device: IfcvfDevice, function: FakeFunction, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few turns to the function and back: some that follow one another are made at once over vfio-user."""
    read, reads = FakeFunction.read, []

    def count(self: FakeFunction, index: Region, offset: int, width: int) -> int:
        reads.append((index, offset))
        return read(self, index, offset, width)

    device.start_logging(guest.logs[0].bitmap)
    monkeypatch.setattr(FakeFunction, "read", count)
    device.start(FEATURES, guest.rings)
    status, control, vectors = (Region.BAR0, 0x14), (Region.BAR4, 0), [(Region.BAR0, 0x1A)] * 2
    assert reads == [status, status, (Region.BAR0, 0x10), control, *vectors, status]
    reads.clear()
    device.suspend()
    enabled, states = [(Region.BAR0, 0x1C)] * 2, [(Region.BAR4, 0x20), (Region.BAR4, 0x24)]
    assert reads == [*enabled, *states, status]


# What fails


def test_a_bitmap_that_the_function_has_no_room_for_is_the_relays(
    device: IfcvfDevice, function: FakeFunction, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.start(FEATURES, guest.rings)
    refuse(function, monkeypatch, guest.logs[0].bitmap)
    device.start_logging(guest.logs[0].bitmap)
    assert (device.log_mode, device.shadowed) == (LogMode.SOFTWARE, True)
    device.stop_logging()
    assert not device.shadowed


def test_where_the_next_bitmap_has_no_room_the_relay_takes_over(
    device: IfcvfDevice, function: FakeFunction, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.start(FEATURES, guest.rings)
    device.start_logging(guest.logs[0].bitmap)
    refuse(function, monkeypatch, guest.logs[1].bitmap)
    function.log.clear()
    device.start_logging(guest.logs[1].bitmap)
    assert (device.log_mode, device.shadowed) == (LogMode.SOFTWARE, True)
    assert guest.logs[0].take() == guest.used_pages(0, 1), "what was used until then"
    assert OFF in function.log
    assert not is_mapped(function, guest.logs[0].bitmap)


def refuse_to_log(function: FakeFunction, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logging control stays off."""
    write = FakeFunction.write

    def write_off(self: FakeFunction, index: Region, offset: int, width: int, value: int) -> None:
        write(self, index, offset, width, 0 if (index, offset) == (Region.BAR4, 0) else value)

    monkeypatch.setattr(FakeFunction, "write", write_off)


@pytest.mark.parametrize("when", ["while rings run", "before they start", "with another bitmap"])
def test_where_the_function_refuses_the_relay_takes_over(
    device: IfcvfDevice, function: FakeFunction, guest: Guest, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    first, second = (log.bitmap for log in guest.logs)
    if when != "before they start":
        device.start(FEATURES, guest.rings)
    if when == "with another bitmap":
        device.start_logging(first)
    refuse_to_log(function, monkeypatch)
    device.start_logging(second)
    if when == "before they start":
        device.start(FEATURES, guest.rings)
    assert (device.log_mode, device.shadowed) == (LogMode.SOFTWARE, True)
    assert not is_mapped(function, second)
    [private] = [memory for memory in function.mapped if memory != guest.region]
    used = {queue["queue_used_low"] | queue["queue_used_high"] << 32 for queue in function.queues[:2]}
    assert all(private.guest_address < at < private.guest_address + private.size for at in used)
    assert function.eventfds.keys() == {0, 1, 2}
    assert not set(guest.calls) & set(function.eventfds.values()), "it would interrupt the guest itself"
    assert device.suspend().keys() == {0, 1}


@pytest.mark.parametrize("running", [True, False])
def test_a_function_that_must_log_and_refuses_is_an_error(
    function: FakeFunction, guest: Guest, monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    device = IfcvfDevice("ifcvf,fake", function, LogMode.HARDWARE)
    device.map_memory(guest.region)
    if running:
        device.start(FEATURES, guest.rings)
    else:
        device.start_logging(guest.logs[0].bitmap)
    refuse_to_log(function, monkeypatch)
    log, start = (
        partial(device.start_logging, guest.logs[0].bitmap),
        partial(device.start, FEATURES, guest.rings),
    )
    with pytest.raises(DeviceError, match="fake: its logging control reads 0x0, written was 0x1"):
        (log if running else start)()
    if running:
        assert device.log_mode is None
        assert not is_mapped(function, guest.logs[0].bitmap)
    device.close()


def test_a_function_that_does_not_end_to_log_is_reset(
    device: IfcvfDevice, function: FakeFunction, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.start(FEATURES, guest.rings)
    device.start_logging(guest.logs[0].bitmap)
    read = FakeFunction.read

    def read_on(self: FakeFunction, index: Region, offset: int, width: int) -> int:
        return 1 if (index, offset) == (Region.BAR4, 0) else read(self, index, offset, width)

    monkeypatch.setattr(FakeFunction, "read", read_on)
    with pytest.raises(DeviceError, match="its logging control reads 0x1, written was 0x0"):
        device.stop_logging()
    assert (device.log_mode, function.status) == (None, 0)
    assert not is_mapped(function, guest.logs[0].bitmap)


def test_a_function_that_must_log_and_cannot_goes_on_without(
    function: FakeFunction, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = IfcvfDevice("ifcvf,fake", function, LogMode.HARDWARE)
    device.map_memory(guest.region)
    device.start(FEATURES, guest.rings)
    device.start_logging(guest.logs[0].bitmap)
    refuse(function, monkeypatch, guest.logs[1].bitmap)
    function.log.clear()
    with pytest.raises(DeviceError, match="one mapping too many"):
        device.start_logging(guest.logs[1].bitmap)
    assert function.log == [OFF], "rings run on"
    assert device.log_mode is None
    assert not is_mapped(function, guest.logs[0].bitmap)
    assert device.suspend().keys() == {0, 1}
    device.close()


def test_to_begin_failing_at_any_access_leaves_nothing_logged(
    device: IfcvfDevice, function: FakeFunction, guest: Guest
) -> None:
    for access in range(1, 7):
        device.start(FEATURES, guest.rings)
        function.fail_at = function.accesses + access
        with pytest.raises(DeviceError, match="fault at access"):
            device.start_logging(guest.logs[0].bitmap)
        function.fail_at = None
        assert device.log_mode is None
        assert not is_mapped(function, guest.logs[0].bitmap)
        if function.status:
            device.suspend()


def test_changing_the_bitmap_failing_at_any_access_leaves_the_function_idle(
    device: IfcvfDevice, function: FakeFunction, guest: Guest
) -> None:
    def run() -> None:
        device.start(FEATURES, guest.rings)
        device.start_logging(guest.logs[0].bitmap)

    run()
    start = function.accesses
    device.start_logging(guest.logs[1].bitmap)
    needed = function.accesses - start
    device.stop_logging()
    device.suspend()
    assert needed > 30
    for access in range(1, needed + 1):
        run()
        function.fail_at = function.accesses + access
        with pytest.raises(DeviceError, match="fault at access"):
            device.start_logging(guest.logs[1].bitmap)
        function.fail_at = None
        assert (device.log_mode, function.status) == (None, 0)
        assert device.suspend() == {}
        assert guest.logs[0].take() >= guest.used_pages(0, 1), "written or not, marked"
        guest.logs[1].take()


def test_rings_that_fail_to_stop_are_marked_all_the_same(
    device: IfcvfDevice, function: FakeFunction, guest: Guest
) -> None:
    device.start_logging(guest.logs[0].bitmap)
    device.start(FEATURES, guest.rings)
    function.fail_at = function.accesses + 1
    with pytest.raises(DeviceError):
        device.suspend()
    assert guest.logs[0].take() == guest.used_pages(0, 1)


def test_a_lost_function_leaves_the_bitmap_alone(
    device: IfcvfDevice, function: FakeFunction, guest: Guest
) -> None:
    device.start(FEATURES, guest.rings)
    device.start_logging(guest.logs[0].bitmap)
    function.lose()
    device.take_event()
    assert device.log_mode is None
    device.stop_logging()
    assert device.statistics()["log_missed"] == 0


def test_a_lost_function_takes_nothing_back_that_was_counted(
    device: IfcvfDevice, function: FakeFunction, guest: Guest
) -> None:
    device.start(FEATURES, guest.rings)
    device.start_logging(guest.logs[0].bitmap)
    mark(guest.logs[0].bitmap, BASE)
    assert device.statistics()["logged_pages"] == 1
    os.ftruncate(guest.logs[0].bitmap.fd, 0)
    device.stop_ring(0)
    assert device.log_missed == 1
    function.lose()
    device.take_event()
    numbers = device.statistics()
    assert (numbers["logged_pages"], numbers["log_missed"], device.log_missed) == (1, 1, 1)


def test_a_function_that_does_not_hear_of_the_end_loses_the_bitmap(
    device: IfcvfDevice, function: FakeFunction, guest: Guest
) -> None:
    device.start(FEATURES, guest.rings)
    device.start_logging(guest.logs[0].bitmap)
    [before] = [memory for memory in function.mapped if memory.fd == guest.logs[0].bitmap.fd]
    function.fail_at = function.accesses + 1
    with pytest.raises(DeviceError, match="fault at access"):
        device.stop_logging()
    assert not is_mapped(function, guest.logs[0].bitmap)
    device.start_logging(guest.logs[0].bitmap)
    assert before in function.mapped, "its addresses are free again"


def test_a_bitmap_that_stays_mapped_keeps_its_addresses(
    device: IfcvfDevice, function: FakeFunction, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.start_logging(guest.logs[0].bitmap)
    [first] = [memory for memory in function.mapped if memory.fd == guest.logs[0].bitmap.fd]

    def refuse_to_unmap(memory: MemoryRegion) -> None:
        raise DeviceError("fake: it stays")

    with monkeypatch.context() as patch:
        patch.setattr(function, "dma_unmap", refuse_to_unmap)
        with pytest.raises(DeviceError, match="it stays"):
            device.stop_logging()
    device.start_logging(guest.logs[1].bitmap)
    [second] = [memory for memory in function.mapped if memory.fd == guest.logs[1].bitmap.fd]
    assert not overlap(first, second)


# Numbers


def test_each_page_is_counted_once(device: IfcvfDevice, guest: Guest) -> None:
    """Those that were looked at before rings stop, and those of used rings that are looked at afterwards."""
    device.start(FEATURES, guest.rings)
    device.start_logging(guest.logs[0].bitmap)
    seen = min(guest.used_pages(0))
    mark(guest.logs[0].bitmap, seen)
    mark(guest.logs[0].bitmap, BASE)
    assert device.statistics()["logged_pages"] == 2
    device.suspend()
    pages = guest.used_pages(0, 1) | {BASE}
    assert [device.statistics()["logged_pages"] for _ in range(2)] == [len(pages)] * 2
    device.stop_logging()
    assert device.statistics()["logged_pages"] == len(pages)


def test_pages_of_used_rings_are_counted_though_nobody_looks(device: IfcvfDevice, guest: Guest) -> None:
    device.start(FEATURES, guest.rings)
    device.start_logging(guest.logs[0].bitmap)
    device.suspend()
    assert guest.logs[0].take() == guest.used_pages(0, 1)
    assert device.statistics()["logged_pages"] == len(guest.used_pages(0, 1))


def test_nothing_but_statistics_walks_through_the_bitmap(
    device: IfcvfDevice, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes long with large guests, which wait meanwhile."""
    looks: list[HardwareLog] = []
    monkeypatch.setattr(HardwareLog, "look", looks.append)
    device.start(FEATURES, guest.rings)
    device.start_logging(guest.logs[0].bitmap)
    device.start_logging(guest.logs[1].bitmap)
    device.suspend()
    device.start(FEATURES, guest.rings)
    assert device.log_missed == 0
    device.stop_logging()
    assert looks == []


def test_a_large_bitmap_takes_memory_only_when_it_is_looked_at(device: IfcvfDevice, guest: Guest) -> None:
    """Of a guest of 32 TiB; a hole that is read becomes memory."""
    size = 1 << 30
    fd = os.memfd_create("large log")
    os.ftruncate(fd, size)
    with mmap.mmap(fd, size) as view, ffi.from_buffer(view) as pin:
        device.start(FEATURES, guest.rings)
        device.start_logging(DirtyBitmap(fd, 0, int(ffi.cast("uintptr_t", pin)), size))
        assert device.log_mode is LogMode.HARDWARE
        device.suspend()
        device.stop_logging()
    assert os.fstat(fd).st_blocks * 512 < 1 << 20
    os.close(fd)


# Memory


def test_guest_memory_where_the_log_is(device: IfcvfDevice, function: FakeFunction, guest: Guest) -> None:
    """Refused while rings run; otherwise the log makes room."""
    bitmap = guest.logs[0].bitmap
    device.start_logging(bitmap)
    device.start(FEATURES, guest.rings)
    [before] = [memory for memory in function.mapped if memory.fd == bitmap.fd]
    more = MemoryRegion(before.guest_address, PAGE, guest.fd, 0, guest.region.address)
    with pytest.raises(DeviceError, match="is where the dirty log is"):
        device.map_memory(more)
    device.suspend()
    device.map_memory(more)
    [after] = [memory for memory in function.mapped if memory.fd == bitmap.fd]
    assert after.guest_address != before.guest_address
    function.log.clear()
    device.start(FEATURES, guest.rings)
    assert ON in function.log


# C


def test_marks_beyond_the_bitmap_are_counted() -> None:
    bitmap = ffi.new("uint8_t[16]")
    assert lib.device_log_mark(bitmap, 16, 126 * PAGE, 4 * PAGE) == 2
    assert bytes(ffi.buffer(bitmap)) == bytes(15) + b"\xc0"


@pytest.mark.parametrize("size", [24, 23, 17])
def test_a_look_counts_what_is_new(size: int) -> None:
    bitmap, before = ffi.new("uint8_t[32]"), ffi.new("uint8_t[32]")
    bitmap[0], bitmap[size - 1], bitmap[size] = 0x81, 0x81, 0xFF
    assert lib.device_log_look(bitmap, before, size) == 4
    bitmap[0] = bitmap[size - 1] = 0x82
    assert lib.device_log_look(bitmap, before, size) == 2
    bitmap[0] = bitmap[size - 1] = 0
    assert lib.device_log_look(bitmap, before, size) == 0
    bitmap[0] = bitmap[size - 1] = 0x80
    assert lib.device_log_look(bitmap, before, size) == 2, "taken, and marked again"


def test_a_bitmap_that_has_shrunk_away_is_survived(
    device: IfcvfDevice, function: FakeFunction, guest: Guest
) -> None:
    device.start(FEATURES, guest.rings)
    device.start_logging(guest.logs[0].bitmap)
    os.ftruncate(guest.logs[0].bitmap.fd, 0)
    device.suspend()
    assert device.statistics()["log_missed"] == 1
