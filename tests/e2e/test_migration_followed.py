"""The daemon follows migrations: it ends one that would cost the guest, and loses sight of none."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from tests.harness import faulty_daemon
from tests.harness.domain_xml import QEMU, DomainXml
from tests.harness.guest import guest_image
from tests.harness.processes import wait_for
from tests.harness.two_hosts import BridgedHost, Migration, TwoHosts
from tests.harness.vdpa_host import GUEST_ADDRESS

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]

MONITOR = "/var/lib/libvirt/qemu/followed.monitor"
#: MiB/s at which the guest's memory takes a minute and more, and at which it takes no time.
SLOW, FAST = "1", "10000"


@pytest.fixture
def domain(hosts: TwoHosts) -> Iterator[DomainXml]:
    made = DomainXml.example().boot(guest_image(), GUEST_ADDRESS)
    yield made
    hosts.remove(made)


def monitored(domain: DomainXml, *, own: bool) -> DomainXml:
    """The domain with or without a monitor for us."""
    for found in domain.root.findall(f"{{{QEMU}}}commandline"):
        domain.root.remove(found)
    if own:
        socket = f"socket,id=vdpamon,path={MONITOR},server=on,wait=off"
        words = ("-chardev", socket, "-mon", "chardev=vdpamon,mode=control")
        arguments = "".join(f"<q:arg value='{word}'/>" for word in words)
        text = f"<q:commandline xmlns:q='{QEMU}'>{arguments}</q:commandline>"
        domain.root.append(etree.fromstring(text))
    return domain


def last(host: BridgedHost) -> dict[str, Any]:
    """The migration that a daemon tells of last; empty when it tells of none."""
    found: list[dict[str, Any]] = host.virt_vdpa("migrations")["migrations"]
    return found[-1] if found else {}


def wait_for_status(host: BridgedHost, side: str, status: str) -> dict[str, Any]:
    """Wait until a daemon says so of the last migration."""

    def told() -> dict[str, Any] | None:
        found = last(host)
        return found if (found.get("side"), found.get("status")) == (side, status) else None

    found = wait_for(f"{host.name} to say {status}", told, 20)
    assert found is not None
    return found


def begin_slowly(hosts: TwoHosts, domain: DomainXml) -> Migration:
    """A migration from the first host that copies as long as it is let."""
    hosts.a.virsh("migrate-setspeed", domain.name, SLOW)
    migration = hosts.begin_migration(domain, to=hosts.b)
    wait_for_status(hosts.a, "source", "copying")
    return migration


@pytest.mark.parametrize("own", [False, True], ids=["by libvirt", "by its own monitor"])
def test_a_log_that_fails_ends_the_migration(hosts: TwoHosts, domain: DomainXml, own: bool) -> None:
    a, b = hosts.both
    fault = Path("/run/log-fails")
    a.daemon.stop()
    command = [sys.executable, "-m", faulty_daemon.__name__, str(fault), f"--config={a.configuration}"]
    a.daemon = a.spawn("virtvdpad", command)
    a.daemon.wait_for("an answer", lambda: a.virt_vdpa("status", check=False), 20)
    try:
        a.start_guest(monitored(domain, own=own))
        migration = begin_slowly(hosts, domain)
        assert last(a)["ports"][0]["mode"] == "hardware"
        wait_for("progress", lambda: last(a)["progress"].get("remaining"), 10)
        a.path(str(fault)).touch()
        migration.fail(20)
    finally:
        a.path(str(fault)).unlink(missing_ok=True)
        a.daemon.stop()
        a.start_daemon()
    reason = f"interface {domain.mac}: {faulty_daemon.PROBLEM}"
    log = (a.logs / "virtvdpad.output").read_text()
    assert f"domain '{domain.name}': the migration is ended: {reason}" in log
    assert hosts.home(domain) is a
    assert a.ping(count=5) == (5, 5)
    assert a.port(domain)["log"]["wanted"] is False
    assert wait_for_status(b, "destination", "failed")
    assert not b.ports_of(domain)
    # QEMU was never asked through libvirt's monitor behind its back.
    assert "custom-monitor" not in (a.path("/var/log/libvirt/qemu") / f"{domain.name}.log").read_text()


def test_daemons_that_are_restarted_find_it_again(hosts: TwoHosts, domain: DomainXml) -> None:
    a, b = hosts.both
    a.start_guest(monitored(domain, own=False))
    state = wait_for("the state", lambda: a.guest_state(domain), 10)
    migration = begin_slowly(hosts, domain)
    for host in hosts.both:
        host.daemon.kill()
        host.start_daemon()
    wait_for_status(a, "source", "copying")
    wait_for_status(b, "destination", "incoming")
    a.virsh("migrate-setspeed", domain.name, FAST)
    migration.succeed()
    at_source = wait_for_status(a, "source", "completed")
    assert at_source["progress"]["downtime_ms"] > 0
    assert at_source["ports"][0]["log"]["pages"] > 0
    assert wait_for_status(b, "destination", "completed")["ports"][0]["timing"]["start"]
    assert b.guest_state(domain) == state


def test_saving_is_no_failed_migration(hosts: TwoHosts, domain: DomainXml, tmp_path: Path) -> None:
    a = hosts.a
    a.start_guest(monitored(domain, own=True))
    a.virsh("save", domain.name, tmp_path / "image")
    assert wait_for_status(a, "source", "completed")["operation"] == "save"
    a.virsh("restore", tmp_path / "image")
    a.wait_for_ping(seconds=20)
    wait_for_status(a, "destination", "completed")
