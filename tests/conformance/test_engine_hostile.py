"""The packet engine against drivers that break the rules, and against memory that vanishes.

Whatever a driver does, the engine says why it stopped, works again after a reset, and no other engine nor
the process notices.
"""

import contextlib
import errno
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from datapath.native._native import ffi, lib
from tests.harness.nic_engine import (
    DEADLINE,
    HEADER,
    MEMORY_SIZE,
    RX,
    RX_RING,
    TABLES,
    TX,
    TX_DATA,
    TX_RING,
    Bench,
    bench,
    wait_for,
)
from tests.harness.virtqueue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Buffer

PAGE = 4096
PACKET = Buffer(TX_DATA, HEADER + 60)
Misdeed = Callable[[Bench], None]


def entry(address: int, size: int, flags: int = 0, following: int = 0) -> bytes:
    return struct.pack("<QIHH", address, size, flags, following)


def chain(*descriptors: bytes, head: int = 0) -> Misdeed:
    """A transmit chain from raw descriptors in places 0, 1, …"""

    def do(b: Bench) -> None:
        for index, descriptor in enumerate(descriptors):
            b.memory.write(b.tx.descriptors + 16 * index, descriptor)
        b.tx.publish(head)

    return do


def indirect(table: bytes, size: int | None = None, flags: int = DESC_F_INDIRECT) -> Misdeed:
    """A transmit chain in a raw indirect table."""

    def do(b: Bench) -> None:
        b.memory.write(TABLES, table)
        chain(entry(TABLES, len(table) if size is None else size, flags))(b)

    return do


def avail_jump(by: int) -> Misdeed:
    return lambda b: b.tx.set_avail_index(b.tx.avail_index + by)


def ring_of_links(b: Bench) -> None:
    """Every descriptor leads to the next, the last to the first."""
    for index in range(b.tx.size):
        b.tx.describe(index, Buffer(TX_DATA, 4), DESC_F_NEXT, (index + 1) % b.tx.size)
    b.tx.publish(0)


TRANSMIT: dict[str, tuple[Misdeed, str]] = {
    "head beyond the table": (chain(head=256), "beyond its table"),
    "head far beyond the table": (chain(head=0xFFFF), "beyond its table"),
    "next beyond the table": (chain(entry(TX_DATA, 72, DESC_F_NEXT, 256)), "beyond its table"),
    "descriptor that is its own next": (chain(entry(TX_DATA, 72, DESC_F_NEXT, 0)), "longer than the ring"),
    "loop through the whole table": (ring_of_links, "longer than the ring"),
    "index ahead by one too many": (avail_jump(257), "available index"),
    "index behind": (avail_jump(-1), "available index"),
    "index half way round": (avail_jump(0x8000), "available index"),
    "memory that is not mapped": (chain(entry(MEMORY_SIZE, 72)), "not mapped"),
    "memory that ends too early": (chain(entry(MEMORY_SIZE - 50, 72)), "not mapped"),
    "memory at the end of the world": (chain(entry((1 << 64) - 8, 8)), "not mapped"),
    "memory beyond the end of the world": (chain(entry((1 << 64) - 8, 16)), "wraps around"),
    "as long as can be": (chain(entry(0, 0xFFFFFFFF)), "not mapped"),
    "buffer for writing": (chain(entry(TX_DATA, 72, DESC_F_WRITE)), "not for the device to read"),
    "shorter than the header": (chain(entry(TX_DATA, HEADER - 1)), "shorter than the packet header"),
    "empty": (chain(entry(TX_DATA, 0)), "shorter than the packet header"),
    "indirect table of no entries": (indirect(b"", 0), "indirect table of a size"),
    "indirect table of half an entry": (indirect(entry(TX_DATA, 72), 24), "indirect table of a size"),
    "indirect table not mapped": (chain(entry(1 << 40, 16, DESC_F_INDIRECT)), "table is not mapped"),
    "indirect table that wraps": (chain(entry((1 << 64) - 16, 32, DESC_F_INDIRECT)), "indirect table of"),
    "indirect and next": (
        indirect(entry(TX_DATA, 72), flags=DESC_F_INDIRECT | DESC_F_NEXT),
        "has a next one",
    ),
    "indirect within indirect": (indirect(entry(TABLES, 16, DESC_F_INDIRECT)), "within an indirect table"),
    "next beyond the indirect table": (indirect(entry(TX_DATA, 72, DESC_F_NEXT, 1)), "beyond its table"),
    "loop in an indirect table": (indirect(entry(TX_DATA, 1, DESC_F_NEXT, 0)), "longer than the ring"),
}


def assert_recovers(b: Bench) -> None:
    """After a reset the engine works with new rings at the old places."""
    b.engine.reset()
    assert b.engine.fault() is None
    for queue in (b.rx, b.tx):
        b.memory.write(queue.avail, bytes(4))
        b.memory.write(queue.used, bytes(4))
        queue.avail_index = queue.seen = 0
    b.run()
    b.send(b"alive")
    assert b.receive_from_wire() == b"alive"


@pytest.mark.parametrize(("misdeed", "reason"), TRANSMIT.values(), ids=TRANSMIT.keys())
def test_bad_transmit_ring(misdeed: Misdeed, reason: str) -> None:
    with bench() as b:
        b.run()
        misdeed(b)
        b.kick(TX)
        assert reason in b.fault()
        assert b.tx.used_index == 0
        assert_recovers(b)


def test_indirect_that_was_not_negotiated() -> None:
    with bench() as b:
        b.run(indirect=False)
        indirect(entry(TX_DATA, 72))(b)
        b.kick(TX)
        assert "not negotiated" in b.fault()


def test_what_came_before_the_bad_buffer_is_done() -> None:
    with bench() as b:
        b.run()
        b.tx.add(PACKET)
        b.tx.publish(0xFFFF)
        b.kick(TX)
        assert "queue 1: " in b.fault()
        assert b.tx.used_index == 1


RECEIVE: dict[str, tuple[Buffer, str]] = {
    "buffer for reading": (Buffer(0x100000, 2048), "not for the device to write"),
    "shorter than the header": (Buffer(0x100000, 11, writable=True), "shorter than the packet header"),
    "not mapped": (Buffer(1 << 40, 2048, writable=True), "not mapped"),
    "mapped for reading": (Buffer(MEMORY_SIZE, 2048, writable=True), "not mapped"),
    "half of it mapped for reading": (Buffer(MEMORY_SIZE - 1024, 2048, writable=True), "not mapped"),
}


@pytest.mark.parametrize(("buffer", "reason"), RECEIVE.values(), ids=RECEIVE.keys())
def test_bad_receive_buffer(buffer: Buffer, reason: str) -> None:
    with bench() as b:
        b.engine.map(MEMORY_SIZE, MEMORY_SIZE, b.memory.fd, 0, writable=False)
        b.run()
        b.rx.add(buffer)
        b.kick(RX)
        b.wire.send(bytes(1400))
        assert reason in b.fault()
        assert b.rx.used_index == 0


def test_second_receive_buffer_is_bad() -> None:
    with bench() as b:
        b.run()
        b.offer(500)
        b.rx.publish(0x100)
        b.wire.send(bytes(1400))
        assert "beyond its table" in b.fault()


def test_bad_receive_index_is_seen_without_a_packet() -> None:
    with bench() as b:
        b.run()
        b.rx.set_avail_index(300)
        b.kick(RX)
        assert "queue 0: the available index" in b.fault()


def test_too_many_pieces_for_one_packet() -> None:
    """Pages whose order in the file is not theirs in DMA space: a mapping each, 550 each in two buffers."""
    pages = 550
    with bench() as b:
        fd = os.memfd_create("pages")
        os.ftruncate(fd, PAGE * pages)
        for page in range(pages):
            b.engine.map((1 << 32) + PAGE * page, PAGE, fd, PAGE * (pages - 1 - page), writable=True)
        os.close(fd)
        b.run()
        chain(entry(1 << 32, PAGE * pages, DESC_F_NEXT, 1), entry(1 << 32, PAGE * pages))(b)
        b.kick(TX)
        assert "too many pieces" in b.fault()


@pytest.mark.parametrize(
    "place",
    [
        {"descriptors": MEMORY_SIZE - PAGE + 16},
        {"avail": 1 << 40},
        {"used": MEMORY_SIZE - PAGE // 2},
        {"used": MEMORY_SIZE},
    ],
    ids=str,
)
def test_ring_outside_memory(place: dict[str, int]) -> None:
    with bench() as b:
        b.engine.map(MEMORY_SIZE, PAGE, b.memory.fd, 0, writable=False)
        b.run(**place)
        b.kick(TX)
        assert "not in one mapping" in b.fault()


def test_memory_taken_from_under_a_running_ring() -> None:
    with bench() as b:
        b.run()
        b.send(b"a")
        b.tx.wait_used()
        b.engine.unmap(0, MEMORY_SIZE)
        b.kick(TX)
        assert "not in one mapping" in b.fault()


def kick_comes(b: Bench) -> None:
    b.kick(TX)


def packet_comes(b: Bench) -> None:
    b.wire.send(b"x")


SHRUNK: dict[str, tuple[int, Misdeed]] = {
    "ring, a kick comes": (0, kick_comes),
    "ring, a packet comes": (0, packet_comes),
    "transmit buffer": (TX_DATA, kick_comes),
    "receive buffer": (TX_RING + 0x10000, packet_comes),
    "indirect table": (TABLES, kick_comes),
}


@pytest.mark.parametrize(("size", "trigger"), SHRUNK.values(), ids=SHRUNK.keys())
def test_memory_that_shrinks(size: int, trigger: Misdeed) -> None:
    with bench() as other, bench() as b:
        other.run()
        b.run()
        b.offer(2048)
        wait_for(lambda: b.engine.count(RX).kicks == 1, "the kick seen")
        if size == TABLES:
            b.tx.add_indirect(TABLES, [PACKET])
        else:
            b.tx.add(PACKET)
        os.ftruncate(b.memory.fd, size)
        trigger(b)
        assert "memory has gone" in b.fault()
        # The file grows back, as nothing the engine keeps depends on how it was.
        os.ftruncate(b.memory.fd, MEMORY_SIZE)
        assert_recovers(b)
        other.send(b"unharmed")
        assert other.receive_from_wire() == b"unharmed"


def test_log_that_shrinks() -> None:
    with bench() as b:
        fd = os.memfd_create("log")
        os.ftruncate(fd, PAGE)
        b.engine.map(1 << 44, PAGE, fd, 0, writable=True)
        b.engine.set_log(True, 1 << 44, (1 << 44) + PAGE)
        b.run()
        os.ftruncate(fd, 0)
        b.offer(2048)
        b.wire.send(b"x")
        assert "memory has gone" in b.fault()
        os.close(fd)


def test_a_fault_stops_both_queues() -> None:
    with bench() as b:
        b.run()
        b.tx.publish(0xFFFF)
        b.kick(TX)
        b.fault()
        b.offer(2048)
        b.wire.send(b"x")
        wait_for(lambda: b.engine.count(RX).dropped == 1, "the packet dropped")
        assert b.rx.used_index == 0


def test_rings_that_change_all_the_time() -> None:
    """A driver that writes random bytes over its rings while the engine runs: it stops, and that is all."""
    noise = os.urandom(1 << 16)
    with bench() as b:
        for round_ in range(50):
            b.engine.reset()
            b.run()
            b.offer(2048, 2048)
            b.send(b"x")
            part = noise[round_ * 1024 : round_ * 1024 + 0x3000]
            for ring in (RX_RING, TX_RING):
                b.memory.write(ring, part)
            for _ in range(3):
                b.kick(TX)
                b.kick(RX)
                with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                    b.wire.send(b"y", 0x40)
            for queue in (b.rx, b.tx):
                b.memory.write(queue.avail, bytes(4))
                b.memory.write(queue.used, bytes(4))
                queue.avail_index = queue.seen = 0
        assert_recovers_after_noise(b)


def assert_recovers_after_noise(b: Bench) -> None:
    b.wire.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            b.wire.recv(65536)
    assert_recovers(b)


def test_a_client_cannot_make_a_notification_block() -> None:
    """It shares the eventfd, with it the flag that reads do not block, and may read it itself."""

    def tease() -> None:
        for _ in range(2000):
            os.eventfd_write(b.engine.kick_fds[TX], 1)
            os.eventfd_read(b.engine.kick_fds[TX])

    with bench() as b:
        b.run()
        os.set_blocking(b.engine.kick_fds[TX], True)
        # In threads, as what would block would do so for ever.
        for act in (tease, lambda: b.engine.count(TX)):
            thread = threading.Thread(target=act, daemon=True)
            thread.start()
            thread.join(DEADLINE)
            assert not thread.is_alive()
        b.send(b"x")
        assert b.receive_from_wire() == b"x"


def test_a_client_cannot_make_an_interrupt_block() -> None:
    """Its eventfd, full and blocking, holds the engine only until somebody calls it."""
    with bench() as b:
        b.run()
        os.set_blocking(b.tx.call_fd, True)
        os.eventfd_write(b.tx.call_fd, (1 << 64) - 2)
        b.send(b"x")
        wait_for(lambda: b.tx.used_index == 1, "the buffer back")
        caller = threading.Thread(target=lambda: b.engine.count(TX), daemon=True)
        caller.start()
        caller.join(DEADLINE)
        assert not caller.is_alive()
        assert "eventfd of an interrupt blocks" in b.fault()
        assert b.receive_from_wire() == b"x"
        os.eventfd_read(b.tx.call_fd)
        assert_recovers(b)


UNGUARDED = """
import ctypes, mmap, os
from datapath.native._native import ffi, lib
handle = ffi.new("struct engine **")
uplink = ffi.new("struct engine_uplink *", {"pairs": 1, "packet_fd": [os.eventfd(0, os.EFD_NONBLOCK)]})
assert lib.engine_open(uplink, handle) == 0
fd = os.memfd_create("x")
os.ftruncate(fd, 4096)
memory = mmap.mmap(fd, 4096)
os.ftruncate(fd, 0)
memory[0]
"""


def test_a_bus_error_elsewhere_is_as_deadly_as_ever() -> None:
    ended = subprocess.run([sys.executable, "-c", UNGUARDED], timeout=DEADLINE * 4, check=False)
    assert ended.returncode == -signal.SIGBUS


def test_a_bus_error_signal_from_outside_is_as_deadly_as_ever() -> None:
    program = UNGUARDED.replace("memory[0]", "os.kill(os.getpid(), 7)")
    ended = subprocess.run([sys.executable, "-c", program], timeout=DEADLINE * 4, check=False)
    assert ended.returncode == -signal.SIGBUS


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_engine_without_descriptors() -> None:
    """A failed start gives everything back."""
    before = open_descriptors()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = [os.dup(0) for _ in range(3)]
    for fd in needed:
        os.close(fd)
    for first_refused in needed:
        handle = ffi.new("struct engine **")
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_refused, limit[1]))
        try:
            uplink = ffi.new("struct engine_uplink *", {"pairs": 1, "packet_fd": [-1]})
            assert lib.engine_open(uplink, handle) == -errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert open_descriptors() == before


def test_doorbells_that_cannot_be_leave_none() -> None:
    with bench() as b:
        before = open_descriptors()
        assert lib.engine_open_doorbells(b.engine._engine, before + 1000) < 0  # the descriptor is none
        assert open_descriptors() == before - 2
        assert lib.engine_kick_fd(b.engine._engine, TX) == -1
        b.engine.open_doorbells(mapped=False)
        assert_recovers(b)


@pytest.mark.parametrize("mapped", [False, True])
def test_doorbells_are_of_one_client(mapped: bool) -> None:
    """Whatever one has done to its own, the next has good ones, and the first rings no more."""
    with bench(mapped_doorbells=mapped) as b:
        kicks = [os.dup(fd) for fd in b.engine.kick_fds]
        memory = b.engine.doorbell_fd
        pages = bytearray(2 * PAGE) if memory is None else mmap.mmap(memory, 0)
        for fd in kicks:
            os.eventfd_write(fd, (1 << 64) - 2)
        wait_for(lambda: b.engine.count(TX).kicks == 1, "the last that it hears of them")
        b.engine.open_doorbells(mapped)
        b.run()
        for fd in kicks:
            os.eventfd_read(fd)
            os.eventfd_write(fd, 1)
            os.close(fd)
        pages[TX * PAGE : TX * PAGE + 2] = struct.pack("<H", TX)
        b.send(b"x")
        assert b.receive_from_wire() == b"x"
        assert b.engine.count(TX).kicks == 2
