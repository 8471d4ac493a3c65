"""A guest moves between hosts whose VFs are of other kinds: a ConnectX on one, an IFCVF on the other.

It may as far as the features go that it has negotiated: an IFCVF has all of a ConnectX', which has not all of
an IFCVF's. The domain asks for whichever driver its pool has.
"""

from collections.abc import Iterator

import pytest

from tests.harness.announcements import Announcements
from tests.harness.domain_xml import DomainXml
from tests.harness.guest import guest_image
from tests.harness.guest_traffic import Traffic
from tests.harness.processes import wait_for
from tests.harness.two_hosts import BRIDGED, TwoHosts
from tests.harness.vdpa_host import GUEST_ADDRESS

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]


#: QEMU's properties of a virtio-net device for features of an emulated IFCVF.
NOT_OF_A_CONNECTX = (
    "mrg_rxbuf",
    "indirect_desc",
    "event_idx",
    "guest_tso4",
    "guest_tso6",
    "guest_ecn",
    "host_ecn",
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    """The pool 'default' has ConnectX on host a, and IFCVF on host b."""
    made = TwoHosts()
    made.a.configuration.write_text(BRIDGED.replace('driver = "ifcvf"', 'driver = "mlx5"'))
    with made:
        yield made


@pytest.fixture
def domain(hosts: TwoHosts) -> Iterator[DomainXml]:
    made = DomainXml.example().boot(guest_image(), GUEST_ADDRESS)
    made.use_pool(0, "any", "default")
    yield made
    hosts.remove(made)


def drivers(hosts: TwoHosts) -> list[str]:
    """Of the VFs that are lent, on host a and on host b."""
    return [device.partition(",")[0] for host in hosts.both for device in host.lent()]


def test_from_a_connectx_to_an_ifcvf_and_back(hosts: TwoHosts, domain: DomainXml) -> None:
    hosts.a.start_guest(domain)
    assert drivers(hosts) == ["mlx5"]
    with Traffic(hosts.a, GUEST_ADDRESS) as traffic, Announcements(hosts.a) as announcements:
        for destination, driver in ((hosts.b, "ifcvf"), (hosts.a, "mlx5")):
            hosts.migrate(domain, to=destination)
            assert drivers(hosts) == [driver]
            (port,) = hosts.figures(domain, to=destination).ports
            assert port.mode == "hardware"
            assert port.pages > 0
            announcements.wait_for(domain.mac, since=port.start_begun, kind="arp")  # the guest's own
            traffic.wait_until_flowing()
        summary = traffic.stop()
    assert summary.damage() == []
    assert summary.from_guest.lost == ()


@pytest.mark.full
def test_from_an_ifcvf_to_a_connectx_and_back(hosts: TwoHosts, domain: DomainXml) -> None:
    """A guest whose NIC was started with no more than a ConnectX has."""
    for name in NOT_OF_A_CONNECTX:
        domain.override(name, "bool", "false")
    hosts.b.start_guest(domain)
    wait_for("the domain to say what its guest uses", lambda: hosts.b.guest_state(domain), 10)
    with Traffic(hosts.b, GUEST_ADDRESS) as traffic:
        for destination, driver in ((hosts.a, "mlx5"), (hosts.b, "ifcvf")):
            hosts.migrate(domain, to=destination)
            assert drivers(hosts) == [driver]
            traffic.wait_until_flowing()
        summary = traffic.stop()
    assert summary.damage() == []


@pytest.mark.full  # as with any feature, which tests/e2e/test_migration.py shows by default
def test_a_guest_that_uses_more_than_a_connectx_has_stays(hosts: TwoHosts, domain: DomainXml) -> None:
    hosts.b.start_guest(domain)
    wait_for("the domain to say what its guest uses", lambda: hosts.b.guest_state(domain), 10)
    said = hosts.begin_migration(domain, to=hosts.a).fail()
    assert "VF 'mlx5,ibdev=emulated_default_0" in said
    assert "lacks NET_F_GUEST_TSO4, " in said
    assert "which the guest has negotiated; choose a host or pool whose VFs fit" in said
    assert hosts.home(domain) is hosts.b
    assert drivers(hosts) == ["ifcvf"]
    hosts.b.wait_for_ping()
