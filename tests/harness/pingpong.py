"""Ping-pong through a driven VF: native/pingpong.c plays the guest and the far end of its wire.

Meanwhile the test does to the VF what it likes. Owns the process.
"""

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from tests.harness.compiled import compiled
from tests.harness.driven_vf import BASE, BUFFERS, MEMORY_SIZE, RX, TX, DrivenVf
from tests.harness.processes import Process

#: Where each ring's buffers begin; 256 of 2 KiB fit.
RING_BUFFERS = {RX: BASE + BUFFERS, TX: BASE + BUFFERS + 0x80000}


@dataclass(frozen=True)
class Score:
    """How a game ended."""

    rounds: int
    #: Frames sent again because they did not come back, and frames that the far end saw twice.
    again: int
    doubles: int
    interrupts: int
    kicks: int


class PingPong(Process):
    """A game in progress. The rings must be as `DrivenVf` laid them out, of 256 descriptors at most."""

    def __init__(
        self,
        folder: Path,
        vf: DrivenVf,
        wire: socket.socket,
        rounds: int,
        *,
        event_idx: bool,
        retry_ms: int = 0,
    ) -> None:
        """
        :param wire: packet socket on the far end of the VF's wire.
        :param retry_ms: when to send a frame again that has not come back; 0: none may be lost.
        """
        wire.setblocking(True)
        argv: list[str | Path] = [compiled("pingpong")]
        numbers = [rounds, int(event_idx), retry_ms, vf.memory.fd, MEMORY_SIZE, BASE, wire.fileno()]
        for index in (RX, TX):
            queue = vf.queues[index]
            numbers += [queue.size, queue.descriptors, queue.avail, queue.used, queue.avail_index]
            numbers += [queue.kick_fd, queue.call_fd, RING_BUFFERS[index]]
        fds = [vf.memory.fd, wire.fileno()]
        fds += [fd for queue in vf.queues for fd in (queue.kick_fd, queue.call_fd)]
        super().__init__([*argv, *map(str, numbers)], folder / "pingpong.log", pass_fds=fds)

    def score(self) -> Score:
        """How it ended.

        :raise AssertionError: with the reason, when it was lost.
        """
        text = self.log.read_text()
        found = re.search(r"rounds (\d+) again (\d+) doubles (\d+) interrupts (\d+) kicks (\d+)", text)
        assert found, text
        return Score(*map(int, found.groups()))
