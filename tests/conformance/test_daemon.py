"""virtvdpad with real ports and a real emulated NIC, driven by the hook as libvirt would call it.

Other clients of the daemon are test_daemon_clients.py's; libvirt itself and guests are tests/e2e's.
"""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from libvirt_vdpa.process import start_time
from tests.harness.daemon_host import HOOK, DaemonHost, end_process
from tests.harness.processes import wait_for

MAC = "52:54:00:76:64:01"


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

    def test_a_domain_with_a_long_name(self, host: DaemonHost) -> None:
        domain = host.domain().edited("<name>vdpa-demo</name>", f"<name>{240 * 'x'}</name>")
        host.hook(domain, "prepare", "start", "started")
        host.stop(signal.SIGKILL)
        host.start()
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
            ("driver='ifcvf'", "driver='mlx5'", "driver='mlx5': pool 'default' has 'ifcvf' VFs"),
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

    def test_without_a_daemon(self, idle: DaemonHost) -> None:
        domain = idle.domain("vdpa-server.xml")
        message = f"of domain 'domain-1': virtvdpad is not running ({idle.socket}: No such file or directory)"
        for operation in ("prepare", "start", "started", "migrate", "restore"):
            assert idle.veto(domain, operation) == f"{operation} {message}; start it and try again"
        for operation in ("stopped", "release", "reconnect"):
            assert message in idle.hook(domain, operation)
        assert idle.hook(domain, "no-such-operation") == ""

    def test_client_mode_needs_no_daemon_after_prepare(self, idle: DaemonHost) -> None:
        assert idle.hook(idle.domain(), "start", "started") == ""

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
        # The port's own limit passes a little sooner than the operation's, unless the machine is busy.
        reason = idle.veto(idle.domain(), "prepare")
        assert re.search(r"not ready within 0\.7 s|prepare took longer than 0\.8 s", reason)
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

    @pytest.mark.parametrize("noticed", [True, False])
    def test_a_dead_port_whose_guest_has_left_is_given_back(self, host: DaemonHost, noticed: bool) -> None:
        # Its release may have come while there was no daemon.
        host.hook(host.domain(), "prepare", "start", "started", "stopped")
        pid = host.ports[0]["pid"]
        if noticed:
            end_process(pid)
            wait_for("the end to be noticed", lambda: host.ports[0]["state"] == "idle", 5)
            host.stop(signal.SIGKILL)
        else:
            host.stop(signal.SIGKILL)
            end_process(pid)
        host.start()
        assert host.is_clean()

    def test_a_port_survives_between_prepare_and_start(
        self, host: DaemonHost, front_end: socket.socket
    ) -> None:
        domain = host.domain("vdpa-server.xml")
        host.hook(domain, "prepare")
        host.stop(signal.SIGKILL)
        host.start()
        assert (host.ports[0]["state"], host.lent) == ("idle", 1)
        host.hook(domain, "start")
        front_end.bind(str(domain.socket))
        front_end.listen()
        front_end.settimeout(10)
        with front_end.accept()[0]:
            host.hook(domain, "started")

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


class TestHostileQemu:
    """In server mode QEMU may write to the folder of its sockets. Nobody trusts what is found there."""

    def test_what_it_leaves_there_changes_nothing(self, host: DaemonHost, front_end: socket.socket) -> None:
        domain = host.domain("vdpa-server.xml")
        host.hook(domain, "prepare")
        assert domain.private.stat().st_mode & 0o7777 == 0o700
        assert list(domain.folder.iterdir()) == []
        victim = host.folder / "victim"
        victim.write_text("precious")
        (domain.folder / f".{domain.record.name}.new").symlink_to(victim)
        pipe = domain.folder / "x.json"
        os.mkfifo(pipe)
        host.hook(domain, "start")
        host.stop(signal.SIGKILL)
        host.start()
        assert victim.read_text() == "precious"
        domain.socket.mkdir()
        host.hook(domain, "stopped", "release")
        assert not host.ports
        assert not host.lent
