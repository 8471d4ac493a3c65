"""A guest moves to another host and back with its vDPA NIC, and nothing that was sent is lost on the way.

What must not happen to traffic is in guest_traffic.py; when a datagram to the guest may be lost is
in `blackout`.
"""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.harness.announcements import Announcements
from tests.harness.domain_xml import STATE, DomainXml
from tests.harness.guest import guest_image
from tests.harness.guest_traffic import Summary, Traffic
from tests.harness.processes import wait_for
from tests.harness.two_hosts import LONGEST_BLACKOUT, BridgedHost, PortFigures, TwoHosts, job_info
from tests.harness.vdpa_host import GUEST_ADDRESS

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]

#: Where the second NIC's traffic goes.
SECOND_NETWORK = {"guest": "10.78.0.2/24", "a": "10.78.0.1/24"}
SECOND_PORT = 7001
#: Another guest's address.
OTHER_ADDRESS = "10.76.0.4/24"
#: The features that a guest uses, in what the daemon writes down of it, and one that no emulated VF has
#: (virtio 1.3, 5.1.3).
STATE_FORM = re.compile(r"""negotiated=["'](0x[0-9a-f]+)["']""")
HOST_USO = 56


@pytest.fixture
def domain(hosts: TwoHosts) -> Iterator[DomainXml]:
    """The example domain, ready to be edited and started; gone from both hosts after the test."""
    made = DomainXml.example().boot(guest_image(), GUEST_ADDRESS)
    yield made
    hosts.remove(made)
    for host in hosts.both:
        assert_free(host)


def assert_free(host: BridgedHost) -> None:
    """Nothing of a guest is left on a host."""
    assert host.lent() == []
    assert not host.running("virt-vdpa-port", "qemu-system-x86_64")


def assert_moved(hosts: TwoHosts, domain: DomainXml, to: BridgedHost, nics: int = 1) -> None:
    """The guest is on one host, wholly."""
    assert hosts.home(domain) is to
    assert [port["state"] for port in to.ports_of(domain)] == ["serving"] * nics
    assert len(to.lent()) == nics
    assert_free(hosts.other(to))


def assert_sound(summary: Summary, blackouts: list[tuple[float, float]]) -> None:
    """Nothing was lost but datagrams to the guest while its NIC ran nowhere."""
    assert summary.damage() == []
    assert summary.from_guest.lost == ()
    assert summary.to_guest.lost_outside(blackouts) == [], f"blackouts: {blackouts}"


def blackout(ports: list[PortFigures], announcements: Announcements) -> tuple[float, float]:
    """
    When the guest could not be reached in a migration: from the first stop of a port at the source
    to when the bridges were told where the guest is, which is after the last start at the destination.
    """
    begins, ends = [], []
    for port in ports:
        begin, started = port.blackout
        begins.append(begin)
        ends.append(announcements.wait_for(port.mac, since=port.start_begun)[0].at)
        assert begin < started
    begin, end = min(begins), max(ends)
    assert end - begin <= LONGEST_BLACKOUT
    return begin, end


@pytest.mark.parametrize("mode", ["hardware", "software"])
def test_nothing_is_lost(hosts: TwoHosts, domain: DomainXml, mode: str, pytestconfig: pytest.Config) -> None:
    hosts.a.start_guest(domain.migrating(mode))
    dark: list[tuple[float, float]] = []
    with Traffic(hosts.a, GUEST_ADDRESS) as traffic, Announcements(hosts.a) as announcements:
        for number in range(20 if pytestconfig.getoption("--full") else 2):
            destination = hosts.a if number % 2 else hosts.b
            hosts.migrate(domain, to=destination)
            assert_moved(hosts, domain, destination)
            ports = hosts.figures(domain, to=destination).ports
            assert [port.mode for port in ports] == [mode]
            assert ports[0].pages > 0
            dark.append(blackout(ports, announcements))
            traffic.wait_until_flowing()
        assert_sound(traffic.stop(), dark)


def test_libvirt_migrates_by_itself(hosts: TwoHosts, domain: DomainXml) -> None:
    hosts.a.start_guest(domain)
    with Traffic(hosts.a, GUEST_ADDRESS) as traffic, Announcements(hosts.a) as announcements:
        hosts.migrate(domain, "--p2p", to=hosts.b, via="tcp")
        assert_moved(hosts, domain, hosts.b)
        ports = hosts.figures(domain, to=hosts.b).ports
        traffic.wait_until_flowing()
        assert_sound(traffic.stop(), [blackout(ports, announcements)])


def test_two_nics(hosts: TwoHosts, domain: DomainXml) -> None:
    domain.add_nic()
    hosts.a.start_guest(domain)
    hosts.a.set_address("br0", SECOND_NETWORK["a"])
    with hosts.a.console(domain) as console:
        console.run(f"ip address add {SECOND_NETWORK['guest']} dev eth1; ip link set eth1 up")
        console.run(f"(traffic serve {SECOND_PORT} </dev/null >/dev/null 2>&1 &)")
    hosts.a.wait_for_ping(SECOND_NETWORK["guest"])
    dark: list[tuple[float, float]] = []
    with (
        Traffic(hosts.a, GUEST_ADDRESS) as first,
        Traffic(hosts.a, SECOND_NETWORK["guest"], port=SECOND_PORT) as second,
        Announcements(hosts.a) as announcements,
    ):
        for destination in (hosts.b, hosts.a):
            hosts.migrate(domain, to=destination)
            assert_moved(hosts, domain, destination, nics=2)
            ports = hosts.figures(domain, to=destination).ports
            assert len(ports) == 2
            dark.append(blackout(ports, announcements))
            first.wait_until_flowing()
            second.wait_until_flowing()
        assert_sound(first.stop(), dark)
        assert_sound(second.stop(), dark)


def test_two_guests_cross(hosts: TwoHosts, domain: DomainXml) -> None:
    other = DomainXml.example().rename(2).boot(guest_image(), OTHER_ADDRESS)
    ways = ((domain, GUEST_ADDRESS, hosts.b), (other, OTHER_ADDRESS, hosts.a))
    try:
        for guest, _, destination in ways:
            hosts.other(destination).define(guest)
            hosts.other(destination).virsh("start", guest.name)
        with ExitStack() as ends:
            announcements = ends.enter_context(Announcements(hosts.a))
            for _, address, _ in ways:
                hosts.a.wait_for_ping(address)
            flows = [ends.enter_context(Traffic(hosts.a, address)) for _, address, _ in ways]
            for migration in [hosts.begin_migration(guest, to=destination) for guest, _, destination in ways]:
                migration.succeed()
            wait_for("one on each", lambda: all(len(host.lent()) == 1 for host in hosts.both), 10)
            for (guest, _, destination), traffic in zip(ways, flows, strict=True):
                assert hosts.home(guest) is destination
                assert destination.port(guest)["state"] == "serving"
                dark = blackout(hosts.figures(guest, to=destination).ports, announcements)
                traffic.wait_until_flowing()
                assert_sound(traffic.stop(), [dark])
    finally:
        hosts.remove(other)


@pytest.mark.full
def test_returns_at_once(hosts: TwoHosts, domain: DomainXml) -> None:
    hosts.a.start_guest(domain)
    with Traffic(hosts.a, GUEST_ADDRESS) as traffic, Announcements(hosts.a) as announcements:
        for destination in (hosts.b, hosts.a):
            hosts.begin_migration(domain, to=destination).succeed()
        wait_for("nothing to be left", lambda: not hosts.b.ports_of(domain), 10)
        assert_moved(hosts, domain, hosts.a)
        figures = [hosts.port_figures(domain, to=destination) for destination in hosts.both]
        traffic.wait_until_flowing()
        assert_sound(traffic.stop(), [blackout(ports, announcements) for ports in figures])


def test_aborted_by_its_user(hosts: TwoHosts, domain: DomainXml) -> None:
    hosts.a.start_guest(domain)
    hosts.a.virsh("migrate-setspeed", domain.name, "1")
    with Traffic(hosts.a, GUEST_ADDRESS) as traffic, Announcements(hosts.a) as announcements:
        migration = hosts.begin_migration(domain, to=hosts.b)
        wait_for("memory to be copied", lambda: "Data processed" in job_info(hosts.a, domain), 30)
        wait_for("the port to log", lambda: log_wanted(hosts.a, domain), 10)
        hosts.a.virsh("domjobabort", domain.name)
        assert "abort" in migration.fail()
        hosts.a.virsh("migrate-setspeed", domain.name, "0")
        # The next one, at once, is none the worse for it.
        hosts.migrate(domain, to=hosts.b)
        assert_moved(hosts, domain, hosts.b)
        ports = hosts.figures(domain, to=hosts.b).ports
        assert endings(hosts.a, domain)[-2:] == endings(hosts.b, domain)[-2:] == ["failed", "completed"]
        traffic.wait_until_flowing()
        assert_sound(traffic.stop(), [blackout(ports, announcements)])


def endings(host: BridgedHost, domain: DomainXml) -> list[str]:
    """How a domain's migrations from or to a host have ended, by its daemon."""
    told = host.virt_vdpa("migrations")["migrations"]
    return [one["status"] for one in told if one["uuid"] == domain.uuid]


def log_wanted(host: BridgedHost, domain: DomainXml) -> bool:
    """Whether QEMU has the port log what the VF writes."""
    return bool(host.ask_port(domain, "query-status")["log"]["wanted"])


def test_a_guest_that_would_not_fit_stays(hosts: TwoHosts, domain: DomainXml) -> None:
    a = hosts.a
    a.start_guest(domain)
    state = wait_for("the state", lambda: a.guest_state(domain), 20)
    # The daemon would put right what is not so.
    a.daemon.stop()
    try:
        uso = STATE_FORM.sub(lambda found: f"negotiated='{int(found[1], 16) | 1 << HOST_USO:#x}'", state)
        words = ["--uri", STATE, "--key", "vdpastate", "--live"]
        a.virsh("metadata", domain.name, *words, "--set", uso.replace(f' xmlns:vdpastate="{STATE}"', ""))
        said = hosts.begin_migration(domain, to=hosts.b).fail()
    finally:
        a.start_daemon()
    assert f"libvirt-vdpa: domain '{domain.name}': interface {domain.mac}: VF " in said
    assert "lacks NET_F_HOST_USO, which the guest has negotiated" in said
    assert_moved(hosts, domain, a)
    assert a.ping(count=3) == (3, 3)
    wait_for("the state to be right again", lambda: a.guest_state(domain) == state, 20)


def test_saved_and_suspended(hosts: TwoHosts, domain: DomainXml) -> None:
    host = hosts.a
    host.start_guest(domain)
    with Traffic(host, GUEST_ADDRESS) as traffic:
        begun = time.time()
        host.virsh("managedsave", domain.name)
        assert_free(host)
        host.virsh("start", domain.name)
        saved = (begun, time.time())
        traffic.wait_until_flowing(60)
        begun = time.time()
        host.virsh("suspend", domain.name)
        assert host.state(domain.name) == "paused"
        host.virsh("resume", domain.name)
        suspended = (begun, time.time())
        traffic.wait_until_flowing(60)
        assert_sound(traffic.stop(), [saved, suspended])


@pytest.mark.parametrize("kind", ["arp", "rarp"])
def test_bridges_are_told(hosts: TwoHosts, domain: DomainXml, kind: str) -> None:
    if kind == "rarp":
        domain.override("guest_announce", "bool", "false")
    hosts.a.start_guest(domain)
    with Announcements(hosts.a) as announcements:
        for destination in (hosts.b, hosts.a):
            hosts.migrate(domain, to=destination)
            (port,) = hosts.figures(domain, to=destination).ports
            # The migration before announces itself for a second.
            first = announcements.wait_for(domain.mac, since=port.blackout[0])[0]
            assert first.kind == kind
            # Not before the rings ran, which would send everybody to a host that drops it.
            assert first.at >= port.start_begun
