"""The back-ends of `./bench packets`, and the generator that loads them: processes, each on its processor.

A back-end has one thread that moves packets, on the first processor; the generator's has the second.
"""

import os
import re
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import Process, wait_for

EAL = ("--no-huge", "--no-pci", "--single-file-segments")
QUEUE_SIZE = 256


class BackEnd(Protocol):
    """What sends packets back."""

    socket: Path

    def features(self) -> int: ...
    def rest(self, on: bool) -> None: ...


class OurBackEnd:
    """A port with an emulated VF that sends everything back: one thread, whatever the number of pairs."""

    def __init__(self, folder: Path, network: NetworkNamespace, features: int, pairs: int) -> None:
        """:raise HarnessError: when it does not start."""
        with ExitStack() as undo:
            self._nic = undo.enter_context(
                EmulatedNic(folder / "nic", network, 1, "--echo", f"--queue-pairs={pairs}")
            )
            options = [f"--features={features:#x}"]
            self._port = undo.enter_context(PortProcess(folder, self._nic.device(0), *options))
            for task in Path(f"/proc/{self._nic.pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), {0})
            self._resources = undo.pop_all()
        self.socket = self._port.socket

    def features(self) -> int:
        """What was negotiated."""
        acked: int = self._port.wait_state("running")["features_acked"]
        return acked

    def rest(self, on: bool) -> None:
        """It sleeps by itself when nothing comes."""

    def close(self) -> None:
        """End both."""
        self._resources.close()


class DpdkBackEnd:
    """dpdk-testpmd that sends back what its vhost device receives: one thread for all pairs."""

    def __init__(self, folder: Path, pairs: int) -> None:
        """:raise HarnessError: when it does not start."""
        self.socket = folder / "vhost.sock"
        # Its main thread rests on the second processor, its forwarding thread runs on the first.
        eal = [*EAL, "-m", "256", "--file-prefix=vhost", "--lcores=0@1,1@0"]
        device = f"--vdev=net_vhost0,iface={self.socket},queues={pairs}"
        application = [
            "--auto-start",
            "--stats-period=600",
            "--forward-mode=macswap",
            "--total-num-mbufs=8192",
            f"--rxq={pairs}",
            f"--txq={pairs}",
        ]
        self._process = Process(
            ["dpdk-testpmd", *eal, device, "--", *application],
            folder / "vhost.log",
            env={**os.environ, "RUNTIME_DIRECTORY": str(folder)},
        )
        try:
            self._process.wait_for("forwarding", lambda: "packets/burst" in self._log(), 20)
        except BaseException:
            self._process.kill()
            raise

    def _log(self) -> str:
        return self._process.log.read_text(errors="replace")

    def features(self) -> int:
        """What was negotiated."""
        said = wait_for(
            "the features", lambda: re.findall(r"negotiated Virtio features: (0x\w+)", self._log()), 20
        )
        return int(said[-1], 16)

    def rest(self, on: bool) -> None:
        """Stand still, or go on: it polls."""
        self._process.signal(signal.SIGSTOP if on else signal.SIGCONT)

    def close(self) -> None:
        """End it."""
        self.rest(False)
        self._process.stop()


class Generator:
    """dpdk-testpmd with a virtio-user device: sends packets, and counts those that come back."""

    def __init__(self, folder: Path, socket: Path, mode: str, size: int, pairs: int) -> None:
        """Start it; it stands still until it is told to go on.

        :param mode: `flowgen`, or `tx-first`: 256 packets on their way on each pair, sent back as they come.
        """
        rings = f"queues={pairs},queue_size={QUEUE_SIZE},in_order=0,packed_vq=0"
        device = f"net_virtio_user0,path={socket},{rings}"
        eal = [*EAL, "-m", "256", "--file-prefix=user", "--lcores=0@0,1@1", f"--vdev={device}"]
        forward = "io" if mode == "tx-first" else mode
        application = [
            "--interactive",
            f"--forward-mode={forward}",
            f"--txpkts={size}",
            "--total-num-mbufs=8192",
            f"--rxq={pairs}",
            f"--txq={pairs}",
        ]
        log = folder / f"{mode}-{size}.log"
        self._process = Process(
            # Told what to do on its standard input it keeps its output to itself, a buffer full at a time.
            ["stdbuf", "-oL", "dpdk-testpmd", *eal, "--", *application],
            log,
            env={**os.environ, "RUNTIME_DIRECTORY": str(folder)},
            stdin=subprocess.PIPE,
        )
        try:
            self._process.wait_for("its prompt", lambda: "testpmd>" in self._log(), 30)
            self._say("start tx_first 8" if mode == "tx-first" else "start")
            self._process.wait_for("forwarding", lambda: "packets/burst" in self._log(), 20)
            self._process.wait_for("packets that come back", lambda: self.received() > 0, 20)
        except BaseException:
            self.close()
            raise
        self.rest(True)

    def _log(self) -> str:
        return self._process.log.read_text(errors="replace")

    def _say(self, command: str) -> None:
        stdin = self._process.popen.stdin
        assert stdin is not None
        stdin.write(f"{command}\n".encode())
        stdin.flush()

    def received(self) -> int:
        """Packets that have come back so far."""
        pattern = re.compile(r"RX-packets: (\d+)")
        before = len(pattern.findall(self._log()))
        self._say("show port stats 0")
        said = self._process.wait_for("statistics", lambda: pattern.findall(self._log())[before:], 10)
        return int(said[0])

    def rest(self, on: bool) -> None:
        """Stand still, or go on."""
        self._process.signal(signal.SIGSTOP if on else signal.SIGCONT)

    def rate(self, seconds: float) -> float:
        """Packets per second that come back."""
        self.rest(False)
        time.sleep(seconds / 4)
        packets, begin = self.received(), time.monotonic()
        time.sleep(seconds)
        packets, took = self.received() - packets, time.monotonic() - begin
        self.rest(True)
        return packets / took

    def close(self) -> None:
        """End it."""
        self.rest(False)
        self._process.stop()
