"""DPDK's half of `./bench relay`: `rte_vdpa_relay_vring_used`, on a device of DPDK's vhost library.

The function wants a vhost device, so DPDK serves a socket and our front-end starts it there as QEMU would:
guest memory is shared, addresses are translated, the log is a memfd. Owns the device and the module that
drives it, which is compiled for each run.
"""

import mmap
import os
from pathlib import Path
from typing import Any

from datapath.vhost_user.backend import F_LOG_ALL, F_PROTOCOL_FEATURES
from datapath.vhost_user.messages import LogArea, Message, ProtocolFeature, Request, encode_request
from datapath.virtio import Feature, bit
from tests.bench.compiled import compiled
from tests.bench.used_entries import LOG_SIZE, QUEUE, fill
from tests.harness.front_end import SocketFrontEnd
from tests.harness.processes import HarnessError

FEATURES = bit(Feature.F_VERSION_1)
PROTOCOL = bit(ProtocolFeature.LOG_SHMFD) | bit(ProtocolFeature.REPLY_ACK)
EAL = ("bench", "--no-huge", "-m", "64", "--no-pci", "--no-shconf", "--no-telemetry", "--log-level=error")
SERVE_TIME = 5.0


class DpdkRelay:
    """A vhost device of DPDK with one ring whose used entries are relayed; one in a process."""

    name = "DPDK's rte_vdpa_relay_vring_used"

    def __init__(self, folder: Path) -> None:
        """:raise HarnessError: when DPDK cannot be compiled against, does not start or takes no front-end."""
        module = compiled("relay_dpdk", folder, libraries=["libdpdk"], defines=["ALLOW_INTERNAL_API"])
        self._ffi, self._lib = module.ffi, module.lib
        words = [self._ffi.new("char[]", word.encode()) for word in EAL]
        # It binds this thread to one processor, where the other relay is measured too.
        self._processors = os.sched_getaffinity(0)
        # Where DPDK keeps its own files; who is started later is to have a place of its own.
        os.environ["RUNTIME_DIRECTORY"] = str(folder)
        try:
            self._ask("dpdk_begin", words, len(words))
        finally:
            del os.environ["RUNTIME_DIRECTORY"]
        self._path = str(folder / "dpdk.sock").encode()
        self._ask("dpdk_serve", self._path)
        self.front_end = SocketFrontEnd.dial(folder / "dpdk.sock", PROTOCOL)
        self.queue = self.front_end.queues[QUEUE]
        self._log = os.memfd_create("log")
        os.ftruncate(self._log, LOG_SIZE)
        self._log_view = mmap.mmap(self._log, LOG_SIZE)
        # As much as a page-aligned vring of 256 entries takes: two pages and a half.
        self._ring = mmap.mmap(-1, 4 * 4096)
        self._start()

    def _ask(self, function: str, *arguments: Any) -> int:
        """Call into DPDK.

        :raise HarnessError: when it fails.
        """
        answer: int = getattr(self._lib, function)(*arguments)
        if answer < 0:
            raise HarnessError(f"DPDK's half of the measurement failed in {function}")
        return answer

    def _start(self) -> None:
        """Let the front-end start the device and hand over the log."""
        front = self.front_end
        fill(front.memory, self.queue)
        front.connect()
        front.start(FEATURES)
        log = Message(Request.SET_LOG_BASE, LogArea(LOG_SIZE, 0))
        front.send(encode_request(log), [self._log])
        # DPDK replies without the payload that ours and the specification have.
        front.read_reply()
        self._vid = self._ask("dpdk_wait_device", int(SERVE_TIME * 1000))

    def log(self, on: bool) -> None:
        """Let the device log what it writes, or not."""
        self.front_end.tell(Request.SET_FEATURES, FEATURES | F_PROTOCOL_FEATURES | (F_LOG_ALL if on else 0))
        self.front_end.settle()

    def measure(self, length: int, batch: int, count: int) -> list[float]:
        """Relay `count` rings full of used entries; nanoseconds per entry of each."""
        times = self._ffi.new("double[]", count)
        log = self._ffi.from_buffer("uint8_t[]", self._log_view)
        ring = self._ffi.from_buffer(self._ring)
        arguments = (QUEUE, ring, self.queue.size, length, batch, log, LOG_SIZE, times, count)
        self._ask("dpdk_relay", self._vid, *arguments)
        return list(times)

    def logged(self) -> bytes:
        """The log as the last measurement has left it."""
        return self._log_view[:]

    def close(self) -> None:
        """End the connection and the device."""
        self.front_end.close()
        self._lib.dpdk_end(self._path)
        self._log_view.close()
        os.close(self._log)
        os.sched_setaffinity(0, self._processors)
