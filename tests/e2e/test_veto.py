"""A domain that cannot have its VF is not started, and `virsh start` says why."""

import signal
from collections.abc import Callable, Iterator

import pytest

from tests.harness.domain_xml import DomainXml
from tests.harness.processes import wait_for
from tests.harness.vdpa_host import VdpaHost

pytestmark = pytest.mark.libvirt


@pytest.fixture(scope="module")
def host() -> Iterator[VdpaHost]:
    """A host with a single VF."""
    configuration = '[pool.default]\ndriver = "ifcvf"\nemulated = 1\n'
    with VdpaHost("veto", configuration=configuration) as made:
        yield made


def refused(host: VdpaHost, domain: DomainXml) -> str:
    """What `virsh start` says when it fails."""
    host.define(domain)
    done = host.virsh("start", domain.name, check=False)
    assert done.returncode != 0
    assert host.state(domain.name) == "shut off"
    assert not host.ports_of(domain)
    assert "Traceback" not in done.stderr
    return done.stderr


def memory_not_shared(domain: DomainXml) -> None:
    domain.element("memoryBacking/access").set("mode", "private")


def no_memory_backing(domain: DomainXml) -> None:
    domain.root.remove(domain.element("memoryBacking"))


def too_many_queues(domain: DomainXml) -> None:
    domain.interface.append(domain.interface.makeelement("driver", {"queues": "8"}))


def wrong_path(domain: DomainXml) -> None:
    domain.element("devices/interface/source").set("path", "/run/somewhere-else.sock")


def unknown_pool(domain: DomainXml) -> None:
    domain.request.set("pool", "nowhere")


def wrong_driver(domain: DomainXml) -> None:
    domain.request.set("driver", "bnxt")


def wrong_mac(domain: DomainXml) -> None:
    domain.request.set("mac", "52:54:00:00:00:99")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (memory_not_shared, "<access mode='shared'/>"),
        (no_memory_backing, "<access mode='shared'/>"),
        (too_many_queues, "queue"),
        (wrong_path, "the path must be '/run/libvirt-vdpa/7664d0a0-0001-4000-8000-000000000001/"),
        (unknown_pool, "pool='nowhere'"),
        (wrong_driver, "driver='bnxt'"),
        (wrong_mac, "52:54:00:00:00:99"),
    ],
)
def test_domain_is_refused(
    host: VdpaHost, domain: DomainXml, edit: Callable[[DomainXml], None], reason: str
) -> None:
    edit(domain)
    answer = refused(host, domain)
    assert f"libvirt-vdpa: domain '{domain.name}'" in answer
    assert reason in answer


def test_no_vf_is_free(host: VdpaHost, domain: DomainXml) -> None:
    host.define(domain)
    host.virsh("start", domain.name)
    other = DomainXml(str(domain)).rename(2)
    try:
        answer = refused(host, other)
    finally:
        host.remove(other)
    assert "pool 'default' has no free VF" in answer
    assert domain.name in answer
    assert host.state(domain.name) == "running"
    assert host.port(domain)["state"] == "serving"


def test_daemon_does_not_run(host: VdpaHost, domain: DomainXml) -> None:
    host.define(domain)
    host.daemon.stop()
    try:
        done = host.virsh("start", domain.name, check=False)
    finally:
        host.start_daemon()
    assert done.returncode != 0
    assert "virtvdpad is not running" in done.stderr
    # Nothing of the attempt is in the way of the next.
    host.virsh("start", domain.name)


@pytest.mark.full
def test_daemon_does_not_answer(host: VdpaHost, domain: DomainXml) -> None:
    host.define(domain)
    host.daemon.signal(signal.SIGSTOP)
    # Each of the hooks prepare, stopped and release waits its 10 s.
    try:
        done = host.virsh("start", domain.name, check=False)
    finally:
        host.daemon.signal(signal.SIGCONT)
    assert done.returncode != 0
    assert "virtvdpad did not answer within" in done.stderr
    # What it did when it woke up, for a hook that had gone, it has undone.
    wait_for("the VF to be free", lambda: not host.lent(), 10)
    host.virsh("start", domain.name)
