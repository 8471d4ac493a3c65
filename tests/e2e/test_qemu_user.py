"""QEMU runs as a user of its own, as distributions have it, and reaches the sockets all the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.domain_xml import DomainXml
from tests.harness.vdpa_host import CONFIGURATION, RUN_FOLDER, VdpaHost

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]

USER = "libvirt-qemu"
UID = 64055
SOCKET = f'[socket]\nuser = "{USER}"\ngroup = "{USER}"\n'


@pytest.fixture(scope="module")
def host() -> Iterator[VdpaHost]:
    with VdpaHost("user", configuration=SOCKET + CONFIGURATION, qemu_user=USER) as made:
        made.set_address()
        yield made


@pytest.mark.parametrize("mode", ["client", "server"])
def test_guest_pings(host: VdpaHost, domain: DomainXml, mode: str) -> None:
    source = domain.element("devices/interface/source")
    source.set("mode", mode)
    if mode == "server":
        source.remove(domain.element("devices/interface/source/reconnect"))
    host.start_guest(domain)
    (qemu,) = host.running("qemu-system-x86_64")
    assert Path(f"/proc/{qemu.pid}").stat().st_uid == UID
    assert host.ping(count=5) == (5, 5)

    socket = host.path(f"{RUN_FOLDER}/{domain.uuid}/{domain.mac}.sock")
    if mode == "client":
        assert (socket.stat().st_uid, socket.stat().st_mode & 0o777) == (UID, 0o660)
