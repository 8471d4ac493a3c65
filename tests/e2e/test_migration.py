"""Live migration is not there yet: it is refused before anything happens, and the guest goes on."""

import pytest

from tests.harness.domain_xml import DomainXml
from tests.harness.vdpa_host import VdpaHost

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]


def test_migration_is_refused(host: VdpaHost, domain: DomainXml) -> None:
    host.start_guest(domain)
    # The destination has our hook as one of several.
    with VdpaHost("destination", hook="qemu.d/50-libvirt-vdpa") as destination:
        uri = f"qemu+unix:///system?socket={destination.path('/run/libvirt/libvirt-sock')}"
        migration = f"unix://{host.folder}/migration"
        done = host.virsh("migrate", "--live", domain.name, uri, "--migrateuri", migration, check=False)
        assert done.returncode != 0
        assert "live migration of vDPA interfaces is not supported yet" in done.stderr
        assert not destination.state(domain.name)
        assert not destination.lent()
    assert host.ping(count=5) == (5, 5)
    assert host.port(domain)["state"] == "serving"
