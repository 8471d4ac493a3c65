"""The exchange in which a front-end begins or ends to log: nothing that fails there is told there, QEMU
before 10.1 would abort; all of it is told afterwards. And who marks what in which log."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from datapath.vdpa import DeviceError, DeviceLostError, Ring
from datapath.vhost_user.backend import F_LOG_ALL, F_PROTOCOL_FEATURES
from datapath.vhost_user.log_exchange import QUIET, LogExchange
from datapath.vhost_user.messages import LogArea, ProtocolError, ProtocolFeature, Region, Request, VringState
from datapath.vhost_user.protocol_features import PROTOCOL_FEATURES
from datapath.virtio import Feature, bit
from tests.harness.direct_front_end import DirectFrontEnd
from tests.harness.dirty_log import PAGE, marked_pages
from tests.harness.front_end import BUFFERS, MEMORY_SIZE, USER, VIRTIO
from tests.harness.recording_device import names
from tests.harness.virtqueue import Buffer

SIZE, OFFSET = 512, 4096
#: A log in which all of guest memory counts as written.
ALL_MARKED = (b"\xff" * (MEMORY_SIZE // PAGE // 8)).ljust(SIZE, b"\0")


@pytest.fixture
def now() -> list[float]:
    """What the clock shows."""
    return [100.0]


@pytest.fixture
def qemu(now: list[float]) -> Iterator[DirectFrontEnd]:
    """A front-end whose rings run, and that asks for an answer to everything."""
    peer = DirectFrontEnd()
    peer.backend.exchange = LogExchange(lambda: now[0])
    peer.connect()
    peer.start()
    peer.need_reply = True
    peer.device.calls.clear()
    yield peer
    peer.device.failures.clear()
    peer.close()


@pytest.fixture
def log() -> Iterator[int]:
    fd = os.memfd_create("log")
    os.ftruncate(fd, OFFSET + SIZE)
    yield fd
    os.close(fd)


def exchange(peer: DirectFrontEnd, log: int | None, on: bool) -> list[Any]:
    """The whole exchange as QEMU 7.2 has it, for one queue pair; the answers."""
    answers = []
    if log is not None:
        answers.append(peer.tell(Request.SET_LOG_BASE, LogArea(SIZE, OFFSET), log))
    features = VIRTIO | F_PROTOCOL_FEATURES | (F_LOG_ALL if on else 0)
    answers.append(peer.tell(Request.SET_FEATURES, features))
    peer.tell(Request.GET_STATUS)
    answers += [peer.tell(Request.SET_VRING_ADDR, peer.address(index, flags=int(on))) for index in (0, 1)]
    return answers


def marked(log: int) -> set[int]:
    """The addresses of the pages that are marked."""
    return marked_pages(os.pread(log, SIZE, OFFSET))


FAILURES: dict[str, tuple[dict[str, DeviceError], type[Exception], str]] = {
    "lost": ({"start_logging": DeviceLostError("it is gone")}, DeviceLostError, "it is gone"),
    "neither logs nor starts": (
        {"start_logging": DeviceError("cannot"), "start": DeviceError("cannot start either")},
        DeviceError,
        "cannot start either",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_fails_is_told_after_the_exchange(qemu: DirectFrontEnd, log: int, case: str) -> None:
    failures, kind, reason = FAILURES[case]
    qemu.device.failures.update(failures)
    if kind is DeviceError:
        qemu.device.rings.clear()  # the device has stopped them
    assert exchange(qemu, log, True) == [0, 0, 0, 0]
    assert qemu.backend.log_status.problem == reason
    with pytest.raises(kind, match=reason):
        qemu.tell(Request.GET_VRING_BASE, VringState(0, 0))


@pytest.mark.parametrize("call", ["start_logging", "stop_logging"])
def test_a_device_that_fails_slowly_fails_within_the_exchange(
    qemu: DirectFrontEnd, log: int, now: list[float], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail_slowly(*_arguments: object) -> None:
        now[0] += QUIET + 0.2
        raise DeviceLostError("it is gone")

    begins = call == "start_logging"
    if not begins:
        exchange(qemu, log, True)
    monkeypatch.setattr(qemu.device, call, fail_slowly)
    assert set(exchange(qemu, log if begins else None, begins)) == {0}
    assert qemu.backend.exchange.deadline == now[0] + QUIET
    with pytest.raises(DeviceLostError, match="it is gone"):
        qemu.tell(Request.GET_VRING_BASE, VringState(0, 0))


def test_the_end_of_logging_is_an_exchange_too(qemu: DirectFrontEnd, log: int) -> None:
    exchange(qemu, log, True)
    qemu.device.failures["stop_logging"] = DeviceLostError("it is gone")
    assert exchange(qemu, None, False) == [0, 0, 0]
    with pytest.raises(DeviceLostError):
        qemu.tell(Request.SET_STATUS, 0)


def test_a_second_queue_pair_belongs_to_the_same_exchange(qemu: DirectFrontEnd, log: int) -> None:
    qemu.device.failures["start_logging"] = DeviceLostError("it is gone")
    for _ in range(2):
        again = os.dup(log)
        assert exchange(qemu, again, True) == [0, 0, 0, 0]
        os.close(again)
    assert names(qemu.device) == ["start_logging"], "nothing is tried on a device that has failed"


def test_an_exchange_is_over_after_a_while(qemu: DirectFrontEnd, log: int, now: list[float]) -> None:
    qemu.device.failures["start_logging"] = DeviceLostError("it is gone")
    exchange(qemu, log, True)
    assert qemu.backend.exchange.deadline == now[0] + QUIET
    now[0] += QUIET - 0.01
    qemu.backend.exchange.check()
    now[0] += 0.01
    with pytest.raises(DeviceLostError, match="it is gone"):
        qemu.backend.exchange.check()


def test_a_device_that_vanishes_between_two_messages(
    qemu: DirectFrontEnd, log: int, now: list[float]
) -> None:
    assert not qemu.backend.exchange.defer(DeviceLostError("too early"))
    qemu.tell(Request.SET_LOG_BASE, LogArea(SIZE, OFFSET), log)
    assert qemu.backend.exchange.defer(DeviceLostError("it is gone"))
    assert exchange(qemu, None, True) == [0, 0, 0]
    assert qemu.device.calls == []
    now[0] += QUIET
    assert not qemu.backend.exchange.defer(DeviceLostError("too late"))


def test_a_message_that_breaks_the_protocol_is_answered_there(qemu: DirectFrontEnd, log: int) -> None:
    qemu.tell(Request.SET_LOG_BASE, LogArea(SIZE, OFFSET), log)
    assert qemu.tell(Request.SET_FEATURES, 1 << 63) == 0
    with pytest.raises(ProtocolError, match="were not offered"):
        qemu.tell(Request.GET_QUEUE_NUM)


def test_what_fails_elsewhere_is_told_at_once(qemu: DirectFrontEnd) -> None:
    qemu.device.failures["suspend"] = DeviceError("it broke")
    qemu.device.failures["stop_ring"] = DeviceError("it broke")
    with pytest.raises(DeviceError, match="it broke"):
        qemu.tell(Request.GET_VRING_BASE, VringState(0, 0))


def test_a_start_with_features_is_no_exchange(qemu: DirectFrontEnd) -> None:
    qemu.stop()
    with pytest.raises(ProtocolError, match="were not offered"):
        qemu.tell(Request.SET_FEATURES, F_LOG_ALL | 1 << 63)


def test_the_same_log_again_is_no_news_to_the_device(qemu: DirectFrontEnd, log: int) -> None:
    for _ in range(3):
        again = os.dup(log)
        exchange(qemu, again, True)
        os.close(again)
    assert names(qemu.device) == ["start_logging"]
    assert qemu.tell(Request.SET_LOG_FD, None, log) == 0
    assert [ring.logged for ring in qemu.backend.rings] == [True, True]
    exchange(qemu, None, False)
    assert [ring.logged for ring in qemu.backend.rings] == [False, False]


@pytest.mark.parametrize("area", [LogArea(0, 0), LogArea(7, OFFSET), LogArea(63, 1), LogArea(2**64 - 1, 3)])
def test_a_log_that_cannot_hold_guest_memory_is_a_problem(
    qemu: DirectFrontEnd, log: int, area: LogArea
) -> None:
    assert qemu.tell(Request.SET_LOG_BASE, area, log) == 0
    assert exchange(qemu, None, True) == [0, 0, 0]
    status = qemu.backend.log_status
    assert (status.wanted, bool(status.problem)) == (True, True)
    if 0 < area.size < 64:
        what = f"the dirty log has {area.size} bytes, guest memory up to 0x200000 needs 64"
        assert status == (type(status))(True, "software", what)


def test_pages_beyond_the_log_are_a_problem_of_their_own_session(qemu: DirectFrontEnd, log: int) -> None:
    qemu.device.counters["log_missed"] = 3  # of a session before
    exchange(qemu, log, True)
    assert qemu.backend.log_status.problem is None
    qemu.device.counters["log_missed"] = 5
    assert "2 written pages could not be marked" in (qemu.backend.log_status.problem or "")
    exchange(qemu, None, False)
    assert qemu.backend.log_status.problem is None


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "running"])
def test_a_device_that_does_not_mark_lets_everything_count(
    qemu: DirectFrontEnd, log: int, stopped: bool
) -> None:
    qemu.device.failures["start_logging"] = DeviceError("cannot")
    if stopped:
        qemu.device.rings.clear()
    assert exchange(qemu, log, True) == [0, 0, 0, 0]
    status = qemu.backend.log_status
    assert (status.mode, status.problem) == ("all", "recording marks no writes: cannot")
    assert sorted(qemu.device.rings) == [0, 1]


@pytest.fixture
def other() -> Iterator[int]:
    """Another log."""
    fd = os.memfd_create("other")
    os.ftruncate(fd, OFFSET + SIZE)
    yield fd
    os.close(fd)


def test_what_ran_while_nobody_marked_counts_in_the_next_log(
    qemu: DirectFrontEnd, log: int, other: int
) -> None:
    qemu.device.failures["start_logging"] = DeviceError("cannot")
    exchange(qemu, log, True)
    del qemu.device.failures["start_logging"]
    exchange(qemu, other, True)
    assert qemu.backend.log_status.problem is None
    assert os.pread(other, SIZE, OFFSET) == ALL_MARKED


def test_what_ran_while_the_log_was_away_counts_in_the_next(
    qemu: DirectFrontEnd, log: int, other: int
) -> None:
    exchange(qemu, log, True)
    qemu.tell(Request.SET_LOG_BASE, LogArea(SIZE, OFFSET))  # without a log
    assert qemu.device.bitmap is None
    exchange(qemu, other, True)
    assert os.pread(other, SIZE, OFFSET) == ALL_MARKED


def test_a_log_that_follows_one_in_which_the_device_marked_begins_empty(
    qemu: DirectFrontEnd, log: int, other: int
) -> None:
    exchange(qemu, log, True)
    exchange(qemu, other, True)
    qemu.stop()
    assert (marked(log), marked(other)) == (set(), set())


BREAKING: dict[str, tuple[str, int, int]] = {
    "a ring stops": ("stop_ring", 0, 0),
    "a ring starts": ("start_ring", 0, 1),
}


@pytest.mark.parametrize("case", BREAKING)
def test_a_device_that_fails_at_one_ring_lets_everything_count(
    qemu: DirectFrontEnd, log: int, case: str
) -> None:
    call, index, enabled = BREAKING[case]
    exchange(qemu, log, True)
    qemu.tell(Request.SET_VRING_ENABLE, VringState(index, 1 - enabled))
    qemu.tell(Request.GET_QUEUE_NUM)
    assert marked(log) == set()
    qemu.device.failures[call] = DeviceError("it broke")
    with pytest.raises(DeviceError, match="it broke"):
        qemu.tell(Request.SET_VRING_ENABLE, VringState(index, enabled))
    assert os.pread(log, SIZE, OFFSET) == ALL_MARKED


def test_a_device_that_can_neither_log_nor_stop_lets_everything_count(
    qemu: DirectFrontEnd, log: int, other: int
) -> None:
    exchange(qemu, log, True)
    qemu.device.failures.update(start_logging=DeviceError("cannot"), suspend=DeviceError("cannot stop"))
    exchange(qemu, other, True)
    assert os.pread(other, SIZE, OFFSET) == ALL_MARKED


# How much of a log is used


@pytest.fixture
def vast() -> Iterator[int]:
    """A file without an end, in which nothing is."""
    fd = os.memfd_create("vast")
    os.ftruncate(fd, 2**42)
    yield fd
    os.close(fd)


def test_a_log_is_used_as_far_as_guest_memory_needs_it(qemu: DirectFrontEnd, vast: int) -> None:
    qemu.tell(Request.SET_LOG_BASE, LogArea(2**42, 0), vast)
    exchange(qemu, None, True)
    assert qemu.device.calls == [("start_logging", PAGE)]
    qemu.device.failures["suspend"] = DeviceError("it broke")
    with pytest.raises(DeviceError, match="it broke"):
        qemu.tell(Request.SET_STATUS, 0)
    needed = MEMORY_SIZE // PAGE // 8
    assert os.pread(vast, 2 * PAGE, 0).rstrip(b"\0") == b"\xff" * needed
    assert os.fstat(vast).st_blocks * 512 == PAGE, "nothing is written further on"


def test_memory_that_comes_later_is_logged_in_more_of_it(qemu: DirectFrontEnd, vast: int) -> None:
    qemu.tell(Request.SET_LOG_BASE, LogArea(2**42, 0), vast)
    exchange(qemu, None, True)
    before = qemu.device.bitmap
    assert before is not None
    at = 8 * PAGE * PAGE  # where the first page of the log ends
    region = Region(at, PAGE, USER + at, 0)
    qemu.device.counters["log_missed"] = 1
    qemu.tell(Request.ADD_MEM_REG, region, qemu.memory.fd)
    qemu.tell(Request.REM_MEM_REG, region)
    assert [call for call in qemu.device.calls if "logging" in call[0]] == [
        ("start_logging", PAGE),
        ("start_logging", 2 * PAGE),
    ], "less memory needs no other log"
    assert "1 written pages" in (qemu.backend.log_status.problem or ""), "it is the same log"
    qemu.stop()
    assert os.pread(vast, 2 * PAGE, 0) == bytes(2 * PAGE)


def test_nobody_looks_at_the_bitmap_to_tell_how_writes_are_logged(
    qemu: DirectFrontEnd, log: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scan() -> dict[str, int]:
        raise AssertionError("statistics look at every page of the log")

    monkeypatch.setattr(qemu.device, "statistics", scan)
    exchange(qemu, log, True)
    assert qemu.backend.log_status.problem is None


# A session that finds logging begun


@pytest.fixture
def restarted(log: int) -> Iterator[DirectFrontEnd]:
    """A front-end whose back-end died while it logged. Its rings have a chain of two buffers to be written,
    one behind an indirect table, one to be read, and descriptors that lead nowhere."""
    peer = DirectFrontEnd()
    receive, transmit = peer.queues
    receive.add(Buffer(BUFFERS, 10, writable=True), Buffer(BUFFERS + 0x3FFF, 2, writable=True))
    receive.add_indirect(BUFFERS + 0x8000, [Buffer(BUFFERS + 0x9000, 2048, writable=True)])
    transmit.add(Buffer(BUFFERS + 0x10000, 64))
    transmit.add_indirect(2**63, [])
    transmit.describe(9, Buffer(2**63, 2**32 - 1, writable=True))
    transmit.describe(10, Buffer(0xFFFFF000, 2**32 - 1), flags=4)
    peer.connect()
    yield peer
    peer.close()


WRITABLE = {BUFFERS, BUFFERS + 0x3000, BUFFERS + 0x4000, BUFFERS + 0x9000}


def start_logged(peer: DirectFrontEnd, log: int) -> None:
    """START as QEMU sends it while it logs: the log comes after the rings, before DRIVER_OK."""
    peer.enable()
    peer.tell(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES | F_LOG_ALL)
    if not len(peer.backend.memory):
        peer.share_memory()
    for index in (0, 1):
        peer.set_up_ring(index)
    peer.tell(Request.SET_LOG_BASE, LogArea(SIZE, OFFSET), log)
    peer.driver_ok()


def test_what_an_earlier_session_may_have_had_written_is_marked_before_rings_run(
    restarted: DirectFrontEnd, log: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    start = restarted.device.start

    def look_and_start(features: int, rings: Mapping[int, Ring]) -> None:
        seen.append(marked(log))
        start(features, rings)

    monkeypatch.setattr(restarted.device, "start", look_and_start)
    start_logged(restarted, log)
    used = {queue.used // PAGE * PAGE for queue in restarted.queues}
    assert seen == [WRITABLE | used]
    assert restarted.backend.log_status.problem is None
    assert os.pread(log, OFFSET, 0) == bytes(OFFSET)


def test_the_same_for_rings_that_start_one_by_one(restarted: DirectFrontEnd, log: int) -> None:
    restarted.protocol &= ~bit(ProtocolFeature.STATUS)  # rings run from their kick on
    restarted.connect()
    restarted.enable()
    restarted.tell(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES | F_LOG_ALL)
    restarted.share_memory()
    restarted.tell(Request.SET_LOG_BASE, LogArea(SIZE, OFFSET), log)
    receive, transmit = restarted.queues
    restarted.set_up_ring(1)
    assert marked(log) == {transmit.used // PAGE * PAGE}
    restarted.set_up_ring(0)
    assert [name for name in names(restarted.device) if "start" in name] == [
        "start_logging",
        "start",
        "start_ring",
    ]
    assert marked(log) == WRITABLE | {queue.used // PAGE * PAGE for queue in (receive, transmit)}


def test_a_session_that_begins_to_log_by_itself_marks_nothing_before(qemu: DirectFrontEnd, log: int) -> None:
    qemu.queues[0].add(Buffer(BUFFERS, 10, writable=True))
    exchange(qemu, log, True)
    qemu.stop()
    start_logged(qemu, log)
    assert marked(log) == set()


def test_rings_that_ran_without_the_log_count_for_everything(restarted: DirectFrontEnd, log: int) -> None:
    restarted.protocol &= ~bit(ProtocolFeature.STATUS)
    restarted.connect()
    start_logged(restarted, log)  # without STATUS, rings run from their kick on
    assert os.pread(log, SIZE, OFFSET) == ALL_MARKED


def test_too_many_descriptors_count_for_everything(restarted: DirectFrontEnd, log: int) -> None:
    for slot in range(20):
        restarted.queues[1].describe(slot + 20, Buffer(0, 2**32 - 1), flags=4)
    start_logged(restarted, log)
    assert os.pread(log, SIZE, OFFSET) == ALL_MARKED


def test_a_log_that_is_let_go_with_the_rings_is_used_no_more(
    qemu: DirectFrontEnd, log: int, other: int
) -> None:
    """A guest that is paused on its way: STOP, then START with a log that comes late."""
    exchange(qemu, log, True)
    qemu.stop()
    qemu.device.calls.clear()
    start_logged(qemu, other)
    assert marked(other) == set()
    assert names(qemu.device) == ["stop_logging", "start_logging", "start"]


# What a front-end may have forgotten


def test_forgotten_features_are_taken_from_the_former_host() -> None:
    peer = DirectFrontEnd(PROTOCOL_FEATURES, negotiated=VIRTIO | F_LOG_ALL)
    peer.connect()
    peer.start(0)
    assert peer.backend.acked == VIRTIO | F_PROTOCOL_FEATURES
    assert len(peer.reports) == 1
    peer.stop()
    peer.start(bit(32), share=False)
    assert peer.backend.acked == bit(32) | F_PROTOCOL_FEATURES, "who remembers is believed"
    peer.stop()
    peer.start(0, share=False)
    assert peer.backend.acked == F_PROTOCOL_FEATURES, "then it is another driver in the guest"
    peer.close()


MRG_RXBUF, EVENT_IDX, MTU = (
    bit(feature) for feature in (Feature.NET_F_MRG_RXBUF, Feature.F_EVENT_IDX, Feature.NET_F_MTU)
)


@pytest.mark.parametrize("former", [VIRTIO, MRG_RXBUF | MTU], ids=["1.0", "0.95"])
@pytest.mark.parametrize(
    ("sent", "forgotten"), [(0, True), (MTU, True), (EVENT_IDX, False), (EVENT_IDX | MTU, False)]
)
def test_a_driver_that_accepts_less_has_not_been_forgotten(former: int, sent: int, forgotten: bool) -> None:
    """It may have booted instead of the one that moved here, and have headers of another length."""
    peer = DirectFrontEnd(negotiated=former)
    peer.device.promised = MTU  # for the sake of it
    peer.backend.offered |= MTU
    peer.connect()
    peer.start(sent)
    assert (peer.backend.acked == former | F_PROTOCOL_FEATURES) is forgotten
    assert (peer.backend.former == former) is forgotten
    peer.close()
