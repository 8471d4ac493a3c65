"""A guest on a VF that is driven as any virtio-net function is: without ring state, so that its rings are
shadowed whenever they do not begin at 0."""

import time
from collections.abc import Iterator

import pytest

from tests.harness.announcements import Announcements
from tests.harness.domain_xml import DomainXml
from tests.harness.guest import guest_image
from tests.harness.processes import wait_for
from tests.harness.vdpa_host import CONFIGURATION, GUEST_ADDRESS, VdpaHost

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]


@pytest.fixture(scope="module")
def host() -> Iterator[VdpaHost]:
    configuration = CONFIGURATION.replace('driver = "ifcvf"', 'driver = "virtio"')
    with VdpaHost("virtio", configuration=configuration) as made:
        made.set_address()
        yield made


@pytest.fixture(scope="module")
def guest(host: VdpaHost) -> Iterator[DomainXml]:
    """One guest for all tests of this module, in the order of its life."""
    made = DomainXml.example().boot(guest_image(), GUEST_ADDRESS)
    made.request.set("driver", "virtio")
    host.start_guest(made)
    yield made
    host.remove(made)


def shadowed(host: VdpaHost, guest: DomainXml) -> bool:
    answer: bool = host.ask_port(guest, "query-status")["shadowed"]
    return answer


def test_a_guest_that_boots_has_its_own_rings(host: VdpaHost, guest: DomainXml) -> None:
    assert host.port(guest)["device"].startswith("virtio,vfio-user=/")
    assert not shadowed(host, guest)
    assert host.ping(count=5) == (5, 5)


def test_a_guest_announces_itself(host: VdpaHost, guest: DomainXml) -> None:
    """As after a migration: the front-end asks it to, and the guest says by the control queue that it has."""
    assert "NET_F_GUEST_ANNOUNCE" in host.port(guest)["features"]
    with Announcements(host, "vdpa0") as announcements:
        for _ in range(2):  # only who has heard of the first is asked again
            begun = time.time()
            host.virsh("qemu-monitor-command", guest.name, "--hmp", "announce_self")
            announcements.wait_for(guest.mac, since=begun, kind="arp")
        assert not announcements.of(guest.mac, kind="rarp"), "the front-end had no need to"


def test_a_paused_guest_goes_on_through_the_relay(host: VdpaHost, guest: DomainXml) -> None:
    host.virsh("suspend", guest.name)
    host.virsh("resume", guest.name)
    host.wait_for_ping()
    assert host.ping(count=10) == (10, 10)
    assert shadowed(host, guest)


def test_a_port_that_died_is_followed_by_one_that_goes_on(host: VdpaHost, guest: DomainXml) -> None:
    before = host.port(guest)["pid"]
    host.kill(before)
    wait_for("another port process", lambda: host.port(guest)["pid"] not in (None, before), 5)
    host.wait_for_ping(seconds=10)
    assert shadowed(host, guest)


def test_a_reset_of_the_guest_ends_it(host: VdpaHost, guest: DomainXml) -> None:
    with host.console(guest) as console:
        console.send("reboot -f\n")
    wait_for("the guest to go down", lambda: host.ping()[1] == 0, 10)
    host.wait_for_ping()
    assert not shadowed(host, guest)
