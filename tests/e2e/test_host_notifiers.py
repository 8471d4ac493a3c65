"""Host notifiers, from the domain's XML to the VF: a guest that writes to its VF's own doorbells, and those
that do not."""

import time
from collections.abc import Iterator

import pytest
from lxml import etree

from datapath.vhost_user.host_notifiers import REST
from tests.harness.domain_xml import DomainXml
from tests.harness.processes import wait_for
from tests.harness.vdpa_host import CONFIGURATION, HOST_ADDRESS, VdpaHost

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]

#: The pool of the domain has pages, the other one has none.
POOLS = f"""{CONFIGURATION}doorbell = "mapped"
[pool.plain]
driver = "ifcvf"
emulated = 1
tap = "plain%d"
"""
PINGS = 5
#: Seconds until a VF that runs is given to its guest, and more.
GIVEN = 30


@pytest.fixture(scope="module")
def host() -> Iterator[VdpaHost]:
    with VdpaHost("notifiers", configuration=POOLS) as made:
        made.set_address()
        yield made


def given(host: VdpaHost, domain: DomainXml) -> list[bool]:
    """Of each ring, whether its doorbell is the guest's."""
    return [ring["host_notifier"] for ring in host.ask_port(domain, "query-status")["rings"]]


def change_tap(host: VdpaHost, before: str, after: str) -> None:
    """Have the host's end of the network at another TAP."""
    host.run(["ip", "address", "del", HOST_ADDRESS, "dev", before])
    host.set_address(after)


def relayed(host: VdpaHost, domain: DomainXml) -> int:
    """How many kicks pass the relay while the guest answers pings, for which it kicks."""

    def kicks() -> int:
        numbers = host.ask_port(domain, "query-stats")
        return sum(number for name, number in numbers.items() if name.startswith("kicks."))

    before = kicks()
    assert host.ping(count=PINGS) == (PINGS, PINGS)
    return kicks() - before


def test_kicks_pass_no_process(host: VdpaHost, domain: DomainXml) -> None:
    etree.SubElement(domain.interface, "driver", page_per_vq="on")
    host.start_guest(domain)
    wait_for("the doorbells to be the guest's", lambda: given(host, domain) == [True, True], GIVEN)
    assert relayed(host, domain) == 0


@pytest.mark.full
@pytest.mark.parametrize("lacking", ["page_per_vq", "doorbell"])
def test_kicks_pass_the_relay(host: VdpaHost, domain: DomainXml, lacking: str) -> None:
    if lacking == "doorbell":
        etree.SubElement(domain.interface, "driver", page_per_vq="on")
        domain.request.set("pool", "plain")
        change_tap(host, "vdpa0", "plain0")
    try:
        host.start_guest(domain)
        assert relayed(host, domain) > 0
        # A page would be given when the rings have run for REST, which they do since that ping at the latest.
        looked_for = time.monotonic() + 2.5 * REST
        while time.monotonic() < looked_for:
            assert host.ping(count=PINGS) == (PINGS, PINGS)
            assert given(host, domain) == [False, False]
        assert relayed(host, domain) > 0
    finally:
        if lacking == "doorbell":
            change_tap(host, "plain0", "vdpa0")
