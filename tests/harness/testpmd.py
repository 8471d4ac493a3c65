"""dpdk-testpmd as a foreign vhost-user peer: DPDK's virtio-user drives our socket as a guest would.

Owns the process and DPDK's command line; needs no hugepages and leaves nothing in /run.
"""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tests.harness.processes import HarnessError, Process, tail

MEMORY = 256
BUFFERS = 8192

#: Destination, source and EtherType (for experiments, RFC 7042) of what is sent to the VF.
STATION = bytes.fromhex("020000000001")
PEER = bytes.fromhex("020000000002")
HEADER_OUT = PEER + STATION + b"\x88\xb5"
#: What macswap makes of the addresses.
HEADER_BACK = STATION + PEER + b"\x88\xb5"
#: txonly sends UDP over IPv4 to this address.
TXONLY = bytes.fromhex("020000000000")
#: Frames on their way at a time: fewer than the ring has, so none need be dropped.
WINDOW = 32
#: Seconds for a frame to come back, the front-end's start included, which takes long under emulation.
PATIENCE = 60.0


class Testpmd(Process):
    """A running testpmd with one virtio-user port, forwarding as `mode` says."""

    #: Not one of pytest's classes, whatever its name.
    __test__ = False

    def __init__(
        self,
        folder: Path,
        socket: Path,
        mode: str,
        *,
        queue_pairs: int = 1,
        queue_size: int = 256,
        memory: int = MEMORY,
        buffers: int = BUFFERS,
        device: str = "",
        options: Sequence[str] = (),
    ) -> None:
        """
        :param folder: where its log and DPDK's runtime files go.
        :param mode: testpmd's --forward-mode: `txonly` sends for ever, `macswap` sends back what comes.
        :param memory: megabytes; `buffers` packet buffers take some of it.
        :param device: more of virtio-user's arguments, such as `packed_vq=1`.
        :param options: more of testpmd's.
        """
        user = f"net_virtio_user0,path={socket},queues={queue_pairs},queue_size={queue_size}"
        user += f",{device}" if device else ""
        eal = ["--no-huge", "-m", str(memory), "--no-pci", "--single-file-segments", "--lcores=0@0,1@1"]
        # Without an interval for statistics it would wait for the end of its standard input and quit.
        application = ["--auto-start", "--stats-period=60", f"--forward-mode={mode}"]
        queues = [f"--total-num-mbufs={buffers}", f"--rxq={queue_pairs}", f"--txq={queue_pairs}", *options]
        super().__init__(
            ["dpdk-testpmd", *eal, f"--vdev={user}", "--", *application, *queues],
            folder / "testpmd.log",
            env={**os.environ, "RUNTIME_DIRECTORY": str(folder)},
        )

    def next_frame(self, wire: socket.socket, header: bytes = HEADER_BACK) -> bytes:
        """The payload of the next frame from the VF with that header.

        :raise HarnessError: when none comes.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with suppress(TimeoutError):
                data, address = wire.recvfrom(2048)
                if data.startswith(header) and address[2] != socket.PACKET_OUTGOING:
                    return data[len(header) :]
        raise HarnessError(f"no frame came from the VF within {PATIENCE:g} s; testpmd: {tail(self.log)}")

    def wait_until_forwarding(self, wire: socket.socket) -> None:
        """Greet a macswap peer until it answers: what it receives before it forwards, it drops."""
        greeter = bytes.fromhex("020000000003")
        wire.settimeout(0.1)

        def answered() -> bool:
            wire.send(PEER + greeter + b"\x88\xb5" + bytes(46))
            with suppress(TimeoutError):
                while not wire.recv(2048).startswith(greeter + PEER):
                    pass
                return True
            return False

        self.wait_for("an answer", answered, PATIENCE)
        wire.settimeout(PATIENCE)

    def exchange(self, wire: socket.socket, payloads: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Send payloads to a macswap peer, some at a time; each, and what has come back in its place.

        :raise HarnessError: when nothing comes back.
        """
        for begin in range(0, len(payloads), WINDOW):
            window = payloads[begin : begin + WINDOW]
            for payload in window:
                wire.send(HEADER_OUT + payload)
            for payload in window:
                yield payload, self.next_frame(wire)
