"""`./bench packets`: packets per second through a VF's virtqueues, there and back.

dpdk-testpmd with a virtio-user device sends to a port whose emulated VF sends everything back, addresses
exchanged (virt-vdpa-nic --echo), and to dpdk-testpmd with a vhost device that does the same (macswap).
Each has one thread for packets, both on the same processor; the generator's is on the other. Each pair
stands still while the other is measured, and the features negotiated have to be the same.

Each packet takes several cache lines from one processor to the other, and how long that takes may change
from one moment to the next where processors are virtual: it is told with each row.

The generator either sends what it can make and counts what comes back (flowgen), or has 256 packets on
their way, on each queue pair, and sends back what comes (tx-first).
"""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datapath.vhost_user.backend import F_LOG_ALL, F_PROTOCOL_FEATURES
from datapath.virtio import Feature, bit
from tests.bench.compiled import compiled
from tests.bench.interleaved import interleaved
from tests.bench.packets_peers import BackEnd, DpdkBackEnd, Generator, OurBackEnd
from tests.bench.rows import Row, more_is_better
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import HarnessError

MODES = ("flowgen", "tx-first")
#: Bytes of a frame without its checksum.
SIZES = (64, 512, 1518)
#: Seconds of a sample.
SAMPLE = 1.0
#: Features without a part in how packets move: vhost-user's own, and NET_F_CTRL_RX, which DPDK's vhost offers
#: to a driver with several pairs and leaves to whoever has its control queue.
APART = F_LOG_ALL | F_PROTOCOL_FEATURES | bit(Feature.NET_F_CTRL_RX)


@dataclass(frozen=True)
class Load:
    """What a generator does."""

    mode: str
    #: Bytes of a frame.
    size: int
    #: Queue pairs.
    pairs: int

    def __str__(self) -> str:
        pairs = "" if self.pairs == 1 else f", {self.pairs} pairs"
        return f"{self.mode}, {self.size} bytes{pairs}"


LOADS = (
    *(Load(mode, size, 1) for mode, size in itertools.product(MODES, SIZES)),
    *(Load(mode, size, 2) for mode, size in itertools.product(MODES, (SIZES[0], SIZES[-1]))),
)


class Pair:
    """A back-end and the generator that loads it, standing still but while they are measured."""

    def __init__(self, back_end: BackEnd, folder: Path, load: Load, stack: ExitStack) -> None:
        """:param stack: ends the generator."""
        self._back_end = back_end
        generator = Generator(folder, back_end.socket, load.mode, load.size, load.pairs)
        self._generator = stack.enter_context(closing(generator))
        self.features = back_end.features() & ~APART
        back_end.rest(True)

    def measure(self) -> float:
        """Millions of packets per second."""
        self._back_end.rest(False)
        try:
            return self._generator.rate(SAMPLE) / 1e6
        finally:
            self._back_end.rest(True)


class CacheLine:
    """How long what one of the two processors has written is on its way to the other and back."""

    def __init__(self) -> None:
        """:raise HarnessError: when the program does not compile."""
        with tempfile.TemporaryDirectory(prefix="vdpa-bench-") as folder:
            self._module = compiled("cache_line", Path(folder))

    def say(self) -> str:
        """In words, with its unit."""
        time: float = self._module.lib.cache_line_round_trip(0, 1)
        return "too long to be measured" if time < 0 else f"{time:.0f} ns"


def measure(runs: int) -> Iterator[Row | str]:
    """A row for each load."""
    yield "the peer is dpdk-testpmd: net_vhost, macswap; one thread each, on the same processor"
    yield "with several queue pairs, too, one thread has them all: ours is a VF's, theirs testpmd's one core"
    cache_line = CacheLine()
    for load in LOADS:
        before = cache_line.say()
        yield measure_load(load, runs)
        between = f"{before} before, {cache_line.say()} after"
        yield f"a cache line from one processor to the other and back: {between}"


def measure_load(load: Load, runs: int) -> Row:
    """One load of both.

    :raise HarnessError: when the features negotiated are not the same.
    """
    with tempfile.TemporaryDirectory(prefix="vdpa-bench-") as path, ExitStack() as stack:
        theirs_at, ours_at = Path(path, "dpdk"), Path(path, "ours")
        theirs_at.mkdir()
        ours_at.mkdir()
        network = stack.enter_context(NetworkNamespace())
        dpdk = stack.enter_context(closing(DpdkBackEnd(theirs_at, load.pairs)))
        peer = Pair(dpdk, theirs_at, load, stack)
        back_end = stack.enter_context(closing(OurBackEnd(ours_at, network, peer.features, load.pairs)))
        ours = Pair(back_end, ours_at, load, stack)
        if ours.features != peer.features:
            raise HarnessError(
                f"{load}: features {ours.features:#x} were negotiated with ours, "
                f"{peer.features:#x} with the peer"
            )
        found = interleaved(runs, partial(ours.measure), partial(peer.measure))
    return more_is_better(f"{load} ({ours.features:#x})", "million/s", *found)
