"""The packet engine of the emulated NIC, driven through its C interface by a driver that keeps the rules."""

import fcntl
import itertools
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from datapath.emulation.engine import MAX_MAPS, NOT_RUNG, Engine, PlainUplink, QueueSetup
from datapath.emulation.nic import MAX_VFS
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
from tests.harness.virtqueue import AVAIL_F_NO_INTERRUPT, Buffer

PACKET = bytes(range(256)) * 5
PAGE = 4096
HUGE_PAGE = 2 << 20


def header(buffers: int) -> bytes:
    """The header of a received packet that fills so many buffers."""
    return bytes(10) + struct.pack("<H", buffers)


def read16(b: Bench, address: int) -> int:
    return int(struct.unpack("<H", b.memory.read(address, 2))[0])


def readable(end: socket.socket) -> bool:
    return bool(select.select([end], [], [], 0)[0])


def threads() -> set[str]:
    return {path.name for path in Path("/proc/self/task").iterdir()}


def test_a_packet_is_sent() -> None:
    with bench() as b:
        b.run()
        b.send(PACKET)
        assert b.receive_from_wire() == PACKET
        assert b.tx.wait_used() == [(0, 0)]
        count = b.engine.count(TX)
        assert (count.packets, count.bytes, count.dropped) == (1, len(PACKET), 0)


def test_a_packet_is_received() -> None:
    with bench() as b:
        b.run()
        [at] = b.offer(2048)
        b.wire.send(PACKET)
        assert b.rx.wait_used() == [(0, HEADER + len(PACKET))]
        assert b.memory.read(at, HEADER + len(PACKET)) == header(1) + PACKET
        assert b.engine.count(RX).packets == 1


@pytest.mark.parametrize("cuts", [(12,), (5, 12), (1, 2, 3, 20), (40,)])
def test_header_and_packet_may_be_cut_anywhere(cuts: tuple[int, ...]) -> None:
    whole = bytes(HEADER) + PACKET
    places = [0, *cuts, len(whole)]
    with bench() as b:
        b.run()
        b.memory.write(TX_DATA, whole)
        b.tx.add(*(Buffer(TX_DATA + a, z - a) for a, z in itertools.pairwise(places)))
        b.kick(TX)
        assert b.receive_from_wire() == PACKET
        b.rx.add(*(Buffer(RX_DATA + a, z - a, writable=True) for a, z in itertools.pairwise(places)))
        b.kick(RX)
        b.wire.send(PACKET)
        assert b.rx.wait_used() == [(0, len(whole))]
        assert b.memory.read(RX_DATA, len(whole)) == header(1) + PACKET


def test_it_stops_by_itself_when_the_client_hangs_up() -> None:
    here, client = socket.socketpair()
    with bench() as b, here:
        b.engine.set_client(here.fileno())
        b.run()
        b.send(PACKET)
        assert b.receive_from_wire() == PACKET
        client.close()
        for kick in (2, 3):  # the engine has looked at what came before by the time that it counts the second
            b.send(PACKET)
            wait_for(lambda kick=kick: b.engine.count(TX).kicks == kick, "a kick")  # type: ignore[misc]
        assert not readable(b.wire)
        assert b.engine.stop_queue(TX) == RingState(1, 1)
        b.engine.reset()
        b.engine.set_client(None)
        b.start(TX, b.tx)
        b.engine.run(True)
        b.kick(TX)
        assert b.receive_from_wire() == PACKET


def test_indirect_descriptors() -> None:
    with bench() as b:
        b.run()
        b.memory.write(TX_DATA, bytes(HEADER) + PACKET)
        b.tx.add_indirect(TABLES, [Buffer(TX_DATA, HEADER), Buffer(TX_DATA + HEADER, len(PACKET))])
        b.kick(TX)
        assert b.receive_from_wire() == PACKET
        pieces = [Buffer(RX_DATA, 700, writable=True), Buffer(RX_DATA + PAGE, 1000, writable=True)]
        b.rx.add_indirect(TABLES + PAGE, pieces)
        b.kick(RX)
        b.wire.send(PACKET)
        assert b.rx.wait_used() == [(0, HEADER + len(PACKET))]
        whole = b.memory.read(RX_DATA, 700) + b.memory.read(RX_DATA + PAGE, 1000)
        assert whole[: HEADER + len(PACKET)] == header(1) + PACKET


def test_a_packet_fills_several_mergeable_buffers() -> None:
    with bench() as b:
        b.run()
        places = b.offer(500, 500, 500, 500)
        b.wire.send(PACKET)
        assert b.rx.wait_used(3) == [(0, 500), (1, 500), (2, HEADER + len(PACKET) - 1000)]
        whole = b"".join(b.memory.read(at, 500) for at in places[:3])
        assert whole[: HEADER + len(PACKET)] == header(3) + PACKET
        b.wire.send(b"short")
        assert b.rx.wait_used() == [(3, HEADER + 5)]
        assert b.memory.read(places[3], HEADER + 5) == header(1) + b"short"


@pytest.mark.parametrize("has_header", [False, True])
def test_the_header_of_virtio_0_95_has_two_bytes_less(has_header: bool) -> None:
    """Out from one buffer and from pieces, in into one that fits just so, into pieces, and not into less."""
    short = HEADER - 2
    on_wire = bytes(HEADER) if has_header else b""
    with bench(mergeable=False, has_header=has_header) as b:
        b.run(short_header=True)
        for sizes in ((short + len(PACKET),), (short, len(PACKET)), (3, short, len(PACKET) - 3)):
            b.memory.write(TX_DATA, bytes(short) + PACKET)
            starts = [TX_DATA + sum(sizes[:n]) for n in range(len(sizes))]
            b.tx.add(*map(Buffer, starts, sizes))
            b.kick(TX)
            assert b.receive_from_wire() == on_wire + PACKET
        [tight] = b.offer(short + len(PACKET) - 1)
        b.wire.send(on_wire + PACKET)
        b.wire.send(on_wire + PACKET[:-1])
        assert b.rx.wait_used() == [(0, short + len(PACKET) - 1)]
        assert b.memory.read(tight, short + len(PACKET) - 1) == bytes(short) + PACKET[:-1]
        assert b.engine.count(RX).dropped == 1
        pieces = [
            Buffer(RX_DATA + PAGE, short, writable=True),
            Buffer(RX_DATA + 2 * PAGE, 2000, writable=True),
        ]
        b.rx.add(*pieces)
        b.kick(RX)
        b.wire.send(on_wire + PACKET)
        assert b.rx.wait_used() == [(1, short + len(PACKET))]
        assert b.memory.read(RX_DATA + 2 * PAGE, len(PACKET)) == PACKET


def test_a_packet_waits_for_enough_buffers() -> None:
    with bench() as b:
        b.run()
        b.offer(800)
        b.wire.send(PACKET)
        b.wire.send(b"next")
        # The engine asks for a notification of new buffers once it knows that it needs one.
        wait_for(lambda: b.engine.count(RX).kicks == 1 and read16(b, b.rx.used) == 0, "a wish for buffers")
        assert b.rx.collect() == []
        b.offer(800, 800)
        assert b.rx.wait_used(3) == [(0, 800), (1, HEADER + len(PACKET) - 800), (2, HEADER + 4)]


def test_a_packet_that_fits_nowhere_is_dropped() -> None:
    with bench(mergeable=False) as b:
        b.run()
        [at] = b.offer(500)
        b.wire.send(PACKET)
        b.wire.send(b"short")
        assert b.rx.wait_used() == [(0, HEADER + 5)]
        assert b.memory.read(at, HEADER + 5) == header(1) + b"short"
        assert b.engine.count(RX).dropped == 1


def test_a_packet_larger_than_all_buffers_together_is_dropped() -> None:
    with bench(size=4) as b:
        b.run()
        b.offer(200, 200, 200, 200)
        b.wire.send(PACKET)
        b.wire.send(b"short")
        assert b.rx.wait_used() == [(0, HEADER + 5)]


@pytest.mark.parametrize("event_idx", [False, True])
def test_indices_wrap_around(event_idx: bool) -> None:
    with bench(size=8, start=65530, event_idx=event_idx) as b:
        b.run()
        for number in range(20):
            packet = b"%d" % number
            b.send(packet)
            assert b.receive_from_wire() == packet
            [(head, _)] = b.tx.wait_used()
            assert head == number % 8
            b.set_used_event(b.tx)
            [at] = b.offer(256)
            b.wire.send(packet)
            assert b.rx.wait_used() == [(number % 8, HEADER + len(packet))]
            assert b.memory.read(at, HEADER + len(packet)) == header(1) + packet
            b.set_used_event(b.rx)
        assert b.engine.stop_queue(TX) == RingState(14, 14)
        assert b.engine.stop_queue(RX) == RingState(14, 14)


def test_no_interrupt_where_the_driver_wants_none() -> None:
    with bench() as b:
        b.memory.write(b.tx.avail, struct.pack("<H", AVAIL_F_NO_INTERRUPT))
        b.run()
        b.send(b"one")
        wait_for(lambda: b.tx.used_index == 1, "the buffer back")
        b.memory.write(b.tx.avail, struct.pack("<H", 0))
        b.send(b"two")
        wait_for(lambda: b.engine.count(TX).interrupts == 1, "an interrupt for the second")
        assert b.tx.used_index == 2


def test_event_idx_delays_interrupts() -> None:
    with bench(event_idx=True) as b:
        b.run()
        b.send(b"first")  # tells the driver where the engine stands, whatever it asked for
        wait_for(lambda: b.engine.count(TX).interrupts == 1, "the first interrupt")
        b.memory.write(b.tx.avail + 4 + 2 * b.tx.size, struct.pack("<H", 3))
        for number in range(2, 6):
            b.send(b"%d" % number)
            wait_for(lambda number=number: b.tx.used_index == number, "the buffer back")  # type: ignore[misc]
        # used_event 3: an interrupt when the fourth buffer comes back, none before and none after.
        assert b.engine.count(TX).interrupts == 2


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_sleeping_engine_wants_to_be_notified(event_idx: bool) -> None:
    with bench(event_idx=event_idx) as b:
        b.run()
        b.send(b"a", b"b", b"c")
        b.tx.wait_used(3)
        if event_idx:
            avail_event = b.tx.used + 4 + 8 * b.tx.size
            wait_for(lambda: read16(b, avail_event) == 3, "avail_event to follow")
        else:
            wait_for(lambda: read16(b, b.tx.used) == 0, "NO_NOTIFY to be cleared")


def test_a_ring_is_not_looked_at_before_it_is_notified() -> None:
    with bench() as b:
        b.tx.add(Buffer(TX_DATA, HEADER + 60))
        b.run()
        b.offer(256)
        b.wire.send(b"x")
        b.rx.wait_used()  # the engine is awake, and has other work
        assert b.tx.used_index == 0
        b.kick(TX)
        b.tx.wait_used()


def test_a_notification_that_comes_early_counts_later() -> None:
    with bench() as b:
        b.start(TX, b.tx)
        b.send(PACKET)
        wait_for(lambda: b.engine.count(TX).kicks == 1, "the kick seen")
        assert b.tx.used_index == 0
        b.engine.run(True)
        assert b.tx.wait_used() == [(0, 0)]


def test_nothing_moves_while_stopped() -> None:
    with bench() as b:
        b.run()
        b.offer(256)
        b.engine.run(False)
        b.wire.send(b"lost")
        wait_for(lambda: b.engine.count(RX).dropped == 1, "the packet dropped")
        b.engine.run(True)
        b.wire.send(b"seen")
        assert b.rx.wait_used() == [(0, HEADER + 4)]
        assert b.memory.read(RX_DATA + HEADER, 4) == b"seen"


def test_a_queue_goes_on_where_it_was_stopped() -> None:
    with bench() as b:
        b.run()
        b.send(b"one", b"two")
        b.tx.wait_used(2)
        state = b.engine.stop_queue(TX)
        assert state == RingState(2, 2)
        b.tx.add(Buffer(TX_DATA, HEADER + 3))
        b.kick(TX)
        with pytest.raises(OSError, match="busy"):
            b.start(RX, b.rx)
        b.start(TX, b.tx, state=state)
        b.kick(TX)
        assert b.tx.wait_used() == [(2, 0)]


@pytest.mark.parametrize("buffers", [0, 1], ids=["packet-at-hand", "packets-on-the-uplink"])
def test_packets_wait_for_a_receive_queue_that_is_out(buffers: int) -> None:
    """The device runs; a NIC has a packet buffer."""
    with bench() as b:
        b.run()
        b.offer(*[2048] * buffers)
        b.wire.send(PACKET)
        if buffers:
            b.rx.wait_used()
        else:
            wait_for(lambda: not readable(b.uplink), "the packet at hand")
        b.engine.stop_queue(RX)
        b.wire.send(b"1" * 60)
        b.wire.send(b"2" * 60)
        b.send(PACKET)
        b.receive_from_wire()
        b.start(RX, b.rx)
        left = 3 - buffers
        b.offer(*[2048] * left)
        assert len(b.rx.wait_used(left)) == left
        assert b.engine.count(RX).dropped == 0


@pytest.mark.parametrize("stop", ["run", "reset"])
def test_packets_are_lost_on_a_device_that_does_not_run(stop: str) -> None:
    with bench() as b:
        b.run()
        b.engine.stop_queue(RX)
        b.wire.send(PACKET)
        if stop == "run":
            b.engine.run(False)
        else:
            b.engine.reset()
        wait_for(lambda: b.engine.count(RX).dropped == 1, "the packet to be lost")


def test_prefetched_buffers_are_fetched_and_not_used() -> None:
    with bench(prefetch=4) as b:
        b.run()
        b.offer(*[256] * 6)
        b.wire.send(b"x")
        b.rx.wait_used()
        b.kick(RX)
        wait_for(lambda: b.engine.count(RX).kicks == 2, "the kick seen")
        state = b.engine.stop_queue(RX)
        assert (state.used, state.avail) in [(1, 4), (1, 5)]  # 4 ahead, once it has looked again
        # What an IFCVF driver does: both from the used index, so that the rest is fetched again.
        b.start(RX, b.rx, state=RingState(state.used, state.used))
        for number in range(1, 6):
            b.wire.send(b"%d" % number)
            assert b.rx.wait_used() == [(number, HEADER + 1)]


def test_packets_wait_for_a_congested_uplink() -> None:
    packets = [b"%d" % number for number in range(1000)]  # more than the far end takes
    with bench(size=1024) as b:
        b.run()
        for number, packet in enumerate(packets):
            at = TX_DATA + 64 * number
            b.memory.write(at, bytes(HEADER) + packet)
            b.tx.add(Buffer(at, HEADER + len(packet)))
        b.kick(TX)
        assert [b.receive_from_wire() for _ in packets] == packets
        assert b.engine.count(TX).dropped == 0


def test_a_lost_uplink_loses_packets_only() -> None:
    with bench() as b:
        b.run()
        b.offer(256)
        b.wire.close()
        b.send(b"into the void")
        assert b.tx.wait_used() == [(0, 0)]
        assert b.engine.count(TX).dropped == 1
        assert b.engine.fault() is None


@pytest.mark.parametrize("size", [0, 1 << 17])
def test_what_is_no_packet_is_dropped(size: int) -> None:
    with bench() as b:
        b.run()
        b.tx.add(Buffer(TX_DATA, HEADER + size))
        b.kick(TX)
        assert b.tx.wait_used() == [(0, 0)]
        assert b.engine.count(TX).dropped == 1


def second_memory(b: Bench, iova: int, *, writable: bool = True) -> int:
    """Map another file where the first memory ends."""
    fd = os.memfd_create("more")
    os.ftruncate(fd, MEMORY_SIZE)
    b.engine.map(iova, MEMORY_SIZE, fd, 0, writable)
    return fd


def test_a_buffer_may_span_two_mappings() -> None:
    whole = bytes(HEADER) + PACKET
    at = MEMORY_SIZE - 600
    with bench() as b:
        fd = second_memory(b, MEMORY_SIZE)
        b.run()
        b.memory.write(at, whole[:600])
        os.pwrite(fd, whole[600:], 0)
        b.tx.add(Buffer(at, len(whole)))
        b.kick(TX)
        assert b.receive_from_wire() == PACKET
        b.rx.add(Buffer(at, len(whole), writable=True))
        b.kick(RX)
        b.wire.send(PACKET)
        assert b.rx.wait_used() == [(0, len(whole))]
        assert b.memory.read(at, 600) + os.pread(fd, len(whole) - 600, 0) == header(1) + PACKET
        os.close(fd)


def test_only_packet_buffers_are_logged() -> None:
    log = MEMORY_SIZE  # one bit for a page: 128 bytes would do
    with bench() as b:
        fd = second_memory(b, log)
        os.pwrite(fd, b"\x01", 0)  # somebody else's bit
        b.engine.set_log(True, log, log + MEMORY_SIZE // PAGE // 8)
        b.run()
        [first, second] = b.offer(2048, 2048)
        b.send(PACKET)
        b.tx.wait_used()
        b.wire.send(PACKET)
        b.rx.wait_used()
        logged = os.pread(fd, MEMORY_SIZE // PAGE // 8, 0)
        pages = [n for n in range(8 * len(logged)) if logged[n // 8] >> n % 8 & 1]
        assert pages == [0, first // PAGE]
        b.engine.set_log(False, 0, 0)
        b.wire.send(PACKET)
        b.rx.wait_used()
        assert os.pread(fd, len(logged), 0) == logged
        assert second // PAGE not in pages
        os.close(fd)


@pytest.mark.parametrize("end", [0, RX_DATA // PAGE // 8])
def test_writes_beyond_the_log_are_passed_over(end: int) -> None:
    with bench() as b:
        fd = second_memory(b, MEMORY_SIZE)
        b.engine.set_log(True, MEMORY_SIZE, MEMORY_SIZE + end)
        b.run()
        b.offer(2048)
        b.wire.send(PACKET)
        b.rx.wait_used()
        assert not any(os.pread(fd, PAGE, 0))
        os.close(fd)


def test_a_log_may_end_within_a_page_of_its_file() -> None:
    """So does QEMU's, which is as long as there are bits, and cannot be made longer."""
    log, size = 1 << 44, PAGE + 8
    with bench() as b:
        fd = os.memfd_create("log", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        b.engine.map(log, 2 * PAGE, fd, 0, writable=True)
        b.engine.set_log(True, log, log + size)
        b.run()
        [at] = b.offer(2048)
        b.wire.send(PACKET)
        b.rx.wait_used()
        assert os.pread(fd, 1, at // PAGE // 8) == bytes([1 << at // PAGE % 8])
        with pytest.raises(OSError, match="Invalid argument"):
            b.engine.map(log + 2 * PAGE, 3 * PAGE, fd, 0, writable=True)
        os.close(fd)


def test_a_log_that_is_not_mapped_is_passed_over() -> None:
    with bench() as b:
        b.engine.set_log(True, 1 << 44, (1 << 44) + PAGE)
        b.run()
        b.offer(2048)
        b.wire.send(PACKET)
        b.rx.wait_used()
        assert b.engine.fault() is None


def test_mapped_doorbells() -> None:
    with bench(mapped_doorbells=True) as b:
        doorbells = b.engine.doorbell_fd
        assert doorbells is not None
        b.run()
        b.memory.write(TX_DATA, bytes(HEADER) + PACKET)
        b.tx.add(Buffer(TX_DATA, HEADER + len(PACKET)))
        os.pwrite(doorbells, struct.pack("<H", TX), TX * PAGE)
        assert b.receive_from_wire() == PACKET
        assert os.pread(doorbells, 2, TX * PAGE) == struct.pack("<H", NOT_RUNG)
        assert b.engine.count(TX).kicks == 1


def run_time(thread: str) -> int:
    """Nanoseconds that a thread has run."""
    return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0])


@pytest.mark.parametrize("starved", [False, True])
def test_an_engine_without_work_sleeps(starved: bool) -> None:
    """Nor does it run while packets wait that only a buffer can help."""
    before = threads()
    with bench() as b:
        [thread] = threads() - before
        b.run()
        b.send(b"a")
        b.tx.wait_used()
        if starved:
            b.wire.send(b"x")
            b.wire.send(b"y")

        def is_asleep() -> bool:
            seen = run_time(thread)
            threading.Event().wait(0.1)
            return run_time(thread) - seen < 1_000_000

        wait_for(is_asleep, "a thread that does not run")


def test_calls_get_through_under_load() -> None:
    """A source of packets that never ends keeps the engine from ever sleeping."""
    zero = os.open("/dev/zero", os.O_RDWR)
    engine = Engine(PlainUplink((zero,)))
    engine.kick(RX)  # /dev/zero cannot be polled: this makes the engine read
    wait_for(lambda: engine.count(RX).dropped > 1000, "load")
    begin = time.monotonic()
    for _ in range(1000):
        engine.set_call(RX, None)
    assert time.monotonic() - begin < 5
    engine.close()
    os.close(zero)


@pytest.mark.parametrize(
    ("iova", "size", "offset", "error"),
    [
        (MEMORY_SIZE - PAGE, 2 * PAGE, 0, "exists"),
        (0, PAGE, 0, "exists"),
        (MEMORY_SIZE, 0, 0, "Invalid"),
        (MEMORY_SIZE, 100, 0, "Invalid"),
        (MEMORY_SIZE + 1, PAGE, 0, "Invalid"),
        (MEMORY_SIZE, PAGE, 1, "Invalid"),
        (MEMORY_SIZE, PAGE, MEMORY_SIZE, "Invalid"),
        (MEMORY_SIZE, MEMORY_SIZE + PAGE, 0, "Invalid"),
        ((1 << 64) - PAGE, 2 * PAGE, 0, "Invalid"),
        (MEMORY_SIZE, PAGE, (1 << 64) - PAGE, "Invalid"),
    ],
)
def test_bad_mappings_are_refused(iova: int, size: int, offset: int, error: str) -> None:
    with bench() as b, pytest.raises(OSError, match=error):
        b.engine.map(iova, size, b.memory.fd, offset, writable=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: os.memfd_create("x"),
        lambda: os.memfd_create("x", os.MFD_HUGETLB),
        lambda: os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR),
    ],
    ids=["memfd", "hugetlbfs", "tmpfs"],
)
def test_files_that_are_memory_are_mapped(make: Callable[[], int]) -> None:
    """What QEMU and DPDK keep guest memory in."""
    fd = make()
    with bench() as b:
        os.ftruncate(fd, HUGE_PAGE)
        b.engine.map(MEMORY_SIZE, HUGE_PAGE, fd, 0, writable=True)
    os.close(fd)


OVERLAY = """
mount -t tmpfs none "$PWD" && cd "$PWD" && mkdir lower upper work merged &&
mount -t overlay none -o lowerdir=lower,upperdir=upper,workdir=work merged &&
truncate --size 4096 merged/file && exec cat merged/file -
"""


def test_a_file_whose_pages_may_not_come_is_refused(tmp_path: Path) -> None:
    """Stands for FUSE and network filesystems, which need a server; what lies below it could be one."""
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", OVERLAY],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert len(holder.stdout.read(4096)) == 4096
        fd = os.open(f"/proc/{holder.pid}/cwd/merged/file", os.O_RDWR)
        with bench() as b, pytest.raises(OSError, match="not supported"):
            b.engine.map(MEMORY_SIZE, PAGE, fd, 0, writable=True)
        os.close(fd)
        holder.communicate()


def test_mappings_are_limited() -> None:
    with bench() as b:
        for number in range(1, MAX_MAPS):
            b.engine.map(MEMORY_SIZE + number * PAGE, PAGE, None, 0, writable=True)
        with pytest.raises(OSError, match="No space"):
            b.engine.map(MEMORY_SIZE, PAGE, None, 0, writable=True)


def test_all_vfs_together_have_mappings_enough() -> None:
    """Linux's DEFAULT_MAX_MAP_COUNT (include/linux/mm.h) is for a whole process; 500 are its own."""
    assert MAX_VFS * (MAX_MAPS + 8) + 500 <= 65530


def test_unmapping_is_exact() -> None:
    with bench() as b:
        for iova, size in ((0, PAGE), (PAGE, MEMORY_SIZE - PAGE), (MEMORY_SIZE, MEMORY_SIZE)):
            with pytest.raises(FileNotFoundError):
                b.engine.unmap(iova, size)
        b.engine.unmap(0, MEMORY_SIZE)
        b.engine.map(0, MEMORY_SIZE, b.memory.fd, 0, writable=True)


@pytest.mark.parametrize(
    "change",
    [{"size": 0}, {"size": 3}, {"size": 2048}, {"descriptors": 8}, {"avail": 1}, {"used": 2}],
    ids=str,
)
def test_a_queue_that_cannot_be_is_refused(change: dict[str, int]) -> None:
    with bench() as b, pytest.raises(OSError, match="Invalid"):
        b.start(TX, b.tx, **change)


def test_setup_is_what_the_header_says() -> None:
    """Catches a field that is added on one side only."""
    from datapath.native._native import ffi

    native = {name for name, _ in ffi.typeof("struct ring_setup").fields}
    python = {*QueueSetup.__dataclass_fields__, "avail_index", "used_index", "prefetch"} - {"state"}
    assert native == python
