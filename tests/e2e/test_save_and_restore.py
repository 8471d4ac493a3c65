"""A guest that was saved goes on where it was, with a VF again."""

from pathlib import Path

import pytest

from tests.harness.domain_xml import DomainXml
from tests.harness.vdpa_host import GUEST_ADDRESS, VdpaHost

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]


def test_managed_save(host: VdpaHost, domain: DomainXml) -> None:
    host.start_guest(domain)
    features = host.port(domain)["features"]
    with host.console(domain) as console:
        console.run("touch /before")
    host.virsh("managedsave", domain.name)
    assert host.state(domain.name) == "shut off"
    assert not host.lent()

    host.virsh("start", domain.name)
    host.wait_for_ping(seconds=20)
    assert host.ping(count=20) == (20, 20)
    assert host.port(domain)["features"] == features
    with host.console(domain) as console:
        console.run("[ -e /before ]")


def test_a_guest_saved_while_it_runs_and_receives(host: VdpaHost, domain: DomainXml, tmp_path: Path) -> None:
    """A live snapshot of memory: QEMU asks for a log of what the VF writes meanwhile."""
    image = tmp_path / "memory"
    domain.migrating("software")
    host.start_guest(domain)
    memory = f"file={image},snapshot=external"
    with host.spawn("ping", ["ping", "-q", "-n", "-i", "0.01", GUEST_ADDRESS.partition("/")[0]]):
        host.virsh("snapshot-create-as", domain.name, "live", "--memspec", memory, "--live")
    assert host.ping(count=20) == (20, 20)  # the guest goes on
    statistics = host.ask_port(domain, "query-stats")
    assert statistics["relayed.1"] > 0, "nothing that the VF wrote was marked page by page"
    assert statistics["log_missed"] == 0
    host.virsh("snapshot-delete", domain.name, "live", "--metadata")
    host.virsh("destroy", domain.name)
    host.virsh("restore", str(image))
    host.wait_for_ping(seconds=20)
    assert host.ping(count=20) == (20, 20)


def test_saved_guest_is_not_restored_without_a_vf(host: VdpaHost, domain: DomainXml) -> None:
    host.start_guest(domain)
    host.virsh("managedsave", domain.name)
    host.daemon.stop()
    try:
        done = host.virsh("start", domain.name, check=False)
        assert done.returncode != 0
        assert "virtvdpad is not running" in done.stderr
    finally:
        host.start_daemon()
    # What was saved is not lost by that.
    host.virsh("start", domain.name)
    host.wait_for_ping(seconds=20)
