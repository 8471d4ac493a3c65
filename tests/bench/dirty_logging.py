"""`./bench logging`: packets per second through a port with logging off and on, and where the time goes.

DPDK's testpmd loads an emulated VF as fast as it can, transmitting or receiving, through the proxy that
begins and ends logging as QEMU does. One port marks in software, another by its VF; each is measured with
logging off and on in turn, all in one run, the others' front-ends stopped meanwhile. The log is taken ten
times a second: QEMU does so less often.

CPU time is of threads as the kernel counts it (proc(5)), in percent of one processor: the port's relay, the
NIC's engine, which is the VF, the front-end, what of port and NIC is neither, and whoever sends frames to the
VF, which is this program. The front-end polls, so it takes a processor whatever it does.
"""

import itertools
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from tests.bench.rows import Row, more_is_better
from tests.harness.dirty_pages import GuestPages, Traffic
from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import wait_for
from tests.harness.procfs import thread_times
from tests.harness.testpmd import HEADER_OUT, Testpmd
from tests.harness.vhost_user_proxy import VhostUserProxy

#: Seconds of one sample, and between two looks at the log.
SAMPLE, LOOK = 0.5, 0.1
QUEUE_SIZE = 256
#: Bytes of a frame that is received, as testpmd transmits.
FRAME = 64
#: Directions: what testpmd does, and the NIC's counter.
DIRECTIONS = {"transmit": ("txonly", "tx_packets"), "receive": ("rxonly", "rx_packets")}
MODES = ("software", "hardware")


@dataclass(frozen=True)
class Sample:
    """Packets per second, and percent of a processor by what it is spent on."""

    rate: float
    cpu: Mapping[str, float]


class Rig:
    """One port at work for a front-end that stands still between measurements."""

    def __init__(self, folder: Path, nic: EmulatedNic, vf: int, direction: str, log_mode: str) -> None:
        mode, self._counter = DIRECTIONS[direction]
        self._nic, self._vf = nic, vf
        self._close = ExitStack()
        enter = self._close.enter_context
        try:
            self._port = enter(PortProcess(folder, nic.device(vf), f"--log-mode={log_mode}"))
            self._proxy = enter(VhostUserProxy(folder / "proxy.sock", self._port.socket))
            self._peer = enter(
                Testpmd(folder, self._proxy.path, mode, queue_size=QUEUE_SIZE, options=["--mbcache=0"])
            )
            self._proxy.wait_until_running()
            self._traffic: Traffic | None = None
            if direction == "receive":
                wire = enter(closing(nic.namespace.packet_socket(f"vf{vf}")))
                self._traffic = enter(closing(Traffic(wire, HEADER_OUT, FRAME, FRAME, pause=0)))
            self._pages = enter(closing(GuestPages(self._proxy)))
            before = self._packets()
            wait_for("packets through the VF", lambda: self._packets() > before + QUEUE_SIZE, 60)
        except BaseException:
            self._close.close()
            raise
        self._rest(True)

    def _packets(self) -> int:
        count: int = self._nic.query(self._vf)[self._counter]
        return count

    def _rest(self, on: bool) -> None:
        self._peer.signal(signal.SIGSTOP if on else signal.SIGCONT)
        if self._traffic is not None:
            self._traffic.rest(on)

    def _cpu(self) -> dict[str, float]:
        """Seconds of CPU so far."""
        port, nic = thread_times(self._port.pid), thread_times(self._nic.pid)
        return {
            "relay": sum(port.values()) - port[self._port.pid],
            "VF": sum(nic.values()) - nic[self._nic.pid],
            "front-end": sum(thread_times(self._peer.pid).values()),
            "control": port[self._port.pid] + nic[self._nic.pid],
            "sender": sum(thread_times(os.getpid()).values()),
        }

    def measure(self, logging: bool) -> Sample:
        """A sample with logging on or off."""
        self._rest(False)
        try:
            if logging:
                self._proxy.start_logging(self._pages.log, self._pages.log_size)
            # Packets, and whoever has been asleep, come into their stride.
            self._watch(SAMPLE / 2, logging)
            packets, cpu, begin = self._packets(), self._cpu(), time.monotonic()
            self._watch(SAMPLE, logging)
            packets, after, seconds = self._packets() - packets, self._cpu(), time.monotonic() - begin
            if logging:
                self._proxy.stop_logging()
        finally:
            self._rest(True)
        used = {name: 100 * (after[name] - cpu[name]) / seconds for name in cpu}
        return Sample(packets / seconds, used)

    def _watch(self, seconds: float, logging: bool) -> None:
        """Let the load go on, and take the log as a migration does."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LOOK))
            if logging:
                self._pages.take_bits()

    def close(self) -> None:
        """End the front-end, then the port."""
        self._peer.signal(signal.SIGCONT)
        self._close.close()


Samples = Mapping[tuple[str, bool], list[Sample]]


def rows(direction: str, samples: Samples) -> Iterator[Row]:
    """A direction's packets, through each port with logging off and on."""
    for mode, logging in itertools.product(MODES, (False, True)):
        what = f"logged in {mode}" if logging else f"not logged (port for {mode})"
        rates = [sample.rate for sample in samples[mode, logging]]
        yield more_is_better(f"{direction}, {what}", "packets/s", rates)


def time_spent(direction: str, samples: Samples) -> Iterator[str]:
    """Where a direction's time goes: percent of a processor, medians."""
    spenders = list(samples[MODES[0], False][0].cpu)
    yield f"  {direction + ', percent of a processor':<46}{'of rate off':>12}" + "".join(
        f"{name:>11}" for name in spenders
    )
    for mode, logging in itertools.product(MODES, (False, True)):
        taken = samples[mode, logging]
        rate = statistics.median(sample.rate for sample in taken)
        without = statistics.median(sample.rate for sample in samples[mode, False])
        cpu = (statistics.median(sample.cpu[name] for sample in taken) for name in spenders)
        what = f"logged in {mode}" if logging else f"not logged (port for {mode})"
        yield f"    {what:<44}{100 * rate / without:>10.0f} %" + "".join(f"{used:11.0f}" for used in cpu)


def measure(runs: int) -> Iterator[Row | str]:
    """Rows of both directions, each followed by where its time goes."""
    yield "without a peer: what logging takes shows beside the same port without it"
    for direction in DIRECTIONS:
        samples = take_samples(direction, runs)
        yield from rows(direction, samples)
        yield from time_spent(direction, samples)


def take_samples(direction: str, runs: int) -> Samples:
    """Both ports, with logging off and on, in turn."""
    with tempfile.TemporaryDirectory(prefix="vdpa-bench-") as path, ExitStack() as stack:
        folder = Path(path)
        network = stack.enter_context(NetworkNamespace())
        nic = stack.enter_context(EmulatedNic(folder / "nic", network, len(MODES)))
        rigs = {}
        for vf, mode in enumerate(MODES):
            (folder / mode).mkdir()
            rigs[mode] = stack.enter_context(closing(Rig(folder / mode, nic, vf, direction, mode)))
        samples: dict[tuple[str, bool], list[Sample]] = {
            key: [] for key in itertools.product(MODES, (False, True))
        }
        for _ in range(runs):
            for mode, logging in samples:
                samples[mode, logging].append(rigs[mode].measure(logging))
        return samples
