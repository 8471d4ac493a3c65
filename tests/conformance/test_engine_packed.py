"""The packet engine on packed rings, driven by drivers that keep the rules, and by some that do not."""

import contextlib
import itertools
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from datapath.emulation.engine import QueueSetup
from datapath.vdpa import RingState
from tests.harness.nic_engine import (
    HEADER,
    MEMORY_SIZE,
    RX,
    RX_DATA,
    TABLES,
    TX,
    TX_DATA,
    Bench,
    bench,
    wait_for,
)
from tests.harness.packed_virtqueue import AVAIL, DESC, DISABLE, ENABLE, USED, PackedVirtqueue
from tests.harness.virtqueue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Buffer

PACKET = bytes(range(256)) * 5
PAGE = 4096
START = 0x8000


def header(buffers: int) -> bytes:
    """The header of a received packet that fills so many buffers."""
    return bytes(10) + struct.pack("<H", buffers)


@dataclass
class Packed:
    """A bench with packed rings in place of its own."""

    bench: Bench
    rx: PackedVirtqueue
    tx: PackedVirtqueue

    def run(self, indirect: bool = True) -> None:
        """Program both queues where the driver stands, and let them run."""
        engine = self.bench.engine
        for index, queue in ((RX, self.rx), (TX, self.tx)):
            setup = QueueSetup(
                size=queue.size,
                descriptors=queue.descriptors,
                avail=queue.avail,
                used=queue.used,
                state=RingState(queue.seen, queue.seen),
                event_idx=self.bench.event_idx,
                indirect=indirect,
                mergeable=self.bench.mergeable,
                packed=True,
            )
            engine.set_call(index, queue.call_fd)
            engine.start_queue(index, setup)
        engine.run(True)

    def kick(self, index: int) -> None:
        os.eventfd_write(self.bench.engine.kick_fds[index], 1)

    def send(self, *packets: bytes) -> list[int]:
        """Transmit packets, each from one buffer; their ids."""
        ids = []
        for packet in packets:
            at = TX_DATA + PAGE * (self.tx.place % 64)
            self.bench.memory.write(at, bytes(HEADER) + packet)
            ids.append(self.tx.add(Buffer(at, HEADER + len(packet))))
        self.kick(TX)
        return ids

    def offer(self, *sizes: int) -> list[int]:
        """Make receive buffers available, each a page of its own; their addresses."""
        addresses = []
        for size in sizes:
            addresses.append(RX_DATA + PAGE * (self.rx.place % 64))
            self.rx.add(Buffer(addresses[-1], size, writable=True))
        self.kick(RX)
        return addresses

    def read(self, address: int, size: int) -> bytes:
        return self.bench.memory.read(address, size)

    def wait_until_asleep(self, place: int) -> None:
        """Wait until the engine asks to be told of what comes at `place` of the transmit ring.

        By then it has read what the driver wished for all before: a used descriptor is out earlier.
        """
        wish = (place, DESC if self.bench.event_idx else ENABLE)
        wait_for(lambda: self.tx.wish() == wish, "a wish to be notified")


@contextlib.contextmanager
def packed(
    size: int = 256, start: int = START, event_idx: bool = False, mergeable: bool = True
) -> Iterator[Packed]:
    with bench(event_idx=event_idx, mergeable=mergeable) as b, contextlib.ExitStack() as stack:
        rx, tx = (PackedVirtqueue(b.memory, at, size, start) for at in (b.rx.descriptors, b.tx.descriptors))
        stack.callback(rx.close)
        stack.callback(tx.close)
        yield Packed(b, rx, tx)


def test_a_packet_is_sent() -> None:
    with packed() as p:
        p.run()
        [number] = p.send(PACKET)
        assert p.bench.receive_from_wire() == PACKET
        assert p.tx.wait_used() == [(number, 0)]
        assert p.tx.read(0)[3] == AVAIL | USED
        assert p.bench.engine.stop_queue(TX) == RingState(START + 1, START + 1)


def test_a_packet_is_received() -> None:
    with packed() as p:
        p.run()
        [at] = p.offer(2048)
        p.bench.wire.send(PACKET)
        assert p.rx.wait_used() == [(0, HEADER + len(PACKET))]
        assert p.rx.read(0)[3] == AVAIL | USED | DESC_F_WRITE
        assert p.read(at, HEADER + len(PACKET)) == header(1) + PACKET


@pytest.mark.parametrize("cuts", [(12,), (5, 12), (1, 2, 3, 20), (40,)])
def test_header_and_packet_may_be_cut_anywhere(cuts: tuple[int, ...]) -> None:
    """The id is that of the chain's last descriptor, and a used one stands for all of it."""
    whole = bytes(HEADER) + PACKET
    places = [0, *cuts, len(whole)]
    with packed(size=8) as p:
        p.run()
        for _ in range(5):  # also across the end of the ring
            p.bench.memory.write(TX_DATA, whole)
            number = p.tx.add(*(Buffer(TX_DATA + a, z - a) for a, z in itertools.pairwise(places)))
            p.kick(TX)
            assert p.bench.receive_from_wire() == PACKET
            assert p.tx.wait_used() == [(number, 0)]
            p.rx.add(*(Buffer(RX_DATA + a, z - a, writable=True) for a, z in itertools.pairwise(places)))
            p.kick(RX)
            p.bench.wire.send(PACKET)
            assert p.rx.wait_used() == [(0, len(whole))]
            assert p.read(RX_DATA, len(whole)) == header(1) + PACKET


def test_indirect_descriptors() -> None:
    with packed() as p:
        p.run()
        p.bench.memory.write(TX_DATA, bytes(HEADER) + PACKET)
        p.tx.add_indirect(TABLES, [Buffer(TX_DATA, HEADER), Buffer(TX_DATA + HEADER, len(PACKET))])
        p.kick(TX)
        assert p.bench.receive_from_wire() == PACKET
        assert p.tx.wait_used() == [(0, 0)]
        pieces = [Buffer(RX_DATA, 700, writable=True), Buffer(RX_DATA + PAGE, 1000, writable=True)]
        p.rx.add_indirect(TABLES + PAGE, pieces)
        p.kick(RX)
        p.bench.wire.send(PACKET)
        assert p.rx.wait_used() == [(0, HEADER + len(PACKET))]
        whole = p.read(RX_DATA, 700) + p.read(RX_DATA + PAGE, 1000)
        assert whole[: HEADER + len(PACKET)] == header(1) + PACKET


def test_a_packet_fills_several_mergeable_buffers() -> None:
    with packed() as p:
        p.run()
        places = p.offer(500, 500, 500, 500)
        p.bench.wire.send(PACKET)
        assert p.rx.wait_used(3) == [(0, 500), (1, 500), (2, HEADER + len(PACKET) - 1000)]
        whole = b"".join(p.read(at, 500) for at in places[:3])
        assert whole[: HEADER + len(PACKET)] == header(3) + PACKET
        p.bench.wire.send(b"short")
        assert p.rx.wait_used() == [(3, HEADER + 5)]


def test_a_packet_waits_for_enough_buffers() -> None:
    with packed() as p:
        p.run()
        p.offer(800)
        p.bench.wire.send(PACKET)
        p.bench.wire.send(b"next")
        wait_for(lambda: p.bench.engine.count(RX).kicks == 1 and p.rx.wish()[1] == ENABLE, "a wish for more")
        assert p.rx.collect() == []
        p.offer(800, 800)
        assert p.rx.wait_used(3) == [(0, 800), (1, HEADER + len(PACKET) - 800), (2, HEADER + 4)]


def test_a_packet_that_fits_nowhere_is_dropped() -> None:
    with packed(mergeable=False) as p:
        p.run()
        [at] = p.offer(500)
        p.bench.wire.send(PACKET)
        p.bench.wire.send(b"short")
        assert p.rx.wait_used() == [(0, HEADER + 5)]
        assert p.read(at, HEADER + 5) == header(1) + b"short"


@pytest.mark.parametrize("start", [START, 5, START + 3])
@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("event_idx", [False, True])
def test_wrap_counters_turn(size: int, start: int, event_idx: bool) -> None:
    """Also from a place in the middle, as after a stop, and in rings whose size is no power of two."""
    start = start & 0x8000 | (start & 0x7FFF) % size
    with packed(size=size, start=start, event_idx=event_idx) as p:
        p.run()
        for number in range(20):
            packet = b"%d" % number
            p.tx.want(DESC if event_idx else ENABLE, p.tx.seen)
            p.send(packet)
            assert p.bench.receive_from_wire() == packet
            assert len(p.tx.wait_used()) == 1
            p.rx.want(DESC if event_idx else ENABLE, p.rx.seen)
            [at] = p.offer(256)
            p.bench.wire.send(packet)
            assert len(p.rx.wait_used()) == 1
            assert p.read(at, HEADER + len(packet)) == header(1) + packet
        for index, queue in ((TX, p.tx), (RX, p.rx)):
            assert p.bench.engine.stop_queue(index) == RingState(queue.place, queue.place)


def test_a_full_ring_is_used_and_filled_again() -> None:
    with packed(size=256) as p:
        p.run()
        for turn in range(3):
            p.offer(*[256] * 256)
            for number in range(256):
                p.bench.wire.send(b"%d" % (turn * number))
            seen = p.rx.wait_used(256)
            assert [length for _, length in seen] == [HEADER + len(b"%d" % (turn * n)) for n in range(256)]


def test_it_goes_on_where_it_has_stopped() -> None:
    with packed(size=8) as p:
        p.run()
        for number in range(11):
            p.send(b"%d" % number)
            assert p.bench.receive_from_wire() == b"%d" % number
            p.tx.wait_used()
        state = p.bench.engine.stop_queue(TX)
        p.bench.engine.stop_queue(RX)
        assert state == RingState(3, 3), "the second round"
        p.send(b"meanwhile")
        p.run()
        p.kick(TX)
        assert p.bench.receive_from_wire() == b"meanwhile"
        p.tx.wait_used()


def test_no_interrupt_where_the_driver_wants_none() -> None:
    with packed() as p:
        p.tx.want(DISABLE)
        p.run()
        p.send(b"one")
        wait_for(lambda: len(p.tx.collect()) == 1, "the buffer back")
        p.wait_until_asleep(p.tx.place)
        p.tx.want(ENABLE)
        p.send(b"two")
        wait_for(lambda: p.bench.engine.count(TX).interrupts == 1, "an interrupt for the second")
        assert len(p.tx.collect()) == 1


@pytest.mark.parametrize("start", [START, 250])
def test_event_idx_delays_interrupts(start: int) -> None:
    with packed(event_idx=True, start=start) as p:
        p.run()
        p.send(b"first")  # tells the driver where the engine stands, whatever it asked for
        wait_for(lambda: p.bench.engine.count(TX).interrupts == 1, "the first interrupt")
        assert len(p.tx.collect()) == 1
        p.tx.want(DESC, p.tx.forward(start, 8))
        for number in range(2, 16):
            p.send(b"%d" % number)
            wait_for(lambda: len(p.tx.collect()) == 1, "the buffer back")
        p.wait_until_asleep(p.tx.place)
        # At the ninth, none before and none after; across the end of the ring, too.
        assert p.bench.engine.count(TX).interrupts == 2


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_sleeping_engine_wants_to_be_notified(event_idx: bool) -> None:
    with packed(event_idx=event_idx) as p:
        p.run()
        p.send(b"a", b"b", b"c")
        p.tx.wait_used(3)
        p.wait_until_asleep(START + 3)


# Drivers that break the rules

Misdeed = Callable[[Packed], None]


def raw(*descriptors: tuple[int, int, int]) -> Misdeed:
    """Transmit descriptors by address, length and flags, as the first round has them."""

    def do(p: Packed) -> None:
        for slot, (address, size, flags) in reversed(list(enumerate(descriptors))):
            p.tx.write(slot, address, size, 0, flags | AVAIL)

    return do


def table(*entries: tuple[int, int, int], size: int | None = None, more: int = 0) -> Misdeed:
    """A transmit chain in an indirect table."""

    def do(p: Packed) -> None:
        data = b"".join(struct.pack("<QIHH", address, length, 0, flags) for address, length, flags in entries)
        p.bench.memory.write(TABLES, data)
        raw((TABLES, len(data) if size is None else size, DESC_F_INDIRECT | more), (TX_DATA, 72, 0))(p)

    return do


BAD: dict[str, tuple[Misdeed, str]] = {
    "a ring of nexts": (raw(*[(TX_DATA, 4, DESC_F_NEXT)] * 256), "longer than the ring"),
    "a chain into another": (
        raw(*[(TX_DATA, 72, 0)] * 4, *[(TX_DATA, 72, DESC_F_NEXT)] * 252),
        "runs into another",
    ),
    "memory that is not mapped": (raw((MEMORY_SIZE, 72, 0)), "not mapped"),
    "memory beyond the end of the world": (raw(((1 << 64) - 8, 16, 0)), "wraps around"),
    "as long as can be": (raw((0, 0xFFFFFFFF, 0)), "not mapped"),
    "buffer for writing": (raw((TX_DATA, 72, DESC_F_WRITE)), "not for the device to read"),
    "shorter than the header": (raw((TX_DATA, HEADER - 1, 0)), "shorter than the packet header"),
    "indirect table of no entries": (table(size=0), "indirect table of a size"),
    "indirect table of half an entry": (table((TX_DATA, 72, 0), size=24), "indirect table of a size"),
    "indirect table not mapped": (raw((1 << 40, 16, DESC_F_INDIRECT)), "table is not mapped"),
    "indirect table that wraps": (raw(((1 << 64) - 16, 32, DESC_F_INDIRECT)), "indirect table of a size"),
    "indirect table without end": (raw((0, 16 * 257, DESC_F_INDIRECT)), "longer than the ring"),
    "indirect and next": (table((TX_DATA, 72, 0), more=DESC_F_NEXT), "indirect descriptor in a chain"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_ring_is_told(name: str) -> None:
    misdeed, reason = BAD[name]
    with packed() as p:
        p.run()
        misdeed(p)
        p.kick(TX)
        assert reason in p.bench.fault()
        p.bench.engine.reset()
        p.tx = PackedVirtqueue(p.bench.memory, p.tx.descriptors)
        with contextlib.closing(p.tx):
            p.run()
            p.send(b"alive")
            assert p.bench.receive_from_wire() == b"alive"


def test_indirect_descriptors_that_were_not_negotiated() -> None:
    with packed() as p:
        p.run(indirect=False)
        p.tx.add_indirect(TABLES, [Buffer(TX_DATA, 72)])
        p.kick(TX)
        assert "not negotiated" in p.bench.fault()


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"size": 2048},
        {"descriptors": 8},
        {"avail": 2},
        {"used": 2},
        {"state": RingState(0, 256)},
    ],
)
def test_a_queue_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    values: dict[str, object] = {
        "size": 256,
        "descriptors": 0,
        "avail": 4096,
        "used": 4100,
        "state": RingState(START, START),
        "event_idx": False,
        "indirect": True,
        "mergeable": True,
        "packed": True,
    }
    with bench() as b, pytest.raises(OSError, match="Invalid argument"):
        b.engine.start_queue(TX, QueueSetup(**{**values, **change}))  # type: ignore[arg-type]


def test_a_ring_outside_the_memory() -> None:
    with packed() as p:
        p.tx.used = MEMORY_SIZE
        p.run()
        p.kick(TX)
        assert "not in one mapping" in p.bench.fault()
