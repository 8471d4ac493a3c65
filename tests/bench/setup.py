"""`./bench setup`: from a front-end's connect until rings run, and until its first frame is on the cable.

A front-end of ours sends both back-ends the same messages, with the features and protocol features that both
have, and a frame as soon as it has been told that all was carried out. Ours is a port with an emulated VF,
whose registers lie behind another socket; the peer is dpdk-testpmd, which forwards between its vhost and its
TAP driver and has no device to set up. Both serve one front-end after another.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from datapath.vhost_user.messages import ProtocolFeature
from datapath.virtio import Feature, bit
from tests.bench.interleaved import interleaved
from tests.bench.rows import Row, Spread, less_is_better
from tests.bench.setup_dpdk import DpdkBackEnd
from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.front_end import SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.traffic import transmit
from tests.harness.wire import Wire

FEATURES = bit(Feature.F_VERSION_1)
PROTOCOL = bit(ProtocolFeature.MQ) | bit(ProtocolFeature.REPLY_ACK) | bit(ProtocolFeature.STATUS)
FRAME = 1
#: What a port says of a start: in its handlers, mapping memory, and at the VF.
SHARES = ("handlers_ms", "memory_ms", "device_ms")


def session(socket: Path, wire: Wire) -> tuple[float, float]:
    """A front-end's life; milliseconds until its rings ran, and until its first frame was there."""
    begin = time.perf_counter()
    with closing(SocketFrontEnd.dial(socket, PROTOCOL)) as front:
        front.connect()
        front.start(FEATURES)
        running = time.perf_counter()
        transmit(front, FRAME)
        wire.expect(FRAME)
        return 1000 * (running - begin), 1000 * (time.perf_counter() - begin)


def our_session(port: PortProcess, wire: Wire, shares: dict[str, list[float]]) -> tuple[float, float]:
    """A session with a port that waits for one; what the port says of its start is added to `shares`."""
    times = session(port.socket, wire)
    start = port.wait_state("waiting")["timing"]["start"]
    for name in SHARES:
        shares[name].append(start[name])
    return times


def their_session(back_end: DpdkBackEnd) -> tuple[float, float]:
    """A session with DPDK, which polls only as long."""
    back_end.rest(False)
    try:
        times = session(back_end.socket, back_end.wire)
        back_end.wait_until_free()
    finally:
        back_end.rest(True)
    return times


def measure(runs: int) -> Iterator[Row | str]:
    """Rows for either point in time, then where ours goes."""
    yield "the peer is dpdk-testpmd: net_vhost and net_tap, forwarding between them"
    with tempfile.TemporaryDirectory(prefix="vdpa-bench-") as path, ExitStack() as stack:
        folder = Path(path)
        network = stack.enter_context(NetworkNamespace())
        nic = stack.enter_context(EmulatedNic(folder / "nic", network, 1))
        wire = stack.enter_context(closing(Wire(network, "vf0")))
        port = stack.enter_context(PortProcess(folder, nic.device(0)))
        back_end = stack.enter_context(closing(DpdkBackEnd(folder, network)))
        shares: dict[str, list[float]] = {name: [] for name in SHARES}
        ours = partial(our_session, port, wire, shares)
        found = interleaved(runs, ours, partial(their_session, back_end), warm_up=1)
    for which, name in enumerate(("connect to DRIVER_OK, rings running", "connect to first frame")):
        mine, theirs = ([times[which] for times in each] for each in found)
        yield less_is_better(name, "ms", mine, theirs)
    # Without the one that warms up.
    all_, memory, device = (Spread.of(shares[name][1:]) for name in SHARES)
    yield f"in our port's handlers: {all_} ms; of it mapping memory: {memory}, starting the VF: {device}"
