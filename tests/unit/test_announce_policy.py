"""Who announces a guest that has arrived, by the operator's policy."""

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from libvirt_vdpa import announce
from libvirt_vdpa.announce import Announcer
from libvirt_vdpa.client import ControlError
from libvirt_vdpa.hypervisor import HypervisorError

UUID = "7664d0a0-0001-4000-8000-000000000001"
MAC = "52:54:00:76:64:01"
ROUNDS = 5


class FakePort:
    def __init__(self, policy: str, rounds: int = 0) -> None:
        self.record = SimpleNamespace(mac=MAC, label=f"a/{MAC}", announce=policy, announce_rounds=rounds)
        self.asked: list[tuple[str, dict[str, object]]] = []
        self.error: ControlError | None = None

    async def ask(self, command: str, arguments: dict[str, object]) -> None:
        self.asked.append((command, arguments))
        if self.error is not None:
            raise self.error


class Qemu:
    """Notes rounds of announce-self, and whether the domain may be tainted for them."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, bool]] = []
        self.error: HypervisorError | None = None

    async def execute(
        self, uuid: str, command: str, arguments: Mapping[str, object], may_taint: bool
    ) -> object:
        assert (uuid, command) == (UUID, "announce-self")
        self.asked.append((arguments["rounds"], may_taint))
        if self.error is not None:
            raise self.error
        return {}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announce, "ROUNDS", (0.0, 0.001, 0.002, 0.003, 0.004))


def announced(port: FakePort, *, late: bool, qemu: Qemu) -> int:
    """How often the port was asked to announce."""

    async def run() -> None:
        announcer = Announcer(qemu.execute)
        if late:
            announcer.late(UUID, cast(Any, port))
        else:
            announcer.arrived(UUID, [cast(Any, port)])
        await announcer._tasks.wait()

    asyncio.run(run())
    assert all(asked == ("announce", {"mac": MAC}) for asked in port.asked)
    return len(port.asked)


@pytest.mark.parametrize(
    ("policy", "rounds", "by_port", "by_qemu"),
    [
        ("auto", 0, 0, []),
        ("auto", 3, 0, [(3, True)]),
        ("guest", 0, 0, []),
        ("guest", 3, 0, [(3, True)]),
        ("rarp", 0, ROUNDS, []),
        ("rarp", 2, ROUNDS, [(2, True)]),
        ("off", 0, 0, []),
        ("off", 3, 0, []),
    ],
)
def test_a_guest_arrives(policy: str, rounds: int, by_port: int, by_qemu: list[tuple[int, bool]]) -> None:
    qemu = Qemu()
    assert announced(FakePort(policy, rounds), late=False, qemu=qemu) == by_port
    assert qemu.asked == by_qemu


@pytest.mark.parametrize(
    ("policy", "rounds", "by_port", "by_qemu"),
    [
        # Unasked, only by a monitor that taints nothing.
        ("auto", 0, ROUNDS, [(announce.LATE_ROUNDS, False)]),
        ("auto", 3, ROUNDS, [(3, True)]),
        ("guest", 0, 0, [(announce.LATE_ROUNDS, False)]),
        ("rarp", 0, ROUNDS, [(announce.LATE_ROUNDS, False)]),
        ("off", 3, 0, []),
    ],
)
def test_a_port_comes_back_after_its_guest_has_arrived(
    policy: str, rounds: int, by_port: int, by_qemu: list[tuple[int, bool]]
) -> None:
    qemu = Qemu()
    assert announced(FakePort(policy, rounds), late=True, qemu=qemu) == by_port
    assert qemu.asked == by_qemu


def test_a_port_that_is_away_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    port = FakePort("rarp")
    port.error = ControlError("not connected")
    assert announced(port, late=False, qemu=Qemu()) == 1
    assert f"a/{MAC}: cannot announce: not connected" in caplog.text


def test_only_what_was_asked_for_is_missed(caplog: pytest.LogCaptureFixture) -> None:
    qemu = Qemu()
    qemu.error = HypervisorError("no monitor")
    announced(FakePort("auto"), late=True, qemu=qemu)
    assert "no monitor" not in caplog.text
    announced(FakePort("auto", 2), late=False, qemu=qemu)
    assert "announce-self: no monitor" in caplog.text


def test_what_nobody_expected_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    port = FakePort("rarp")
    port.error = ValueError("odd")  # type: ignore[assignment]
    assert announced(port, late=False, qemu=Qemu()) == 1
    assert f"a/{MAC}: announcing failed" in caplog.text
