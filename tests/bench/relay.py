"""What our relay takes for a used entry, beside the one that DPDK's drivers have.

Both carry over the same ring: 256 receive buffers, a page each. A sample is a ring full, in calls of some
entries each; samples of both alternate, so that both meet the same machine. Ours also logs what it writes
into the used ring, which DPDK leaves to its caller, and checks what the device says.
"""

import itertools
import statistics
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from tests.bench.relay_dpdk import DpdkRelay
from tests.bench.relay_ours import OurRelay
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


def column(times: Iterable[float]) -> str:
    """Median, least and most."""
    values = sorted(times)
    return f"{statistics.median(values):8.1f}   {values[0]:5.1f} … {values[-1]:<5.1f}"


def measure(runs: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(prefix="vdpa-bench-") as folder, ExitStack() as stack:
        relays: list[UsedRelay] = []
        for kind in (OurRelay, DpdkRelay):
            relays.append(kind(Path(folder)))
            stack.callback(relays[-1].close)
        print(f"nanoseconds per used entry: median, least … most of {runs} runs")
        print(f"{'log':<4}{'batch':>5}" + "".join(f"   {relay.name:<34}" for relay in relays) + "ratio")
        for log, batch in itertools.product((False, True), BATCHES):
            for relay in relays:
                relay.log(log)
            # The first sample of each kind meets cold caches.
            samples = [[sample(relay, batch, log) for relay in relays] for _ in range(runs + 1)][1:]
            times = list(zip(*samples, strict=True))
            ratio = statistics.median(times[0]) / statistics.median(times[1])
            columns = "".join(f"   {column(each):<34}" for each in times)
            print(f"{'on' if log else 'off':<4}{batch:>5}{columns}{ratio:5.2f}")
