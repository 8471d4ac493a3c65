"""A running guest keeps its network, or has it back within seconds, whatever is restarted around it."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.domain_xml import DomainXml
from tests.harness.guest import guest_image
from tests.harness.processes import wait_for
from tests.harness.vdpa_host import GUEST_ADDRESS, VdpaHost

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]

#: Seconds in which traffic must be back after a port was killed: QEMU reconnects once a second, and
#: the guest's link comes up after that.
BACK = 10.0


@pytest.fixture(scope="module")
def running(host: VdpaHost) -> Iterator[DomainXml]:
    """One guest for all tests of this module: each leaves it as it found it."""
    made = DomainXml.example().boot(guest_image(), GUEST_ADDRESS)
    host.start_guest(made)
    yield made
    host.remove(made)


@pytest.fixture
def guest(host: VdpaHost, running: DomainXml) -> DomainXml:
    """The guest, seen to be well before the test."""
    assert host.ping(count=3) == (3, 3)
    return running


def test_guest_reboots(host: VdpaHost, guest: DomainXml) -> None:
    port = host.port(guest)
    with host.console(guest) as console:
        console.run("touch /before")
        console.send("reboot -f\n")
    wait_for("the guest to go down", lambda: host.ping()[1] == 0, 10)
    host.wait_for_ping()
    with host.console(guest) as console:
        console.run("[ ! -e /before ]")
    assert host.port(guest)["pid"] == port["pid"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_daemon_is_restarted(host: VdpaHost, guest: DomainXml, how: signal.Signals) -> None:
    port = host.port(guest)
    host.daemon.signal(how)
    host.daemon.popen.wait(10)
    assert host.ping(count=5) == (5, 5)
    host.start_daemon()
    adopted = host.port(guest)
    assert (adopted["pid"], adopted["state"], adopted["restarts"]) == (port["pid"], "serving", 0)
    assert host.lent() == [port["device"]]
    assert host.ping(count=5) == (5, 5)


def test_port_is_killed(host: VdpaHost, guest: DomainXml) -> None:
    before = host.port(guest)
    host.kill(before["pid"])
    wait_for("another port process", lambda: host.port(guest)["pid"] not in (None, before["pid"]), 5)
    host.wait_for_ping(seconds=BACK)
    after = host.port(guest)
    assert after["restarts"] == before["restarts"] + 1
    assert (after["device"], after["features"]) == (before["device"], before["features"])


def test_port_is_killed_while_the_daemon_is_away(host: VdpaHost, guest: DomainXml) -> None:
    before = host.port(guest)
    host.daemon.stop()
    host.kill(before["pid"])
    host.start_daemon()
    host.wait_for_ping(seconds=BACK)
    assert host.port(guest)["device"] == before["device"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_libvirtd_is_restarted(host: VdpaHost, guest: DomainXml, how: signal.Signals) -> None:
    port = host.port(guest)
    host.libvirtd.signal(how)
    host.libvirtd.popen.wait(10)
    assert host.ping(count=3) == (3, 3)
    host.start_libvirtd()
    assert host.state(guest.name) == "running"
    assert host.port(guest)["pid"] == port["pid"]
    assert host.ping(count=3) == (3, 3)


def test_libvirtd_is_restarted_while_the_daemon_is_away(host: VdpaHost, guest: DomainXml) -> None:
    # libvirt kills a guest whose `reconnect` hook fails.
    host.daemon.stop()
    host.libvirtd.stop()
    host.start_libvirtd()
    assert host.state(guest.name) == "running"
    host.start_daemon()
    assert host.ping(count=3) == (3, 3)


def test_vf_is_stopped_and_started(host: VdpaHost, guest: DomainXml) -> None:
    host.ask_nic("vf-stop", vf=0)
    assert host.ping()[1] == 0
    host.ask_nic("vf-start", vf=0)
    host.wait_for_ping(seconds=BACK)
    assert host.state(guest.name) == "running"


def test_nic_is_killed(host: VdpaHost, guest: DomainXml) -> None:
    (nic,) = host.running("virt-vdpa-nic")
    host.kill(nic.inner_pid)
    # Its TAPs have gone with it; the daemon starts another, with new ones.
    wait_for("another NIC", lambda: [found for found in host.running("virt-vdpa-nic") if found != nic], 10)
    wait_for("its TAP", lambda: host.run(["ip", "link", "show", "vdpa0"], check=False).returncode == 0, 10)
    host.set_address()
    host.wait_for_ping(seconds=BACK)
    assert host.state(guest.name) == "running"


@pytest.mark.full
def test_port_hangs(host: VdpaHost, guest: DomainXml) -> None:
    # A port that does not answer would block QEMU at its next message: the daemon kills it.
    before = host.port(guest)
    host.kill(before["pid"], signal.SIGSTOP)
    wait_for("another port process", lambda: host.port(guest)["pid"] not in (None, before["pid"]), 30)
    host.wait_for_ping(seconds=BACK)


@pytest.mark.full
def test_ports_come_and_go_without_a_trace(host: VdpaHost, guest: DomainXml) -> None:
    def held() -> int:
        return len(list(Path(f"/proc/{host.daemon.pid}/fd").iterdir()))

    host.kill(host.port(guest)["pid"])
    host.wait_for_ping(seconds=BACK)
    before = held()
    for _ in range(10):
        host.kill(host.port(guest)["pid"])
        host.wait_for_ping(seconds=BACK)
    assert held() <= before
