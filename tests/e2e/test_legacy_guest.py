"""Guests of virtio 0.95, which do not know VERSION_1: an IFCVF serves them, and they move.

There are two kinds: a NIC that has nothing but the legacy interface, and a transitional one, whose guest
takes that interface though there is a modern one beside it.
"""

import re
from collections.abc import Callable

import pytest
from lxml import etree

from datapath.virtio import Feature, bit
from tests.harness.domain_xml import STATE, DomainXml
from tests.harness.guest import guest_image
from tests.harness.guest_traffic import Traffic
from tests.harness.processes import wait_for
from tests.harness.two_hosts import TwoHosts
from tests.harness.vdpa_host import GUEST_ADDRESS, VdpaHost

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]

#: What a guest of QEMU's that is kept to virtio 0.95 finds on its bus (virtio 1.3 section 4.1.2).
LEGACY_ID = "0x1000"
#: Where libvirt puts a transitional NIC: behind PCI Express there is none.
BRIDGE = "model='pcie-to-pci-bridge'"
NEGOTIATED = re.compile(r"""negotiated=["'](0x[0-9a-f]+)["']""")


def without_merging(domain: DomainXml, mergeable: bool = False) -> DomainXml:
    """The same domain; unless `mergeable`, its NIC is one whose packets have the header of 10 bytes."""
    if not mergeable:
        driver = etree.SubElement(domain.interface, "driver")
        etree.SubElement(driver, "host", mrg_rxbuf="off")
    return domain


def legacy(domain: DomainXml) -> DomainXml:
    """The same domain with a NIC of virtio 0.95."""
    # Behind a PCI Express port QEMU has no legacy registers unless it is told to.
    return domain.override("disable-legacy", "string", "off").override("disable-modern", "bool", "true")


def transitional(domain: DomainXml, interface: str = "legacy") -> DomainXml:
    """The same domain with libvirt's transitional NIC, of which the guest takes one of the interfaces."""
    domain.element("devices/interface/model").set("type", "virtio-transitional")
    if interface == "legacy":
        line = domain.element("os/cmdline")
        line.text = f"{line.text} virtio_pci.force_legacy=1"
    return domain


def accepted(host: VdpaHost, domain: DomainXml) -> int:
    """The features that the guest's driver has accepted, as they are written down."""

    def written_down() -> list[str]:
        return NEGOTIATED.findall(host.virsh("metadata", domain.name, STATE, check=False).stdout)

    (word,) = wait_for("what the guest has accepted to be written down", written_down, 10) or []
    return int(word, 16)


def assert_is_legacy(host: VdpaHost, domain: DomainXml, mergeable: bool) -> None:
    """Its driver has accepted neither VERSION_1 nor what it was not offered."""
    with host.console(domain) as console:
        assert console.run("cat /sys/class/net/eth0/device/../device").strip() == LEGACY_ID
    features = accepted(host, domain)
    assert not features & bit(Feature.F_VERSION_1)
    assert bool(features & bit(Feature.NET_F_MRG_RXBUF)) is mergeable


def assert_is_served(host: VdpaHost) -> None:
    """Nothing of its traffic is lost or damaged."""
    assert host.ping(count=5) == (5, 5)
    with Traffic(host, GUEST_ADDRESS) as traffic:
        traffic.wait_until_flowing()
        assert traffic.stop().damage() == []


@pytest.mark.parametrize("mergeable", [False, pytest.param(True, marks=pytest.mark.full)])
def test_it_is_served(host: VdpaHost, domain: DomainXml, mergeable: bool) -> None:
    host.start_guest(legacy(without_merging(domain, mergeable)))
    assert_is_legacy(host, domain, mergeable)
    assert_is_served(host)


@pytest.mark.parametrize("mergeable", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_transitional_nic_serves_its_legacy_interface(
    host: VdpaHost, domain: DomainXml, mergeable: bool
) -> None:
    host.start_guest(transitional(without_merging(domain, mergeable)))
    assert BRIDGE in host.virsh("dumpxml", domain.name).stdout
    assert_is_legacy(host, domain, mergeable)
    assert_is_served(host)


@pytest.mark.full
def test_a_transitional_nic_serves_its_modern_interface(host: VdpaHost, domain: DomainXml) -> None:
    host.start_guest(transitional(domain, "modern"))
    assert accepted(host, domain) & bit(Feature.F_VERSION_1)
    assert_is_served(host)


@pytest.mark.full
@pytest.mark.parametrize("mode", ["hardware", "software"])
@pytest.mark.parametrize("kind", [legacy, transitional])
def test_it_moves(hosts: TwoHosts, kind: Callable[[DomainXml], DomainXml], mode: str) -> None:
    domain = kind(without_merging(DomainXml.example().boot(guest_image(), GUEST_ADDRESS)))
    try:
        hosts.a.start_guest(domain.migrating(mode))
        with Traffic(hosts.a, GUEST_ADDRESS) as traffic:
            for destination in (hosts.b, hosts.a):
                hosts.migrate(domain, to=destination)
                traffic.wait_until_flowing()
                (figures,) = hosts.figures(domain, to=destination).ports
                assert figures.mode == mode
                assert figures.pages > 0
            summary = traffic.stop()
        assert summary.damage() == []
        assert_is_legacy(hosts.a, domain, mergeable=False)
    finally:
        hosts.remove(domain)
