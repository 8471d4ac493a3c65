"""`./bench mlx5-setup`: how long a ConnectX takes to start rings, of one pair and of sixteen.

The ConnectX is the emulated one, in this process as in a port's: each of its commands takes 0.8 ms, and its
firmware works on eight at a time. Every figure is the first start of a device that was opened for it, with
guest memory mapped; the memory's key is made within it. Beside threads that configure there is the same
without them, and with event queues and counters that were made when the device was opened.
"""

import mmap
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial

from datapath.emulation.mlx5 import LIBRARY
from datapath.native._native import ffi
from datapath.vdpa import DeviceError, DeviceSpec, MemoryRegion, Ring, RingState, open_device
from datapath.virtio import Feature, bit
from tests.bench.interleaved import interleaved
from tests.bench.rows import Row, Spread, less_is_better
from tests.harness.processes import HarnessError
from tests.harness.virtqueue import MemfdMemory, Virtqueue

PAIRS = 16
#: Of the emulated device: microseconds that a command takes, and how many it works on at a time.
LATENCY_US, SLOTS = 800, 8
RING_SIZE, RING_STRIDE = 256, 0x8000
FEATURES = bit(Feature.F_VERSION_1) | bit(Feature.NET_F_MQ)
#: What is measured -> what the device string says of it.
WAYS: Mapping[str, Mapping[str, int]] = {
    "16 threads": {"max_conf_threads": 16},
    "no threads": {},
    "16 threads, made beforehand": {"max_conf_threads": 16, "queues": PAIRS, "queue_size": RING_SIZE},
}


class Guest:
    """Memory with rings for all pairs."""

    def __init__(self) -> None:
        with ExitStack() as undo:
            memory = undo.enter_context(closing(MemfdMemory(2 * PAIRS * RING_STRIDE)))
            mapping = undo.enter_context(closing(mmap.mmap(memory.fd, memory.size)))
            address = int(ffi.cast("uintptr_t", ffi.from_buffer(mapping)))
            self.region = MemoryRegion(0, memory.size, memory.fd, 0, address)
            places = range(0, memory.size, RING_STRIDE)
            queues = [undo.enter_context(closing(Virtqueue(memory, at, RING_SIZE))) for at in places]
            self.rings = {index: _ring(queue) for index, queue in enumerate(queues)}
            self._resources = undo.pop_all()

    def close(self) -> None:
        """Give it back; no device has it any more."""
        self._resources.close()


def _ring(queue: Virtqueue) -> Ring:
    return Ring(
        queue.size,
        queue.descriptors,
        queue.avail,
        queue.used,
        RingState(0, 0),
        queue.kick_fd,
        queue.call_fd,
    )


def start(guest: Guest, way: str, pairs: int) -> tuple[float, float]:
    """Milliseconds of opening a device, and of starting so many of its pairs.

    :raise HarnessError: when that fails.
    """
    chosen = {"ibdev": "mlx5_0", "libibverbs": LIBRARY, "libmlx5": LIBRARY, **WAYS[way]}
    spec = DeviceSpec.parse(",".join(["mlx5", *(f"{name}={value}" for name, value in chosen.items())]))
    os.environ["MLX5_EMULATION"] = f"pairs={PAIRS},latency_us={LATENCY_US},slots={SLOTS}"
    begin = time.perf_counter()
    try:
        with closing(open_device(spec)) as device:
            opened = time.perf_counter()
            device.map_memory(guest.region)
            rings = {index: guest.rings[index] for index in range(2 * pairs)}
            mapped = time.perf_counter()
            device.start(FEATURES & device.features, rings)
            return 1000 * (opened - begin), 1000 * (time.perf_counter() - mapped)
    except DeviceError as error:
        raise HarnessError(str(error)) from error


def measure(runs: int) -> Iterator[Row | str]:
    """Rows for one pair and all, with threads and without; how many times as long all of them take."""
    yield f"{LATENCY_US / 1000} ms a command, {SLOTS} at a time; the peer is the same without threads"
    found: dict[tuple[str, int], tuple[list[tuple[float, float]], list[tuple[float, float]]]] = {}
    with closing(Guest()) as guest:
        for way in (way for way in WAYS if WAYS[way]):
            for pairs in (1, PAIRS):
                ours = partial(start, guest, way, pairs)
                peer = partial(start, guest, "no threads", pairs)
                found[way, pairs] = interleaved(runs, ours, peer, warm_up=1)
    for (way, pairs), (ours_found, peer_found) in found.items():
        name = f"start {pairs} pair{'s'[: pairs > 1]}, {way}"
        yield less_is_better(name, "ms", *([times[1] for times in each] for each in (ours_found, peer_found)))
    for way in (way for way in WAYS if WAYS[way]):
        opened = Spread.of(times[0] for pairs in (1, PAIRS) for times in found[way, pairs][0])
        yield f"{way}: {_ratio(found[way, PAIRS][0], found[way, 1][0])}; to open takes {opened} ms"
    yield f"no threads: {_ratio(found['16 threads', PAIRS][1], found['16 threads', 1][1])}"


def _ratio(all_: list[tuple[float, float]], one: list[tuple[float, float]]) -> str:
    """How many times as long all pairs take as one does, each measured as the other."""
    ratios = Spread.of(many[1] / few[1] for many, few in zip(all_, one, strict=True))
    return f"{PAIRS} pairs take {ratios} times as long as one"
