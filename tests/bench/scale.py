"""`./bench scale`: what ports cost when there are many: their start, memory, descriptors and idle time.

Each has a VF of an emulated NIC and a front-end whose rings run, as that of a guest that does nothing. A few
start at a time, as many as there are processors: more would wait for each other. NICs are not counted.

Memory is what the kernel says (proc(5), smaps_rollup): PSS counts a page that n processes have as 1/n, so
that the sum is what all ports take together; what is private to a port is what one more takes. Processor time
is that of all threads, in nanoseconds (schedstat): clock ticks are too coarse for what is almost nothing.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from datapath.emulation.nic import MAX_VFS
from tests.bench.rows import Row, figure, less_is_better
from tests.harness.emulated_nic import BIN, EmulatedNic
from tests.harness.front_end import SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import Process

SIZES = (1, 16, 64, 256)
#: Seconds that ports are watched doing nothing, after as many in which they come to rest.
IDLE, REST = 5.0, 2.0
#: Seconds for a few ports to start.
START_TIME = 60.0
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Cost:
    """Of a number of ports; for each of them, but for the last."""

    start_ms: float
    pss_mb: float
    private_mb: float
    descriptors: float
    #: Percent of a processor that all of them use together.
    idle: float


#: The rows: unit, and the figure.
FIGURES: Mapping[str, tuple[str, Callable[[Cost], float]]] = {
    "start": ("ms", lambda cost: cost.start_ms),
    "PSS": ("MB", lambda cost: cost.pss_mb),
    "private memory (limit 10 MB)": ("MB", lambda cost: cost.private_mb),
    "descriptors": ("fds", lambda cost: cost.descriptors),
    "idle processor time, all ports": ("%", lambda cost: cost.idle),
}
#: Those that would grow if ports were in each other's way, and how much more a port among many may cost.
GROWING, LINEAR = ("start", "private memory (limit 10 MB)", "descriptors"), 1.25


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    pss: int
    private: int

    @classmethod
    def of(cls, pid: int) -> "Memory":
        """As the kernel counts it now."""
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {
            name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)
        }
        private = ("Private_Clean", "Private_Dirty", "Private_Hugetlb")
        return cls(sizes["Pss"], sum(sizes[name] for name in private))


def processor_time(pids: Sequence[int]) -> int:
    """Nanoseconds that all threads of these processes have run."""
    return sum(
        int((task / "schedstat").read_text().split()[0])
        for pid in pids
        for task in Path(f"/proc/{pid}/task").iterdir()
    )


class Ports:
    """So many ports, each with a VF."""

    def __init__(self, folder: Path, nics: Sequence[EmulatedNic], count: int, stack: ExitStack) -> None:
        """Start them, and give each a front-end.

        :param stack: ends them.
        :raise HarnessError: when one does not start.
        """
        begin = time.perf_counter()
        self._processes: list[Process] = []
        self._sockets = [folder / f"{number}.sock" for number in range(count)]
        at_once = len(os.sched_getaffinity(0))
        for number, socket in enumerate(self._sockets):
            if number >= at_once:
                self._wait(number - at_once)
            argv: list[str | Path] = [
                BIN / "virt-vdpa-port",
                f"--device={nics[number // MAX_VFS].device(number % MAX_VFS)}",
                f"--socket-path={socket}",
                f"--control={folder}/{number}.ctl",
            ]
            self._processes.append(stack.enter_context(Process(argv, folder / f"{number}.log")))
        for number in range(count):
            self._wait(number)
        self.start_ms = 1000 * (time.perf_counter() - begin)
        for socket in self._sockets:
            front = stack.enter_context(closing(SocketFrontEnd.dial(socket)))
            front.connect()
            front.start()

    def _wait(self, number: int) -> None:
        """Until a port has opened its VF and serves its socket."""
        self._processes[number].wait_for("its socket", self._sockets[number].exists, START_TIME)

    def cost(self) -> Cost:
        """What they take while nothing happens."""
        pids = [process.pid for process in self._processes]
        time.sleep(REST)
        used, begin = processor_time(pids), time.monotonic_ns()
        time.sleep(IDLE)
        idle = 100 * (processor_time(pids) - used) / (time.monotonic_ns() - begin)
        memory = [Memory.of(pid) for pid in pids]
        descriptors = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
        count = len(pids)
        return Cost(
            start_ms=self.start_ms / count,
            pss_mb=sum(each.pss for each in memory) / count / MEGABYTE,
            private_mb=sum(each.private for each in memory) / count / MEGABYTE,
            descriptors=descriptors / count,
            idle=idle,
        )


def sample(count: int) -> Cost:
    """Start so many ports, see what they cost, end them."""
    with tempfile.TemporaryDirectory(prefix="vdpa-bench-") as path, ExitStack() as stack:
        folder = Path(path)
        nics = []
        for number, first in enumerate(range(0, count, MAX_VFS)):
            # One network namespace each: TAPs of all have the same names.
            network = stack.enter_context(NetworkNamespace())
            vfs = min(MAX_VFS, count - first)
            nics.append(stack.enter_context(EmulatedNic(folder / f"nic{number}", network, vfs)))
        with ExitStack() as ports:
            return Ports(folder, nics, count, ports).cost()


def measure(runs: int) -> Iterator[Row | str]:
    """Rows for each number of ports, then whether it is linear."""
    yield "without a peer; of each port, while all of them run rings of a guest that does nothing"
    costs: dict[int, list[Cost]] = {count: [] for count in SIZES}
    for run in range(runs):
        # In turn, once up and once down: this or that number of ports is not to meet a slower machine.
        for count in SIZES if run % 2 == 0 else reversed(SIZES):
            costs[count].append(sample(count))
    for count in SIZES:
        yield from rows(count, costs[count])
    yield linear(costs)


def rows(count: int, costs: Sequence[Cost]) -> Iterator[Row]:
    """What so many ports cost."""
    of = f"{count:>3} port{'s' if count > 1 else ''}"
    for name, (unit, value) in FIGURES.items():
        yield less_is_better(f"{of}: {name}", unit, map(value, costs))


def linear(costs: Mapping[int, Sequence[Cost]]) -> str:
    """Whether a port among the most costs what one among a few does.

    One alone has nobody to share with, and nobody who starts at the same time.
    """
    few, many = sorted(costs)[1], max(costs)
    said = []
    for name in GROWING:
        _, value = FIGURES[name]
        less, more = (statistics.median(map(value, costs[count])) for count in (few, many))
        said.append(f"{name} x {figure(more / less)}{'' if more <= LINEAR * less else ', NOT LINEAR'}")
    return f"a port among {many} beside one among {few}: {'; '.join(said)}"
