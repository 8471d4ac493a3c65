"""What our hook costs a domain that is not ours, and what hook and port add to `virsh start`.

The peer is the same domain on a host without our hook, its NIC served by DPDK's vhost library: what an
operator has who tends the sockets by hand. Starts of both kinds alternate, so that both meet the same
machine; figures are medians.
"""

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.harness.domain_xml import DomainXml
from tests.harness.guest import guest_image
from tests.harness.host import LibvirtHost
from tests.harness.processes import run
from tests.harness.vdpa_host import GUEST_ADDRESS, HOOK, RUN_FOLDER, VdpaHost

#: Calls of the hook for each start of a domain: they are much shorter.
CALLS_PER_RUN = 5
INTERPRETER = ["/usr/bin/python3", "-IS", "-c", "pass"]
#: A start and an end as libvirt reports them to the hook; less `started`, which wants a guest that is
#: connected (`virsh start` has it).
SUB_OPERATIONS = {"prepare": "begin", "start": "begin", "stopped": "end", "release": "end"}


def milliseconds(action: Callable[[], object]) -> float:
    """How long something takes."""
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1000


def show(label: str, times: list[float], remark: str = "") -> float:
    """Print one line and return the median."""
    median = statistics.median(times)
    print(f"{label:<44}{median:8.1f} ms   {min(times):7.1f} … {max(times):<7.1f} {len(times):4d}   {remark}")
    return median


def hook_call(domain: DomainXml, operation: str, socket: Path | None = None) -> Callable[[], object]:
    """A call of the hook as libvirt makes it."""
    argv = [str(HOOK), domain.name, operation, SUB_OPERATIONS[operation], "-"]
    env = dict(os.environ, LIBVIRT_VDPA_SOCKET=str(socket)) if socket else None
    xml = str(domain)
    return lambda: run(argv, text_in=xml, env=env)


def start_and_destroy(host: LibvirtHost, domain: DomainXml) -> float:
    """How long `virsh start` takes."""
    time_taken = milliseconds(lambda: host.virsh("start", domain.name))
    host.virsh("destroy", domain.name)
    return time_taken


def measure(runs: int) -> None:
    """Print the table."""
    ours = DomainXml.example().boot(guest_image(), GUEST_ADDRESS)
    foreign = DomainXml(str(ours)).without_vdpa()
    print(f"{'':<44}{'median':>11}   {'least … most':<15}  runs")
    measure_foreign(foreign, runs * CALLS_PER_RUN)
    with VdpaHost("bench") as host, LibvirtHost("peer") as peer:
        measure_ours(host, ours, runs)
        measure_start(host, peer, ours, runs)


def measure_foreign(foreign: DomainXml, calls: int) -> None:
    """The hook for a domain without our metadata, beside an interpreter that does nothing."""
    call = hook_call(foreign, "prepare")
    hook, interpreter = [], []
    for _ in range(calls):
        hook.append(milliseconds(call))
        interpreter.append(milliseconds(lambda: run(INTERPRETER)))
    median = show("hook, foreign domain", hook, "limit 20 ms")
    show("  the interpreter alone", interpreter)
    print(f"{'  ratio':<44}{median / statistics.median(interpreter):8.2f}")


def measure_ours(host: VdpaHost, ours: DomainXml, runs: int) -> None:
    """The hook's calls in the life of a domain of ours, without libvirt and QEMU around them."""
    socket = Path(f"/proc/{host.init_pid}/root{RUN_FOLDER}/virtvdpad.sock")
    times: dict[str, list[float]] = {operation: [] for operation in SUB_OPERATIONS}
    for _ in range(runs):
        for operation in SUB_OPERATIONS:
            times[operation].append(milliseconds(hook_call(ours, operation, socket)))
    for operation in SUB_OPERATIONS:
        show(f"hook, our domain: {operation}", times[operation])


def measure_start(host: VdpaHost, peer: LibvirtHost, ours: DomainXml, runs: int) -> None:
    """`virsh start` with our hook and port, beside the same start with DPDK's vhost and no hook."""
    theirs = DomainXml(str(ours))
    theirs.root.remove(theirs.element("metadata"))
    back_end = peer.path(theirs.socket)
    back_end.parent.mkdir(parents=True)
    # Interactive and never told to start: it serves the socket and does not poll the rings.
    device = f"--vdev=net_vhost0,iface={theirs.socket}"
    eal = ["--no-huge", "-m", "256", "--no-pci", "--lcores=0@0,1@1", device]
    command = ["dpdk-testpmd", *eal, "--", "--interactive", "--total-num-mbufs=8192"]
    testpmd = peer.spawn("testpmd", command, stdin=subprocess.PIPE)
    testpmd.wait_for("its socket", back_end.exists, 20)

    host.define(ours)
    peer.define(theirs)
    # The first start on a host asks QEMU for its capabilities.
    start_and_destroy(host, ours)
    start_and_destroy(peer, theirs)
    with_us, without = [], []
    for _ in range(runs):
        with_us.append(start_and_destroy(host, ours))
        without.append(start_and_destroy(peer, theirs))
    median = show("virsh start: our hook and port", with_us)
    peers = show("virsh start: DPDK's vhost, no hook", without)
    print(f"{'  added':<44}{median - peers:8.1f} ms   ratio {median / peers:.2f}, limit 200 ms")
