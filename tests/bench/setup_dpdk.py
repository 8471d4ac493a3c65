"""DPDK's half of `./bench setup`: dpdk-testpmd as a back-end that forwards between a front-end and a TAP.

Its poll-mode driver for TAPs and the one for vhost stand in for the VF and the port.
"""

import os
import signal
from contextlib import ExitStack
from pathlib import Path

from tests.harness.netns import NetworkNamespace
from tests.harness.processes import Process
from tests.harness.wire import Wire

LINK = "dpdk0"
#: Forwards between port 0 and port 1. Without an interval for statistics it would wait for the end of its
#: standard input and quit.
APPLICATION = ("--auto-start", "--stats-period=60", "--forward-mode=io", "--total-num-mbufs=8192")
#: What it logs when a front-end has gone.
PEER_CLOSED = "vhost peer closed"


class DpdkBackEnd:
    """A running testpmd; it polls, so it stands still but for `rest(False)`."""

    def __init__(self, folder: Path, network: NetworkNamespace) -> None:
        """:raise HarnessError: when it does not start."""
        self.socket = folder / "dpdk.sock"
        devices = [f"--vdev=net_vhost0,iface={self.socket}", f"--vdev=net_tap0,iface={LINK}"]
        eal = ["--no-huge", "-m", "256", "--no-pci", "--lcores=0@0,1@1", *devices]
        self._sessions = 0
        with ExitStack() as undo:
            self._process = undo.enter_context(
                Process(
                    [*network.prefix, "dpdk-testpmd", *eal, "--", *APPLICATION],
                    folder / "dpdk.log",
                    env={**os.environ, "RUNTIME_DIRECTORY": str(folder)},
                )
            )
            self._process.wait_for("forwarding", lambda: "packets/burst" in self._log(), 20)
            network.run("ip", "link", "set", LINK, "up")
            self.wire = Wire(network, LINK)
            undo.callback(self.wire.close)
            self.rest(True)
            self._resources = undo.pop_all()

    def _log(self) -> str:
        return self._process.log.read_text(errors="replace")

    def rest(self, on: bool) -> None:
        """Stand still, or go on."""
        self._process.signal(signal.SIGSTOP if on else signal.SIGCONT)

    def wait_until_free(self) -> None:
        """Wait until it has seen the front-end go."""
        self._sessions += 1
        self._process.wait_for("the end", lambda: self._log().count(PEER_CLOSED) >= self._sessions)

    def close(self) -> None:
        """End it."""
        self.rest(False)
        self._resources.close()
