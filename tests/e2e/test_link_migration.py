"""A guest whose VF has no link migrates: where it arrives, it sees the link of the VF there."""

from collections.abc import Iterator

import pytest

from tests.harness.domain_xml import DomainXml
from tests.harness.guest import guest_image
from tests.harness.processes import wait_for
from tests.harness.two_hosts import BridgedHost, TwoHosts
from tests.harness.vdpa_host import GUEST_ADDRESS

pytestmark = [pytest.mark.libvirt, pytest.mark.guest, pytest.mark.full]


@pytest.fixture
def domain(hosts: TwoHosts) -> Iterator[DomainXml]:
    made = DomainXml.example().boot(guest_image(), GUEST_ADDRESS)
    yield made
    hosts.remove(made)
    for host in hosts.both:
        host.ask_nic("vf-start", vf=0)


def carrier(host: BridgedHost, domain: DomainXml) -> str:
    with host.console(domain) as console:
        return console.run("cat /sys/class/net/eth0/carrier").strip()


def wait_carrier(host: BridgedHost, domain: DomainXml, wanted: str) -> None:
    wait_for(f"carrier {wanted}", lambda: carrier(host, domain) == wanted, 20)


def test_from_no_link_to_a_link(hosts: TwoHosts, domain: DomainXml) -> None:
    hosts.a.start_guest(domain)
    hosts.a.ask_nic("vf-stop", vf=0)
    wait_carrier(hosts.a, domain, "0")
    hosts.migrate(domain, to=hosts.b)
    wait_carrier(hosts.b, domain, "1")
    hosts.a.wait_for_ping()


@pytest.mark.parametrize("had", ["link", "no link"])
def test_to_no_link(hosts: TwoHosts, domain: DomainXml, had: str) -> None:
    hosts.a.start_guest(domain)
    hosts.b.ask_nic("vf-stop", vf=0)
    if had == "no link":
        hosts.a.ask_nic("vf-stop", vf=0)
        wait_carrier(hosts.a, domain, "0")
    hosts.migrate(domain, to=hosts.b)
    told = f"{domain.mac}: its guest's link is down"
    wait_for("QEMU to be told", lambda: told in hosts.b.daemon.log.read_text(), 20)
    wait_carrier(hosts.b, domain, "0")
    hosts.b.ask_nic("vf-start", vf=0)
    wait_carrier(hosts.b, domain, "1")
    hosts.a.wait_for_ping()
