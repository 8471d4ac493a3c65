"""Several queues, from the domain's XML to the VF: the guest uses as many as it likes, and thinks anew."""

from collections.abc import Iterator

import pytest
from lxml import etree

from tests.harness.domain_xml import DomainXml
from tests.harness.guest_queues import rings_of_many_flows, use_pairs
from tests.harness.guest_traffic import Traffic
from tests.harness.vdpa_host import CONFIGURATION, GUEST_ADDRESS, VdpaHost

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]

PAIRS = 4


@pytest.fixture(scope="module")
def host() -> Iterator[VdpaHost]:
    """A host whose VFs have several queue pairs."""
    with VdpaHost("queues", configuration=f"{CONFIGURATION}queue-pairs = {PAIRS}\n") as made:
        made.set_address()
        yield made


def test_guest_changes_the_number_of_its_queues(host: VdpaHost, domain: DomainXml) -> None:
    etree.SubElement(domain.interface, "driver", queues=str(PAIRS))
    host.start_guest(domain)
    assert "NET_F_MQ" in host.port(domain)["features"]
    with host.console(domain) as console, Traffic(host, GUEST_ADDRESS) as traffic:
        for pairs in (PAIRS, 1):
            use_pairs(host, domain, console, pairs, PAIRS)
            rings = rings_of_many_flows(host, domain, console)
            receive, transmit = {n for n in rings if n % 2 == 0}, {n for n in rings if n % 2}
            assert min(len(receive), len(transmit)) >= min(pairs, 2)
            traffic.wait_until_flowing()
        assert traffic.stop().damage() == []


def test_more_than_the_vf_has_are_refused(host: VdpaHost, domain: DomainXml) -> None:
    etree.SubElement(domain.interface, "driver", queues=str(PAIRS + 1))
    host.define(domain)
    refused = host.virsh("start", domain.name, check=False).stderr
    assert f"<driver queues='{PAIRS + 1}'>: the VF has {PAIRS} queue pairs; lower queues" in refused
