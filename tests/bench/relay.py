"""What our relay takes for a used entry, beside the one that DPDK's drivers have.

Both carry over the same ring: 256 receive buffers, a page each. A sample is a ring full, in calls of some
entries each; samples of both alternate, so that both meet the same machine.
"""

import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from tests.bench.relay_dpdk import DpdkRelay
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


def show(times: Iterable[float]) -> str:
    """Median, least and most as a column."""
    values = sorted(times)
    return f"{statistics.median(values):8.1f}   {values[0]:6.1f} … {values[-1]:<6.1f}"


def measure(runs: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(prefix="vdpa-bench-") as folder:
        dpdk = DpdkRelay(Path(folder))
        try:
            print(f"nanoseconds per used entry, {runs} runs: median, least … most")
            print(f"{'log':<5}{'batch':>5}   {dpdk.name}")
            for log in (False, True):
                dpdk.log(log)
                for batch in BATCHES:
                    times = [sample(dpdk, batch, log) for _ in range(runs)]
                    print(f"{'on' if log else 'off':<5}{batch:>5}   {show(times)}")
        finally:
            dpdk.close()
