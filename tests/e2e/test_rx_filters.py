"""What a guest wants to receive reaches its VF: seen by frames that it gets, and others that it does not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.harness.console import Console
from tests.harness.domain_xml import DomainXml
from tests.harness.guest import guest_image
from tests.harness.netns import inside, open_packet_socket
from tests.harness.processes import wait_for
from tests.harness.two_hosts import TwoHosts
from tests.harness.vdpa_host import GUEST_ADDRESS, VdpaHost

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]

GROUP, OTHER_GROUP = "01:00:5e:00:00:05", "01:00:5e:00:00:06"
OTHER = "02:00:00:00:00:77"
BROADCAST = "ff:ff:ff:ff:ff:ff"
VLAN, OTHER_VLAN = 5, 6
#: What a guest gets that has asked for nothing more, and what there is besides.
ALWAYS = {"own", "broadcast"}
ALL = {*ALWAYS, "other", "group", "other-group", "vlan", "other-vlan"}


def trusting(domain: DomainXml) -> DomainXml:
    """The operator lets the guest say what it receives."""
    domain.interface.set("trustGuestRxFilters", "yes")
    return domain


def monitored(domain: DomainXml) -> DomainXml:
    return domain.with_monitor(f"/var/lib/libvirt/qemu/{domain.name}.monitor")


@contextmanager
def started(host: VdpaHost, domain: DomainXml) -> Iterator[Console]:
    host.define(domain)
    host.virsh("start", domain.name)
    with host.console(domain) as console:
        yield console


def frames(domain: DomainXml) -> list[bytes]:
    """One of each kind, its name in it; "end" comes last and always passes."""

    def frame(name: str, to: str, vlan: int | None = None) -> bytes:
        tag = b"" if vlan is None else bytes.fromhex("8100") + vlan.to_bytes(2, "big")
        head = bytes.fromhex(to.replace(":", "")) + bytes.fromhex("020000000009") + tag
        return (head + bytes.fromhex("88b5") + name.encode()).ljust(60, b"\0")

    return [
        frame("own", domain.mac),
        frame("other", OTHER),
        frame("group", GROUP),
        frame("other-group", OTHER_GROUP),
        frame("broadcast", BROADCAST),
        frame("vlan", domain.mac, VLAN),
        frame("other-vlan", domain.mac, OTHER_VLAN),
        frame("end", BROADCAST),
    ]


def begin(console: Console, command: str) -> str:
    """Have something run in the guest, by its process id."""
    return console.run(f"({command} & echo $!)").strip()


def received(host: VdpaHost, domain: DomainXml, console: Console) -> set[str]:
    """Which of them the guest's driver gets, when they are sent on the VF's wire."""
    collector = begin(console, "frames collect eth0 >/seen")
    console.run("until grep -q ready /seen; do sleep 0.1; done")
    with inside(host.network, lambda: open_packet_socket("vdpa0")) as wire:
        for frame in frames(domain):
            wire.send(frame)
    console.run(f"until grep -q end /seen; do sleep 0.1; done; kill {collector}")
    return set(console.run("cat /seen; rm /seen").split()) - {"ready", "end"}


def vf(host: VdpaHost) -> dict[str, Any]:
    """The guest's VF, as the NIC tells of it."""
    found: dict[str, Any] = host.ask_nic("query-devices")["vfs"][0]
    return found


def told_alike(host: VdpaHost, domain: DomainXml) -> bool:
    """Whether the guest's port tells of the same filter as the NIC, and of no problem."""
    told = host.port(domain)["rx_filter"]
    return bool(told == {"wanted": vf(host)["rx_filter"], "problem": None})


def wait_filter(host: VdpaHost, *, without: tuple[object, ...] = (), **wanted: object) -> dict[str, Any]:
    """Wait until the VF has a filter with such members; a list's are those that must be there.

    :param without: addresses and VLANs that must not be there.
    """

    def has(found: dict[str, Any], name: str, value: object) -> bool:
        return set(value) <= set(found[name]) if isinstance(value, list) else found[name] == value

    def reached() -> dict[str, Any] | None:
        found = vf(host)["rx_filter"]
        if not found or not {*found["macs"], *found["vlans"]}.isdisjoint(without):
            return None
        return found if all(has(found, name, value) for name, value in wanted.items()) else None

    return wait_for(f"a filter with {wanted}, without {without}", reached, 20) or {}


def test_a_guest_gets_what_it_asks_for(host: VdpaHost, domain: DomainXml) -> None:
    with started(host, monitored(trusting(domain))) as console:
        console.run("vlans")
        wait_filter(host, promiscuous=False, vlan="listed", macs=[domain.mac])
        assert received(host, domain, console) == ALWAYS
        assert vf(host)["rx_filtered"] >= len(ALL - ALWAYS)

        member = begin(console, f"frames join eth0 {GROUP}")
        wait_filter(host, macs=[domain.mac, GROUP])
        assert received(host, domain, console) == {*ALWAYS, "group"}

        console.run(f"vconfig add eth0 {VLAN}")
        wait_filter(host, vlans=[VLAN])
        assert received(host, domain, console) == {*ALWAYS, "group", "vlan"}
        wait_for("the port to tell what the VF has", lambda: told_alike(host, domain), 10)

        # Another port process, and it is all there again.
        before = host.port(domain)["pid"]
        host.kill(before)
        wait_for("another port", lambda: host.port(domain)["pid"] not in (before, None), 10)
        wait_filter(host, macs=[domain.mac, GROUP], vlans=[VLAN])
        assert received(host, domain, console) == {*ALWAYS, "group", "vlan"}

        console.run("ip link set eth0 promisc on")
        wait_filter(host, promiscuous=True)
        assert received(host, domain, console) == ALL
        console.run(f"ip link set eth0 promisc off; kill {member}; vconfig rem eth0.{VLAN}")
        wait_filter(host, promiscuous=False, without=(GROUP, VLAN))
        assert received(host, domain, console) == ALWAYS

        # An address of its own choice, in the place of what the domain has.
        console.run(f"ip link set eth0 address {OTHER}")
        wait_filter(host, macs=[OTHER])
        assert received(host, domain, console) == {"other", "broadcast"}
    log = host.path(f"/var/log/libvirt/qemu/{domain.name}.log").read_text()
    assert "tainted: custom-monitor" not in log


@pytest.mark.parametrize(
    "kept_back", [pytest.param("ctrl_rx"), pytest.param("ctrl_vlan", marks=pytest.mark.full)]
)
def test_a_guest_without_the_feature(host: VdpaHost, domain: DomainXml, kept_back: str) -> None:
    """Without CTRL_RX it gets everything, without CTRL_VLAN all VLANs."""
    monitored(trusting(domain)).override(kept_back, "bool", "false")
    with started(host, domain) as console:
        if kept_back == "ctrl_rx":
            wait_filter(host, promiscuous=True)
            assert received(host, domain, console) == ALL
        else:
            wait_filter(host, promiscuous=False, vlan="all")
            assert received(host, domain, console) == {*ALWAYS, "vlan", "other-vlan"}


@pytest.mark.full
def test_a_guest_that_is_not_trusted(host: VdpaHost, domain: DomainXml) -> None:
    with started(host, monitored(domain)) as console:
        host.wait_for_ping()
        assert received(host, domain, console) == ALL
        assert vf(host)["rx_filter"] is None


@pytest.mark.full
def test_by_libvirt_alone(host: VdpaHost, domain: DomainXml) -> None:
    """Where the guest has no monitor for us, which taints the domain."""
    with started(host, trusting(domain)) as console:
        wait_filter(host, promiscuous=False)
        member = begin(console, f"frames join eth0 {GROUP}")
        wait_filter(host, macs=[domain.mac, GROUP])
        assert received(host, domain, console) == {*ALWAYS, "group"}
        # Whatever is missed while the daemon is away.
        host.daemon.stop()
        console.run(f"kill {member}")
        begin(console, f"frames join eth0 {OTHER_GROUP}")
        host.start_daemon()
        wait_filter(host, macs=[domain.mac, OTHER_GROUP])
        assert received(host, domain, console) == {*ALWAYS, "other-group"}
    log = host.path(f"/var/log/libvirt/qemu/{domain.name}.log").read_text()
    assert "tainted: custom-monitor" in log


@pytest.mark.full
def test_trust_that_is_withdrawn_takes_the_filter_away(host: VdpaHost, domain: DomainXml) -> None:
    """libvirt 9.0 changes the attribute in no running domain: what it keeps on disk of one is edited here."""
    with started(host, monitored(trusting(domain))) as console:
        wait_filter(host, promiscuous=False)
        assert received(host, domain, console) == ALWAYS
        host.daemon.stop()
        host.libvirtd.stop()
        status = host.path(f"/run/libvirt/qemu/{domain.name}.xml")
        kept = status.read_text()
        assert kept.count(" trustGuestRxFilters='yes'") == 1
        status.write_text(kept.replace(" trustGuestRxFilters='yes'", ""))
        host.start_libvirtd()
        host.start_daemon()
        wait_for("no filter", lambda: vf(host)["rx_filter"] is None, 20)
        assert received(host, domain, console) == ALL


@pytest.mark.full
@pytest.mark.parametrize("own", [True, False], ids=["own monitor", "libvirt's"])
def test_where_a_guest_arrives_it_gets_the_same(hosts: TwoHosts, own: bool) -> None:
    domain = trusting(DomainXml.example().boot(guest_image(), GUEST_ADDRESS))
    if own:
        monitored(domain)
    try:
        with started(hosts.a, domain) as console:
            begin(console, f"frames join eth0 {GROUP}")
            wait_filter(hosts.a, promiscuous=False, macs=[domain.mac, GROUP])
        hosts.migrate(domain, to=hosts.b)
        wait_filter(hosts.b, promiscuous=False, macs=[domain.mac, GROUP])
        with hosts.b.console(domain) as console:
            assert received(hosts.b, domain, console) == {*ALWAYS, "group"}
            # It is followed there as it was here.
            console.run("ip link set eth0 promisc on")
            wait_filter(hosts.b, promiscuous=True)
        assert vf(hosts.a)["rx_filter"] is None
    finally:
        hosts.remove(domain)
