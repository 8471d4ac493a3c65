"""What our relay takes for a used entry, beside the one that DPDK's drivers have.

Both carry over the same ring: 256 receive buffers, a page each. A sample is a ring full, in calls of some
entries each; samples of both alternate, so that both meet the same machine. Ours also logs what it writes
into the used ring, which DPDK leaves to its caller, and checks what the device says.
"""

import itertools
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

from tests.bench.interleaved import interleaved
from tests.bench.relay_dpdk import DpdkRelay
from tests.bench.relay_ours import OurRelay
from tests.bench.rows import Row, less_is_better
from tests.bench.used_entries import LENGTH, check
from tests.harness.processes import HarnessError
from tests.harness.virtqueue import Virtqueue

BATCHES = (1, 8, 64, 256)
#: Rings full for each sample.
RINGS = 200


class UsedRelay(Protocol):
    """A relay that can be timed."""

    name: str
    queue: Virtqueue

    def log(self, on: bool) -> None: ...
    def measure(self, length: int, batch: int, count: int) -> list[float]: ...
    def logged(self) -> bytes: ...
    def close(self) -> None: ...


def sample(relay: UsedRelay, batch: int, log: bool) -> float:
    """Nanoseconds per entry: the median of many rings full.

    :raise HarnessError: when what was to be carried over did not arrive.
    """
    times = relay.measure(LENGTH, batch, RINGS)
    try:
        check(relay.queue, relay.logged(), log)
    except ValueError as error:
        raise HarnessError(f"{relay.name}: {error}") from None
    return statistics.median(times)


def measure(runs: int) -> Iterator[Row | str]:
    """A row for each size of a batch, with and without a log."""
    with tempfile.TemporaryDirectory(prefix="vdpa-bench-") as folder, ExitStack() as stack:
        ours: UsedRelay = OurRelay(Path(folder))
        stack.callback(ours.close)
        peer: UsedRelay = DpdkRelay(Path(folder))
        stack.callback(peer.close)
        yield f"{ours.name}, beside {peer.name}; nanoseconds for a used entry"
        for log, batch in itertools.product((False, True), BATCHES):
            for each in (ours, peer):
                each.log(log)
            # The first sample of each kind meets cold caches.
            times = interleaved(
                runs, partial(sample, ours, batch, log), partial(sample, peer, batch, log), warm_up=1
            )
            yield less_is_better(f"log {'on' if log else 'off'}, {batch} entries a call", "ns", *times)
