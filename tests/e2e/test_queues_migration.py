"""A guest with several queues moves to another host: those that it uses carry packets there, no others do."""

from collections.abc import Iterator

import pytest
from lxml import etree

from tests.harness.console import Console
from tests.harness.domain_xml import DomainXml
from tests.harness.guest import guest_image
from tests.harness.guest_queues import receiving, rings_of_many_flows, rings_of_one_flow, use_pairs
from tests.harness.guest_traffic import Traffic
from tests.harness.processes import wait_for
from tests.harness.two_hosts import BRIDGED, BridgedHost, TwoHosts
from tests.harness.vdpa_host import GUEST_ADDRESS

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]

#: What the NIC has, and what the guest uses at first.
PAIRS, USED = 4, 3
#: Flows that are looked at. A ring that moves less than this share of one's packets moves others: those of
#: its connection for control, ARP.
FLOWS, SHARE = 3, 0.25


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    """Hosts whose VFs have several queue pairs."""
    with TwoHosts(configuration=f"{BRIDGED}queue-pairs = {PAIRS}\n") as made:
        yield made


@pytest.fixture
def domain(hosts: TwoHosts) -> Iterator[DomainXml]:
    made = DomainXml.example().boot(guest_image(), GUEST_ADDRESS)
    etree.SubElement(made.interface, "driver", queues=str(PAIRS))
    yield made
    hosts.remove(made)


def assert_pairs_carry(host: BridgedHost, domain: DomainXml, console: Console, pairs: int) -> None:
    """The VF receives on so many pairs, and flows move packets on all of them, both ways."""
    assert receiving(host, domain) == pairs
    seen: set[int] = set()

    def all_carry() -> bool:
        seen.update(rings_of_many_flows(host, domain, console))
        return seen == set(range(2 * pairs))

    # Flows fall on rings by chance.
    wait_for(f"all of {pairs} pairs to carry packets", all_carry, 60)


def assert_steered(hosts: TwoHosts, host: BridgedHost, domain: DomainXml) -> None:
    """A flow comes to the guest on the pair on which it goes out."""
    for _ in range(FLOWS):
        echoes, used = rings_of_one_flow(hosts.a, host, domain)
        busy = {index for index, count in used.items() if count > SHARE * echoes}
        pair = min(busy) // 2
        assert busy == {2 * pair, 2 * pair + 1}, f"{echoes} echoes: {used}"


@pytest.mark.parametrize("mode", ["hardware", pytest.param("software", marks=pytest.mark.full)])
def test_queues_move_along(hosts: TwoHosts, domain: DomainXml, mode: str) -> None:
    hosts.a.start_guest(domain.migrating(mode))
    with hosts.a.console(domain) as console:
        use_pairs(hosts.a, domain, console, USED, PAIRS)
    with Traffic(hosts.a, GUEST_ADDRESS) as traffic:
        hosts.migrate(domain, to=hosts.b)
        assert [port.mode for port in hosts.figures(domain, to=hosts.b).ports] == [mode]
        traffic.wait_until_flowing()
        assert traffic.stop().damage() == []
    with hosts.b.console(domain) as console:
        assert_pairs_carry(hosts.b, domain, console, USED)
        assert_steered(hosts, hosts.b, domain)
        use_pairs(hosts.b, domain, console, PAIRS, PAIRS)
        assert_pairs_carry(hosts.b, domain, console, PAIRS)
