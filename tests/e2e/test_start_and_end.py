"""A domain starts, its guest has a VF as its NIC, and gives it back however it ends."""

from collections.abc import Callable

import pytest
from lxml import etree

from tests.harness.domain_xml import DomainXml
from tests.harness.guest import guest_image
from tests.harness.processes import wait_for
from tests.harness.vdpa_host import RUN_FOLDER, VdpaHost

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]


QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"


def test_guest_reaches_the_network_through_its_vf(host: VdpaHost, domain: DomainXml) -> None:
    before = host.ask_nic("query-devices")["vfs"][0]
    host.start_guest(domain)
    assert host.ping(count=20) == (20, 20)
    after = host.ask_nic("query-devices")["vfs"][0]
    for counter in ("rx_packets", "tx_packets"):
        assert after[counter] - before[counter] >= 20

    port = host.port(domain)
    assert port["state"] == "serving"
    assert port["front_end"]
    assert port["socket"] == domain.socket
    assert port["mac"] == domain.mac
    assert "F_VERSION_1" in port["features"]
    assert host.lent() == [port["device"]]


def test_without_reconnect(host: VdpaHost, domain: DomainXml) -> None:
    domain.element("devices/interface/source").remove(domain.element("devices/interface/source/reconnect"))
    host.start_guest(domain)
    assert host.ping(count=5) == (5, 5)


def test_mtu_of_the_nic(host: VdpaHost, domain: DomainXml) -> None:
    """By QEMU's property: libvirt 9.0 looks for a host's interface to give `<mtu>` to, and finds none."""
    etree.SubElement(domain.interface, "alias", name="ua-net")
    override = etree.SubElement(domain.root, f"{{{QEMU}}}override", nsmap={"qemu": QEMU})
    device = etree.SubElement(override, f"{{{QEMU}}}device", alias="ua-net")
    front_end = etree.SubElement(device, f"{{{QEMU}}}frontend")
    etree.SubElement(front_end, f"{{{QEMU}}}property", name="host_mtu", type="unsigned", value="1400")
    host.start_guest(domain)
    with host.console(domain) as console:
        console.run("[ $(cat /sys/class/net/eth0/mtu) = 1400 ]")
    assert "NET_F_MTU" in host.port(domain)["features"]


def test_two_guests_have_a_vf_each(host: VdpaHost, domain: DomainXml) -> None:
    other = DomainXml(str(domain)).rename(2).boot(guest_image(), "10.77.0.2/24")
    host.set_address("vdpa1", "10.77.0.1/24")
    try:
        for each in (domain, other):
            host.define(each)
            host.virsh("start", each.name)
        host.wait_for_ping()
        host.wait_for_ping("10.77.0.2")
        assert len(host.lent()) == 2
        assert host.port(domain)["pid"] != host.port(other)["pid"]
    finally:
        host.remove(other)
    # The end of one does not disturb the other.
    assert host.ping(count=3) == (3, 3)


def destroy(host: VdpaHost, domain: DomainXml) -> None:
    host.virsh("destroy", domain.name)


def shut_down(host: VdpaHost, domain: DomainXml) -> None:
    host.virsh("shutdown", domain.name)


def power_off(host: VdpaHost, domain: DomainXml) -> None:
    with host.console(domain) as console:
        console.send("poweroff -f\n")


def kill_qemu(host: VdpaHost, domain: DomainXml) -> None:
    (qemu,) = host.running("qemu-system-x86_64")
    host.kill(qemu.inner_pid)


@pytest.mark.parametrize("end", [destroy, shut_down, power_off, kill_qemu])
def test_vf_is_given_back(
    host: VdpaHost, domain: DomainXml, end: Callable[[VdpaHost, DomainXml], None]
) -> None:
    host.start_guest(domain)
    end(host, domain)
    host.wait_for_state(domain, "shut off")
    wait_for("the port to be forgotten", lambda: not host.ports(), 10)
    assert not host.running("virt-vdpa-port")
    assert not host.path(f"{RUN_FOLDER}/{domain.uuid}").exists()
    assert not host.lent()


def test_domain_starts_again(host: VdpaHost, domain: DomainXml) -> None:
    host.define(domain)
    for _ in range(2):
        host.virsh("start", domain.name)
        assert host.port(domain)["state"] == "serving"
        host.virsh("destroy", domain.name)


def test_foreign_domain_is_none_of_our_business(host: VdpaHost, domain: DomainXml) -> None:
    domain.without_vdpa()
    host.define(domain)
    # It must start even where virtvdpad does not run.
    host.daemon.stop()
    try:
        host.virsh("start", domain.name)
        assert host.state(domain.name) == "running"
        assert not host.running("virt-vdpa-port")
        host.virsh("destroy", domain.name)
    finally:
        host.start_daemon()
