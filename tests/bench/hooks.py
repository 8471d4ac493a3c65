"""What our hook costs a domain that is not ours, and what hook and port add to `virsh start`.

The peer is the same domain on a host without our hook, its NIC served by DPDK's vhost library: what an
operator has who tends the sockets by hand. Starts of both kinds alternate, so that both meet the same
machine; figures are medians.
"""

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.interleaved import interleaved
from tests.bench.rows import Row, less_is_better
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


def measure(runs: int) -> Iterator[Row | str]:
    """The hook by itself, then `virsh start`."""
    ours = DomainXml.example().boot(guest_image(), GUEST_ADDRESS)
    foreign = DomainXml(str(ours)).without_vdpa()
    yield "the hook's peer is an interpreter that does nothing; virsh start's is DPDK's vhost without a hook"
    yield measure_foreign(foreign, runs * CALLS_PER_RUN)
    with VdpaHost("bench") as host, LibvirtHost("peer") as peer:
        yield from measure_ours(host, ours, runs)
        yield from measure_start(host, peer, ours, runs)


def measure_foreign(foreign: DomainXml, calls: int) -> Row:
    """The hook for a domain without our metadata, beside an interpreter that does nothing."""
    call = hook_call(foreign, "prepare")
    hook, interpreter = interleaved(
        calls, lambda: milliseconds(call), lambda: milliseconds(lambda: run(INTERPRETER))
    )
    return less_is_better("hook, foreign domain (limit 20 ms)", "ms", hook, interpreter)


def measure_ours(host: VdpaHost, ours: DomainXml, runs: int) -> Iterator[Row]:
    """The hook's calls in the life of a domain of ours, without libvirt and QEMU around them."""
    socket = Path(f"/proc/{host.init_pid}/root{RUN_FOLDER}/virtvdpad.sock")
    times: dict[str, list[float]] = {operation: [] for operation in SUB_OPERATIONS}
    for _ in range(runs):
        for operation in SUB_OPERATIONS:
            times[operation].append(milliseconds(hook_call(ours, operation, socket)))
    for operation in SUB_OPERATIONS:
        yield less_is_better(f"hook, our domain: {operation}", "ms", times[operation])


def measure_start(host: VdpaHost, peer: LibvirtHost, ours: DomainXml, runs: int) -> Iterator[Row | str]:
    """`virsh start` with our hook and port, beside the same start with DPDK's vhost and no hook."""
    theirs = DomainXml(str(ours))
    theirs.root.remove(theirs.element("metadata"))
    serve_with_dpdk(peer, theirs)
    host.define(ours)
    peer.define(theirs)
    # The first start on a host asks QEMU for its capabilities.
    with_us, without = interleaved(
        runs, lambda: start_and_destroy(host, ours), lambda: start_and_destroy(peer, theirs), warm_up=1
    )
    row = less_is_better("virsh start", "ms", with_us, without)
    yield row
    added = row.ours.median - statistics.median(without)
    yield f"hook and port add {added:.1f} ms to virsh start (limit 200 ms)"


def serve_with_dpdk(peer: LibvirtHost, domain: DomainXml) -> None:
    """A back-end for the domain's NIC."""
    back_end = peer.path(domain.socket)
    back_end.parent.mkdir(parents=True)
    # Interactive and never told to start: it serves the socket and does not poll the rings.
    device = f"--vdev=net_vhost0,iface={domain.socket}"
    eal = ["--no-huge", "-m", "256", "--no-pci", "--lcores=0@0,1@1", device]
    command = ["dpdk-testpmd", *eal, "--", "--interactive", "--total-num-mbufs=8192"]
    testpmd = peer.spawn("testpmd", command, stdin=subprocess.PIPE)
    testpmd.wait_for("its socket", back_end.exists, 20)
