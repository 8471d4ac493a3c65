"""What the supervisor believes of files and processes: sockets that QEMU may have replaced, pids that a
server claims, names that are too long. Processes are conformance/test_daemon.py's."""

import asyncio
import dataclasses
import os
import socket
import stat
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from datapath.control import Arguments
from libvirt_vdpa.api import ApiServer
from libvirt_vdpa.config import SocketConfig
from libvirt_vdpa.ports import Event, Record, State, control_path
from libvirt_vdpa.supervisor import Port, PortError, Supervisor, give_socket, port_arguments, uplink_is_there

UUID = "7664d0a0-0001-4000-8000-000000000001"
MAC = "52:54:00:76:64:01"
OWNER = SocketConfig(os.getuid(), os.getgid(), 0o606)


def record(folder: Path, role: str = "listen", mac: str = MAC) -> Record:
    return Record(
        domain="a",
        uuid=UUID,
        mac=mac,
        device="ifcvf,vfio-user=/no/vf.sock",
        pool=None,
        role=role,
        socket=str(folder / UUID / f"{mac}.sock"),
        control=str(control_path(folder, UUID, mac)),
        log=str(folder / f"{mac}.log"),
    )


def supervisor() -> Supervisor:
    return Supervisor(OWNER, lambda _port: None, lambda _record: None)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestGiveSocket:
    def test_a_socket(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            assert give_socket(path, OWNER)
        assert mode(path) == 0o606

    def test_nothing(self, tmp_path: Path) -> None:
        assert not give_socket(tmp_path / "s", OWNER)

    def test_a_link_is_not_followed(self, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.touch(0o600)
        (tmp_path / "s").symlink_to(victim)
        assert not give_socket(tmp_path / "s", OWNER)
        assert mode(victim) == 0o600


class TestCommandLine:
    """What a record has the port told beyond where its sockets and its VF are, and whose it is."""

    UPLINK = "nic=/run/nics/default/control,vf=1"

    def options(self, **changes: object) -> list[str]:
        changed = dataclasses.replace(record(Path("/run")), **changes)  # type: ignore[arg-type]
        whose, *options = port_arguments(changed)[4:]
        assert whose == f"--mac={MAC}"
        return options

    def test_by_default_nothing(self) -> None:
        assert self.options() == []

    def test_who_logs_and_what_was_offered(self) -> None:
        assert self.options(log_mode="hardware", features=0x30) == ["--log-mode=hardware", "--features=0x30"]
        assert self.options(host_notifiers="auto") == ["--host-notifiers=auto"]

    def test_what_a_guest_from_elsewhere_had_negotiated(self) -> None:
        assert self.options(negotiated=0x20) == ["--negotiated=0x20"]

    @pytest.mark.parametrize(
        ("announce", "told"), [("auto", True), ("rarp", True), ("guest", False), ("off", False)]
    )
    def test_an_uplink_where_the_port_may_announce(self, announce: str, told: bool) -> None:
        uplink = [f"--uplink={self.UPLINK}", *([] if told else ["--silent"])]
        assert self.options(announce=announce, uplink=self.UPLINK) == uplink
        interface = "interface=eth0"  # one that nothing can be filtered on
        expected = [f"--uplink={interface}"] if told else []
        assert self.options(announce=announce, uplink=interface) == expected


class TestUplinkThatHasGone:
    """An interface may go while a guest runs; its port must come back all the same."""

    @pytest.mark.parametrize(
        ("uplink", "there"),
        [(None, True), ("interface=lo", True), ("interface=no-such-0", False), ("nic=/no,vf=0", True)],
    )
    def test_interfaces_are_looked_for(self, uplink: str | None, there: bool) -> None:
        assert uplink_is_there(uplink) == there

    @pytest.mark.parametrize(("restarts", "told"), [(False, True), (True, False)])
    def test_a_port_is_started_again_without_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: bool, told: bool
    ) -> None:
        """The program is one that notes its command line and ends."""
        program = tmp_path / "port"
        program.write_text('#!/bin/sh\necho "$@"\nexit 1\n')
        program.chmod(0o700)
        monkeypatch.setattr("libvirt_vdpa.supervisor.find_program", lambda _name: str(program))
        made = dataclasses.replace(record(tmp_path), uplink="interface=no-such-0")

        async def run() -> None:
            ports = supervisor()
            port = ports.add(made)
            if restarts:
                port.feed(Event.LOST)
                await port.settled(State.RESTARTING)
                await port.settled(State.RETRYING)
            else:
                with pytest.raises(PortError):
                    await ports.start(port)
            assert port.record.uplink == "interface=no-such-0"
            await ports.release(port)

        asyncio.run(run())
        first = Path(made.log).read_text().splitlines()[0]
        assert ("--uplink=interface=no-such-0" in first) == told


class TestFolders:
    def test_records_are_apart_from_what_qemu_reaches(self, tmp_path: Path) -> None:
        made = record(tmp_path, "connect")
        supervisor().add(made)
        assert made.path == tmp_path / "ports" / UUID / f"{MAC}.json"
        assert made.path.is_file()
        assert mode(made.path.parent) == mode(tmp_path / "ports") == 0o700
        assert mode(tmp_path / UUID) == 0o1771
        assert list((tmp_path / UUID).iterdir()) == []

    @pytest.mark.parametrize("roles", [("listen", "connect"), ("connect", "listen")])
    def test_one_port_that_connects_lets_qemu_write(self, tmp_path: Path, roles: tuple[str, str]) -> None:
        ports = supervisor()
        for number, role in enumerate(roles):
            ports.add(record(tmp_path, role, f"52:54:00:76:64:0{number}"))
        assert mode(tmp_path / UUID) == 0o1771

    def test_what_is_left_of_server_mode_does_not_stay_open(self, tmp_path: Path) -> None:
        (tmp_path / UUID).mkdir()
        (tmp_path / UUID).chmod(0o1771)
        supervisor().add(record(tmp_path))
        assert mode(tmp_path / UUID) == 0o711


def test_no_port_takes_another_ones_place(tmp_path: Path) -> None:
    ports = supervisor()
    first = ports.add(record(tmp_path))
    with pytest.raises(PortError, match="there is such a port already"):
        ports.add(dataclasses.replace(record(tmp_path), device="ifcvf,vfio-user=/other.sock"))
    assert list(ports.ports.values()) == [first]
    assert Record.load(first.record.path) == first.record


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for sockets below it."""
    with tempfile.TemporaryDirectory(prefix="vdpa-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def bystander() -> Iterator[int]:
    """Pid of a process that is not ours to signal."""
    process = subprocess.Popen(["sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


async def served(path: Path, pid: int, question: Callable[[], Awaitable[object]]) -> object:
    """Ask while a control socket is served that says it is process `pid`."""

    async def query_status(_arguments: Arguments) -> object:
        return {"pid": pid}

    server = ApiServer({"query-status": query_status})
    path.parent.mkdir(parents=True, exist_ok=True)
    server.start(path)
    try:
        return await question()
    finally:
        await server.stop()


def test_a_server_cannot_pass_for_another_process(short: Path, bystander: int) -> None:
    made = record(short)
    port = Port(made, OWNER, lambda _port: None)
    assert asyncio.run(served(Path(made.control), bystander, port._find_process)) is None


def test_a_server_that_says_who_it_is_is_found(short: Path) -> None:
    made = record(short)
    port = Port(made, OWNER, lambda _port: None)

    async def found_pid() -> int | None:
        process = await port._find_process()
        if process is None:
            return None
        process.close()
        return process.pid

    assert asyncio.run(served(Path(made.control), os.getpid(), found_pid)) == os.getpid()


#: A log that cannot be opened, whoever tries.
NO_LOG = "/proc/no/log"
LONG_LOG = f"/tmp/{300 * 'x'}.log"


class TestNoProcess:
    """Ports whose process cannot be started, or is not there any more."""

    @pytest.mark.parametrize("log", [NO_LOG, LONG_LOG])
    def test_a_start_that_cannot_be_is_told_and_undone(self, tmp_path: Path, log: str) -> None:
        forgotten: list[Record] = []

        async def run() -> None:
            ports = Supervisor(OWNER, lambda _port: None, forgotten.append)
            port = ports.add(dataclasses.replace(record(tmp_path), log=log))
            with pytest.raises(PortError, match=log):
                await ports.start(port)
            await ports.release(port)

        asyncio.run(asyncio.wait_for(run(), 10))
        assert len(forgotten) == 1

    def test_a_release_meets_a_start_that_cannot_be(self, tmp_path: Path) -> None:
        async def run() -> State:
            ports = supervisor()
            port = ports.add(dataclasses.replace(record(tmp_path), log=NO_LOG))
            start = asyncio.create_task(ports.start(port))
            await asyncio.sleep(0)
            await ports.release(port)
            with pytest.raises(PortError):
                await start
            # Whatever was still to come has come.
            await asyncio.sleep(0)
            return port.state

        assert asyncio.run(asyncio.wait_for(run(), 10)) is State.GONE

    def test_one_port_that_cannot_be_adopted_is_not_the_others_problem(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adopt = Port.adopt

        async def fail_once(port: Port) -> None:
            if port.record.mac == MAC:
                raise OSError("no luck")
            await adopt(port)

        monkeypatch.setattr(Port, "adopt", fail_once)
        first = record(tmp_path)
        for mac in (MAC, "52:54:00:76:64:02"):
            supervisor().add(dataclasses.replace(record(tmp_path, mac=mac), state="serving", log=LONG_LOG))
        ports = supervisor()

        async def run() -> list[State]:
            await ports.adopt(tmp_path)
            states = [port.state for port in ports.ports.values()]
            ports.disregard()
            return states

        # The one that failed stays known: its process may run, and its VF must not be lent.
        assert asyncio.run(asyncio.wait_for(run(), 10)) == [State.IDLE, State.RETRYING]
        assert f"{first.path}: the port cannot be adopted" in caplog.text


def test_that_its_guest_has_come_is_written_down(tmp_path: Path) -> None:
    async def run() -> None:
        port = supervisor().add(dataclasses.replace(record(tmp_path), arriving=True))
        assert Record.load(port.record.path).arriving
        port.arrived()
        assert not Record.load(port.record.path).arriving

    asyncio.run(run())


@pytest.mark.parametrize(
    ("arriving", "told", "kept"),
    [
        (False, {"features_former": None}, False),
        (True, {"features_former": None}, True),
        (False, {"features_former": 0x20}, True),
        (False, {}, True),  # by a port of a release before
    ],
)
def test_what_a_guest_had_negotiated_is_forgotten_with_its_driver_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arriving: bool, told: dict[str, object], kept: bool
) -> None:
    class Client:
        async def query(self, _command: str) -> dict[str, object]:
            return told

    async def run() -> None:
        port = supervisor().add(dataclasses.replace(record(tmp_path), arriving=arriving, negotiated=0x20))
        monkeypatch.setattr(port, "_client", Client())
        await port.query_status()
        assert (Record.load(port.record.path).negotiated == 0x20) is kept
        assert ("--negotiated=0x20" in port_arguments(port.record)) is kept

    asyncio.run(run())
