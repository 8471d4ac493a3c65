"""A guest's rings handed from one port to another, as at the end of a migration: what was made available
leaves exactly once, and what was received stays received."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from datapath.vhost_user.backend import F_LOG_ALL, F_PROTOCOL_FEATURES
from datapath.vhost_user.messages import LogArea, Request
from datapath.virtio import NET_HEADER_SIZE, Feature, bit
from tests.harness.dirty_log import PAGE
from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.front_end import BUFFERS, MEMORY_SIZE, VIRTIO, SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.traffic import RX, TX, offer_buffers, received
from tests.harness.virtqueue import Buffer
from tests.harness.wire import Wire, frame, number_of

#: Frames of a turn, each in a page of its own above the receive buffers.
FRAMES = 60
OUTGOING = BUFFERS + 64 * PAGE


@pytest.fixture(scope="module")
def nic(network: NetworkNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedNic]:
    with EmulatedNic(tmp_path_factory.mktemp("nic"), network, 2, "--keep") as running:
        yield running


def transmit_many(peer: SocketFrontEnd, first: int) -> None:
    """Make frames available in one go, and notify once."""
    for at in range(FRAMES):
        data = bytes(NET_HEADER_SIZE) + frame(first + at)
        peer.memory.write(OUTGOING + PAGE * at, data)
        peer.queues[TX].add(Buffer(OUTGOING + PAGE * at, len(data)))
    peer.queues[TX].kick()


def seen(wire: Wire) -> list[int]:
    """The numbers of the frames that have left there by now."""
    wire.socket.setblocking(False)
    numbers = []
    try:
        while True:
            number = number_of(wire.socket.recv(2048))
            if number is not None and number < 10000:
                numbers.append(number)
    except BlockingIOError:
        wire.socket.settimeout(10)
        return numbers


def begin_to_log(peer: SocketFrontEnd, log: int) -> None:
    peer.tell(Request.SET_LOG_BASE, LogArea(MEMORY_SIZE // PAGE // 8, 0), log)
    peer.tell(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES | F_LOG_ALL)
    for index in (RX, TX):
        peer.tell(Request.SET_VRING_ADDR, peer.address(index, flags=1))


@pytest.mark.parametrize("mode", ["software", "hardware"])
@pytest.mark.parametrize("status_first", [True, False], ids=["qemu-7.2", "qemu-8.1"])
def test_nothing_is_lost_or_doubled(nic: EmulatedNic, tmp_path: Path, mode: str, status_first: bool) -> None:
    option = f"--log-mode={mode}"
    with (
        os.fdopen(os.memfd_create("log"), "wb") as log,
        PortProcess(tmp_path, nic.device(0), option, name="here") as here,
        PortProcess(tmp_path, nic.device(1), option, name="there") as there,
        closing(SocketFrontEnd.dial(here.socket)) as peer,
        closing(Wire(nic.namespace, "vf0")) as wire,
        closing(Wire(nic.namespace, "vf1")) as other,
    ):
        log.truncate(MEMORY_SIZE // PAGE // 8)
        wires, ports = (wire, other), (here, there)
        peer.connect()
        peer.start()
        offer_buffers(peer, 48)
        gone: list[int] = []
        for turn in range(6):
            begin_to_log(peer, log.fileno())
            transmit_many(peer, FRAMES * turn)
            wires[turn % 2].send(20000 + turn)
            assert received(peer) == 20000 + turn
            bases = peer.stop(status_first=status_first)
            assert bases == [queue.used_index for queue in peer.queues]
            gone += seen(wires[turn % 2])
            peer.socket.close()
            ports[turn % 2].wait_state("waiting")
            peer.socket = SocketFrontEnd.dial(ports[1 - turn % 2].socket).socket
            peer.connect()
            peer.start()
            peer.queues[TX].wait_used(peer.queues[TX].avail_index - peer.queues[TX].seen)
            gone += seen(wires[1 - turn % 2])
        assert gone == list(range(FRAMES * 6))


@pytest.mark.parametrize(
    "negotiated", [VIRTIO, bit(Feature.NET_F_MAC) | bit(Feature.NET_F_MRG_RXBUF)], ids=["1.0", "0.95"]
)
def test_what_the_guest_had_accepted_is_for_a_front_end_that_never_knew(
    nic: EmulatedNic, tmp_path: Path, negotiated: int
) -> None:
    """QEMU that came too late for its guest's features goes on without; a guest that boots has its own."""
    with PortProcess(tmp_path, nic.device(0), f"--negotiated={negotiated:#x}") as port:

        def serve(features: int) -> None:
            with closing(SocketFrontEnd.dial(port.socket)) as peer:
                peer.connect()
                peer.start(features)
            port.wait_state("waiting")

        for _ in range(2):
            serve(0)
            assert port.status()["last_error"] is None
        serve(negotiated)
        assert port.status()["last_error"] is None
        with pytest.raises(ConnectionError):
            serve(0)
        assert "did not accept VERSION_1" in str(port.status()["last_error"])
