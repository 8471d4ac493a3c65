"""A packet engine on its bench: guest memory, two virtqueues, and a socket in place of the TAP."""

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from datapath.emulation.engine import Engine, PlainUplink, QueueSetup
from datapath.vdpa import RingState
from tests.harness.virtqueue import Buffer, MemfdMemory, Virtqueue

RX, TX = 0, 1
HEADER = 12
MEMORY_SIZE = 1 << 22
RX_RING, TX_RING = 0x10000, 0x20000
#: Where tests put packets and buffers; 4 KiB each.
RX_DATA, TX_DATA, TABLES = 0x100000, 0x200000, 0x300000
DEADLINE = 5.0


def wait_for(condition: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
    """Wait until a condition holds.

    :raise TimeoutError: when it does not.
    """
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline} s: {what}")
        time.sleep(0.001)


@dataclass
class Bench:
    """One engine with all that it needs."""

    engine: Engine
    memory: MemfdMemory
    rx: Virtqueue
    tx: Virtqueue
    #: The far end of the uplink, and the engine's.
    wire: socket.socket
    uplink: socket.socket
    event_idx: bool
    mergeable: bool

    def start(self, index: int, queue: Virtqueue, **changes: Any) -> None:
        """Program a queue where the driver's side of it stands, changed as a test wants it."""
        setup = QueueSetup(
            size=queue.size,
            descriptors=queue.descriptors,
            avail=queue.avail,
            used=queue.used,
            state=RingState(queue.seen, queue.seen),
            event_idx=self.event_idx,
            indirect=True,
            mergeable=self.mergeable,
        )
        self.engine.set_call(index, queue.call_fd)
        self.engine.start_queue(index, replace(setup, **changes))

    def run(self, **changes: Any) -> None:
        """Program both queues and let them run."""
        self.start(RX, self.rx, **changes)
        self.start(TX, self.tx, **changes)
        self.engine.run(True)

    def kick(self, index: int) -> None:
        """Notify a queue."""
        os.eventfd_write(self.engine.kick_fds[index], 1)

    def send(self, *packets: bytes) -> None:
        """Transmit packets, each from one buffer of its own."""
        for packet in packets:
            at = TX_DATA + 4096 * (self.tx.avail_index % 64)
            self.memory.write(at, bytes(HEADER) + packet)
            self.tx.add(Buffer(at, HEADER + len(packet)))
        self.kick(TX)

    def receive_from_wire(self) -> bytes:
        """The next packet that the engine sent."""
        readable, _, _ = select.select([self.wire], [], [], DEADLINE)
        if not readable:
            raise TimeoutError("no packet came out")
        return self.wire.recv(1 << 17)

    def offer(self, *sizes: int) -> list[int]:
        """Make receive buffers available, each a page of its own; returns their addresses."""
        addresses = []
        for size in sizes:
            addresses.append(RX_DATA + 4096 * (self.rx.avail_index % 64))
            self.rx.add(Buffer(addresses[-1], size, writable=True))
        self.kick(RX)
        return addresses

    def set_used_event(self, queue: Virtqueue) -> None:
        """Ask for an interrupt at the next used buffer (only looked at with EVENT_IDX)."""
        self.memory.write(queue.avail + 4 + 2 * queue.size, struct.pack("<H", queue.seen))

    def fault(self) -> str:
        """Wait for the engine to give up, and say why."""
        readable, _, _ = select.select([self.engine.fault_fd], [], [], DEADLINE)
        if not readable:
            raise TimeoutError("the engine has not found fault")
        return self.engine.fault() or ""


@contextlib.contextmanager
def bench(
    size: int = 256,
    start: int = 0,
    prefetch: int = 0,
    mapped_doorbells: bool = False,
    event_idx: bool = False,
    mergeable: bool = True,
    has_header: bool = False,
    mtu: int = 0,
) -> Iterator[Bench]:
    """An engine whose memory is mapped at 0 and whose queues are laid out but not yet programmed.

    :param has_header: whether a header stands before each frame on the wire, too.
    """
    with contextlib.ExitStack() as stack:
        wire, uplink = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        stack.enter_context(wire)
        stack.enter_context(uplink)
        uplink.setblocking(False)
        memory = MemfdMemory(MEMORY_SIZE)
        stack.callback(memory.close)
        rx, tx = (Virtqueue(memory, at, size, start) for at in (RX_RING, TX_RING))
        stack.callback(rx.close)
        stack.callback(tx.close)
        engine = Engine(PlainUplink((uplink.fileno(),), has_header), prefetch, mtu=mtu)
        stack.callback(engine.close)
        engine.open_doorbells(mapped_doorbells)
        engine.map(0, MEMORY_SIZE, memory.fd, 0, writable=True)
        yield Bench(engine, memory, rx, tx, wire, uplink, event_idx, mergeable)
