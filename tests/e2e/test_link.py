"""A guest sees whether its VF has a link, whoever else has a say in it."""

from collections.abc import Iterator

import pytest
from lxml import etree

from tests.harness.console import Console
from tests.harness.domain_xml import DomainXml
from tests.harness.guest import guest_image
from tests.harness.processes import wait_for
from tests.harness.vdpa_host import GUEST_ADDRESS, VdpaHost

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]


@pytest.fixture(scope="module")
def guest(host: VdpaHost) -> Iterator[DomainXml]:
    """One guest for all tests of this module: each leaves its link up."""
    made = DomainXml.example().boot(guest_image(), GUEST_ADDRESS)
    host.start_guest(made)
    yield made
    host.remove(made)


@pytest.fixture
def console(host: VdpaHost, guest: DomainXml) -> Iterator[Console]:
    with host.console(guest) as opened:
        yield opened
        host.ask_nic("vf-start", vf=0)
        wait_carrier(opened, up=True)


def carrier(console: Console) -> bool:
    """Whether the guest sees a link."""
    return console.run("cat /sys/class/net/eth0/carrier").strip() == "1"


def wait_carrier(console: Console, *, up: bool, seconds: float = 10.0) -> None:
    wait_for(f"the guest to see {'a' if up else 'no'} link", lambda: carrier(console) == up, seconds)


def test_guest_sees_the_link_of_its_vf(host: VdpaHost, guest: DomainXml, console: Console) -> None:
    assert carrier(console)
    host.ask_nic("vf-stop", vf=0)
    wait_carrier(console, up=False)
    assert host.port(guest)["link"] == "down"
    host.ask_nic("vf-start", vf=0)
    wait_carrier(console, up=True)
    assert host.port(guest)["link"] == "up"
    host.wait_for_ping()


def test_link_comes_back_while_the_daemon_is_away(host: VdpaHost, guest: DomainXml, console: Console) -> None:
    host.ask_nic("vf-stop", vf=0)
    wait_carrier(console, up=False)
    host.daemon.stop()
    host.ask_nic("vf-start", vf=0)
    host.start_daemon()
    wait_carrier(console, up=True)
    host.wait_for_ping()


@pytest.mark.full
def test_link_is_down_while_the_port_is_restarted(host: VdpaHost, guest: DomainXml, console: Console) -> None:
    """QEMU plugs the link in when its back-end comes back."""
    host.ask_nic("vf-stop", vf=0)
    wait_carrier(console, up=False)
    host.kill(host.port(guest)["pid"])
    wait_for("QEMU to be back", lambda: host.port(guest)["restarts"] and host.port(guest)["front_end"], 10)
    wait_carrier(console, up=False)
    host.ask_nic("vf-start", vf=0)
    wait_carrier(console, up=True)
    host.wait_for_ping()


@pytest.mark.full
@pytest.mark.parametrize("own", [True, False], ids=["own monitor", "libvirt's"])
def test_whose_monitor_tells_qemu(host: VdpaHost, guest: DomainXml, own: bool) -> None:
    other = DomainXml(str(guest)).rename(3 + own)
    if own:
        other.with_monitor(f"/var/lib/libvirt/qemu/{other.name}.monitor")
    host.define(other)
    try:
        host.virsh("start", other.name)
        if own:
            told = f"domain {other.uuid}: its QEMU is followed"
            wait_for("the daemon to be there", lambda: told in host.daemon.log.read_text(), 10)
        device = int(host.port(other)["device"].removesuffix(".sock")[-1])
        with host.console(other) as console:
            for command, up in (("vf-stop", False), ("vf-start", True)):
                host.ask_nic(command, vf=device)
                wait_carrier(console, up=up)
        log = host.path(f"/var/log/libvirt/qemu/{other.name}.log").read_text()
        assert ("tainted: custom-monitor" in log) == (not own)
    finally:
        host.remove(other)


@pytest.mark.full
def test_what_the_operator_has_taken_down_stays_down(host: VdpaHost, guest: DomainXml) -> None:
    """QEMU by itself would plug it in when its port comes back."""
    other = DomainXml(str(guest)).rename(2)
    etree.SubElement(other.interface, "link", state="down")
    host.define(other)
    try:
        host.virsh("start", other.name)
        with host.console(other) as console:
            assert not carrier(console)
            before = host.port(other)["pid"]
            host.kill(before)
            told = f"{other.name}/{other.mac}: its guest's link is down"
            wait_for("QEMU to be told", lambda: told in host.daemon.log.read_text(), 10)
            assert host.port(other)["pid"] != before
            wait_carrier(console, up=False)
    finally:
        host.remove(other)
