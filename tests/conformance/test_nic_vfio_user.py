"""virt-vdpa-nic, the program, driven over its sockets by a client that shares no code with it."""

import contextlib
import errno
import itertools
import os
import resource
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.emulated_nic import BIN, EmulatedNic, ask
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import run, wait_for
from tests.harness.raw_vfio_user import (
    COMMON_BAR,
    CONFIG,
    DEVICE_CONFIG,
    DEVICE_RESET,
    GET_INFO,
    GET_IRQ_INFO,
    GET_REGION_IO_FDS,
    HEADER,
    LM_BAR,
    MEMORY_SIZE,
    MSIX,
    NO_REPLY,
    NOTIFY_BAR,
    REGION_READ,
    REGION_WRITE,
    RX,
    TX,
    TX_RING,
    VERSION,
    ErrnoReplyError,
    GoneError,
    RawClient,
    RawDriver,
    map_page,
)
from tests.harness.wire import Wire, frame

PAGE = 4096
NEEDS_RESET = 64


@contextmanager
def nic(folder: Path, *options: str, vfs: int = 2) -> Iterator[EmulatedNic]:
    with NetworkNamespace() as namespace, EmulatedNic(folder, namespace, vfs, *options) as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedNic]:
    """One NIC for all tests that do not end it; each finds its VFs idle."""
    with nic(tmp_path_factory.mktemp("nic")) as running:
        yield running


@contextmanager
def connected(running: EmulatedNic) -> Iterator[RawClient]:
    client = RawClient(running.folder / "vf0.sock")
    try:
        yield client
    finally:
        client.close()


@pytest.fixture
def client(shared: EmulatedNic) -> Iterator[RawClient]:
    with connected(shared) as connection:
        yield connection
    wait_idle(shared, 0)


def wait_idle(running: EmulatedNic, vf: int) -> None:
    wait_for("an idle VF", lambda: running.query(vf)["state"] == "idle", 5)


@contextmanager
def driven(running: EmulatedNic, vf: int, features: int = 1 << 32) -> Iterator[RawDriver]:
    """A VF with its queues running."""
    driver = RawDriver(RawClient(running.folder / f"vf{vf}.sock"))
    try:
        driver.start(features)
        yield driver
    finally:
        driver.close()
    wait_idle(running, vf)


def exchange(driver: RawDriver, wire: Wire, number: int) -> None:
    """A packet in each direction, notified by messages."""
    driver.add_packet(frame(number))
    driver.kick(TX)
    wire.expect(number)
    driver.tx.wait_used()
    driver.add_buffers(1)
    driver.kick(RX)
    wire.send(number + 1)
    assert driver.received() == frame(number + 1)


def test_packets_go_both_ways(shared: EmulatedNic) -> None:
    wire = Wire(shared.namespace, "vf0")
    with driven(shared, 0) as driver:
        before = shared.query(0)
        assert before["state"] == "running"
        for number in range(0, 20, 2):
            exchange(driver, wire, number)
        after = shared.query(0)
        assert after["tx_packets"] - before["tx_packets"] == 10
        assert after["rx_packets"] - before["rx_packets"] == 10
    wire.close()


def test_kicks_by_eventfd(shared: EmulatedNic) -> None:
    wire = Wire(shared.namespace, "vf0")
    with driven(shared, 0) as driver:
        reply = driver.client.command(GET_REGION_IO_FDS, struct.pack("=IIII", 16, 0, NOTIFY_BAR, 0))
        argsz, _, _, count = struct.unpack("=IIII", reply)
        assert (argsz, count, driver.client.fds) == (16 + 2 * 40, 2, [])
        reply = driver.client.command(GET_REGION_IO_FDS, struct.pack("=IIII", argsz, 0, NOTIFY_BAR, 0))
        kicks = driver.client.fds
        for queue, fd in enumerate(kicks):
            entry = struct.unpack_from("=QQIIIIQ", reply, 16 + 40 * queue)
            assert entry == (PAGE * queue, 2, queue, 0, 0, 0, 0)
            driver.add_packet(frame(7)) if queue == TX else driver.add_buffers(1)
            os.eventfd_write(fd, 1)
            os.close(fd)
        wire.expect(7)
        wire.send(8)
        assert driver.received() == frame(8)
    wire.close()


def test_nothing_but_a_doorbell_notifies(shared: EmulatedNic) -> None:
    """A queue's number, in 16 bits, at the queue's own place (virtio 1.3 section 4.1.5.2)."""
    with driven(shared, 0) as driver:
        before = shared.query(0)["kicks"]
        for offset, width, value in (
            (PAGE, 2, 0),  # the other queue's number
            (0, 2, 1),
            (PAGE, 4, 1),
            (PAGE + 2, 2, 1),
            (2 * PAGE, 2, 2),  # nobody serves the control queue
            (3 * PAGE, 2, 3),  # no queue at all
        ):
            driver.client.write(NOTIFY_BAR, offset, width, value)
        driver.kick(TX)
        wait_for("the good kick", lambda: shared.query(0)["kicks"] == before + 1, 5)


def kick_eventfds(client: RawClient) -> list[int]:
    """Ask for the eventfds of the doorbells, in the order of the queues."""
    client.command(GET_REGION_IO_FDS, struct.pack("=IIII", 16 + 2 * 40, 0, NOTIFY_BAR, 0))
    return client.fds


def fill(fd: int) -> None:
    """Make an eventfd take nothing more."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)
    os.eventfd_write(fd, (1 << 64) - 2)


def test_a_doorbell_that_blocks_does_not_hold_up_the_nic(shared: EmulatedNic) -> None:
    """Its eventfd, full and blocking, hinders no notification by message."""
    wire = Wire(shared.namespace, "vf0")
    with driven(shared, 0) as driver:
        for fd in kick_eventfds(driver.client):
            fill(fd)
            os.set_blocking(fd, True)
            os.close(fd)
        exchange(driver, wire, 1)
    wire.close()


def test_a_doorbell_that_a_client_has_spoilt_goes_with_it(shared: EmulatedNic) -> None:
    wire = Wire(shared.namespace, "vf0")
    with driven(shared, 0) as driver:
        kept = kick_eventfds(driver.client)
        for fd in kept:
            fill(fd)
    with driven(shared, 0) as driver:
        before = shared.query(0)["kicks"]
        for fd in kept:
            os.eventfd_read(fd)
            os.eventfd_write(fd, 1)
        _, kick = kicks = kick_eventfds(driver.client)
        driver.add_packet(frame(1))
        os.eventfd_write(kick, 1)
        wire.expect(1)
        assert shared.query(0)["kicks"] == before + 1
    for fd in (*kept, *kicks):
        os.close(fd)
    wire.close()


def test_no_client_without_descriptors(tmp_path: Path) -> None:
    with nic(tmp_path, vfs=1) as running:
        wait_idle(running, 0)
        in_use = {int(path.name) for path in Path(f"/proc/{running.pid}/fd").iterdir()}
        free = next(number for number in itertools.count() if number not in in_use)
        limits = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
        # Enough to accept a client, not for its doorbells.
        resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (free + 1, limits[1]))
        client = RawClient(running.folder / "vf0.sock", negotiate=False)
        assert client.is_gone()
        client.close()
        resource.prlimit(running.pid, resource.RLIMIT_NOFILE, limits)
        with driven(running, 0) as driver:
            assert driver.status == 15


def test_mapped_doorbells(tmp_path: Path) -> None:
    with nic(tmp_path, "--doorbell=mapped", vfs=1) as running, driven(running, 0) as driver:
        client = driver.client
        wire = Wire(running.namespace, "vf0")
        reply = client.command(GET_REGION_IO_FDS, struct.pack("=IIII", 256, 0, NOTIFY_BAR, 0))
        assert struct.unpack("=IIII", reply)[3] == 0
        argsz, flags, _, _, _, _ = client.region_info(NOTIFY_BAR)
        assert (argsz, flags & 4, client.fds) == (32 + 16 + 2 * 16, 4, [])
        _, flags, _, at, _, offset = client.region_info(NOTIFY_BAR, argsz)
        [fd] = client.fds
        assert (flags & 0xC, at) == (0xC, 32)
        assert struct.unpack("=HHIII", client.capabilities[:16]) == (1, 1, 0, 2, 0)
        areas = list(struct.iter_unpack("=QQ", client.capabilities[16:]))
        assert areas == [(0, PAGE), (PAGE, PAGE)]
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)  # a client cannot take the page from under the device
        with map_page(fd, offset + areas[TX][0]) as doorbell:
            driver.add_packet(frame(1))
            doorbell[0:2] = struct.pack("<H", TX)
            wire.expect(1)
        exchange(driver, wire, 2)  # messages notify as well
        os.close(fd)
        wire.close()


def test_a_queue_stops_and_says_where(shared: EmulatedNic) -> None:
    wire = Wire(shared.namespace, "vf0")
    with driven(shared, 0) as driver:
        exchange(driver, wire, 0)
        exchange(driver, wire, 2)
        for index, queue in ((RX, driver.rx), (TX, driver.tx)):
            driver.client.write(COMMON_BAR, 0x16, 2, index)
            driver.client.write(COMMON_BAR, 0x1C, 2, 0)
            assert driver.client.read(COMMON_BAR, 0x1C, 2) == 0
            assert driver.client.read(LM_BAR, 0x20 + 4 * index, 4) == 2 << 16 | 2
            driver.enable(index, queue)  # the state registers keep what they were
        exchange(driver, wire, 4)
    wire.close()


def test_prefetch_shows_in_the_state(tmp_path: Path) -> None:
    with nic(tmp_path, "--prefetch=3", vfs=1) as running, driven(running, 0) as driver:
        driver.add_buffers(8)
        driver.kick(RX)
        wait_for("the kick", lambda: running.query(0)["kicks"] == 1, 5)
        wire = Wire(running.namespace, "vf0")
        wire.send(1)
        assert driver.received() == frame(1)
        driver.client.write(COMMON_BAR, 0x16, 2, RX)
        driver.client.write(COMMON_BAR, 0x1C, 2, 0)
        state = driver.client.read(LM_BAR, 0x20, 4)
        assert state >> 16 == 1
        assert state & 0xFFFF >= 3
        wire.close()


def test_dirty_log(shared: EmulatedNic) -> None:
    """The registers of BAR 4 lead to bits for the pages that packets are written to."""
    base = 1 << 44
    wire = Wire(shared.namespace, "vf0")
    with driven(shared, 0) as driver:
        log = os.memfd_create("log")
        os.ftruncate(log, PAGE)
        driver.client.dma_map(base, PAGE, log)
        for offset, value in ((0x10, base), (0x18, base + PAGE)):
            driver.client.write(LM_BAR, offset, 4, value & 0xFFFFFFFF)
            driver.client.write(LM_BAR, offset + 4, 4, value >> 32)
        driver.client.write(LM_BAR, 0, 4, 1)
        exchange(driver, wire, 0)
        logged = os.pread(log, PAGE, 0)
        assert [n for n in range(8 * PAGE) if logged[n // 8] >> n % 8 & 1] == [0x100000 // PAGE]
        os.close(log)
    wire.close()


def test_link_down_and_up(shared: EmulatedNic) -> None:
    wire = Wire(shared.namespace, "vf0")
    with driven(shared, 0) as driver:
        exchange(driver, wire, 0)
        ask(shared.control, "vf-stop", vf=0)
        driver.wait_config_interrupt()
        assert driver.client.read(COMMON_BAR, DEVICE_CONFIG + 6, 2) == 0
        assert shared.query(0)["state"] == "stopped"
        driver.add_packet(frame(2))
        driver.kick(TX)
        dropped = shared.query(0)["rx_dropped"]
        wire.send(3)
        wait_for("the frame dropped", lambda: shared.query(0)["rx_dropped"] > dropped, 5)
        assert driver.tx.used_index == 1
        ask(shared.control, "vf-start", vf=0)
        driver.wait_config_interrupt()
        assert driver.client.read(COMMON_BAR, DEVICE_CONFIG + 6, 2) == 1
        wire.expect(2)
        driver.tx.wait_used()
        exchange(driver, wire, 4)
    wire.close()


def test_a_bad_ring_breaks_one_vf_alone(shared: EmulatedNic) -> None:
    wires = [Wire(shared.namespace, f"vf{vf}") for vf in (0, 1)]
    with driven(shared, 1) as good:
        with driven(shared, 0) as bad:
            exchange(bad, wires[0], 0)
            bad.tx.publish(0x7FFF)
            bad.kick(TX)
            bad.wait_config_interrupt()
            assert bad.status & NEEDS_RESET
            assert shared.query(0)["state"] == "broken"
            assert "queue 1" in shared.query(0)["failure"]
            exchange(good, wires[1], 0)
            bad.set_status(0)
            assert bad.status == 0
            assert shared.query(0)["state"] == "attached"
        exchange(good, wires[1], 2)
    for wire in wires:
        wire.close()


def test_memory_that_shrinks_breaks_one_vf_alone(shared: EmulatedNic) -> None:
    wires = [Wire(shared.namespace, f"vf{vf}") for vf in (0, 1)]
    with driven(shared, 1) as good:
        with driven(shared, 0) as bad:
            os.ftruncate(bad.memory.fd, TX_RING)
            bad.kick(TX)
            bad.wait_config_interrupt()
            assert bad.status & NEEDS_RESET
            exchange(good, wires[1], 0)
        exchange(good, wires[1], 2)
    for wire in wires:
        wire.close()


def test_a_reset_may_meet_a_fault(shared: EmulatedNic) -> None:
    """Whichever comes first at the NIC, the other must not confuse it."""
    with driven(shared, 0) as driver:
        driver.client.command(GET_REGION_IO_FDS, struct.pack("=IIII", 96, 0, NOTIFY_BAR, 0))
        kicks = driver.client.fds
        for _ in range(300):
            driver.tx.publish(0x7FFF)
            os.eventfd_write(kicks[TX], 1)
            driver.set_status(0)
            assert driver.status == 0
            driver.client.dma_unmap(0, MEMORY_SIZE)
            driver.clear_rings()
            driver.start()
        for fd in kicks:
            os.close(fd)


def test_what_qemu_asks_for_first(client: RawClient) -> None:
    assert client.command(GET_INFO, struct.pack("=IIII", 16, 0, 0, 0)) == struct.pack("=IIII", 16, 3, 9, 5)
    sizes = [client.region_info(index)[4] for index in range(9)]
    assert sizes == [0x4000, 0, 0x4000, 0, 0x1000, 0, 0, 256, 0]
    counts = []
    for index in range(5):
        reply = client.command(GET_IRQ_INFO, struct.pack("=IIII", 16, 0, index, 0))
        counts.append(struct.unpack("=IIII", reply)[3])
    assert counts == [0, 0, 4, 1, 1]
    space = client.read(CONFIG, 0, 256).to_bytes(256, "little")
    assert struct.unpack_from("<HH", space) == (0x1AF4, 0x1041)
    assert struct.unpack_from("<HH", space, 0x2C) == (0x8086, 0x001A)
    client.write(CONFIG, 4, 2, 2)  # BARs are decoded from now on
    assert client.read(COMMON_BAR, 0x12, 2) == 3


def test_bus_master_and_memory_bits(shared: EmulatedNic) -> None:
    wire = Wire(shared.namespace, "vf0")
    with driven(shared, 0) as driver:
        driver.client.write(CONFIG, 4, 2, 2)
        driver.add_packet(frame(0))
        driver.kick(TX)
        assert shared.query(0)["state"] == "attached"
        assert driver.tx.used_index == 0
        driver.client.write(CONFIG, 4, 2, 4)
        assert driver.status == 0xFF
        driver.client.write(CONFIG, 4, 2, 6)
        wire.expect(0)
        driver.tx.wait_used()
    wire.close()


def test_function_reset_keeps_memory_and_interrupts(shared: EmulatedNic) -> None:
    with driven(shared, 0) as driver:
        driver.client.command(DEVICE_RESET)
        assert driver.client.read(CONFIG, 4, 2) == 0
        with pytest.raises(ErrnoReplyError) as refused:
            driver.client.dma_map(0, MEMORY_SIZE, driver.memory.fd)
        assert refused.value.errno == errno.EEXIST
        driver.client.set_irqs(0x21, MSIX, 0, 4)
        driver.client.set_irqs(0x24, MSIX, 0, 1, (driver.config_fd,))
        driver.client.set_irqs(0x21, MSIX, 0, 1)  # loopback
        driver.wait_config_interrupt()


def test_an_interrupt_that_is_no_eventfd_is_refused(client: RawClient) -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(ErrnoReplyError) as refused:
            client.set_irqs(0x24, MSIX, 1, 1, (writer,))
        assert refused.value.errno == errno.EINVAL
    finally:
        os.close(reader)
        os.close(writer)


def test_forms_of_set_irqs_that_qemu_uses(client: RawClient) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    client.set_irqs(0x21, 0, 0, 0)  # INTx off, though there is none
    client.set_irqs(0x24, 3, 0, 1, (fd,))  # ERR
    client.set_irqs(0x24, 3, 0, 1)
    client.set_irqs(0x24, MSIX, 0, 1)  # "switch to MSI-X, no vector"
    client.set_irqs(0x24, MSIX, 2, 1, (fd,))
    client.set_irqs(0x22, MSIX, 1, 2, data=b"\0\1")
    assert os.eventfd_read(fd) == 1
    client.set_irqs(0x21, MSIX, 0, 0)
    client.set_irqs(0x21, MSIX, 2, 1)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)
    os.close(fd)


@pytest.mark.parametrize(
    ("flags", "index", "start", "count", "fds", "data"),
    [
        (0x24, MSIX, 4, 1, 1, b""),  # start beyond the vectors
        (0x24, MSIX, 3, 2, 2, b""),  # range beyond
        (0x24, MSIX, 0xFFFFFFFF, 2, 2, b""),
        (0x24, MSIX, 0, 3, 2, b""),  # neither none nor one for each
        (0x24, MSIX, 0, 0, 0, b""),
        (0x24, 0, 0, 1, 1, b""),  # no INTx
        (0x24, 5, 0, 1, 1, b""),
        (0x24, 0xFFFFFFFF, 0, 1, 1, b""),
        (0x21, MSIX, 1, 0, 0, b""),
        (0x22, MSIX, 0, 2, 0, b"\1"),  # one flag for two vectors
        (0x21, MSIX, 0, 1, 1, b""),  # a descriptor for nothing
        (0x27, MSIX, 0, 1, 1, b""),
        (0x3C, MSIX, 0, 1, 1, b""),
        (0x00, MSIX, 0, 1, 0, b""),
        (0x09, MSIX, 0, 1, 0, b""),
        (0x24, MSIX, 0, 1, 1, bytes(4)),
    ],
)
def test_bad_set_irqs(
    client: RawClient, flags: int, index: int, start: int, count: int, fds: int, data: bytes
) -> None:
    given = tuple(os.eventfd(0) for _ in range(fds))
    with pytest.raises(ErrnoReplyError) as refused:
        client.set_irqs(flags, index, start, count, given, data)
    assert refused.value.errno == errno.EINVAL
    for fd in given:
        os.close(fd)


def test_memory_without_a_file_is_kept_in_mind(client: RawClient) -> None:
    client.dma_map(0xC0000, 0x20000, None, flags=1)
    with pytest.raises(ErrnoReplyError) as refused:
        client.dma_map(0xD0000, PAGE, None, flags=1)
    assert refused.value.errno == errno.EEXIST
    client.dma_unmap(0xC0000, 0x20000)
    client.dma_map(0xD0000, PAGE, None, flags=1)
    client.dma_unmap(0, 0, flags=2)
    client.dma_map(0xD0000, PAGE, None, flags=1)


@pytest.mark.parametrize(
    ("address", "size", "offset", "flags", "error"),
    [
        (0, 0, 0, 3, errno.EINVAL),
        (0, 100, 0, 3, errno.EINVAL),
        (8, PAGE, 0, 3, errno.EINVAL),
        (0, PAGE, 8, 3, errno.EINVAL),
        (0, 2 * PAGE, 0, 3, errno.EINVAL),  # beyond the file
        (0, PAGE, PAGE, 3, errno.EINVAL),
        (0, PAGE, 1 << 63, 3, errno.EINVAL),
        ((1 << 64) - PAGE, 2 * PAGE, 0, 3, errno.EINVAL),
        (0, PAGE, 0, 0, errno.EINVAL),
        (1 << 32, PAGE, 0, 3, errno.EEXIST),
    ],
)
def test_bad_dma_map(client: RawClient, address: int, size: int, offset: int, flags: int, error: int) -> None:
    fd = os.memfd_create("page")
    os.ftruncate(fd, PAGE)
    client.dma_map(1 << 32, PAGE, fd)
    with pytest.raises(ErrnoReplyError) as refused:
        client.dma_map(address, size, fd, offset, flags)
    assert refused.value.errno == error
    os.close(fd)


def test_bad_dma_unmap(client: RawClient) -> None:
    client.dma_map(0, 2 * PAGE, None)
    for address, size, flags, error in (
        (0, PAGE, 0, errno.ENOENT),
        (PAGE, PAGE, 0, errno.ENOENT),
        (0, 2 * PAGE, 2, errno.EINVAL),  # ALL has no range
        (0, 2 * PAGE, 1, errno.EOPNOTSUPP),  # a dirty bitmap
    ):
        with pytest.raises(ErrnoReplyError) as refused:
            client.dma_unmap(address, size, flags)
        assert refused.value.errno == error


@pytest.mark.parametrize(
    ("command", "payload", "error"),
    [
        (11, b"", errno.ENOSYS),
        (16, bytes(8), errno.ENOSYS),
        (0xFFFF, b"", errno.ENOSYS),
        (VERSION, bytes(4), errno.EINVAL),
        (GET_INFO, b"", errno.EINVAL),
        (5, struct.pack("=IIIIQQ", 32, 0, 9, 0, 0, 0), errno.EINVAL),
        (5, struct.pack("=IIIIQQ", 31, 0, 0, 0, 0, 0), errno.EINVAL),
        (GET_REGION_IO_FDS, struct.pack("=IIII", 16, 0, 9, 0), errno.EINVAL),
        (GET_IRQ_INFO, struct.pack("=IIII", 16, 0, 5, 0), errno.EINVAL),
        (REGION_READ, struct.pack("=QII", 0, 1, 4), errno.EINVAL),  # an empty region
        (REGION_READ, struct.pack("=QII", 0, 9, 4), errno.EINVAL),
        (REGION_READ, struct.pack("=QII", 255, CONFIG, 2), errno.EINVAL),
        (REGION_READ, struct.pack("=QII", (1 << 64) - 1, CONFIG, 2), errno.EINVAL),
        (REGION_READ, struct.pack("=QII", 0, CONFIG, 0), errno.EINVAL),
        (REGION_READ, struct.pack("=QII", 0, CONFIG, 0xFFFFFFFF), errno.EINVAL),
        (REGION_WRITE, struct.pack("=QII", 0, CONFIG, 4), errno.EINVAL),  # no data
        (REGION_WRITE, struct.pack("=QII", 0, CONFIG, 4) + bytes(5), errno.EINVAL),
        (2, bytes(31), errno.EINVAL),
        (3, bytes(23), errno.EINVAL),
    ],
)
def test_bad_commands_are_refused_one_by_one(
    client: RawClient, command: int, payload: bytes, error: int
) -> None:
    with pytest.raises(ErrnoReplyError) as refused:
        client.command(command, payload)
    assert refused.value.errno == error
    assert client.read(CONFIG, 0, 2) == 0x1AF4


def test_a_write_without_reply(client: RawClient) -> None:
    client.send(REGION_WRITE, struct.pack("=QII", 4, CONFIG, 2) + b"\2\0", flags=NO_REPLY)
    assert client.read(CONFIG, 4, 2) == 2
    client.send(0x1234, flags=NO_REPLY)  # not even a refusal
    assert client.read(CONFIG, 4, 2) == 2


def test_commands_may_come_in_pieces_and_in_bulk(client: RawClient) -> None:
    read = struct.pack("=QII", 0, CONFIG, 2)
    message = HEADER.pack(77, REGION_READ, 32, 0, 0) + read
    for at in range(len(message)):
        client.socket.send(message[at : at + 1])
    client.socket.send(message * 100)
    expected = HEADER.pack(77, REGION_READ, 34, 1, 0) + read + b"\xf4\x1a"
    received = b""
    while len(received) < len(expected) * 101:
        received += client.socket.recv(65536)
    assert received == expected * 101


def test_a_client_that_does_not_read_is_waited_for(client: RawClient) -> None:
    """Replies pile up at the client, not in the NIC, which serves its other VFs meanwhile."""
    message = HEADER.pack(1, REGION_READ, 32, 0, 0) + struct.pack("=QII", 0, COMMON_BAR, 0x4000)
    client.socket.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 100000:
            client.socket.send(message)
            sent += 1
    assert sent < 100000
    other = RawClient(Path(client.socket.getpeername()).with_name("vf1.sock"))
    assert other.read(CONFIG, 0, 2) == 0x1AF4
    other.close()
    client.socket.settimeout(5)
    left = sent * (32 + 0x4000)
    while left:
        left -= len(client.socket.recv(1 << 20))


def test_a_client_without_end_does_not_hold_up_the_others(shared: EmulatedNic) -> None:
    write = struct.pack("=QII", 4, CONFIG, 2) + bytes(2)
    flood = HEADER.pack(1, REGION_WRITE, HEADER.size + len(write), NO_REPLY, 0) + write
    done = threading.Event()
    with connected(shared) as client:

        def send() -> None:
            while not done.is_set():
                client.socket.sendall(flood * 2000)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            with driven(shared, 1) as driver:
                assert driver.status == 15
        finally:
            done.set()
            thread.join()
    wait_idle(shared, 0)


def test_an_interrupt_that_blocks_does_not_hold_up_the_others(shared: EmulatedNic) -> None:
    with driven(shared, 0) as driver:
        os.set_blocking(driver.config_fd, True)
        os.eventfd_write(driver.config_fd, (1 << 64) - 2)
        ask(shared.control, "vf-stop", vf=0)
        assert shared.query(0)["state"] == "stopped"
        ask(shared.control, "vf-start", vf=0)
        os.eventfd_read(driver.config_fd)
        assert driver.status == 15


GARBAGE = {
    "noise": bytes(range(256)),
    "size below a header": HEADER.pack(1, VERSION, 15, 0, 0),
    "size of 4 GiB": HEADER.pack(1, VERSION, 0xFFFFFFFF, 0, 0),
    "no such type": HEADER.pack(1, VERSION, 16, 2, 0),
    "a reply": HEADER.pack(1, VERSION, 16, 1, 0),
    "command before version": HEADER.pack(1, GET_INFO, 32, 0, 0) + bytes(16),
    "version 1": HEADER.pack(1, VERSION, 20, 0, 0) + struct.pack("=HH", 1, 0),
    "version without JSON": HEADER.pack(1, VERSION, 24, 0, 0) + bytes(4) + b"{{{\0",
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_ends_the_connection(shared: EmulatedNic, garbage: bytes) -> None:
    client = RawClient(shared.folder / "vf0.sock", negotiate=False)
    client.socket.send(garbage)
    assert client.is_gone()
    client.close()
    with driven(shared, 0) as driver:
        assert driver.status == 15


def descriptors(running: EmulatedNic) -> int:
    """How many the NIC has that are no sockets: connections to its control socket come and go."""
    links = []
    for path in Path(f"/proc/{running.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(path.readlink()))
    return sum(not link.startswith("socket:") for link in links)


def mappings(running: EmulatedNic) -> int:
    return Path(f"/proc/{running.pid}/maps").read_text().count("guest-memory")


@pytest.mark.parametrize("vanish", [False, True])
def test_nothing_is_left_of_a_client(tmp_path: Path, vanish: bool) -> None:
    with nic(tmp_path) as running:
        before = descriptors(running)
        with driven(running, 0) as driver:
            assert mappings(running) == 1
            assert descriptors(running) > before
            fds = tuple(os.eventfd(0) for _ in range(16))
            if vanish:  # in the middle of a message that carries descriptors
                socket.send_fds(driver.client.socket, [HEADER.pack(1, 8, 52, 0, 0)], fds)
            else:
                driver.client.set_irqs(0x24, 3, 0, 1, fds[:1])
                driver.client.set_irqs(0x24, 4, 0, 1, fds[:1])
                with pytest.raises(ErrnoReplyError):
                    driver.client.set_irqs(0x24, MSIX, 0, 3, fds)
            for fd in fds:
                os.close(fd)
        wait_for("descriptors closed", lambda: descriptors(running) == before, 5)
        assert mappings(running) == 0


def test_a_vf_has_one_client(shared: EmulatedNic) -> None:
    with driven(shared, 0) as driver:
        second = RawClient(shared.folder / "vf0.sock", negotiate=False)
        assert second.is_gone()
        second.close()
        assert driver.status == 15


def test_too_many_descriptors_end_the_connection(shared: EmulatedNic) -> None:
    client = RawClient(shared.folder / "vf0.sock")
    fds = tuple(os.eventfd(0) for _ in range(40))
    client.send(8, struct.pack("=IIIII", 20, 0x24, MSIX, 0, 1), fds)
    assert client.is_gone()
    client.close()
    for fd in fds:
        os.close(fd)
    wait_idle(shared, 0)


@pytest.mark.parametrize("arguments", [{}, {"vf": 2}, {"vf": -1}, {"vf": "0"}, {"vf": True}], ids=str)
def test_control_names_a_wrong_vf(shared: EmulatedNic, arguments: dict[str, object]) -> None:
    with pytest.raises(Exception, match="is not a VF number from 0 to 1"):
        ask(shared.control, "vf-stop", **arguments)


def test_describes_its_vfs(shared: EmulatedNic) -> None:
    wait_idle(shared, 0)
    first, second = ask(shared.control, "query-devices")["vfs"]
    assert (first["index"], second["index"]) == (0, 1)
    assert (first["tap"], second["tap"]) == ("vf0", "vf1")
    assert first["socket"] == str(shared.folder / "vf0.sock")
    assert first["mac"].startswith("02:")
    assert first["mac"] != second["mac"]
    assert (first["driver"], first["queue_pairs"]) == ("ifcvf", 1)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, None])
def test_ends_and_leaves_nothing(tmp_path: Path, end: signal.Signals | None) -> None:
    with nic(tmp_path, "--mac=02:00:00:00:00:07") as running:
        with connected(running) as client:
            assert client.read(CONFIG, 0, 2) == 0x1AF4
            if end is None:
                with contextlib.suppress(EOFError):  # the answer comes, and then the end
                    ask(running.control, "quit")
            else:
                running.signal(end)
            assert running.popen.wait(5) == 0
            assert client.is_gone()
        assert [path.name for path in tmp_path.iterdir()] == ["nic.log"]
        assert "vf0" not in running.namespace.run("ip", "link")


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--folder=/nonexistent/folder"], 1, "/nonexistent/folder"),
        ([f"--folder=/tmp/{'x' * 120}"], 1, f"/tmp/{'x' * 120}/vf0.sock: "),
        (["--folder={}", f"--control=/tmp/{'x' * 120}"], 1, f"/tmp/{'x' * 120}: "),
        (["--folder={}", "--tap=a-name-much-too-long"], 1, "TAP a-name-much-too-long"),
        (["--folder={}", "--tap=lo"], 1, "TAP lo: "),
        (["--folder={}", "--bridge=nobridge"], 1, "does the bridge exist?"),
        (["--folder={}", "--mac=01:00:00:00:00:00"], 2, "multicast"),
        (["--folder={}", "--mac=nonsense"], 2, "not a MAC address"),
        (["--folder={}", "--mac=02:00:00:00:00:01", "--mac=02:00:00:00:00:02"], 2, "2 times for 1 VFs"),
        (["--folder={}", "--vfs=0"], 2, "1 to 64"),
        (["--folder={}", "--vfs=65"], 2, "1 to 64"),
        (["--folder={}", "--prefetch=-1"], 2, "0 to 65535"),
        (["--folder={}", "--queue-pairs=0"], 2, "1 to 8"),
        (["--folder={}", "--queue-pairs=9"], 2, "1 to 8"),
        (["--folder={}", "--mtu=67"], 2, "from 68 to 9000"),
        (["--folder={}", "--mtu=9001"], 2, "from 68 to 9000"),
        (["--folder={}", "--without=csum,speed"], 2, "'speed' is no feature that can be withheld"),
        (["--folder={}", "--without=version_1"], 2, "'version_1' is no feature that can be withheld"),
        ([], 2, "--folder"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, options: list[str], code: int, text: str) -> None:
    command: list[str | Path] = [BIN / "virt-vdpa-nic", *(option.format(tmp_path) for option in options)]
    with NetworkNamespace() as namespace:
        ended = run(command, prefix=namespace.prefix, check=False)
    assert ended.returncode == code
    message = ended.stderr.strip().splitlines()
    assert text in message[-1]
    assert "None" not in message[-1]
    assert code == 2 or len(message) == 1
    assert not list(tmp_path.iterdir())


def test_does_not_take_a_folder_that_is_served(shared: EmulatedNic) -> None:
    command: list[str | Path] = [BIN / "virt-vdpa-nic", f"--folder={shared.folder}", "--tap=another"]
    ended = run(command, prefix=shared.namespace.prefix, check=False)
    assert ended.returncode == 1
    assert "vf0.sock: another process serves this socket" in ended.stderr
    assert shared.query(0)["state"] == "idle"
    assert "another" not in shared.namespace.run("ip", "link")


def test_does_not_take_a_tap_of_somebody_else(tmp_path: Path) -> None:
    """A persistent one could be opened as if it were new."""
    with NetworkNamespace() as namespace:
        namespace.run("ip", "tuntap", "add", "mine", "mode", "tap")
        command: list[str | Path] = [BIN / "virt-vdpa-nic", f"--folder={tmp_path}", "--tap=mine"]
        ended = run([*namespace.prefix, "timeout", "5", *command], check=False)
        assert ended.returncode == 1
        assert "TAP mine: " in ended.stderr
        assert "mtu 1500 qdisc noop state DOWN" in namespace.run("ip", "link", "show", "mine")


def test_joins_a_bridge(tmp_path: Path) -> None:
    with NetworkNamespace() as namespace:
        namespace.run("ip", "link", "add", "br0", "type", "bridge")
        with EmulatedNic(tmp_path, namespace, 1, "--bridge=br0"):
            assert "master br0" in namespace.run("ip", "link", "show", "vf0")


def test_gone_device_is_noticed(tmp_path: Path) -> None:
    with nic(tmp_path) as running, connected(running) as client:
        running.kill()
        with pytest.raises((GoneError, BrokenPipeError, ConnectionResetError)):
            client.read(CONFIG, 0, 2)
