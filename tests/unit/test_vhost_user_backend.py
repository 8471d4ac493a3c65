"""The back-end's state machine over a device that writes down its orders: message orders of front-ends,
when rings run, and what the front-end does wrong."""

import mmap
import os
from collections.abc import Iterator
from typing import Any

import pytest

from datapath.vdpa import DeviceError, RingState
from datapath.vhost_user.backend import F_LOG_ALL, F_PROTOCOL_FEATURES, PROTOCOL_FEATURES, Backend
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
from datapath.virtio import Feature, Status, bit
from tests.harness.recording_device import RecordingDevice, names

MEMORY = 0x10000
USER = 0x7F0000000000
DRIVER_OK = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
VIRTIO = bit(Feature.F_VERSION_1) | bit(Feature.NET_F_MAC)
#: User addresses of each ring's parts; guest physical is the same less USER.
RINGS = [
    VringAddress(i, 0, USER + 0x4000 * i, USER + 0x4000 * i + 0x2000, USER + 0x4000 * i + 0x1000, 0)
    for i in (0, 1)
]


class FrontEnd:
    """Talks to a back-end as QEMU does, with one memfd for guest memory."""

    def __init__(self, protocol: int = PROTOCOL_FEATURES) -> None:
        self.device = RecordingDevice()
        self.reports: list[str] = []
        self.backend = Backend(self.device, report=self.reports.append)
        self.memory = os.memfd_create("guest")
        os.ftruncate(self.memory, MEMORY)
        self.protocol = protocol
        self.need_reply = False

    def tell(self, request: Request, payload: Any = None, *fds: int) -> Any:
        """Send a message with copies of `fds`; the decoded reply, None where there is none."""
        message = Message(request, payload, self.need_reply, [os.dup(fd) for fd in fds])
        reply = self.backend.handle(message)
        return None if reply is None else decode_reply(request, reply)

    def connect(self) -> None:
        self.tell(Request.GET_FEATURES)
        self.tell(Request.SET_PROTOCOL_FEATURES, self.protocol)
        self.tell(Request.SET_OWNER)

    def share_memory(self) -> None:
        region = Region(0, MEMORY, USER, 0)
        if self.protocol & bit(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            self.tell(Request.ADD_MEM_REG, region, self.memory)
        else:
            self.tell(Request.SET_MEM_TABLE, (region,), self.memory)

    def set_up_ring(self, index: int, base: int = 0) -> None:
        event = os.eventfd(0)
        self.tell(Request.SET_VRING_NUM, VringState(index, 256))
        self.tell(Request.SET_VRING_BASE, VringState(index, base))
        self.tell(Request.SET_VRING_ADDR, RINGS[index])
        try:
            self.tell(Request.SET_VRING_KICK, VringFd(index, True), event)
            self.tell(Request.SET_VRING_CALL, VringFd(index, True), event)
        finally:
            os.close(event)

    def enable(self, on: bool = True) -> None:
        for index in (0, 1):
            self.tell(Request.SET_VRING_ENABLE, VringState(index, int(on)))

    def start(self, features: int = VIRTIO) -> None:
        """START as QEMU sends it: enable first, DRIVER_OK last."""
        self.enable()
        self.tell(Request.SET_FEATURES, features | F_PROTOCOL_FEATURES)
        self.share_memory()
        for index in (0, 1):
            self.set_up_ring(index)
        if self.protocol & bit(ProtocolFeature.STATUS):
            self.tell(Request.SET_STATUS, DRIVER_OK)

    def set_used_index(self, index: int, used: int) -> None:
        """As if `used` buffers had been completed on a ring."""
        os.pwrite(self.memory, used.to_bytes(2, "little"), RINGS[index].used - USER + 2)

    def close(self) -> None:
        self.backend.close()
        self.device.close()
        os.close(self.memory)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.fixture(params=["status", "no-status", "table"])
def front_end(request: pytest.FixtureRequest) -> Iterator[FrontEnd]:
    """A connected front-end, with three sets of protocol features; checks that nothing leaks."""
    without = {
        "status": 0,
        "no-status": bit(ProtocolFeature.STATUS),
        "table": bit(ProtocolFeature.CONFIGURE_MEM_SLOTS),
    }
    before = open_descriptors()
    peer = FrontEnd(PROTOCOL_FEATURES & ~without[request.param])
    peer.connect()
    yield peer
    peer.close()
    assert peer.device.mapped == []
    assert open_descriptors() == before


@pytest.fixture
def qemu(front_end: FrontEnd) -> FrontEnd:
    """A front-end whose rings run."""
    front_end.start()
    return front_end


def test_features_are_offered_and_only_the_offered_accepted(front_end: FrontEnd) -> None:
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


def test_start_runs_both_rings_with_the_virtio_features(qemu: FrontEnd) -> None:
    started = qemu.device.calls[-1] if "start_ring" not in names(qemu.device) else qemu.device.calls[1]
    assert started[:2] == ("start", VIRTIO)
    assert sorted(qemu.device.rings) == [0, 1]
    ring = qemu.device.rings[1]
    assert (ring.descriptors, ring.avail, ring.used, ring.size) == (0x4000, 0x5000, 0x6000, 256)


def test_with_status_the_device_starts_once_and_whole() -> None:
    peer = FrontEnd()
    peer.connect()
    peer.start()
    assert names(peer.device) == ["start"]
    peer.close()


def test_nothing_runs_before_the_ring_is_enabled(front_end: FrontEnd) -> None:
    front_end.tell(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES)
    front_end.share_memory()
    front_end.set_up_ring(0)
    if front_end.protocol & bit(ProtocolFeature.STATUS):
        front_end.tell(Request.SET_STATUS, DRIVER_OK)
    assert names(front_end.device) == []
    front_end.tell(Request.SET_VRING_ENABLE, VringState(0, 1))
    assert names(front_end.device) == ["start"]
    front_end.tell(Request.SET_VRING_ENABLE, VringState(0, 0))
    assert names(front_end.device) == ["start", "suspend"]


def test_without_protocol_features_rings_are_enabled_from_the_start(front_end: FrontEnd) -> None:
    front_end.tell(Request.SET_PROTOCOL_FEATURES, 0)
    front_end.protocol = 0
    front_end.tell(Request.SET_FEATURES, VIRTIO)
    front_end.share_memory()
    front_end.set_up_ring(0)
    assert names(front_end.device) == ["start", "set_call"]


def test_one_ring_of_two_can_be_disabled_and_enabled(qemu: FrontEnd) -> None:
    qemu.device.calls.clear()
    qemu.device.states[1] = RingState(9, 9)
    qemu.tell(Request.SET_VRING_ENABLE, VringState(1, 0))
    qemu.set_used_index(1, 9)
    qemu.tell(Request.SET_VRING_ENABLE, VringState(1, 1))
    assert names(qemu.device) == ["stop_ring", "start_ring"]
    assert qemu.device.rings[1].state == RingState(9, 9)


def test_stop_returns_where_the_rings_stand(qemu: FrontEnd) -> None:
    qemu.device.states = {0: RingState(5, 5), 1: RingState(65535, 65535)}
    assert qemu.tell(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 5)
    assert qemu.tell(Request.GET_VRING_BASE, VringState(1, 0)) == VringState(1, 65535)
    assert not qemu.backend.running
    assert qemu.tell(Request.GET_VRING_BASE, VringState(1, 0)) == VringState(1, 65535)


def test_status_0_before_the_bases_as_qemu_7_2_sends_it() -> None:
    peer = FrontEnd()
    peer.connect()
    peer.start()
    peer.device.states = {0: RingState(5, 5), 1: RingState(6, 6)}
    peer.tell(Request.SET_STATUS, 0)
    assert not peer.backend.running
    assert peer.tell(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 5)
    assert peer.tell(Request.GET_VRING_BASE, VringState(1, 0)) == VringState(1, 6)
    peer.close()


def test_rings_begin_at_the_used_index_of_guest_memory(front_end: FrontEnd) -> None:
    front_end.set_used_index(0, 0xFFFE)
    front_end.start()
    assert front_end.device.rings[0].state == RingState(0xFFFE, 0xFFFE)


def test_stop_and_start_again_as_a_paused_guest(qemu: FrontEnd) -> None:
    for index in (0, 1):
        qemu.tell(Request.GET_VRING_BASE, VringState(index, 0))
    qemu.set_used_index(0, 8)  # QEMU itself completed buffers meanwhile
    for index in (0, 1):
        qemu.set_up_ring(index, base=8)
    assert qemu.device.rings[0].state == RingState(8, 8)
    assert qemu.backend.running


def test_a_new_call_eventfd_reaches_the_device(qemu: FrontEnd) -> None:
    qemu.device.calls.clear()
    qemu.tell(Request.SET_VRING_CALL, VringFd(0, False))
    assert qemu.device.calls == [("set_call", 0, False)]


def test_a_new_kick_eventfd_restarts_its_ring(qemu: FrontEnd) -> None:
    qemu.device.calls.clear()
    event = os.eventfd(0)
    qemu.tell(Request.SET_VRING_KICK, VringFd(0, True), event)
    os.close(event)
    assert names(qemu.device) == ["stop_ring", "start_ring"]


def test_a_kick_without_descriptor_asks_for_polling(front_end: FrontEnd) -> None:
    front_end.enable()
    front_end.tell(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES)
    front_end.share_memory()
    front_end.tell(Request.SET_VRING_NUM, VringState(0, 256))
    front_end.tell(Request.SET_VRING_ADDR, RINGS[0])
    front_end.tell(Request.SET_VRING_KICK, VringFd(0, False))
    if front_end.protocol & bit(ProtocolFeature.STATUS):
        front_end.tell(Request.SET_STATUS, DRIVER_OK)
    assert front_end.device.rings[0].kick is None


def test_logging_is_switched_on_a_running_ring_without_touching_it(qemu: FrontEnd) -> None:
    qemu.device.calls.clear()
    log = os.memfd_create("log")
    assert qemu.tell(Request.SET_LOG_BASE, LogArea(4096, 0), log) == 0
    os.close(log)
    qemu.tell(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES | F_LOG_ALL)
    logged = VringAddress(0, 1, RINGS[0].descriptors, RINGS[0].used, RINGS[0].avail, RINGS[0].used - USER)
    qemu.tell(Request.SET_VRING_ADDR, logged)
    assert qemu.device.calls == []
    assert any("dirty logging" in line for line in qemu.reports)


def test_an_unchanged_memory_table_leaves_the_device_alone(front_end: FrontEnd) -> None:
    front_end.start()
    front_end.device.calls.clear()
    front_end.tell(Request.SET_MEM_TABLE, (Region(0, MEMORY, USER, 0),), front_end.memory)
    assert front_end.device.calls == []


def test_a_table_that_grows_keeps_the_rings_running(front_end: FrontEnd) -> None:
    front_end.start()
    front_end.device.calls.clear()
    more = os.memfd_create("more")
    os.ftruncate(more, 4096)
    table = (Region(0, MEMORY, USER, 0), Region(0x100000, 4096, USER + 0x100000, 0))
    front_end.tell(Request.SET_MEM_TABLE, table, front_end.memory, more)
    os.close(more)
    assert front_end.device.calls == [("map_memory", 0x100000, 4096)]


def test_a_table_that_moves_memory_stops_the_rings_around_it(front_end: FrontEnd) -> None:
    front_end.start()
    front_end.device.calls.clear()
    other = os.memfd_create("other")
    os.ftruncate(other, MEMORY)
    front_end.tell(Request.SET_MEM_TABLE, (Region(0, MEMORY, USER, 0),), other)
    os.close(other)
    assert [call[0] for call in front_end.device.calls] == ["suspend", "unmap_memory", "map_memory", "start"]


def test_a_removed_region_leaves_the_device_first() -> None:
    peer = FrontEnd()
    peer.connect()
    peer.start()
    with pytest.raises(ProtocolError, match="lie in no memory region"):  # its rings are told to go on
        peer.tell(Request.REM_MEM_REG, Region(0, MEMORY, USER, 0))
    assert [call[0] for call in peer.device.calls[-2:]] == ["suspend", "unmap_memory"]
    peer.close()


def test_mtu_is_bounded_by_the_device(front_end: FrontEnd) -> None:
    front_end.need_reply = True
    assert [front_end.tell(Request.NET_SET_MTU, mtu) for mtu in (68, 9000, 67, 9001)] == [0, 0, 1, 1]


def test_need_reply_is_answered_only_where_it_was_asked(front_end: FrontEnd) -> None:
    assert front_end.tell(Request.SET_OWNER) is None
    front_end.need_reply = True
    assert front_end.tell(Request.SET_OWNER) == 0


def test_without_reply_ack_no_acknowledgement_is_sent() -> None:
    peer = FrontEnd(PROTOCOL_FEATURES & ~bit(ProtocolFeature.REPLY_ACK))
    peer.connect()
    peer.need_reply = True
    assert peer.tell(Request.SET_OWNER) is None
    peer.close()


@pytest.mark.parametrize("request_id", [Request.SEND_RARP, Request.SET_VRING_ENDIAN, Request.RESET_DEVICE])
def test_requests_not_served_are_refused_or_ignored(front_end: FrontEnd, request_id: Request) -> None:
    front_end.need_reply = False
    assert front_end.backend.handle(Message(request_id, bytes(8))) is None
    reply = front_end.backend.handle(Message(request_id, bytes(8), need_reply=True))
    assert reply is not None
    assert decode_reply(request_id, reply) == 1


def test_a_request_whose_sender_waits_for_its_reply_ends_the_connection(front_end: FrontEnd) -> None:
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
def test_wrong_values_end_the_connection(front_end: FrontEnd, case: str) -> None:
    request, payload, reason = WRONG[case]
    with pytest.raises(ProtocolError, match=reason):
        front_end.tell(request, payload)


def test_a_status_of_more_than_8_bits_ends_the_connection() -> None:
    peer = FrontEnd()
    peer.connect()
    with pytest.raises(ProtocolError, match="more than 8 bits"):
        peer.tell(Request.SET_STATUS, 0x100)
    peer.close()


@pytest.mark.parametrize("request_id", [Request.SET_VRING_NUM, Request.SET_VRING_BASE])
def test_a_running_ring_does_not_change(qemu: FrontEnd, request_id: Request) -> None:
    with pytest.raises(ProtocolError, match="ring 0 is running"):
        qemu.tell(request_id, VringState(0, 256))


def test_features_of_running_rings_do_not_change(qemu: FrontEnd) -> None:
    with pytest.raises(ProtocolError, match="features changed"):
        qemu.tell(Request.SET_FEATURES, bit(Feature.F_VERSION_1) | F_PROTOCOL_FEATURES)


def test_a_running_ring_does_not_move(qemu: FrontEnd) -> None:
    with pytest.raises(ProtocolError, match="its addresses cannot change"):
        qemu.tell(Request.SET_VRING_ADDR, VringAddress(0, 0, USER + 0x8000, USER + 0xA000, USER + 0x9000, 0))


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (
            VringAddress(0, 0, USER - 16, USER + 0x2000, USER + 0x1000, 0),
            "descriptor table: .* no memory region",
        ),
        (VringAddress(0, 0, USER, USER + MEMORY - 4, USER + 0x1000, 0), "used ring: .* no memory region"),
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
    front_end: FrontEnd, address: VringAddress, reason: str
) -> None:
    front_end.share_memory()
    front_end.tell(Request.SET_VRING_NUM, VringState(0, 256))
    with pytest.raises(ProtocolError, match=reason):
        front_end.tell(Request.SET_VRING_ADDR, address)


def test_a_ring_started_without_an_address_ends_the_connection(front_end: FrontEnd) -> None:
    front_end.enable()
    front_end.tell(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES)
    if front_end.protocol & bit(ProtocolFeature.STATUS):
        front_end.tell(Request.SET_STATUS, DRIVER_OK)
    with pytest.raises(ProtocolError, match="ring 0: started without a size"):
        front_end.tell(Request.SET_VRING_KICK, VringFd(0, False))


REGIONS = {
    "empty": (Region(0, 0, USER, 0), "empty"),
    "guest range wraps": (Region(2**64 - 4096, 8192, USER, 0), "wraps"),
    "user range wraps": (Region(0, 8192, 2**64 - 4096, 0), "wraps"),
    "offset wraps": (Region(0, 8192, USER, 2**64 - 4096), "wraps"),
    "longer than its file": (Region(0, MEMORY + 4096, USER, 0), f"bytes of a file that has {MEMORY}"),
    "beyond its file": (Region(0, 4096, USER, MEMORY), f"bytes of a file that has {MEMORY}"),
}


@pytest.mark.parametrize("case", REGIONS)
def test_impossible_regions_end_the_connection(front_end: FrontEnd, case: str) -> None:
    region, reason = REGIONS[case]
    with pytest.raises(ProtocolError, match=reason):
        front_end.tell(Request.SET_MEM_TABLE, (region,), front_end.memory)
    assert front_end.device.mapped == []


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Region(0x8000, MEMORY, USER + MEMORY, 0), "overlaps .* in guest memory"),
        (Region(MEMORY, MEMORY, USER + 0x8000, 0), "overlaps .* in the front-end's memory"),
        (Region(0, MEMORY, USER, 0), "overlap"),
    ],
)
def test_overlapping_regions_end_the_connection(front_end: FrontEnd, other: Region, reason: str) -> None:
    table = (Region(0, MEMORY, USER, 0), other)
    with pytest.raises(ProtocolError, match=reason):
        front_end.tell(Request.SET_MEM_TABLE, table, front_end.memory, front_end.memory)


def test_memory_that_is_no_file_ends_the_connection(front_end: FrontEnd) -> None:
    reader, writer = os.pipe()
    with pytest.raises(ProtocolError, match="bytes of a file that has 0"):
        front_end.tell(Request.SET_MEM_TABLE, (Region(0, 4096, USER, 0),), reader)
    os.close(reader)
    os.close(writer)


def test_guest_memory_that_shrank_ends_the_connection_at_the_next_start(front_end: FrontEnd) -> None:
    front_end.share_memory()
    os.ftruncate(front_end.memory, mmap.PAGESIZE)
    front_end.tell(Request.SET_VRING_NUM, VringState(0, 256))
    with pytest.raises(ProtocolError, match="has shrunk away"):
        front_end.tell(Request.SET_VRING_ADDR, RINGS[0])


@pytest.mark.parametrize("call", ["map_memory", "start", "suspend", "set_call", "unmap_memory"])
def test_a_device_that_fails_leaves_nothing_behind(front_end: FrontEnd, call: str) -> None:
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


def test_errors_are_told_by_the_error_eventfd(qemu: FrontEnd) -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    qemu.tell(Request.SET_VRING_ERR, VringFd(0, True), event)
    qemu.backend.signal_error()
    assert os.eventfd_read(event) == 1
    os.close(event)
