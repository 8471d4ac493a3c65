"""The back-end's state machine over a device that writes down its orders: message orders of front-ends,
when rings run, and what the front-end does wrong."""

import mmap
import os
from collections.abc import Iterator
from typing import Any

import pytest

from datapath.native._native import ffi
from datapath.vdpa import DeviceError, RingState
from datapath.vhost_user.backend import F_PROTOCOL_FEATURES, Backend
from datapath.vhost_user.messages import (
    LogArea,
    Message,
    ProtocolError,
    ProtocolFeature,
    Region,
    Request,
    VringAddress,
    VringFd,
    VringState,
    decode_reply,
)
from datapath.vhost_user.protocol_features import PROTOCOL_FEATURES
from datapath.virtio import Feature, bit
from tests.harness.direct_front_end import DirectFrontEnd
from tests.harness.front_end import MEMORY_SIZE, USER, VIRTIO
from tests.harness.recording_device import RecordingDevice, names

END = USER + MEMORY_SIZE
PACKED = bit(Feature.F_RING_PACKED)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.fixture(params=["status", "no-status", "table"])
def front_end(request: pytest.FixtureRequest) -> Iterator[DirectFrontEnd]:
    """A connected front-end, with three sets of protocol features; checks that nothing leaks."""
    without = {
        "status": 0,
        "no-status": bit(ProtocolFeature.STATUS),
        "table": bit(ProtocolFeature.CONFIGURE_MEM_SLOTS),
    }
    before = open_descriptors()
    peer = DirectFrontEnd(PROTOCOL_FEATURES & ~without[request.param])
    peer.connect()
    yield peer
    peer.close()
    assert peer.device.mapped == []
    assert open_descriptors() == before


@pytest.fixture
def qemu(front_end: DirectFrontEnd) -> DirectFrontEnd:
    """A front-end whose rings run."""
    front_end.start()
    return front_end


def test_features_are_offered_and_only_the_offered_accepted(front_end: DirectFrontEnd) -> None:
    assert front_end.tell(Request.GET_FEATURES) == front_end.device.features | F_PROTOCOL_FEATURES
    assert front_end.tell(Request.GET_PROTOCOL_FEATURES) == PROTOCOL_FEATURES
    assert front_end.tell(Request.GET_QUEUE_NUM) == 1
    with pytest.raises(ProtocolError, match="features NET_F_CSUM were not offered"):
        front_end.tell(Request.SET_FEATURES, bit(Feature.NET_F_CSUM))


def test_an_offer_can_be_narrowed() -> None:
    device = RecordingDevice()
    backend = Backend(device, offer=bit(Feature.F_VERSION_1))
    assert backend.offered == bit(Feature.F_VERSION_1) | F_PROTOCOL_FEATURES
    device.close()


def test_never_offered_what_qemu_accepts_and_does_not_implement() -> None:
    for feature in (ProtocolFeature.INBAND_NOTIFICATIONS, ProtocolFeature.XEN_MMAP):
        assert not PROTOCOL_FEATURES & bit(feature)


def test_start_runs_both_rings_with_the_virtio_features(qemu: DirectFrontEnd) -> None:
    started = qemu.device.calls[-1] if "start_ring" not in names(qemu.device) else qemu.device.calls[1]
    assert started[:2] == ("start", VIRTIO)
    assert sorted(qemu.device.rings) == [0, 1]
    ring = qemu.device.rings[1]
    assert (ring.descriptors, ring.avail, ring.used, ring.size) == (0x8000, 0x9000, 0xA000, 256)


def test_with_status_the_device_starts_once_and_whole() -> None:
    peer = DirectFrontEnd()
    peer.connect()
    peer.start()
    assert names(peer.device) == ["start"]
    peer.close()


def test_nothing_runs_before_the_ring_is_enabled(front_end: DirectFrontEnd) -> None:
    front_end.tell(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES)
    front_end.share_memory()
    front_end.set_up_ring(0)
    front_end.driver_ok()
    assert names(front_end.device) == []
    front_end.tell(Request.SET_VRING_ENABLE, VringState(0, 1))
    assert names(front_end.device) == ["start"]
    front_end.tell(Request.SET_VRING_ENABLE, VringState(0, 0))
    assert names(front_end.device) == ["start", "suspend"]


def test_without_protocol_features_rings_are_enabled_from_the_start(front_end: DirectFrontEnd) -> None:
    front_end.tell(Request.SET_PROTOCOL_FEATURES, 0)
    front_end.protocol = 0
    front_end.tell(Request.SET_FEATURES, VIRTIO)
    front_end.share_memory()
    front_end.set_up_ring(0)
    assert names(front_end.device) == ["start", "set_call"]


def test_one_ring_of_two_can_be_disabled_and_enabled(qemu: DirectFrontEnd) -> None:
    qemu.device.calls.clear()
    qemu.device.states[1] = RingState(9, 9)
    qemu.tell(Request.SET_VRING_ENABLE, VringState(1, 0))
    qemu.set_used_index(1, 9)
    qemu.tell(Request.SET_VRING_ENABLE, VringState(1, 1))
    assert names(qemu.device) == ["stop_ring", "start_ring"]
    assert qemu.device.rings[1].state == RingState(9, 9)


def test_stop_returns_where_the_rings_stand(qemu: DirectFrontEnd) -> None:
    qemu.device.states = {0: RingState(5, 5), 1: RingState(65535, 65535)}
    assert qemu.tell(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 5)
    assert qemu.tell(Request.GET_VRING_BASE, VringState(1, 0)) == VringState(1, 65535)
    assert not qemu.backend.running
    assert qemu.tell(Request.GET_VRING_BASE, VringState(1, 0)) == VringState(1, 65535)


def test_status_0_before_the_bases_as_qemu_7_2_sends_it() -> None:
    peer = DirectFrontEnd()
    peer.connect()
    peer.start()
    peer.device.states = {0: RingState(5, 5), 1: RingState(6, 6)}
    peer.tell(Request.SET_STATUS, 0)
    assert not peer.backend.running
    assert peer.tell(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 5)
    assert peer.tell(Request.GET_VRING_BASE, VringState(1, 0)) == VringState(1, 6)
    peer.close()


def test_rings_begin_at_the_used_index_of_guest_memory(front_end: DirectFrontEnd) -> None:
    front_end.set_used_index(0, 0xFFFE)
    front_end.start()
    assert front_end.device.rings[0].state == RingState(0xFFFE, 0xFFFE)


def test_packed_rings_begin_at_their_base_and_leave_two_places() -> None:
    """DPDK's virtio-user tells of one place, QEMU of two; ours are the same."""
    peer = DirectFrontEnd()
    peer.device.features |= PACKED
    peer.backend.offered |= PACKED
    peer.connect()
    peer.enable()
    peer.tell(Request.SET_FEATURES, VIRTIO | PACKED | F_PROTOCOL_FEATURES)
    peer.share_memory()
    peer.set_up_ring(0, base=0x8000)
    peer.set_up_ring(1, base=0x7_8007)
    peer.driver_ok()
    assert [peer.device.rings[n].state for n in (0, 1)] == [RingState(at, at) for at in (0x8000, 0x8007)]
    assert all(ring.packed for ring in peer.device.rings.values())
    peer.device.states = {0: RingState(5, 5), 1: RingState(0x8009, 0x8009)}
    assert peer.stop() == [0x5_0005, 0x8009_8009]
    peer.close()


@pytest.mark.parametrize("without", [0, bit(ProtocolFeature.STATUS)])
def test_packed_rings_run_together_or_not_at_all(without: int) -> None:
    """A function that has stopped in one cannot go on with the other."""
    peer = DirectFrontEnd(PROTOCOL_FEATURES & ~without)
    peer.device.features |= PACKED
    peer.backend.offered |= PACKED
    peer.connect()
    peer.start(VIRTIO | PACKED)
    assert ("start", VIRTIO | PACKED, [0, 1]) in peer.device.calls
    peer.device.states = {0: RingState(5, 5), 1: RingState(0x8009, 0x8009)}
    assert peer.tell(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 0x5_0005)
    assert not peer.backend.running
    assert peer.tell(Request.GET_VRING_BASE, VringState(1, 0)) == VringState(1, 0x8009_8009)
    assert set(names(peer.device)) <= {"start", "set_call", "suspend"}
    peer.close()


def test_parts_of_packed_rings_have_sizes_and_places_of_their_own() -> None:
    peer = DirectFrontEnd()
    peer.backend.offered |= PACKED
    peer.connect()
    peer.tell(Request.SET_FEATURES, VIRTIO | PACKED | F_PROTOCOL_FEATURES)
    peer.share_memory()
    for size in (0, 1025):
        with pytest.raises(ProtocolError, match=f"size {size} is no number from 1 to 1024"):
            peer.tell(Request.SET_VRING_NUM, VringState(0, size))
    peer.tell(Request.SET_VRING_NUM, VringState(0, 255))
    peer.tell(Request.SET_VRING_ADDR, VringAddress(0, 0, USER, END - 4, END - 8, 0))
    with pytest.raises(ProtocolError, match="driver event area at 0x2 is not aligned to 4 bytes"):
        peer.tell(Request.SET_VRING_ADDR, VringAddress(0, 0, USER, END - 4, USER + 2, 0))
    peer.close()


def test_stop_and_start_again_as_a_paused_guest(qemu: DirectFrontEnd) -> None:
    for index in (0, 1):
        qemu.tell(Request.GET_VRING_BASE, VringState(index, 0))
    qemu.set_used_index(0, 8)  # QEMU itself completed buffers meanwhile
    for index in (0, 1):
        qemu.set_up_ring(index, base=8)
    assert qemu.device.rings[0].state == RingState(8, 8)
    assert qemu.backend.running


def test_a_ring_that_begins_interrupts_the_guest_once(qemu: DirectFrontEnd) -> None:
    for queue in qemu.queues:
        assert os.eventfd_read(queue.call_fd) == 1


def test_a_call_descriptor_that_is_full_holds_nobody(front_end: DirectFrontEnd) -> None:
    for queue in front_end.queues:
        os.set_blocking(queue.call_fd, True)
        os.eventfd_write(queue.call_fd, 2**64 - 2)
    front_end.start()
    assert front_end.backend.running


def test_a_new_call_eventfd_reaches_the_device(qemu: DirectFrontEnd) -> None:
    qemu.device.calls.clear()
    qemu.tell(Request.SET_VRING_CALL, VringFd(0, False))
    assert qemu.device.calls == [("set_call", 0, False)]


def test_a_new_kick_eventfd_restarts_its_ring(qemu: DirectFrontEnd) -> None:
    qemu.device.calls.clear()
    event = os.eventfd(0)
    qemu.tell(Request.SET_VRING_KICK, VringFd(0, True), event)
    os.close(event)
    assert names(qemu.device) == ["stop_ring", "start_ring"]


def test_a_kick_without_descriptor_asks_for_polling(front_end: DirectFrontEnd) -> None:
    front_end.enable()
    front_end.tell(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES)
    front_end.share_memory()
    front_end.tell(Request.SET_VRING_NUM, VringState(0, 256))
    front_end.tell(Request.SET_VRING_ADDR, front_end.address(0))
    front_end.tell(Request.SET_VRING_KICK, VringFd(0, False))
    front_end.driver_ok()
    assert front_end.device.rings[0].kick is None


@pytest.fixture
def log() -> Iterator[int]:
    """A dirty log of 512 bytes behind 4096 that are somebody else's."""
    fd = os.memfd_create("log")
    os.ftruncate(fd, 4096 + 512)
    yield fd
    os.close(fd)


#: A log of 512 bytes in which all of guest memory counts as written.
ALL_MARKED = (b"\xff" * (MEMORY_SIZE // 4096 // 8)).ljust(512, b"\0")


def mark(device: RecordingDevice, at: int) -> None:
    """Do as a device that marks a page: set a byte of the bitmap that it was given."""
    assert device.bitmap is not None
    ffi.memmove(ffi.cast("char *", device.bitmap.address + at), b"\x01", 1)


def test_the_device_marks_its_writes_from_the_moment_it_is_told(qemu: DirectFrontEnd, log: int) -> None:
    qemu.device.calls.clear()
    assert qemu.tell(Request.SET_LOG_BASE, LogArea(512, 4096), log) == 0
    assert qemu.device.calls == [], "a log without LOG_ALL is not used yet"
    qemu.switch_logging(True)
    assert qemu.device.calls == [("start_logging", 512)]
    mark(qemu.device, 3)
    qemu.stop()
    assert os.pread(log, 4096 + 512, 0) == bytes(4096 + 3) + b"\x01" + bytes(508)


def test_logging_ends_with_the_feature(qemu: DirectFrontEnd, log: int) -> None:
    qemu.tell(Request.SET_LOG_BASE, LogArea(512, 4096), log)
    qemu.switch_logging(True)
    qemu.device.calls.clear()
    qemu.switch_logging(False)
    assert qemu.device.calls == [("stop_logging",)]
    qemu.stop()
    assert os.pread(log, 512, 4096) == bytes(512)


def test_a_log_takes_over_from_another(qemu: DirectFrontEnd, log: int) -> None:
    """As when memory is added to a guest that is on its way: the log has to be larger."""
    qemu.tell(Request.SET_LOG_BASE, LogArea(256, 4096), log)
    qemu.switch_logging(True)
    qemu.device.calls.clear()
    assert qemu.tell(Request.SET_LOG_BASE, LogArea(512, 4096), log) == 0
    assert qemu.device.calls == [("start_logging", 512)]


def test_a_front_end_that_goes_ends_its_log(qemu: DirectFrontEnd, log: int) -> None:
    qemu.tell(Request.SET_LOG_BASE, LogArea(512, 4096), log)
    qemu.switch_logging(True)
    qemu.device.calls.clear()
    qemu.backend.close()
    assert names(qemu.device)[:2] == ["suspend", "stop_logging"]
    assert os.pread(log, 512, 4096) == bytes(512)


@pytest.fixture
def unlogging(qemu: DirectFrontEnd) -> DirectFrontEnd:
    """A front-end whose device cannot mark what it writes."""
    qemu.device.failures["start_logging"] = DeviceError("cannot")
    return qemu


def test_without_the_device_every_page_counts_as_written_before_the_base_is_told(
    unlogging: DirectFrontEnd, log: int
) -> None:
    unlogging.tell(Request.SET_LOG_BASE, LogArea(512, 4096), log)
    unlogging.device.rings.clear()  # it failed in the middle
    unlogging.switch_logging(True)
    assert unlogging.reports == ["recording marks no writes: cannot"]
    assert set(unlogging.device.rings) == {0, 1}, "the rings run again"
    os.pwrite(log, bytes(512), 4096)  # what they wrote before counts already
    unlogging.tell(Request.GET_VRING_BASE, VringState(0, 0))
    assert os.pread(log, 4096 + 512, 0) == bytes(4096) + ALL_MARKED
    os.pwrite(log, bytes(512), 4096)  # the front-end has read it
    unlogging.tell(Request.GET_VRING_BASE, VringState(1, 0))
    assert os.pread(log, 512, 4096) == ALL_MARKED


def test_without_the_device_logging_that_was_given_up_leaves_the_log_alone(
    unlogging: DirectFrontEnd, log: int
) -> None:
    unlogging.tell(Request.SET_LOG_BASE, LogArea(512, 4096), log)
    unlogging.device.rings.clear()
    unlogging.switch_logging(True)
    os.pwrite(log, bytes(512), 4096)
    unlogging.switch_logging(False)
    unlogging.stop()
    assert os.pread(log, 512, 4096) == bytes(512)


@pytest.mark.parametrize("area", [LogArea(2**40, 0), LogArea(512, 2**63), LogArea(2**64 - 1, 2**64 - 1)])
def test_a_log_that_cannot_be_used_is_no_error(qemu: DirectFrontEnd, log: int, area: LogArea) -> None:
    assert qemu.tell(Request.SET_LOG_BASE, area, log) == 0
    qemu.switch_logging(True)
    qemu.stop()
    assert ["cannot be mapped" in qemu.reports[0], "is not logged" in qemu.reports[1]] == [True, True]


@pytest.mark.parametrize(
    ("fails", "request_", "payload"),
    [
        ("suspend", Request.SET_STATUS, 0),
        ("stop_ring", Request.SET_VRING_ENABLE, VringState(0, 0)),
        ("set_call", Request.SET_VRING_CALL, VringFd(0, False)),
    ],
)
def test_a_device_that_failed_and_stopped_is_let_go_in_order(
    request: pytest.FixtureRequest, fails: str, request_: Request, payload: Any
) -> None:
    """A device that raises has stopped all rings: it has nothing to tell of them afterwards."""
    peer = DirectFrontEnd()
    peer.connect()
    peer.start()
    request.addfinalizer(peer.close)
    peer.device.failures[fails] = DeviceError("it broke")
    with pytest.raises(DeviceError, match="it broke"):
        peer.tell(request_, payload)
    peer.device.rings.clear()
    del peer.device.failures[fails]
    peer.backend.close()
    assert peer.device.mapped == []
    assert peer.reports == []


def test_what_a_device_wrote_before_it_failed_counts_as_everything(qemu: DirectFrontEnd, log: int) -> None:
    qemu.tell(Request.SET_LOG_BASE, LogArea(512, 4096), log)
    qemu.switch_logging(True)
    qemu.device.failures["suspend"] = DeviceError("it broke")
    with pytest.raises(DeviceError):
        qemu.backend._suspend()
    assert os.pread(log, 512, 4096) == ALL_MARKED
    qemu.device.failures.clear()


def test_an_unchanged_memory_table_leaves_the_device_alone(front_end: DirectFrontEnd) -> None:
    front_end.start()
    front_end.device.calls.clear()
    front_end.tell(Request.SET_MEM_TABLE, (Region(0, MEMORY_SIZE, USER, 0),), front_end.memory.fd)
    assert front_end.device.calls == []


def test_a_table_that_grows_keeps_the_rings_running(front_end: DirectFrontEnd) -> None:
    front_end.start()
    front_end.device.calls.clear()
    more = os.memfd_create("more")
    os.ftruncate(more, 4096)
    table = (Region(0, MEMORY_SIZE, USER, 0), Region(0x400000, 4096, USER + 0x400000, 0))
    front_end.tell(Request.SET_MEM_TABLE, table, front_end.memory.fd, more)
    os.close(more)
    assert front_end.device.calls == [("map_memory", 0x400000, 4096)]


def test_a_table_that_moves_memory_stops_the_rings_around_it(front_end: DirectFrontEnd) -> None:
    front_end.start()
    front_end.device.calls.clear()
    other = os.memfd_create("other")
    os.ftruncate(other, MEMORY_SIZE)
    front_end.tell(Request.SET_MEM_TABLE, (Region(0, MEMORY_SIZE, USER, 0),), other)
    os.close(other)
    assert [call[0] for call in front_end.device.calls] == ["suspend", "unmap_memory", "map_memory", "start"]


def test_a_removed_region_leaves_the_device_first() -> None:
    peer = DirectFrontEnd()
    peer.connect()
    peer.start()
    with pytest.raises(ProtocolError, match="lie in no memory region"):  # its rings are told to go on
        peer.tell(Request.REM_MEM_REG, Region(0, MEMORY_SIZE, USER, 0))
    assert [call[0] for call in peer.device.calls[-2:]] == ["suspend", "unmap_memory"]
    peer.close()


def test_a_region_may_be_named_for_each_queue_pair() -> None:
    """As QEMU before 8.1 does."""
    peer = DirectFrontEnd()
    peer.device.queue_pairs = 2
    peer.connect()
    region = Region(0x400000, 4096, USER + 0x400000, 0)
    peer.device.calls.clear()
    before = open_descriptors()
    file = os.memfd_create("more")
    os.ftruncate(file, 4096)
    for _ in range(2):
        peer.tell(Request.ADD_MEM_REG, region, file)
    for _ in range(2):
        peer.tell(Request.REM_MEM_REG, region)
    with pytest.raises(ProtocolError, match="not a region"):
        peer.tell(Request.REM_MEM_REG, Region(0x500000, 4096, USER + 0x500000, 0))
    os.close(file)
    assert peer.device.calls == [("map_memory", 0x400000, 4096), ("unmap_memory", 0x400000, 4096)]
    assert open_descriptors() == before
    peer.close()


class TwoPairs(DirectFrontEnd):
    """The front-end of a guest with two queue pairs."""

    pairs = 2

    def enable_pair(self, pair: int, on: bool) -> None:
        """The guest begins, or ceases, to use a pair."""
        for index in (2 * pair, 2 * pair + 1):
            self.tell(Request.SET_VRING_ENABLE, VringState(index, int(on)))


def test_what_a_guest_left_in_a_queue_that_it_gave_up_is_sent() -> None:
    peer = TwoPairs()
    peer.connect()
    peer.start()
    assert set(peer.device.rings) == {0, 1, 2, 3}
    peer.enable_pair(1, on=False)
    assert set(peer.device.rings) == {0, 1, 3}
    other = os.memfd_create("other")  # memory that changes stops all rings for a moment
    os.ftruncate(other, MEMORY_SIZE)
    peer.tell(Request.SET_MEM_TABLE, (Region(0, MEMORY_SIZE, USER, 0),), other)
    os.close(other)
    assert set(peer.device.rings) == {0, 1, 3}
    peer.tell(Request.GET_VRING_BASE, VringState(3, 0))
    assert set(peer.device.rings) == {0, 1}
    peer.close()


def test_a_queue_that_a_guest_never_used_does_not_run() -> None:
    peer = TwoPairs()
    peer.connect()
    peer.tell(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES)
    peer.share_memory()
    for index in peer.indices:
        peer.set_up_ring(index)
    peer.enable_pair(0, on=True)
    peer.driver_ok()
    assert set(peer.device.rings) == {0, 1}
    peer.close()


def test_mtu_is_bounded_by_the_device(front_end: DirectFrontEnd) -> None:
    front_end.need_reply = True
    assert [front_end.tell(Request.NET_SET_MTU, mtu) for mtu in (68, 9000, 67, 9001)] == [0, 0, 1, 1]


def test_need_reply_is_answered_only_where_it_was_asked(front_end: DirectFrontEnd) -> None:
    assert front_end.tell(Request.SET_OWNER) is None
    front_end.need_reply = True
    assert front_end.tell(Request.SET_OWNER) == 0


def test_without_reply_ack_no_acknowledgement_is_sent() -> None:
    peer = DirectFrontEnd(PROTOCOL_FEATURES & ~bit(ProtocolFeature.REPLY_ACK))
    peer.connect()
    peer.need_reply = True
    assert peer.tell(Request.SET_OWNER) is None
    peer.close()


@pytest.mark.parametrize("request_id", [Request.SET_VRING_ENDIAN, Request.RESET_DEVICE])
def test_requests_not_served_are_refused_or_ignored(front_end: DirectFrontEnd, request_id: Request) -> None:
    front_end.need_reply = False
    assert front_end.backend.handle(Message(request_id, bytes(8))) is None
    reply = front_end.backend.handle(Message(request_id, bytes(8), need_reply=True))
    assert reply is not None
    assert decode_reply(request_id, reply) == 1


def test_a_request_whose_sender_waits_for_its_reply_ends_the_connection(front_end: DirectFrontEnd) -> None:
    with pytest.raises(ProtocolError, match="GET_CONFIG waits for a reply"):
        front_end.backend.handle(Message(Request.GET_CONFIG, bytes(12)))


WRONG: dict[str, tuple[Request, Any, str]] = {
    "ring out of range": (Request.SET_VRING_NUM, VringState(2, 256), "has rings 0 to 1"),
    "32-bit ring number": (Request.SET_VRING_BASE, VringState(1 << 16, 0), "has rings 0 to 1"),
    "size 0": (Request.SET_VRING_NUM, VringState(0, 0), "no power of two"),
    "size odd": (Request.SET_VRING_NUM, VringState(0, 255), "no power of two"),
    "size too large": (Request.SET_VRING_NUM, VringState(0, 2048), "no power of two"),
    "base too large": (Request.SET_VRING_BASE, VringState(0, 0x10000), "no index of a split ring"),
    "enable 2": (Request.SET_VRING_ENABLE, VringState(0, 2), "neither 0 nor 1"),
    "kick of ring 255": (Request.SET_VRING_KICK, VringFd(255, False), "has rings 0 to 1"),
    "protocol feature": (Request.SET_PROTOCOL_FEATURES, 1 << 17, "were not offered"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_end_the_connection(front_end: DirectFrontEnd, case: str) -> None:
    request, payload, reason = WRONG[case]
    with pytest.raises(ProtocolError, match=reason):
        front_end.tell(request, payload)


def test_a_status_of_more_than_8_bits_ends_the_connection() -> None:
    peer = DirectFrontEnd()
    peer.connect()
    with pytest.raises(ProtocolError, match="more than 8 bits"):
        peer.tell(Request.SET_STATUS, 0x100)
    peer.close()


@pytest.mark.parametrize("request_id", [Request.SET_VRING_NUM, Request.SET_VRING_BASE])
def test_a_running_ring_does_not_change(qemu: DirectFrontEnd, request_id: Request) -> None:
    with pytest.raises(ProtocolError, match="ring 0 is running"):
        qemu.tell(request_id, VringState(0, 256))


def test_features_of_running_rings_do_not_change(qemu: DirectFrontEnd) -> None:
    with pytest.raises(ProtocolError, match="features changed"):
        qemu.tell(Request.SET_FEATURES, bit(Feature.F_VERSION_1) | F_PROTOCOL_FEATURES)


def test_a_running_ring_does_not_move(qemu: DirectFrontEnd) -> None:
    with pytest.raises(ProtocolError, match="its addresses cannot change"):
        qemu.tell(Request.SET_VRING_ADDR, VringAddress(0, 0, USER + 0x8000, USER + 0xA000, USER + 0x9000, 0))


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (
            VringAddress(0, 0, USER - 16, USER + 0x2000, USER + 0x1000, 0),
            "descriptor table: .* no memory region",
        ),
        (
            VringAddress(0, 0, USER, USER + MEMORY_SIZE - 4, USER + 0x1000, 0),
            "used ring: .* no memory region",
        ),
        (VringAddress(0, 0, USER, 2**64 - 4, USER + 0x1000, 0), "used ring: .* no memory region"),
        (
            VringAddress(0, 0, USER + 8, USER + 0x2000, USER + 0x1000, 0),
            "descriptor table .* not aligned to 16",
        ),
        (VringAddress(0, 0, USER, USER + 0x2002, USER + 0x1000, 0), "used ring .* not aligned to 4"),
        (VringAddress(0, 0, USER, USER + 0x2000, USER + 0x1001, 0), "available ring .* not aligned to 2"),
    ],
)
def test_rings_must_lie_in_the_memory_and_be_aligned(
    front_end: DirectFrontEnd, address: VringAddress, reason: str
) -> None:
    front_end.share_memory()
    front_end.tell(Request.SET_VRING_NUM, VringState(0, 256))
    with pytest.raises(ProtocolError, match=reason):
        front_end.tell(Request.SET_VRING_ADDR, address)


def test_a_ring_started_without_an_address_ends_the_connection(front_end: DirectFrontEnd) -> None:
    front_end.enable()
    front_end.tell(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES)
    front_end.driver_ok()
    with pytest.raises(ProtocolError, match="ring 0: started without a size"):
        front_end.tell(Request.SET_VRING_KICK, VringFd(0, False))


TOO_SHORT = f"bytes of a file that has {MEMORY_SIZE}"
REGIONS = {
    "empty": (Region(0, 0, USER, 0), "empty"),
    "guest range wraps": (Region(2**64 - 4096, 8192, USER, 0), "wraps"),
    "user range wraps": (Region(0, 8192, 2**64 - 4096, 0), "wraps"),
    "offset wraps": (Region(0, 8192, USER, 2**64 - 4096), "wraps"),
    "longer than its file": (
        Region(0, MEMORY_SIZE + 4096, USER, 0),
        TOO_SHORT,
    ),
    "beyond its file": (Region(0, 4096, USER, MEMORY_SIZE), TOO_SHORT),
}


@pytest.mark.parametrize("case", REGIONS)
def test_impossible_regions_end_the_connection(front_end: DirectFrontEnd, case: str) -> None:
    region, reason = REGIONS[case]
    with pytest.raises(ProtocolError, match=reason):
        front_end.tell(Request.SET_MEM_TABLE, (region,), front_end.memory.fd)
    assert front_end.device.mapped == []


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Region(0x8000, MEMORY_SIZE, USER + MEMORY_SIZE, 0), "overlaps .* in guest memory"),
        (Region(MEMORY_SIZE, MEMORY_SIZE, USER + 0x8000, 0), "overlaps .* in the front-end's memory"),
        (Region(0, MEMORY_SIZE, USER, 0), "overlap"),
    ],
)
def test_overlapping_regions_end_the_connection(
    front_end: DirectFrontEnd, other: Region, reason: str
) -> None:
    table = (Region(0, MEMORY_SIZE, USER, 0), other)
    with pytest.raises(ProtocolError, match=reason):
        front_end.tell(Request.SET_MEM_TABLE, table, front_end.memory.fd, front_end.memory.fd)


def test_memory_that_is_no_file_ends_the_connection(front_end: DirectFrontEnd) -> None:
    reader, writer = os.pipe()
    with pytest.raises(ProtocolError, match="bytes of a file that has 0"):
        front_end.tell(Request.SET_MEM_TABLE, (Region(0, 4096, USER, 0),), reader)
    os.close(reader)
    os.close(writer)


def test_guest_memory_that_shrank_ends_the_connection_at_the_next_start(front_end: DirectFrontEnd) -> None:
    front_end.share_memory()
    os.ftruncate(front_end.memory.fd, mmap.PAGESIZE)
    front_end.tell(Request.SET_VRING_NUM, VringState(0, 256))
    with pytest.raises(ProtocolError, match="has shrunk away"):
        front_end.tell(Request.SET_VRING_ADDR, front_end.address(0))


@pytest.mark.parametrize("call", ["map_memory", "start", "suspend", "set_call", "unmap_memory"])
def test_a_device_that_fails_leaves_nothing_behind(front_end: DirectFrontEnd, call: str) -> None:
    front_end.device.failures[call] = DeviceError("the VF does not answer")
    try:
        front_end.start()
        front_end.tell(Request.SET_VRING_CALL, VringFd(0, False))
        for index in (0, 1):
            front_end.tell(Request.GET_VRING_BASE, VringState(index, 0))
    except DeviceError:
        pass
    front_end.backend.close()
    front_end.device.mapped.clear()  # a device that fails to unmap keeps its word in this test alone
    assert len(front_end.backend.memory) == 0
    assert not front_end.backend.running


def test_errors_are_told_by_the_error_eventfd(qemu: DirectFrontEnd) -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    qemu.tell(Request.SET_VRING_ERR, VringFd(0, True), event)
    qemu.backend.signal_error()
    assert os.eventfd_read(event) == 1
    os.close(event)
