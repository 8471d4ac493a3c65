"""Which doorbells a guest is given, and when they are taken back: by a clock of the test's."""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from datapath.vdpa import HostNotifier, Ring, RingState
from datapath.vhost_user.host_notifiers import ANSWER_TIME, REST, HostNotifiers
from datapath.vhost_user.messages import HEADER, BackendRequest, ProtocolError, decode_area, encode_answer
from datapath.vhost_user.vring import Vring
from tests.harness.recording_device import RecordingDevice

PAGE = 4096
MESSAGE = HEADER.size + 24


@dataclass
class PagedDevice(RecordingDevice):
    """A device whose ring N has its doorbell in the page N of a file."""

    file: int = field(default_factory=lambda: os.memfd_create("doorbells"))

    def notifier(self, index: int) -> HostNotifier | None:
        return HostNotifier(self.file, index * PAGE, PAGE)

    def close(self) -> None:
        os.close(self.file)
        super().close()


class Session:
    """Two rings, a front-end's end of the back channel, and a clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.device = PagedDevice()
        self.rings = [Vring(index) for index in (0, 1)]
        for ring in self.rings:
            ring.kick = os.eventfd(0, os.EFD_NONBLOCK)
            ring.placed = Ring(256, 0, 0, 0, RingState(0, 0), ring.kick, None)
        self.reports: list[str] = []
        self.notifiers = HostNotifiers(self.device, self.rings, self.reports.append, lambda: self.now)
        self.front_end, ours = socket.socketpair()
        self.front_end.setblocking(False)
        self.notifiers.connect(ours.detach())

    def sleep(self, seconds: float) -> None:
        """Let time pass, with as many looks as are asked for."""
        end = self.now + seconds
        while (due := self.notifiers.deadline) is not None and due <= end:
            self.now = max(self.now, due)
            self.notifiers.check()
        self.now = end

    def told(self) -> list[tuple[int, bool]]:
        """The rings that the front-end has been told of since, and whether they came with a page."""
        told: list[tuple[int, bool]] = []
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.front_end, MESSAGE, 1)
            except BlockingIOError:
                return told
            area = decode_area(data)
            for fd in fds:
                assert os.path.sameopenfile(fd, self.device.file)
                os.close(fd)
            assert len(fds) == area.has_fd
            assert not fds or (area.offset, area.size) == (area.index * PAGE, PAGE)
            told.append((area.index, area.has_fd))

    def answer(self, *results: int) -> None:
        for result in results:
            self.front_end.send(encode_answer(BackendRequest.VRING_HOST_NOTIFIER_MSG, result))

    def kicked(self, index: int) -> bool:
        """Whether a ring has been signalled since."""
        kick = self.rings[index].kick
        assert kick is not None
        try:
            return os.eventfd_read(kick) > 0
        except BlockingIOError:
            return False

    def given(self) -> "Session":
        """Both pages are given, and confirmed."""
        self.notifiers.settle([0, 1])
        self.sleep(REST)
        assert self.told() == [(0, True), (1, True)]
        self.answer(0, 0)
        self.sleep(0.1)
        assert self.notifiers.confirmed == {0, 1}
        return self

    def close(self) -> None:
        self.notifiers.close()
        self.front_end.close()
        for ring in self.rings:
            ring.close()
        self.device.close()


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session()
    yield made
    made.close()


def test_a_ring_is_given_when_it_has_run_for_a_while(session: Session) -> None:
    session.notifiers.settle([0])
    session.sleep(REST / 2)
    session.notifiers.settle([0, 1])
    session.sleep(REST / 2)
    assert session.told() == [(0, True)]
    session.sleep(REST)
    assert session.told() == [(1, True)]
    session.answer(0, 0)
    session.sleep(0.1)
    assert session.notifiers.deadline is None, "nothing more to do"
    assert not session.kicked(0)


def test_a_ring_that_is_taken_back_is_signalled_until_that_is_sure(session: Session) -> None:
    session.given()
    session.notifiers.take_back()
    assert session.told() == [(0, False), (1, False)]
    assert session.notifiers.confirmed == set()
    for _ in range(3):
        session.sleep(0.1)
        assert session.kicked(0)
    session.answer(0, 0)
    session.sleep(0.1)
    assert session.kicked(0), "a kick may have gone to the page until just now"
    session.sleep(2 * REST)
    assert session.kicked(0)
    session.sleep(2 * REST)
    assert not session.kicked(0)
    assert session.notifiers.deadline is None
    assert session.told() == []


def test_a_ring_rests_before_it_is_given_again(session: Session) -> None:
    """QEMU aborts when a page is taken back that it was given before it had unmapped the last one."""
    session.given()
    session.notifiers.take_back()
    session.notifiers.settle([0, 1])
    session.told()
    session.sleep(3 * REST)
    assert session.told() == [], "the front-end has not confirmed"
    session.answer(0, 0)
    session.sleep(0.1)
    session.sleep(REST * 0.8)
    assert session.told() == []
    session.sleep(REST * 0.5)
    assert session.told() == [(0, True), (1, True)]


def test_a_ring_that_does_not_run_is_not_signalled(session: Session) -> None:
    session.given()
    session.notifiers.take_back()
    session.rings[0].placed = None
    session.sleep(0.1)
    assert (session.kicked(0), session.kicked(1)) == (False, True)


def test_rings_that_no_longer_run_alone_are_taken_back(session: Session) -> None:
    session.given()
    session.notifiers.settle([0])
    assert session.told() == [(1, False)]
    session.notifiers.settle([])
    assert session.told() == [(0, False)]


def test_who_refuses_is_not_asked_again(session: Session) -> None:
    session.notifiers.settle([0, 1])
    session.sleep(REST)
    session.told()
    session.answer(1, 1)
    session.sleep(0.1)
    assert len(session.reports) == 1
    assert "page_per_vq" in session.reports[0]
    session.notifiers.settle([])
    session.notifiers.settle([0, 1])
    session.sleep(10 * REST)
    assert session.told() == [], "neither given nor taken back"
    assert session.notifiers.deadline is None


def test_who_does_not_answer_keeps_nobody_awake(session: Session) -> None:
    session.notifiers.settle([0, 1])
    session.sleep(REST)
    session.sleep(ANSWER_TIME + 1)
    assert [report.rpartition(": ")[2] for report in session.reports] == ["it has not answered within 5 s"]
    assert session.notifiers.deadline is None
    session.told()
    session.notifiers.take_back()
    assert session.told() == [(0, False), (1, False)], "it may have them all the same"
    session.sleep(10 * ANSWER_TIME)
    assert session.kicked(0), "and keep them"
    assert len(session.reports) == 1


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda end: end.send(bytes(20)), "not the answer to VRING_HOST_NOTIFIER_MSG"),
        (lambda end: end.shutdown(socket.SHUT_RDWR), "the front-end has closed it"),
    ],
)
def test_a_channel_that_fails_is_given_up(session: Session, spoil: object, reason: str) -> None:
    session.notifiers.settle([0, 1])
    session.sleep(REST)
    assert callable(spoil)
    spoil(session.front_end)
    session.sleep(0.1)
    assert len(session.reports) == 1
    assert reason in session.reports[0]
    session.notifiers.take_back()
    session.sleep(0.1)
    assert session.kicked(0), "what is mapped stays mapped"


def test_a_channel_that_is_full_is_given_up(session: Session) -> None:
    session.notifiers.settle([0, 1])
    fds = []
    ours = session.notifiers._channel
    assert ours is not None
    while True:
        try:
            fds.append(ours._socket.send(bytes(4096), socket.MSG_DONTWAIT))
        except BlockingIOError:
            break
    session.sleep(REST)
    assert [report.rpartition(": ")[2] for report in session.reports] == ["it is full"]


def test_a_descriptor_that_is_no_socket(session: Session) -> None:
    with pytest.raises(ProtocolError, match="cannot be used: Socket operation on non-socket"):
        session.notifiers.connect(os.memfd_create("no socket"))


def test_without_a_channel_nothing_is_given(session: Session) -> None:
    session.notifiers.connect(None)
    session.notifiers.settle([0, 1])
    assert session.notifiers.deadline is None
