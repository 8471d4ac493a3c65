"""Announcing a guest: the frame, what is kept until rings run, and who is taken for an uplink."""

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath.announce import MAX_PENDING, MAX_PER_SECOND, Announcer, parse_mac, rarp_frame
from datapath.uplink import NicUplink, Outcome, Uplink, UplinkError, UplinkSpec, UplinkSpecError, open_uplink

MAC = bytes.fromhex("525400123456")


class PaperUplink(Uplink):
    """Notes what is sent; fails when told to."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.problem: str | None = None

    def send(self, frame: bytes, outcome: Outcome) -> None:
        self.frames.append(frame)
        outcome(self.problem)

    def close(self) -> None:
        return


def test_the_frame_is_the_one_that_qemu_sends() -> None:
    frame = rarp_frame(MAC)
    assert len(frame) == 60
    assert frame[:14].hex(" ") == "ff ff ff ff ff ff 52 54 00 12 34 56 80 35"
    assert frame[14:42].hex() == "0001080006040003" + 2 * "52540012345600000000"
    assert frame[42:] == bytes(18)


@pytest.mark.parametrize("text", ["52:54:00:12:34", "52-54-00-12-34-56", "", None, 5, "03:00:00:00:00:01"])
def test_what_is_no_address_of_a_guest_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"MAC address|multicast"):
        parse_mac(text)


def test_what_is_asked_for_before_rings_run_is_kept() -> None:
    told: list[dict[str, object]] = []
    uplink = PaperUplink()
    announcer = Announcer(uplink, told.append)
    announcer.announce(MAC, now=False)
    announcer.announce(MAC, now=False)
    assert announcer.describe() == {"pending": True, "sent": 0, "last_sent": None, "problem": None}
    announcer.rings_run()
    announcer.rings_run()
    assert uplink.frames == [rarp_frame(MAC)]
    announcer.announce(MAC, now=True)
    assert told == [{"mac": "52:54:00:12:34:56", "sent": sent, "problem": None} for sent in (1, 2)]
    assert (announcer.describe()["pending"], announcer.describe()["sent"]) == (False, 2)
    uplink.problem = "no wire"
    announcer.announce(MAC, now=True)
    assert told[-1] == {"mac": "52:54:00:12:34:56", "sent": 2, "problem": "no wire"}
    assert announcer.describe()["problem"] == "no wire"


def test_a_front_end_fills_no_memory() -> None:
    announcer = Announcer(PaperUplink(), lambda told: None)
    for number in range(100):
        announcer.announce(number.to_bytes(6, "big"), now=False)
    assert len(announcer._pending) == MAX_PENDING


@pytest.mark.parametrize("now", [False, True])
def test_nobody_else_is_announced(now: bool) -> None:
    told: list[dict[str, object]] = []
    uplink = PaperUplink()
    announcer = Announcer(uplink, told.append, MAC)
    announcer.announce(bytes.fromhex("525400999999"), now)
    announcer.rings_run()
    assert uplink.frames == []
    problem = "it is not the guest's address"
    assert told == [{"mac": "52:54:00:99:99:99", "sent": 0, "problem": problem}]
    assert announcer.describe()["problem"] == problem
    announcer.announce(MAC, now)
    announcer.rings_run()
    assert uplink.frames == [rarp_frame(MAC)]


def test_a_group_is_never_announced() -> None:
    uplink = PaperUplink()
    Announcer(uplink, lambda told: None).announce(b"\xff" * 6, now=True)
    assert uplink.frames == []


def test_a_front_end_floods_neither_the_wire_nor_who_listens() -> None:
    now = [5.0]
    told: list[dict[str, object]] = []
    uplink = PaperUplink()
    announcer = Announcer(uplink, told.append, clock=lambda: now[0])
    for _ in range(100):
        announcer.announce(MAC, now=True)
    assert len(uplink.frames) == MAX_PER_SECOND
    assert len(told) == 2 * MAX_PER_SECOND
    assert "announcements a second" in str(announcer.describe()["problem"])
    now[0] += 1
    announcer.announce(MAC, now=True)
    assert len(uplink.frames) == MAX_PER_SECOND + 1
    assert announcer.describe()["problem"] is None


def test_without_an_uplink_it_is_dropped_and_told() -> None:
    told: list[dict[str, object]] = []
    announcer = Announcer(None, told.append)
    announcer.announce(MAC, now=False)
    assert announcer.describe()["pending"] is False
    assert "no uplink" in str(announcer.describe()["problem"])


@pytest.mark.parametrize(
    "text", ["", "eth0", "interface=", "nic=/x", "nic=/x,vf=-1", "vf=0", "interface=a,vf=1"]
)
def test_what_names_no_uplink_is_refused(text: str) -> None:
    with pytest.raises(UplinkSpecError, match="neither"):
        UplinkSpec.parse(text)


def test_uplinks_are_named_as_they_were_given() -> None:
    for text in ("interface=eth0", "nic=/run/nic/control,vf=3"):
        assert str(UplinkSpec.parse(text)) == text


def test_an_interface_that_is_not_there_is_named() -> None:
    with selectors.DefaultSelector() as selector, pytest.raises(UplinkError, match="uplink nosuch0: "):
        open_uplink(UplinkSpec(interface="nosuch0"), selector)


@pytest.fixture
def selector() -> Iterator[selectors.BaseSelector]:
    with selectors.DefaultSelector() as made:
        yield made
        assert not made.get_map()


def test_a_nic_that_is_not_there_is_named(tmp_path: Path, selector: selectors.BaseSelector) -> None:
    with pytest.raises(UplinkError, match=r"control: No such file or directory; is the NIC running\?"):
        NicUplink(tmp_path / "control", 0, selector)


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (b"", r"no answer in 0\.05 s"),
        (b"SSH-2.0", "a command must be a JSON object"),
        (
            b'{"return": {}} {"error": {"class": "CommandNotFound", "desc": "no"}}',
            "not the control socket of",
        ),
        (b'{"return": {}} {"return": {"vfs": [{}]}}', "no VF 3; the NIC has 1"),
    ],
)
def test_somebody_else_is_not_taken_for_a_nic(
    tmp_path: Path,
    selector: selectors.BaseSelector,
    monkeypatch: pytest.MonkeyPatch,
    says: bytes,
    reason: str,
) -> None:
    if not says:
        monkeypatch.setattr("datapath.uplink.ANSWER_TIME", 0.05)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control"))
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as peer, contextlib.suppress(OSError):
                peer.send(says)
                peer.recv(1)
                ended.wait(10)

        ended = threading.Event()
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UplinkError, match=reason):
            NicUplink(tmp_path / "control", 3, selector)
        ended.set()
        thread.join()
