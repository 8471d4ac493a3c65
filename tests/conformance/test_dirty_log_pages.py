"""Whatever the last thing was that a device or its relay wrote before rings stop, it is in the log.

Under the load of `test_dirty_log_proof` the next mark covers one that is missing. Here all is taken from the
log first, then one thing happens, and rings stop. Guest memory is compared whole: the guest is ours, so we
know which pages it wrote itself. Its used rings lie so that flags and index, the entries and the wish for
notifications (`avail_event`) are in pages of their own.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from datapath.vhost_user.messages import ProtocolFeature
from datapath.vhost_user.protocol_features import PROTOCOL_FEATURES
from datapath.virtio import Feature, bit
from tests.harness.dirty_log import PAGE
from tests.harness.dirty_pages import GuestPages
from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.front_end import BUFFERS, RING_STRIDE, VIRTIO, SocketFrontEnd
from tests.harness.processes import wait_for
from tests.harness.traffic import RX, TX, both_ways, offer_buffers, received, transmit
from tests.harness.vhost_user_proxy import VhostUserProxy
from tests.harness.virtqueue import Buffer, Virtqueue
from tests.harness.wire import Wire

EVENT_IDX = bit(Feature.F_EVENT_IDX)
RING_SIZE = 512
#: Where a used ring begins within its ring's stride: four bytes before a page.
USED_AT = 0x5000 - 4
#: Frames that each ring has moved when logging begins.
BEFORE = 3


@pytest.fixture(params=["ifcvf", "virtio"])
def proxy(
    nic: EmulatedNic, tmp_path: Path, log_mode: str, request: pytest.FixtureRequest
) -> Iterator[VhostUserProxy]:
    if (request.param, log_mode) == ("virtio", "hardware"):
        pytest.skip("a virtio function has no log of its own")
    with (
        PortProcess(tmp_path, nic.device(0, request.param), f"--log-mode={log_mode}") as port,
        VhostUserProxy(tmp_path / "proxy.sock", port.socket) as made,
    ):
        yield made


@pytest.fixture(params=[0, EVENT_IDX], ids=["flags", "event-idx"])
def guest(proxy: VhostUserProxy, request: pytest.FixtureRequest) -> Iterator[SocketFrontEnd]:
    """A guest with buffers on offer."""
    protocol = PROTOCOL_FEATURES & ~bit(ProtocolFeature.CONFIGURE_MEM_SLOTS)
    with closing(SocketFrontEnd.dial(proxy.path, protocol)) as peer:
        lay_rings_out(peer)
        peer.connect()
        peer.start(VIRTIO | request.param)
        yield peer


def lay_rings_out(peer: SocketFrontEnd) -> None:
    """Rings whose used half is spread over pages, in memory full of bytes that no device writes."""
    peer.memory.write(BUFFERS, os.urandom(0x40000))
    for queue in peer.queues:
        queue.close()
    peer.queues = [Virtqueue(peer.memory, RING_STRIDE * index, RING_SIZE) for index in (RX, TX)]
    for queue in peer.queues:
        queue.used = queue.descriptors + USED_AT
        queue.memory.write(queue.used, bytes(4))


def written_by_guest(peer: SocketFrontEnd) -> set[int]:
    """Pages that the guest writes itself: descriptors, available rings, and what it sends."""
    tables = {
        at // PAGE * PAGE for queue in peer.queues for at in range(queue.descriptors, queue.used - 1, PAGE)
    }
    used = {(queue.used + at) // PAGE * PAGE for queue in peer.queues for at in (0, 4, 4 + 8 * RING_SIZE)}
    return tables - used | {BUFFERS}


def receive(peer: SocketFrontEnd, wire: Wire) -> None:
    wire.send(1001)
    assert received(peer) == 1001


def send(peer: SocketFrontEnd, wire: Wire) -> None:
    transmit(peer, 1002)
    wire.expect(1002)


def offer(peer: SocketFrontEnd, _wire: Wire) -> None:
    peer.queues[RX].add(Buffer(BUFFERS + 0x20000, 2048, writable=True))
    peer.queues[RX].kick()


LAST: dict[str, Callable[[SocketFrontEnd, Wire], None]] = {
    "a frame is received": receive,
    "a frame is sent": send,
    "buffers are offered": offer,
    "nothing": lambda _peer, _wire: None,
}


@pytest.mark.parametrize("last", LAST)
def test_the_last_thing_written_is_in_the_log(
    guest: SocketFrontEnd, proxy: VhostUserProxy, wire: Wire, log_mode: str, last: str
) -> None:
    with closing(GuestPages(proxy)) as pages:
        offer_buffers(guest, 24)
        for turn in range(BEFORE):
            both_ways(guest, wire, 10 + 10 * turn)
        proxy.start_logging(pages.log, pages.log_size)
        pages.copy_all()
        both_ways(guest, wire, 100)
        own = written_by_guest(guest)
        # What a VF does not log itself, used rings, is marked when they stop.
        later = pages.used_ring_pages() if log_mode == "hardware" else set()

        def all_is_there() -> bool:
            pages.take()
            return not pages.unlike() - own - later

        wait_for("the log to tell of all that was written", all_is_there, 5)
        LAST[last](guest, wire)
        proxy.stop_rings()
        pages.take()
        assert not pages.unlike() - own, "pages differ that the log did not tell of"
