"""The MTU of a domain's XML: advised to the guest, kept to by whoever carries its packets, or refused."""

from collections.abc import Iterator

import pytest
from lxml import etree

from tests.harness.domain_xml import DomainXml
from tests.harness.vdpa_host import CONFIGURATION, GUEST_ADDRESS, HOST_ADDRESS, VdpaHost

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]

MTU = 4000
#: What libvirt 9.0 gives the MTU to beside QEMU.
SPARE = "mtu0"
#: Bytes of the headers of IPv4 and ICMP.
HEADERS = 28


@pytest.fixture(scope="module")
def host() -> Iterator[VdpaHost]:
    """A host whose VFs take an MTU of more than the usual."""
    with VdpaHost("mtu", configuration=f"{CONFIGURATION}mtu = {MTU}\n") as made:
        made.set_address()
        made.run(["ip", "link", "add", SPARE, "type", "bridge"])
        yield made


@pytest.fixture
def domain(domain: DomainXml) -> DomainXml:
    """One that asks for an MTU."""
    etree.SubElement(domain.interface, "target", dev=SPARE)
    etree.SubElement(domain.interface, "mtu", size=str(MTU))
    return domain


def test_guest_uses_the_mtu(host: VdpaHost, domain: DomainXml) -> None:
    host.start_guest(domain)
    assert "NET_F_MTU" in host.port(domain)["features"]
    assert ping(host, MTU)
    assert not ping(host, MTU + 1)
    with host.console(domain) as console:
        assert console.run("cat /sys/class/net/eth0/mtu").strip() == str(MTU)
        peer = HOST_ADDRESS.partition("/")[0]
        console.run(f"ping -c 3 -s {MTU - HEADERS} {peer}")


def ping(host: VdpaHost, size: int) -> bool:
    """Whether packets of a size, not to be cut into fragments, reach the guest and come back."""
    words = ["-n", "-q", "-M", "do", "-c", "3", "-i", "0.1", "-W", "1", "-s", str(size - HEADERS)]
    return host.run(["ping", *words, GUEST_ADDRESS.partition("/")[0]], check=False).returncode == 0


def test_more_than_the_vf_takes_is_refused(host: VdpaHost, domain: DomainXml) -> None:
    domain.element("devices/interface/mtu").set("size", str(MTU + 1))
    host.define(domain)
    refused = host.virsh("start", domain.name, check=False).stderr
    text = f"MTU {MTU + 1}: the VF carries packets of at most {MTU} bytes; lower it"
    assert f"libvirt-vdpa: domain 'vdpa-demo': interface {domain.mac}: {text}" in refused
    assert not host.ports()


def test_more_by_qemus_property_is_refused(host: VdpaHost, domain: DomainXml) -> None:
    domain.interface.remove(domain.element("devices/interface/mtu"))
    host.define(domain.override("host_mtu", "unsigned", str(MTU + 1)))
    refused = host.virsh("start", domain.name, check=False).stderr
    assert f"carries packets of at most {MTU} bytes" in refused
