"""The supervisor and a port that is busy for longer than its answer may take: pinning the memory of a large
guest. It is left alone while it answers between pieces, and killed where it does not."""

import asyncio
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from libvirt_vdpa import supervisor
from libvirt_vdpa.config import SocketConfig
from libvirt_vdpa.ports import Record, State, control_path
from libvirt_vdpa.supervisor import Supervisor
from tests.harness.front_end import SocketFrontEnd

ROOT = Path(__file__).resolve().parents[2]
UUID = "7664d0a0-0001-4000-8000-000000000001"
MAC = "52:54:00:76:64:01"
OWNER = SocketConfig(os.getuid(), os.getgid(), 0o600)
#: Seconds in place of five, and the longer time that the memory takes.
LIMIT = 1.0
PINNING = 3.0
PROGRAM = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.harness.pinning_port import main
sys.exit(main())
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder with a short path, and the program to run as the port."""
    with tempfile.TemporaryDirectory(prefix="vdpa-", dir="/tmp") as path:
        program = Path(path) / "port"
        program.write_text(PROGRAM)
        program.chmod(0o700)
        monkeypatch.setattr(supervisor, "find_program", lambda _name: str(program))
        monkeypatch.setattr(supervisor, "ANSWER_LIMIT", LIMIT)
        monkeypatch.setattr(supervisor, "WATCH_INTERVAL", LIMIT / 10)
        yield Path(path)


def record(folder: Path, pieces: int) -> Record:
    return Record(
        domain="a",
        uuid=UUID,
        mac=MAC,
        device=f"ifcvf,pieces={pieces},seconds={PINNING / pieces}",
        pool=None,
        role="listen",
        socket=str(folder / UUID / f"{MAC}.sock"),
        control=str(control_path(folder, UUID, MAC)),
        log=str(folder / "log"),
    )


def share_memory(path: str) -> bool:
    """As QEMU does at the start of a guest; whether the port took it."""
    with closing(SocketFrontEnd.dial(Path(path))) as front_end:
        front_end.connect()
        front_end.need_reply = True
        try:
            front_end.share_memory()
        except ConnectionError:
            return False
    return True


async def watched(folder: Path, pieces: int) -> tuple[bool, bool]:
    """Let a supervised port take memory; whether it did, and whether it is the same process afterwards."""
    ports = Supervisor(OWNER, lambda _port: None, lambda _record: None)
    port = ports.add(record(folder, pieces))
    try:
        await ports.start(port)
        before = port.record.pid
        taken = await asyncio.to_thread(share_memory, port.record.socket)
        while not taken and port.record.pid in (before, None):
            await asyncio.sleep(0.01)
        await port.settled(State.SERVING)
        return taken, port.record.pid == before
    finally:
        await ports.release(port)


def test_a_port_that_answers_while_it_pins_memory_lives(folder: Path) -> None:
    assert asyncio.run(asyncio.wait_for(watched(folder, 30), 20)) == (True, True)


def test_a_port_that_is_deaf_for_too_long_is_killed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert asyncio.run(asyncio.wait_for(watched(folder, 1), 20)) == (False, False)
    assert "does not answer" in caplog.text


async def adopted(folder: Path) -> tuple[bool, bool, bool]:
    """Let another supervisor take over a port that pins memory.

    Whether it got an answer before the memory was taken, whether that was, and the process is the same.
    """
    first = Supervisor(OWNER, lambda _port: None, lambda _record: None)
    port = first.add(record(folder, 30))
    second = Supervisor(OWNER, lambda _port: None, lambda _record: None)
    try:
        await first.start(port)
        sharing = asyncio.create_task(asyncio.to_thread(share_memory, port.record.socket))
        while not port.status.get("front_end"):
            await asyncio.sleep(0.01)
        first.disregard()
        await second.adopt(folder)
        (found,) = second.ports.values()
        await found.settled(State.SERVING)
        in_time = not sharing.done()
        return in_time, await sharing, found.record.pid == port.record.pid
    finally:
        ports = second if second.ports else first
        for left in list(ports.ports.values()):
            await ports.release(left)


def test_a_port_is_taken_over_while_it_pins_memory(folder: Path) -> None:
    assert asyncio.run(asyncio.wait_for(adopted(folder), 20)) == (True, True, True)
