"""<source mode='server'>: QEMU listens, waits for the port before it runs, and takes it back later."""

import pytest

from tests.harness.domain_xml import DomainXml
from tests.harness.processes import wait_for
from tests.harness.vdpa_host import VdpaHost

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]


@pytest.fixture
def server(domain: DomainXml) -> DomainXml:
    source = domain.element("devices/interface/source")
    source.set("mode", "server")
    source.remove(domain.element("devices/interface/source/reconnect"))
    return domain


def test_guest_starts_and_survives_its_port(host: VdpaHost, server: DomainXml) -> None:
    host.start_guest(server)
    port = host.port(server)
    assert (port["role"], port["state"], port["front_end"]) == ("connect", "serving", True)
    assert host.ping(count=20) == (20, 20)

    host.kill(port["pid"])
    wait_for("another port process", lambda: host.port(server)["pid"] not in (None, port["pid"]), 5)
    host.wait_for_ping(seconds=10)


def test_destroy(host: VdpaHost, server: DomainXml) -> None:
    host.define(server)
    host.virsh("start", server.name)
    host.virsh("destroy", server.name)
    wait_for("the port to be forgotten", lambda: not host.ports(), 10)
