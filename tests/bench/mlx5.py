"""`./bench mlx5`: our driver for ConnectX beside DPDK's own, each on an emulated one of the same kind.

The emulated card lives in its driver's process: with ours in a port, with DPDK's (drivers/vdpa/mlx5,
unchanged) in a program that does nothing but serve its socket. Each command takes 0.8 ms, the firmware works
on eight at a time, and frames come back with their addresses exchanged. Both drivers have their defaults, or
eight threads that configure (`max_conf_threads`), and one front-end after another: how long until rings run,
until the first frame has come back, and until a front-end that stops knows where its rings stand. Then
packets: dpdk-testpmd with a virtio-user device has 256 on their way. Each stands still while the other is
measured.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datapath.vhost_user.messages import ProtocolFeature
from datapath.virtio import Feature, bit
from tests.bench.interleaved import interleaved
from tests.bench.packets_peers import Generator
from tests.bench.rows import Row, less_is_better, more_is_better
from tests.harness.connectx import ConnectX
from tests.harness.dpdk_vdpa import DpdkVdpa
from tests.harness.front_end import SocketFrontEnd
from tests.harness.processes import Process
from tests.harness.traffic import RX, offer_buffers, transmit

FEATURES = bit(Feature.F_VERSION_1)
#: What DPDK's driver has, too.
PROTOCOL = bit(ProtocolFeature.MQ) | bit(ProtocolFeature.STATUS)
#: Where rings lie: DPDK takes an address of 0 for none.
RINGS = 0x10000
CARD = {"pairs": 1, "latency_us": 800, "slots": 8}
#: What configures -> more of the device strings.
WAYS = {"defaults": "", "8 threads": "max_conf_threads=8"}
#: Seconds of a sample of packets.
SAMPLE = 1.0


class Times(NamedTuple):
    """Milliseconds of a front-end's life."""

    running: float
    first_frame: float
    stopped: float


class Side:
    """A back-end, standing still but while it is measured."""

    def __init__(self, process: Process, socket: Path) -> None:
        self._process = process
        self.socket = socket
        process.signal(signal.SIGSTOP)

    def __enter__(self) -> "Side":
        self._process.signal(signal.SIGCONT)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.signal(signal.SIGSTOP)

    def session(self) -> Times:
        """A front-end's life."""
        with self:
            begin = time.perf_counter()
            with closing(SocketFrontEnd.dial(self.socket, PROTOCOL)) as front:
                front.lay_rings_out(RINGS)
                front.connect()
                front.start(FEATURES)
                running = time.perf_counter()
                offer_buffers(front)
                transmit(front, 1)
                front.queues[RX].wait_used(1)
                first = time.perf_counter()
                front.stop()
                stopped = time.perf_counter()
        return Times(*(1000 * span for span in (running - begin, first - begin, stopped - first)))

    def rate(self, generator: Generator) -> float:
        """Millions of packets per second."""
        with self:
            return generator.rate(SAMPLE) / 1e6


def _sides(folder: Path, arguments: str, stack: ExitStack) -> tuple[Side, Side]:
    """Ours and DPDK's, both with `arguments` in their device strings."""
    folder.mkdir()
    options = dict(part.split("=") for part in arguments.split(",") if part)
    port = stack.enter_context(ConnectX(folder / "nic", None, **CARD).port(folder, **options))
    peer = stack.enter_context(DpdkVdpa(folder / "dpdk", arguments=arguments, options=CARD))
    peer.answer(0)
    return Side(port, port.socket), Side(peer, peer.socket)


def _lives(runs: int, folder: Path) -> Iterator[Row | str]:
    for way, arguments in WAYS.items():
        with ExitStack() as stack:
            ours, peer = _sides(folder / way.replace(" ", "-"), arguments, stack)
            found = interleaved(runs, ours.session, peer.session, warm_up=1)
        for name, which in (
            ("connect to rings running", "running"),
            ("connect to first frame back", "first_frame"),
            ("stop to last base", "stopped"),
        ):
            mine, theirs = ([getattr(times, which) for times in each] for each in found)
            yield less_is_better(f"{name}, {way}", "ms", mine, theirs)


def _packets(runs: int, folder: Path) -> Iterator[Row | str]:
    with ExitStack() as stack:
        sides = _sides(folder / "packets", "", stack)
        rates = []
        for name, side in zip(("ours", "peer"), sides, strict=True):
            place = folder / name
            place.mkdir()
            with side:
                generator = stack.enter_context(closing(Generator(place, side.socket, "tx-first", 64, 1)))
            rates.append(partial(side.rate, generator))
        mine, theirs = interleaved(runs, *rates, warm_up=1)
    yield more_is_better("256 packets of 64 bytes on their way", "Mpps", mine, theirs)


def measure(runs: int) -> Iterator[Row | str]:
    """Rows for the life of a front-end, then for packets."""
    yield "the peer is DPDK's mlx5 vDPA driver; 0.8 ms a command, 8 at a time"
    before = os.environ.pop("MLX5_EMULATION", None)  # each card has options of its own
    try:
        with tempfile.TemporaryDirectory(prefix="vdpa-bench-") as path:
            yield from _lives(runs, Path(path))
            yield from _packets(runs, Path(path))
    finally:
        if before is not None:
            os.environ["MLX5_EMULATION"] = before
