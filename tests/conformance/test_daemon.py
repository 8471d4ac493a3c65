"""virtvdpad with real ports and a real emulated NIC, driven by the hook as libvirt would call it.

In a network namespace and a run folder of its own. libvirt itself and guests are tests/e2e's.
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from libvirt_vdpa.client import ControlClient, ControlError
from libvirt_vdpa.metadata import xml_folder
from libvirt_vdpa.process import start_time
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import wait_for
from tests.harness.procfs import all_running

PROGRAMS = Path(sys.executable).parent
HOOK = Path(__file__).resolve().parents[2] / "hooks" / "qemu"
MAC = "52:54:00:76:64:01"
#: What the daemon starts and does not end.
SERVANTS = ("virt-vdpa-port", "virt-vdpa-nic")
CONFIGURATION = """
run-folder = "{folder}"
log-folder = "{folder}/log"
libvirt-uri = ""
hook-time-limit = {limit}
[socket]
mode = "0606"
[pool.default]
driver = "ifcvf"
emulated = 2
"""


class Domain:
    """One of the examples, at home in a run folder."""

    def __init__(self, folder: Path, example: str = "vdpa-demo.xml", number: int = 1) -> None:
        text = (xml_folder() / example).read_text().replace("/run/libvirt-vdpa", str(folder))
        self.xml = text.replace("7664d0a0-", f"7664d0a{number}-")
        self.name = f"domain-{number}"
        self.folder = folder / self.xml.partition("<uuid>")[2][:36]
        mac = self.xml.partition("<mac address='")[2][:17]
        self.socket = self.folder / f"{mac}.sock"
        self.control = self.folder / f"{mac}.ctl"
        self.record = self.folder / f"{mac}.json"

    def edited(self, before: str, after: str) -> "Domain":
        """The same domain with a change in its XML."""
        assert before in self.xml
        self.xml = self.xml.replace(before, after)
        return self


class DaemonHost:
    """A daemon, its folders, and everything that it starts."""

    def __init__(self, network: NetworkNamespace) -> None:
        self.network = network
        self.folder = Path(tempfile.mkdtemp(prefix="vdpa-", dir="/tmp"))
        self.socket = self.folder / "virtvdpad.sock"
        self.configuration = self.folder / "virtvdpad.toml"
        self.log = self.folder / "daemon.log"
        self.daemon: subprocess.Popen[bytes] | None = None
        self.configure()

    def configure(self, limit: float = 10, more: str = "") -> None:
        """Write the configuration, with more lines for the pool."""
        self.configuration.write_text(CONFIGURATION.format(folder=self.folder, limit=limit) + more)

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        command = [*self.network.prefix, str(PROGRAMS / "virtvdpad"), f"--config={self.configuration}"]
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for("virtvdpad to answer", self.answers, 20)

    def answers(self) -> bool:
        assert self.daemon is not None
        assert self.daemon.poll() is None, self.log.read_text()
        try:
            return bool(self.ask("query-status")["pid"] == self.daemon.pid)
        except ControlError:
            return False

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the daemon; its exit code."""
        assert self.daemon is not None
        self.daemon.send_signal(number)
        code = self.daemon.wait(10)
        self.daemon = None
        return code

    def close(self) -> None:
        """End all: the daemon, then whatever it has left, found by its command line."""
        if self.daemon is not None:
            self.stop(signal.SIGKILL)
        for process in all_running():
            if process.name in SERVANTS and any(str(self.folder) in word for word in process.argv):
                end_process(process.pid)
        shutil.rmtree(self.folder)

    def ask(self, command: str, path: Path | None = None, arguments: dict[str, object] | None = None) -> Any:
        """Execute a command on the daemon's control socket, or another."""

        async def execute() -> object:
            async with ControlClient(path or self.socket) as client:
                return await client.execute(command, arguments)

        return asyncio.run(execute())

    @property
    def ports(self) -> list[dict[str, Any]]:
        found = self.ask("query-ports")["ports"]
        assert isinstance(found, list)
        return found

    @property
    def lent(self) -> int:
        """Number of VFs that a port holds."""
        return sum(device["state"] == "lent" for device in self.ask("query-devices")["devices"])

    @property
    def nic(self) -> int:
        """Pid of the emulated NIC."""
        pid = json.loads((self.folder / "nics/default/nic.json").read_text())["pid"]
        assert isinstance(pid, int)
        return pid

    def begin_hook(self, domain: Domain, operation: str) -> subprocess.Popen[str]:
        """Call the hook as libvirt does and do not wait for it."""
        pipe = subprocess.PIPE
        environment = {"LIBVIRT_VDPA_SOCKET": str(self.socket), "LC_ALL": "C", "PATH": os.environ["PATH"]}
        command = [str(HOOK), domain.name, operation, "begin", "-"]
        hook = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, cwd="/"
        )
        assert hook.stdin is not None
        hook.stdin.write(domain.xml)
        hook.stdin.close()
        hook.stdin = None
        return hook

    def hook(self, domain: Domain, *operations: str) -> str:
        """Call the hook for operations that must go well; what it says."""
        said = ""
        for operation in operations:
            hook = self.begin_hook(domain, operation)
            output, said = hook.communicate(timeout=20)
            assert (hook.returncode, output) == (0, ""), said
        return said

    def veto(self, domain: Domain, operation: str) -> str:
        """Call the hook for an operation that must be refused; its one line."""
        hook = self.begin_hook(domain, operation)
        output, said = hook.communicate(timeout=20)
        assert (hook.returncode, output) == (1, "")
        assert said.startswith("libvirt-vdpa: ")
        assert said.endswith("\n")
        assert said.count("\n") == 1
        return said.removeprefix("libvirt-vdpa: ").strip()

    def domain(self, example: str = "vdpa-demo.xml", number: int = 1) -> Domain:
        return Domain(self.folder, example, number)

    def is_clean(self) -> bool:
        """Whether no port, folder or lent VF is left."""
        return not self.ports and not self.lent and not list(self.folder.glob("*-*-*"))


def end_process(pid: int) -> None:
    """End a process that need not be our child, and wait until it has ended."""
    os.kill(pid, signal.SIGKILL)
    wait_for(f"process {pid} to end", lambda: start_time(pid) is None, 10)


@pytest.fixture(scope="module")
def network() -> Iterator[NetworkNamespace]:
    with NetworkNamespace() as network:
        yield network


@pytest.fixture
def idle(network: NetworkNamespace) -> Iterator[DaemonHost]:
    """A host whose daemon has not been started."""
    host = DaemonHost(network)
    yield host
    host.close()


@pytest.fixture
def host(idle: DaemonHost) -> DaemonHost:
    idle.start()
    return idle


@pytest.fixture
def front_end() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as front_end:
        yield front_end


class TestLife:
    """What libvirt's hooks do to a port."""

    def test_a_domain_starts_and_ends(self, host: DaemonHost, front_end: socket.socket) -> None:
        domain = host.domain()
        host.hook(domain, "prepare")
        assert domain.socket.stat().st_mode & 0o777 == 0o606
        assert domain.control.stat().st_mode & 0o777 == 0o600
        assert domain.record.stat().st_mode & 0o777 == 0o600
        assert domain.folder.stat().st_mode & 0o7777 == 0o711
        front_end.connect(str(domain.socket))
        host.hook(domain, "start", "started")
        wait_for("the front-end to be noticed", lambda: host.ports[0]["front_end"], 5)
        (port,) = host.ports
        assert (port["state"], port["pool"], port["restarts"]) == ("serving", "default", 0)
        front_end.close()
        host.hook(domain, "stopped")
        assert host.ports[0]["state"] == "lingering"
        host.hook(domain, "release")
        assert host.is_clean()
        assert start_time(port["pid"]) is None

    def test_in_server_mode_the_port_connects(self, host: DaemonHost, front_end: socket.socket) -> None:
        domain = host.domain("vdpa-server.xml")
        host.hook(domain, "prepare")
        assert host.ports[0]["state"] == "idle"
        host.hook(domain, "start")
        front_end.bind(str(domain.socket))
        front_end.listen()
        front_end.settimeout(10)
        with front_end.accept()[0]:
            host.hook(domain, "started")
        host.hook(domain, "stopped", "release")
        assert host.is_clean()

    def test_a_vf_is_lent_once(self, host: DaemonHost) -> None:
        first, second, third = (host.domain(number=number) for number in (1, 2, 3))
        host.hook(first, "prepare")
        host.hook(second, "prepare")
        assert len({port["device"] for port in host.ports}) == 2
        assert "pool 'default' has no free VF: 2 of 2 lent to domain 'vdpa-demo'" in host.veto(
            third, "prepare"
        )
        assert not third.folder.exists()
        host.hook(first, "stopped", "release")
        host.hook(third, "prepare")

    def test_two_interfaces(self, host: DaemonHost) -> None:
        domain = host.domain("vdpa-kvm.xml")
        host.hook(domain, "prepare", "start", "started")
        assert [port["state"] for port in host.ports] == ["serving", "serving"]
        host.hook(domain, "stopped", "release")
        assert host.is_clean()

    def test_reconnect_makes_a_missing_port(self, host: DaemonHost) -> None:
        domain = host.domain()
        host.hook(domain, "reconnect")
        assert domain.socket.is_socket()
        pid = host.ports[0]["pid"]
        host.hook(domain, "reconnect")
        assert host.ports[0]["pid"] == pid


class TestVeto:
    """What virsh shows when a start is refused; nothing is left then."""

    @pytest.mark.parametrize(
        ("before", "after", "message"),
        [
            (
                "mode='shared'",
                "mode='private'",
                "guest memory is not shared with the port; add <memoryBacking>",
            ),
            (
                "pool='default'",
                "pool='fast'",
                "metadata attribute pool='fast': not configured; configured: default",
            ),
            ("driver='ifcvf'", "driver='mlx5'", "driver='mlx5': not available in this version"),
            (".sock'", ".socket'", f"{MAC}.socket'>: the path must be '"),
            (
                "<model type='virtio'/>",
                "<model type='virtio'/><driver queues='9'/>",
                "queues='9'>: the VF has ",
            ),
            (f"<mac address='{MAC}'/>", "", f"mac='{MAC}': no interface of the domain has this MAC"),
            ("</devices>", "", "domain XML: Opening and ending tag mismatch"),
            ("pool='default'", "device='vfio-user=/no/vf.sock'", "/no/vf.sock"),
        ],
    )
    def test_prepare(self, host: DaemonHost, before: str, after: str, message: str) -> None:
        assert message in host.veto(host.domain().edited(before, after), "prepare")
        assert host.is_clean()

    def test_a_nic_that_does_not_start_is_told_of(self, idle: DaemonHost) -> None:
        idle.configure(more='bridge = "no-such-bridge"')
        idle.start()
        assert "pool 'default' has no usable VF: " in (said := idle.veto(idle.domain(), "prepare"))
        assert "no-such-bridge" in said
        assert idle.is_clean()

    def test_migration(self, host: DaemonHost) -> None:
        assert host.veto(host.domain(), "migrate") == (
            "domain 'domain-1': live migration of vDPA interfaces is not supported yet"
        )

    def test_without_a_daemon(self, idle: DaemonHost) -> None:
        domain = idle.domain()
        message = f"of domain 'domain-1': virtvdpad is not running ({idle.socket}: No such file or directory)"
        for operation in ("prepare", "start", "started", "migrate", "restore"):
            assert idle.veto(domain, operation) == f"{operation} {message}; start it and try again"
        for operation in ("stopped", "release", "reconnect"):
            assert message in idle.hook(domain, operation)
        assert idle.hook(domain, "no-such-operation") == ""

    def test_a_foreign_domain_needs_no_daemon(self, idle: DaemonHost) -> None:
        domain = idle.domain().edited("urn:libvirt-vdpa:domain:1.0", "urn:other")
        assert idle.hook(domain, "prepare", "start", "started", "stopped", "release") == ""

    @pytest.mark.parametrize(
        "words", [[], ["a"], ["a", "prepare", "begin"], ["a", "prepare", "begin", "-", "x"]]
    )
    def test_arguments_that_libvirt_never_sends(self, words: list[str]) -> None:
        done = subprocess.run([HOOK, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("usage: ")


class TestUndone:
    """A prepare that does not come to its end. The NIC stands still, so its VF cannot be opened."""

    def test_the_hook_is_killed(self, host: DaemonHost) -> None:
        domain = host.domain()
        os.kill(host.nic, signal.SIGSTOP)
        hook = host.begin_hook(domain, "prepare")
        wait_for("the port to start", lambda: [port["state"] for port in host.ports] == ["starting"], 5)
        hook.kill()
        hook.communicate()
        # Before the port would have given up the VF by itself.
        wait_for("the port to vanish", host.is_clean, 3)
        os.kill(host.nic, signal.SIGCONT)
        host.hook(domain, "prepare")

    def test_the_time_limit_passes(self, idle: DaemonHost) -> None:
        idle.configure(limit=1)
        idle.start()
        os.kill(idle.nic, signal.SIGSTOP)
        assert "prepare took longer than 0.8 s" in idle.veto(idle.domain(), "prepare")
        assert idle.is_clean()
        os.kill(idle.nic, signal.SIGCONT)

    def test_the_daemon_is_killed(self, host: DaemonHost) -> None:
        domain = host.domain()
        os.kill(host.nic, signal.SIGSTOP)
        hook = host.begin_hook(domain, "prepare")
        wait_for("the port to start", lambda: [port["state"] for port in host.ports] == ["starting"], 5)
        pid = host.ports[0]["pid"]
        host.stop(signal.SIGKILL)
        assert "virtvdpad" in hook.communicate(timeout=10)[1]
        assert hook.returncode == 1
        os.kill(host.nic, signal.SIGCONT)
        host.start()
        wait_for("the port to vanish", host.is_clean, 10)
        assert start_time(pid) is None


class TestRestarts:
    """What survives whose end."""

    def test_a_killed_daemon_finds_its_ports_again(self, host: DaemonHost) -> None:
        domain = host.domain()
        host.hook(domain, "prepare", "start", "started")
        (before,), nic = host.ports, host.nic
        host.stop(signal.SIGKILL)
        host.start()
        (after,) = host.ports
        assert (after["pid"], after["device"], host.nic) == (before["pid"], before["device"], nic)
        wait_for("the port to serve", lambda: host.ports[0]["state"] == "serving", 5)
        assert host.lent == 1
        host.hook(domain, "stopped", "release")
        assert host.is_clean()
        assert start_time(before["pid"]) is None

    def test_a_daemon_that_is_told_to_end_leaves_its_ports_alone(self, host: DaemonHost) -> None:
        host.hook(host.domain(), "prepare")
        (port,) = host.ports
        assert os.getsid(port["pid"]) == port["pid"]
        assert host.stop() == 0
        assert start_time(port["pid"]) is not None
        assert not host.socket.exists()
        host.start()
        host.ask("quit")
        assert host.daemon is not None
        assert host.daemon.wait(10) == 0
        assert start_time(port["pid"]) is not None

    def test_a_killed_port_comes_back_as_it_was(self, host: DaemonHost, front_end: socket.socket) -> None:
        domain = host.domain()
        host.hook(domain, "prepare", "start", "started")
        (before,) = host.ports
        offered = host.ask("query-status", domain.control)["features_offered"]
        end_process(before["pid"])
        wait_for("another process to serve", lambda: back(host, before["pid"]), 10)
        (after,) = host.ports
        assert (after["device"], after["socket"], after["restarts"]) == (
            before["device"],
            before["socket"],
            1,
        )
        assert f"--features={offered:#x}" in Path(f"/proc/{after['pid']}/cmdline").read_text().split("\0")
        assert domain.socket.stat().st_mode & 0o777 == 0o606
        front_end.connect(str(domain.socket))

    def test_a_port_that_died_while_the_daemon_was_away_comes_back(self, host: DaemonHost) -> None:
        host.hook(host.domain(), "prepare", "start", "started")
        (before,) = host.ports
        host.stop(signal.SIGKILL)
        end_process(before["pid"])
        host.start()
        wait_for("another process to serve", lambda: back(host, before["pid"]), 10)
        assert host.ports[0]["device"] == before["device"]

    def test_a_port_that_dies_after_its_guest_stays_dead(self, host: DaemonHost) -> None:
        domain = host.domain()
        host.hook(domain, "prepare", "start", "started", "stopped")
        end_process(host.ports[0]["pid"])
        wait_for("the end to be noticed", lambda: host.ports[0]["state"] == "idle", 5)
        host.hook(domain, "release")
        assert host.is_clean()

    def test_a_port_that_stops_answering_is_killed_and_comes_back(self, host: DaemonHost) -> None:
        host.hook(host.domain(), "prepare", "start", "started")
        (before,) = host.ports
        os.kill(before["pid"], signal.SIGSTOP)
        wait_for("another process to serve", lambda: back(host, before["pid"]), 30)

    def test_a_killed_nic_comes_back_and_its_ports_with_it(self, host: DaemonHost) -> None:
        host.hook(host.domain(), "prepare", "start", "started")
        (before,), nic = host.ports, host.nic
        end_process(nic)
        wait_for("the NIC to come back", lambda: host.nic != nic, 10)
        wait_for("the port to come back", lambda: back(host, before["pid"]), 20)
        assert host.ask("query-status")["pools"][0]["problem"] == ""


def back(host: DaemonHost, old: int) -> bool:
    """Whether the only port is served by another process than before."""
    (port,) = host.ports
    return bool(port["state"] == "serving" and port["pid"] != old)


class TestControlSocket:
    """QMP, from clients good and bad."""

    def test_only_root_may_use_it(self, host: DaemonHost) -> None:
        assert host.socket.stat().st_mode & 0o777 == 0o600

    def test_commands_need_no_newline_and_answers_come_in_order(self, host: DaemonHost) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(host.socket))
            answers = client.makefile("r")
            assert "QMP" in json.loads(answers.readline())
            client.sendall(b'{"execute":"query-status","id":0}{"execute":"qmp_capabilities","id":1}')
            client.sendall(b'{"execute":"query-commands","id":[2]} {"execute":"no-such"}{"execute":')
            assert json.loads(answers.readline())["error"]["class"] == "CommandNotFound"
            assert json.loads(answers.readline()) == {"return": {}, "id": 1}
            commands = json.loads(answers.readline())
            assert {"name": "hook"} in commands["return"]
            assert commands["id"] == [2]
            assert json.loads(answers.readline())["error"]["class"] == "CommandNotFound"

    @pytest.mark.parametrize(
        "garbage",
        [
            b"garbage\n",
            b"\x00\xff" * 100,
            b"[" * 100_000,
            b'{"a":' * 50_000 + b"}" * 50_000,
            b'{"x": "' + b"a" * 9_000_000,
        ],
        ids=["text", "bytes", "brackets", "nested", "endless"],
    )
    def test_garbage_ends_its_connection_and_nothing_else(self, host: DaemonHost, garbage: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(host.socket))
            try:
                client.sendall(garbage)
                answers = client.makefile("rb").read()
                assert b'"error"' in answers
            except (BrokenPipeError, ConnectionResetError):
                pass
        assert host.answers()

    def test_a_client_that_does_not_read_holds_nobody_up(self, host: DaemonHost) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(host.socket))
            client.sendall(b'{"execute":"qmp_capabilities"}')
            client.settimeout(1)
            with pytest.raises(TimeoutError):
                client.sendall(b'{"execute":"query-commands"}' * 100_000)
            host.hook(host.domain(), "prepare")
            assert host.stop() == 0

    @pytest.mark.parametrize(
        "arguments",
        [{}, {"domain": 1, "operation": "prepare", "xml": ""}, {"domain": "a", "operation": "prepare"}],
    )
    def test_a_hook_command_with_wrong_arguments(
        self, host: DaemonHost, arguments: dict[str, object]
    ) -> None:
        with pytest.raises(ControlError, match=r"hook: argument '\w+' must be a string"):
            host.ask("hook", arguments=arguments)

    def test_events_tell_what_becomes_of_a_port(self, host: DaemonHost) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(host.socket))
            lines = client.makefile("r")
            lines.readline()
            client.sendall(b'{"execute":"qmp_capabilities"}')
            lines.readline()
            host.hook(host.domain(), "prepare")
            states = []
            while "serving" not in states:
                event = json.loads(lines.readline())
                assert event["event"] == "PORT_STATE_CHANGE"
                states.append(event["data"]["state"])
            assert states == ["starting", "serving"]


class TestPrograms:
    """virtvdpad's and virt-vdpa's own mistakes and output."""

    def run(self, name: str, *words: Path | str) -> subprocess.CompletedProcess[str]:
        command = [str(PROGRAMS / name), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=20)

    def test_a_second_daemon_is_refused(self, host: DaemonHost) -> None:
        done = self.run("virtvdpad", f"--config={host.configuration}")
        assert host.daemon is not None
        message = f"another virtvdpad (pid {host.daemon.pid}) serves it; stop that one first"
        assert (done.returncode, done.stderr) == (1, f"virtvdpad: {host.folder}: {message}\n")
        assert host.answers()

    def test_a_configuration_that_cannot_be_read(self, tmp_path: Path) -> None:
        done = self.run("virtvdpad", f"--config={tmp_path}/no.toml")
        assert (done.returncode, done.stderr) == (
            1,
            f"virtvdpad: {tmp_path}/no.toml: No such file or directory\n",
        )

    def test_tables(self, host: DaemonHost) -> None:
        host.hook(host.domain(), "prepare")
        for command, words in (
            ("status", ["default", "ifcvf", "2", "1"]),
            ("ports", ["vdpa-demo", MAC, "serving"]),
            ("devices", ["vf0.sock", "lent", "vf1.sock", "free"]),
        ):
            done = self.run("virt-vdpa", f"--socket={host.socket}", command)
            assert (done.returncode, done.stderr) == (0, "")
            assert all(word in done.stdout for word in words)
            as_json = self.run("virt-vdpa", f"--socket={host.socket}", command, "--json")
            assert isinstance(json.loads(as_json.stdout), dict)

    def test_no_daemon_to_ask(self, idle: DaemonHost) -> None:
        done = self.run("virt-vdpa", f"--socket={idle.socket}", "ports")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("virt-vdpa: virtvdpad does not answer: ")
        assert done.stderr.count("\n") == 1

    def test_xml_check_names_the_line(self, tmp_path: Path) -> None:
        file = tmp_path / "d.xml"
        text = (xml_folder() / "vdpa-demo.xml").read_text()
        file.write_text(text)
        assert self.run("virt-vdpa", "xml", "check", file).returncode == 0
        file.write_text(text.replace("mode='shared'", "mode='private'"))
        done = self.run("virt-vdpa", "xml", "check", file)
        line = text[: text.index("<access")].count("\n") + 1
        assert done.returncode == 1
        assert done.stdout.startswith(f"{file}:{line}: guest memory is not shared")
