"""`./bench kick`: how long a guest's notification is on its way to the VF's doorbell.

A thread stands in for guest and VF: it writes to the kick eventfd, as KVM does when the guest notifies, and
looks at the doorbell until that has been rung. Between are our relay, as a port has it, or a thread that does
what the notify relay of DPDK's ifcvf driver does; both wait for the kick in the kernel. That driver knows
mapped doorbells alone; where a NIC has eventfds, as the emulated one by default, its thread writes to those.
"""

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from datapath.native.relay import Doorbell, Relay
from tests.bench.compiled import compiled
from tests.bench.interleaved import interleaved
from tests.bench.rows import Row, less_is_better, percentile
from tests.harness.processes import HarnessError

#: Kicks at a time, and microseconds between two: a guest that is neither idle nor at full load.
KICKS, PAUSE = 50, 1000
#: How many times a run has ours and the peer's in turn: how fast a processor wakes changes within seconds.
TURNS = 10
QUEUE = 0


class Line:
    """One queue's kick and doorbell, with a relay between them."""

    def __init__(self, module: Any, mapped: bool, *, ours: bool) -> None:
        """:raise HarnessError: when there can be no relay."""
        self._module = module
        with ExitStack() as undo:
            self.kick = self._eventfd(undo)
            self._page = mmap.mmap(-1, mmap.PAGESIZE)
            self._view = module.ffi.from_buffer("uint16_t[]", self._page)
            doorbell_fd = -1 if mapped else self._eventfd(undo)
            doorbell = {"mapped": self._view if mapped else module.ffi.NULL, "fd": doorbell_fd}
            self._doorbell = module.ffi.new("struct doorbell *", doorbell)[0]
            if ours:
                relay = Relay(1)
                undo.callback(relay.close)
                address = int(module.ffi.cast("uintptr_t", self._view))
                relay.add(QUEUE, self.kick, Doorbell(address=address) if mapped else Doorbell(doorbell_fd))
            else:
                peer = module.lib.dpdk_kicks_begin(self.kick, self._doorbell)
                if not peer:
                    raise HarnessError("DPDK's half of the measurement has no thread")
                undo.callback(module.lib.dpdk_kicks_end, peer)
            self._resources = undo.pop_all()

    @staticmethod
    def _eventfd(undo: ExitStack) -> int:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        undo.callback(os.close, fd)
        return fd

    def measure(self) -> list[float]:
        """Microseconds of each of some kicks.

        :raise HarnessError: when one does not arrive.
        """
        times = self._module.ffi.new("double[]", KICKS)
        if self._module.lib.kick_times(self.kick, self._doorbell, PAUSE, times, KICKS) < 0:
            raise HarnessError("a kick did not reach its doorbell")
        return [nanoseconds / 1000 for nanoseconds in times]

    def close(self) -> None:
        """End the relay."""
        self._resources.close()


def runs_of_turns(turns: list[list[float]]) -> list[list[float]]:
    """All kicks of each run."""
    return [list(chain(*turns[begin : begin + TURNS])) for begin in range(0, len(turns), TURNS)]


def measure(runs: int) -> Iterator[Row | str]:
    """Rows for either kind of doorbell."""
    yield (
        "the peer is a thread that does as DPDK's ifcvf driver;"
        f" {KICKS} kicks in turn, {KICKS * TURNS} a run, {PAUSE} us apart"
    )
    with tempfile.TemporaryDirectory(prefix="vdpa-bench-") as folder:
        module = compiled("kick_dpdk", Path(folder), libraries=["libdpdk"])
        for kind, mapped in (("mapped doorbell", True), ("eventfd doorbell", False)):
            with ExitStack() as stack:
                lines = [Line(module, mapped, ours=ours) for ours in (True, False)]
                for line in lines:
                    stack.callback(line.close)
                times = interleaved(runs * TURNS, lines[0].measure, lines[1].measure, warm_up=1)
            ours, peer = map(runs_of_turns, times)
            for name, pick in (("median", 50), ("99th percentile", 99)):
                rank = partial(percentile, rank=pick)
                yield less_is_better(f"{kind}, {name}", "us", map(rank, ours), map(rank, peer))
