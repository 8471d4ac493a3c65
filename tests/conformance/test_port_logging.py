"""A port whose front-end logs dirty pages, as QEMU does to save or move a running guest."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from datapath.vhost_user.backend import F_LOG_ALL, F_PROTOCOL_FEATURES
from datapath.vhost_user.messages import (
    LogArea,
    Message,
    ProtocolFeature,
    Request,
    VringFd,
    VringState,
    encode_request,
)
from datapath.vhost_user.protocol_features import PROTOCOL_FEATURES
from datapath.virtio import bit
from tests.harness.dirty_log import PAGE, marked_pages
from tests.harness.emulated_nic import EmulatedNic, PortProcess, ask
from tests.harness.front_end import BUFFERS, MEMORY_SIZE, VIRTIO, SocketFrontEnd
from tests.harness.traffic import RX, TX, both_ways, offer_buffers
from tests.harness.wire import Wire

#: The bitmap of the front-end's memory, and what lies before it in the same file.
SIZE, OFFSET = MEMORY_SIZE // PAGE // 8, 4096


@pytest.fixture(params=["ifcvf", "virtio"])
def port(nic: EmulatedNic, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[PortProcess]:
    """A port whose relay marks what its VF writes."""
    with PortProcess(tmp_path, nic.device(0, request.param), "--log-mode=software") as running:
        yield running


@pytest.fixture
def front_end(front_end: SocketFrontEnd) -> SocketFrontEnd:
    front_end.start()
    return front_end


@pytest.fixture
def log() -> Iterator[int]:
    fd = os.memfd_create("log")
    os.ftruncate(fd, OFFSET + SIZE)
    yield fd
    os.close(fd)


def take(log: int) -> set[int]:
    """The addresses of the pages that are marked; they are not afterwards."""
    data = os.pread(log, SIZE, OFFSET)
    os.pwrite(log, bytes(SIZE), OFFSET)
    return marked_pages(data)


def switch(peer: SocketFrontEnd, on: bool) -> None:
    """Logging on or off, while rings run."""
    peer.tell(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES | (F_LOG_ALL if on else 0))
    for index in (RX, TX):
        peer.tell(Request.SET_VRING_ADDR, peer.address(index, flags=int(on)))
    peer.settle()


def test_just_what_was_written_is_marked(
    front_end: SocketFrontEnd, port: PortProcess, wire: Wire, log: int
) -> None:
    offer_buffers(front_end)
    both_ways(front_end, wire, 100)
    front_end.tell(Request.SET_LOG_BASE, LogArea(SIZE, OFFSET), log)
    switch(front_end, True)
    assert port.status()["shadowed"]
    take(log)
    for turn in range(3):
        both_ways(front_end, wire, 110 + 10 * turn)
    front_end.stop()
    marked = take(log)
    rings = {front_end.queues[index].used // PAGE * PAGE for index in (RX, TX)}
    assert rings <= marked
    # Each frame was received into a buffer of its own.
    assert marked - rings
    assert all(BUFFERS <= page < MEMORY_SIZE for page in marked - rings)
    assert len(marked - rings) <= 3 + 1
    assert os.pread(log, OFFSET, 0) == bytes(OFFSET), "before the bitmap is not ours"


def test_who_has_not_agreed_on_a_shared_log_has_none(port: PortProcess, wire: Wire, log: int) -> None:
    """A bitmap that comes all the same is not answered, and not written to."""
    protocol = PROTOCOL_FEATURES & ~bit(ProtocolFeature.LOG_SHMFD)
    with closing(SocketFrontEnd.dial(port.socket, protocol)) as peer:
        peer.connect()
        peer.start()
        peer.send(encode_request(Message(Request.SET_LOG_BASE, LogArea(SIZE, OFFSET))), [log])
        switch(peer, True)
        offer_buffers(peer)
        both_ways(peer, wire, 300)
        assert port.status()["log"]["mode"] != "software"
        peer.stop()
        assert take(log) == set()


def test_a_given_up_migration_leaves_the_way_as_it_was(
    front_end: SocketFrontEnd, port: PortProcess, wire: Wire, log: int
) -> None:
    offer_buffers(front_end, 8)
    before = port.status()["shadowed"]
    for turn in range(3):
        front_end.tell(Request.SET_LOG_BASE, LogArea(SIZE, OFFSET), log)
        switch(front_end, True)
        both_ways(front_end, wire, 200 + 20 * turn)
        assert port.status()["shadowed"]
        switch(front_end, False)
        both_ways(front_end, wire, 210 + 20 * turn)
        # A function without ring state has begun elsewhere than at 0 meanwhile, and stays shadowed.
        assert port.status()["shadowed"] is (before or "virtio" in port.status()["driver"])
    assert ask(port.control, "query-stats")["log_missed"] == 0


FAULTS: dict[str, tuple[Callable[[SocketFrontEnd], None], str]] = {
    "avail index jumps": (
        lambda peer: peer.queues[TX].set_avail_index(5000),
        "ring 1: the available index is ahead by more than the ring holds",
    ),
    "head outside the table": (
        lambda peer: peer.queues[TX].publish(256),
        "ring 1: a head is beyond the descriptor table, or available twice",
    ),
    "memory shrinks": (
        lambda peer: os.ftruncate(peer.memory.fd, PAGE),
        "memory has gone under the ring",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_bad_ring_is_told_and_ends_one_connection(
    port: PortProcess, wire: Wire, log: int, case: str
) -> None:
    spoil, reason = FAULTS[case]
    with closing(SocketFrontEnd.dial(port.socket)) as bad:
        bad.connect()
        bad.tell(Request.SET_LOG_BASE, LogArea(SIZE, OFFSET), log)
        bad.start(VIRTIO | F_LOG_ALL)
        lines = len(port.log_lines())
        spoil(bad)
        bad.queues[TX].kick()
        assert bad.ended()
    port.wait_state("waiting")
    said = port.log_lines()[lines]
    assert "needs a reset: ring " in said
    assert said.endswith(reason)
    with closing(SocketFrontEnd.dial(port.socket)) as good:
        good.connect()
        good.start()
        offer_buffers(good)
        both_ways(good, wire, 400)


def scribble_over_heads(peer: SocketFrontEnd) -> None:
    """Change what the device has been given, so that nobody can tell what it still has."""
    queue = peer.queues[RX]
    for index in range(queue.used_index, queue.avail_index):
        queue.memory.write(queue.avail + 4 + 2 * (index % queue.size), (200).to_bytes(2, "little"))


def stop(peer: SocketFrontEnd) -> None:
    peer.send(encode_request(Message(Request.GET_VRING_BASE, VringState(RX, 0))))


def stop_logging(peer: SocketFrontEnd) -> None:
    peer.send(encode_request(Message(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES)))


def give_a_kick_that_is_none(peer: SocketFrontEnd) -> None:
    scribble_over_heads(peer)
    peer.send(encode_request(Message(Request.SET_VRING_KICK, VringFd(RX, True))), [peer.memory.fd])


@pytest.mark.parametrize("then", [stop, stop_logging, give_a_kick_that_is_none])
def test_a_ring_that_is_found_bad_when_it_stops_ends_one_connection(
    port: PortProcess, wire: Wire, log: int, then: Callable[[SocketFrontEnd], None]
) -> None:
    if then is stop_logging and "virtio" in port.status()["driver"]:
        pytest.skip("a function without ring state is not stopped then")
    with closing(SocketFrontEnd.dial(port.socket)) as bad:
        bad.connect()
        bad.tell(Request.SET_LOG_BASE, LogArea(SIZE, OFFSET), log)
        bad.start(VIRTIO | F_LOG_ALL)
        offer_buffers(bad, 8)
        both_ways(bad, wire, 500)
        lines = len(port.log_lines())
        scribble_over_heads(bad)
        then(bad)
        assert bad.ended()
    port.wait_state("waiting")
    assert "completed out of order" in port.log_lines()[lines]
    with closing(SocketFrontEnd.dial(port.socket)) as good:
        good.connect()
        good.start()
        offer_buffers(good)
        both_ways(good, wire, 510)


def test_a_log_that_vanishes_costs_the_guest_nothing(
    front_end: SocketFrontEnd, port: PortProcess, wire: Wire, log: int
) -> None:
    offer_buffers(front_end)
    front_end.tell(Request.SET_LOG_BASE, LogArea(SIZE, OFFSET), log)
    switch(front_end, True)
    os.ftruncate(log, 0)
    both_ways(front_end, wire, 300)
    front_end.stop()
    assert ask(port.control, "query-stats")["log_missed"] > 0
    assert port.running
