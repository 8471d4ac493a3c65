"""`./bench packets`: packets per second through a VF's virtqueues, there and back.

dpdk-testpmd with a virtio-user device sends to a port whose emulated VF sends everything back, addresses
exchanged (virt-vdpa-nic --echo), and to dpdk-testpmd with a vhost device that does the same (macswap).
Each has one thread for packets, both on the same processor; the generator's is on the other. Each pair
stands still while the other is measured, and the features negotiated have to be the same.

The generator either sends what it can make and counts what comes back (flowgen), or has 256 packets on
their way and sends back what comes (tx-first).
"""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from datapath.vhost_user.backend import F_LOG_ALL, F_PROTOCOL_FEATURES
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
#: vhost-user's own among the features.
OF_THE_TRANSPORT = F_LOG_ALL | F_PROTOCOL_FEATURES


class Pair:
    """A back-end and the generator that loads it, standing still but while they are measured."""

    def __init__(self, back_end: BackEnd, folder: Path, mode: str, size: int, stack: ExitStack) -> None:
        """:param stack: ends the generator."""
        self._back_end = back_end
        self._generator = stack.enter_context(closing(Generator(folder, back_end.socket, mode, size)))
        self.features = back_end.features() & ~OF_THE_TRANSPORT
        back_end.rest(True)

    def measure(self) -> float:
        """Millions of packets per second."""
        self._back_end.rest(False)
        try:
            return self._generator.rate(SAMPLE) / 1e6
        finally:
            self._back_end.rest(True)


def measure(runs: int) -> Iterator[Row | str]:
    """A row for each way of generating and each size."""
    yield "the peer is dpdk-testpmd: net_vhost, macswap; one thread each, on the same processor"
    for mode, size in itertools.product(MODES, SIZES):
        with tempfile.TemporaryDirectory(prefix="vdpa-bench-") as path, ExitStack() as stack:
            theirs_at, ours_at = Path(path, "dpdk"), Path(path, "ours")
            theirs_at.mkdir()
            ours_at.mkdir()
            network = stack.enter_context(NetworkNamespace())
            peer = Pair(stack.enter_context(closing(DpdkBackEnd(theirs_at))), theirs_at, mode, size, stack)
            back_end = stack.enter_context(closing(OurBackEnd(ours_at, network, peer.features)))
            ours = Pair(back_end, ours_at, mode, size, stack)
            if ours.features != peer.features:
                raise HarnessError(
                    f"{mode}, {size} bytes: features {ours.features:#x} were negotiated with ours, "
                    f"{peer.features:#x} with the peer"
                )
            found = interleaved(runs, partial(ours.measure), partial(peer.measure))
        yield more_is_better(f"{mode}, {size} bytes (features {ours.features:#x})", "million/s", *found)
