"""Several queues, from the domain's XML to the VF: the guest uses as many as it likes, and thinks anew."""

from collections.abc import Iterator

import pytest
from lxml import etree

from tests.harness.console import Console
from tests.harness.domain_xml import DomainXml
from tests.harness.guest_traffic import Traffic
from tests.harness.processes import wait_for
from tests.harness.vdpa_host import CONFIGURATION, GUEST_ADDRESS, HOST_ADDRESS, VdpaHost

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]

PAIRS = 4
#: Connections that are tried, to a port each where nobody listens: as many flows, each way.
FLOWS = 16
FIRST_PORT = 9000


@pytest.fixture(scope="module")
def host() -> Iterator[VdpaHost]:
    """A host whose VFs have several queue pairs."""
    with VdpaHost("queues", configuration=f"{CONFIGURATION}queue-pairs = {PAIRS}\n") as made:
        made.set_address()
        yield made


def running(host: VdpaHost, domain: DomainXml) -> dict[int, int]:
    """The rings that the VF runs, each with its used index."""
    rings = host.ask_port(domain, "query-status")["rings"]
    return {ring["index"]: ring["used"] for ring in rings if ring["running"]}


def use(host: VdpaHost, domain: DomainXml, console: Console, pairs: int) -> None:
    """Have the guest use so many pairs, and wait until the VF receives on those."""
    console.run(f"channels eth0 {pairs}")
    assert console.run("channels eth0").strip() == f"{pairs} of {PAIRS}"

    def receiving() -> int:
        return sum(index % 2 == 0 for index in running(host, domain))

    wait_for(f"{pairs} pairs to receive", lambda: receiving() == pairs, 5)


def moved(host: VdpaHost, domain: DomainXml, console: Console) -> set[int]:
    """The rings on which many flows move packets."""
    before = running(host, domain)
    peer = HOST_ADDRESS.partition("/")[0]
    ports = f"$(seq {FIRST_PORT} {FIRST_PORT + FLOWS - 1})"
    console.run(f"for port in {ports}; do nc {peer} $port </dev/null 2>/dev/null; done; true", seconds=60)
    after = running(host, domain)
    return {index for index, used in after.items() if used != before[index]}


def test_guest_changes_the_number_of_its_queues(host: VdpaHost, domain: DomainXml) -> None:
    etree.SubElement(domain.interface, "driver", queues=str(PAIRS))
    host.start_guest(domain)
    assert "NET_F_MQ" in host.port(domain)["features"]
    with host.console(domain) as console, Traffic(host, GUEST_ADDRESS) as traffic:
        for pairs in (PAIRS, 1):
            use(host, domain, console, pairs)
            rings = moved(host, domain, console)
            receive, transmit = {n for n in rings if n % 2 == 0}, {n for n in rings if n % 2}
            assert min(len(receive), len(transmit)) >= min(pairs, 2)
            traffic.wait_until_flowing()
        assert traffic.stop().damage() == []


def test_more_than_the_vf_has_are_refused(host: VdpaHost, domain: DomainXml) -> None:
    etree.SubElement(domain.interface, "driver", queues=str(PAIRS + 1))
    host.define(domain)
    refused = host.virsh("start", domain.name, check=False).stderr
    assert f"<driver queues='{PAIRS + 1}'>: the VF has {PAIRS} queue pairs; lower queues" in refused
