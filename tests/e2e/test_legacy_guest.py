"""Guests of virtio 0.95, which do not know VERSION_1: an IFCVF serves them, and they move."""

import re

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
NEGOTIATED = re.compile(r"""negotiated=["'](0x[0-9a-f]+)["']""")


def legacy(domain: DomainXml, mergeable: bool) -> DomainXml:
    """The same domain with a NIC of virtio 0.95."""
    if not mergeable:
        driver = etree.SubElement(domain.interface, "driver")
        etree.SubElement(driver, "host", mrg_rxbuf="off")
    # Behind a PCI Express port QEMU has no legacy registers unless it is told to.
    return domain.override("disable-legacy", "string", "off").override("disable-modern", "bool", "true")


def assert_is_legacy(host: VdpaHost, domain: DomainXml, mergeable: bool) -> None:
    """Its driver has accepted neither VERSION_1 nor what it was not offered."""
    with host.console(domain) as console:
        assert console.run("cat /sys/class/net/eth0/device/../device").strip() == LEGACY_ID

    def written_down() -> list[str]:
        return NEGOTIATED.findall(host.virsh("metadata", domain.name, STATE, check=False).stdout)

    (word,) = wait_for("what the guest has accepted to be written down", written_down, 10) or []
    negotiated = int(word, 16)
    assert not negotiated & bit(Feature.F_VERSION_1)
    assert bool(negotiated & bit(Feature.NET_F_MRG_RXBUF)) is mergeable


@pytest.mark.parametrize("mergeable", [False, pytest.param(True, marks=pytest.mark.full)])
def test_it_is_served(host: VdpaHost, domain: DomainXml, mergeable: bool) -> None:
    host.start_guest(legacy(domain, mergeable))
    assert_is_legacy(host, domain, mergeable)
    assert host.ping(count=5) == (5, 5)
    with Traffic(host, GUEST_ADDRESS) as traffic:
        traffic.wait_until_flowing()
        assert traffic.stop().damage() == []


@pytest.mark.full
@pytest.mark.parametrize("mode", ["hardware", "software"])
def test_it_moves(hosts: TwoHosts, mode: str) -> None:
    domain = legacy(DomainXml.example().boot(guest_image(), GUEST_ADDRESS), mergeable=False)
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
