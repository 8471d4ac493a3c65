"""Guests that come to a host: the real hook, daemon, ports and emulated NIC, without libvirt.

What each refusal says, on VFs of all kinds, is unit/test_arrival.py's; two hosts are tests/e2e's.
"""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from datapath.virtio import Feature, bit
from libvirt_vdpa.state import InterfaceState, render_state
from tests.harness.daemon_host import DaemonHost, Domain
from tests.harness.processes import wait_for
from tests.harness.procfs import all_running

MAC = "52:54:00:76:64:01"
#: What a Linux guest takes of an emulated IFCVF.
USED = bit(Feature.F_VERSION_1) | bit(Feature.NET_F_MRG_RXBUF)


def arriving(host: DaemonHost, number: int = 1, **changes: Any) -> Domain:
    """A domain whose guest runs elsewhere, on a VF like ours."""
    state = {"offered": USED, "negotiated": USED, "queue_pairs": 1, "ring_size": 256, **changes}
    return host.domain(number=number).edited(
        "</metadata>", f"{render_state([InterfaceState(MAC, **state)])}</metadata>"
    )


def states(host: DaemonHost) -> list[str]:
    """What becomes of the VFs, in their order."""
    return [device["state"] for device in host.ask("query-devices")["devices"]]


def probes(host: DaemonHost) -> list[int]:
    """Processes that ask a VF of the host."""
    return [
        process.pid
        for process in all_running()
        if "--probe" in process.argv and any(str(host.folder) in word for word in process.argv)
    ]


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does not answer meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_vf_is_promised_lent_and_given_back(host: DaemonHost) -> None:
    domain = arriving(host)
    host.hook(domain, "migrate")
    assert states(host) == ["promised", "free"]
    assert (host.ports, domain.folder.exists(), probes(host)) == ([], False, [])
    host.hook(domain, "prepare", "start", "started")
    assert states(host) == ["lent", "free"]
    record = json.loads(domain.record.read_text())
    assert (record["features"], record["negotiated"]) == (USED, USED)
    status = host.ask("query-status", domain.control)
    assert status["features_offered"] == USED
    # As when QEMU fails at the destination.
    host.hook(domain, "stopped", "release")
    assert host.is_clean()


def test_the_port_announces_its_guest_through_the_nic(host: DaemonHost) -> None:
    domain = arriving(host)
    host.hook(domain, "migrate", "prepare")
    uplink = f"nic={host.folder}/nics/default/control,vf=0"
    assert json.loads(domain.record.read_text())["uplink"] == uplink
    assert host.ask("query-status", domain.control)["announce"]["uplink"] == uplink


def test_what_is_promised_is_lent_to_nobody_else(host: DaemonHost) -> None:
    host.hook(arriving(host), "migrate")
    host.hook(host.domain(number=2), "prepare")
    assert host.veto(host.domain(number=3), "prepare").endswith(
        f"pool 'default' has no free VF: 1 of 2 lent to domain 'vdpa-demo' ({MAC});"
        f" 1 of 2 promised to domain 'vdpa-demo' ({MAC})"
    )


def test_a_promise_does_not_outlive_the_daemon(host: DaemonHost) -> None:
    domain = arriving(host)
    host.hook(domain, "migrate")
    host.stop(signal.SIGKILL)
    host.start()
    assert states(host) == ["free", "free"]
    # libvirt goes on all the same; it is an ordinary start then.
    host.hook(domain, "prepare")
    assert json.loads(domain.record.read_text())["negotiated"] is None


@pytest.mark.parametrize("operation", ["migrate", "restore"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"negotiated": USED | bit(Feature.NET_F_GUEST_USO4) | bit(Feature.NET_F_HASH_REPORT)},
            "lacks NET_F_GUEST_USO4, NET_F_HASH_REPORT, which the guest has negotiated",
        ),
        (
            {"negotiated": None, "offered": USED | bit(Feature.NET_F_RSS)},
            "lacks NET_F_RSS, which the source's VF has offered",
        ),
        ({"queue_pairs": 64}, ", the guest uses 64"),
        ({"ring_size": 32768}, " descriptors, the guest's have 32768"),
    ],
)
def test_a_guest_that_does_not_fit(
    host: DaemonHost, operation: str, changes: dict[str, Any], reason: str
) -> None:
    said = host.veto(arriving(host, **changes), operation)
    vf = f"ifcvf,vfio-user={host.folder}/nics/default/vf0.sock"
    assert said.startswith(f"domain 'vdpa-demo': interface {MAC}: VF '{vf}' ")
    assert said.endswith(
        f"{reason}; choose a host or pool whose VFs fit (none of 2 free VFs of pool 'default' fits)"
    )
    assert states(host) == ["free", "free"]
    assert host.is_clean()


def test_a_vf_that_cannot_log_by_itself(idle: DaemonHost) -> None:
    idle.configure(more='[pool.plain]\ndriver = "virtio"\nemulated = 1\ntap = "plain%d"\n')
    idle.start()
    domain = arriving(idle).edited("driver='ifcvf' pool='default'", "pool='plain' migration='hardware'")
    words = "cannot log what it writes by itself, as migration='hardware' asks"
    assert words in idle.veto(domain, "migrate")
    # At an ordinary start it is the port that says so.
    assert "has no dirty log of its own" in idle.veto(domain, "prepare")
    assert idle.is_clean()
    domain.edited("migration='hardware'", "migration='software'")
    idle.hook(domain, "migrate", "prepare")


def test_the_xml_is_made_this_hosts(host: DaemonHost) -> None:
    domain = arriving(host)
    here = domain.xml
    domain.edited(f"path='{host.folder}/", "path='/run/elsewhere/")
    for operation in ("migrate", "restore"):
        hook = host.begin_hook(domain, operation)
        output, said = hook.communicate(timeout=host.PATIENCE)
        assert (hook.returncode, said) == (0, "")
        changed = output[output.index("<domain") :].replace('"', "'")
        assert changed.strip() == here[here.index("<domain") :].strip().replace('"', "'")
    domain.xml = output
    host.hook(domain, "migrate", "prepare")
    assert domain.socket.is_socket()


def test_a_vf_that_does_not_answer_holds_nobody_up(idle: DaemonHost) -> None:
    idle.configure(limit=4)
    idle.start()
    with stopped(idle.nic):
        said = idle.veto(arriving(idle), "migrate")
        assert "cannot be used: it could not be asked within" in said
        assert probes(idle) == []
    assert states(idle) == ["free", "free"]
    wait_for("the VFs to be of use again", lambda: _accepted(idle), 20)


def _accepted(host: DaemonHost) -> bool:
    hook = host.begin_hook(arriving(host), "migrate")
    hook.communicate(timeout=host.PATIENCE)
    return hook.returncode == 0


def test_a_hook_that_is_killed_leaves_no_probe(idle: DaemonHost) -> None:
    idle.start()
    with stopped(idle.nic):
        hook = idle.begin_hook(arriving(idle), "migrate")
        wait_for("a VF to be asked", lambda: bool(probes(idle)), 10)
        hook.kill()
        hook.communicate()
        wait_for("nobody to ask", lambda: not probes(idle), 10)
        assert states(idle) == ["free", "free"]
