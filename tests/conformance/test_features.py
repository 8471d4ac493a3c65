"""What the feature table says of rings and of the vhost-user protocol, shown with each driver on frames of a
guest behind a port, with the feature and without."""

import os
import platform
import select
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial

import pytest

from datapath.vhost_user.messages import ProtocolFeature, Request, VringState
from datapath.vhost_user.protocol_features import PROTOCOL_FEATURES
from datapath.virtio import NET_HEADER_SIZE, SHORT_NET_HEADER_SIZE, Feature, bit
from tests.harness.connectx import ConnectX
from tests.harness.emulated_nic import EmulatedNic, PortProcess, ask
from tests.harness.front_end import BUFFERS, VIRTIO, SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import wait_for
from tests.harness.traffic import RX, TX, both_ways, offer_buffers, transmit
from tests.harness.virtqueue import DESC_F_NEXT, Buffer, Virtqueue
from tests.harness.wire import HEADER, Wire, frame

MAC = bit(Feature.NET_F_MAC)
MRG_RXBUF = bit(Feature.NET_F_MRG_RXBUF)
INDIRECT = bit(Feature.F_INDIRECT_DESC)
EVENT_IDX = bit(Feature.F_EVENT_IDX)
#: Where a test has its odd buffers.
PIECES = BUFFERS + 0x40000


@pytest.fixture(scope="module", params=["ifcvf", "virtio", "mlx5"])
def driver(request: pytest.FixtureRequest) -> str:
    """The emulated IFCVF as what it is, and as any virtio-net function; and an emulated ConnectX."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConnectX]:
    """Its TAP is vf0, too, elsewhere."""
    with NetworkNamespace() as network:
        yield ConnectX(tmp_path_factory.mktemp("card"), network)


@pytest.fixture(scope="module")
def port(
    nic: EmulatedNic, card: ConnectX, driver: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PortProcess]:
    folder = tmp_path_factory.mktemp("port")
    made = card.port(folder) if driver == "mlx5" else PortProcess(folder, nic.device(0, driver))
    with made as running:
        yield running


@pytest.fixture
def wire(nic: EmulatedNic, card: ConnectX, driver: str) -> Iterator[Wire]:
    """The other end of the VF's cable."""
    with closing(Wire(card.namespace if driver == "mlx5" else nic.namespace, "vf0")) as made:
        yield made


@pytest.fixture(scope="module")
def bare_nic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedNic]:
    """One whose VF says neither its MAC nor its MTU."""
    folder = tmp_path_factory.mktemp("bare")
    with (
        NetworkNamespace() as network,
        EmulatedNic(folder, network, 1, "--keep", "--without=mac,mtu") as running,
    ):
        yield running


@pytest.fixture(scope="module")
def bare(
    bare_nic: EmulatedNic, driver: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PortProcess]:
    folder = tmp_path_factory.mktemp("port")
    if driver == "mlx5":  # its MTU is its network interface's
        made = ConnectX(folder / "card", ibdev=str(folder / "nowhere")).port(folder)
    else:
        made = PortProcess(folder, bare_nic.device(0, driver))
    with made as running:
        yield running


@contextmanager
def guest(port: PortProcess, features: int = VIRTIO) -> Iterator[SocketFrontEnd]:
    """A front-end whose guest has accepted these features and runs."""
    port.wait_state("waiting")
    with closing(SocketFrontEnd.dial(port.socket)) as peer:
        peer.connect()
        peer.start(features)
        assert port.status()["state"] == "running"
        yield peer


def kept_back(port: PortProcess, driver: str, feature: int) -> bool:
    """Whether the driver is a ConnectX', which knows no such feature: it is not offered, and refused."""
    if driver != "mlx5":
        return False
    with front_end(port) as peer:
        assert not peer.tell(Request.GET_FEATURES) & feature
        with pytest.raises(ConnectionError):
            peer.start(VIRTIO | feature)
    assert "were not offered" in str(port.wait_state("waiting")["last_error"])
    return True


def pieces(peer: SocketFrontEnd, data: bytes, *sizes: int) -> list[Buffer]:
    """Data in buffers of these sizes, nowhere side by side; the last has what is left."""
    made = []
    for number, size in enumerate((*sizes, len(data))):
        part, data = data[:size], data[size:]
        peer.memory.write(PIECES + 0x1000 * number, part)
        made.append(Buffer(PIECES + 0x1000 * number, len(part)))
    return made


def test_a_guest_of_virtio_1(port: PortProcess, wire: Wire) -> None:
    with guest(port) as peer:
        offer_buffers(peer)
        both_ways(peer, wire, 100)


def test_a_guest_of_virtio_0_95(port: PortProcess, driver: str, wire: Wire) -> None:
    """It has a shorter header unless it merges buffers. An IFCVF serves it, virtio's own rules do not."""
    if driver == "mlx5":
        with guest(port, bit(Feature.NET_F_CSUM)) as peer:
            offer_buffers(peer)
            both_ways(peer, wire, 102, SHORT_NET_HEADER_SIZE)
        return
    legacy = bit(Feature.NET_F_MAC)
    if driver == "ifcvf":
        for features, header in ((legacy, SHORT_NET_HEADER_SIZE), (legacy | MRG_RXBUF, NET_HEADER_SIZE)):
            with guest(port, features) as peer:
                offer_buffers(peer)
                both_ways(peer, wire, 102, header)
        return
    port.wait_state("waiting")
    before = len(port.log_lines())
    for _ in range(3):  # as QEMU does, again and again
        with closing(SocketFrontEnd.dial(port.socket)) as peer:
            peer.connect()
            with pytest.raises(ConnectionError):
                peer.start(legacy)
        said = str(port.wait_state("waiting")["last_error"])
        assert "did not accept VERSION_1, and the function needs it; boot a guest" in said
    (line,) = port.log_lines()[before:]
    assert line.endswith(said)


def test_frames_pass_on_x86_64(port: PortProcess, wire: Wire) -> None:
    assert platform.machine() == "x86_64", "the feature table says more than this machine shows"
    with guest(port) as peer:
        offer_buffers(peer)
        both_ways(peer, wire, 110)


def test_a_mac_is_offered_where_the_vf_has_one(
    port: PortProcess, bare: PortProcess, wire: Wire, bare_nic: EmulatedNic, driver: str
) -> None:
    """The guest may know of it or not: its frames are its own business. With mlx5 it is the front-end's."""
    if driver == "mlx5":
        for made in (port, bare):
            with front_end(made) as peer:
                assert peer.tell(Request.GET_FEATURES) & MAC
        return
    with guest(port) as peer:
        assert peer.tell(Request.GET_FEATURES) & MAC
        offer_buffers(peer)
        both_ways(peer, wire, 170)
    version_1 = bit(Feature.F_VERSION_1)
    with closing(Wire(bare_nic.namespace, "vf0")) as bare_wire:
        for made, cable in ((port, wire), (bare, bare_wire)):
            with guest(made, version_1) as peer:
                assert bool(peer.tell(Request.GET_FEATURES) & MAC) is (made is port)
                offer_buffers(peer)
                both_ways(peer, cable, 172)
    bare.wait_state("waiting")
    with front_end(bare) as peer, pytest.raises(ConnectionError):
        peer.start(VIRTIO)
    assert "features NET_F_MAC were not offered" in str(bare.wait_state("waiting")["last_error"])


def test_an_mtu_is_offered_where_the_vf_has_one(port: PortProcess, bare: PortProcess) -> None:
    more = 1501
    for made, has_one in ((port, True), (bare, False)):
        with front_end(made) as peer:
            assert bool(peer.tell(Request.GET_FEATURES) & bit(Feature.NET_F_MTU)) is has_one
            assert (made.status()["max_mtu"] is not None) is has_one
            peer.need_reply = True
            assert (peer.tell(Request.NET_SET_MTU, more) != 0) is has_one


def filled(peer: SocketFrontEnd, head: int, length: int) -> bytes:
    """What the device has written into a chain of buffers."""
    queue, data, following = peer.queues[RX], b"", True
    while following:
        entry = peer.memory.read(queue.descriptors + 16 * head, 16)
        address, size, flags, head = struct.unpack("<QIHH", entry)
        data += peer.memory.read(address, size)
        following = bool(flags & DESC_F_NEXT)
    return data[:length]


def first_packet(peer: SocketFrontEnd) -> tuple[bytes, int]:
    """The first packet that is not a foreign one (IPv6 of the host, say), and how many buffers it fills."""
    used: list[tuple[int, int]] = []

    def take() -> bytes:
        if not used:
            used.extend(peer.queues[RX].wait_used())
        return filled(peer, *used.pop(0))

    while True:
        packet = take()
        buffers = int.from_bytes(packet[10:12], "little")  # num_buffers (virtio 1.3 section 5.1.6)
        packet += b"".join(take() for _ in range(buffers - 1))
        if packet[NET_HEADER_SIZE:].startswith(HEADER):
            return packet[NET_HEADER_SIZE:], buffers


def offer(peer: SocketFrontEnd, *sizes: int) -> None:
    """Give the receive ring buffers of these sizes to fill."""
    for number, size in enumerate(sizes):
        peer.queues[RX].add(Buffer(PIECES + 0x1000 * number, size, writable=True))
    peer.queues[RX].kick()


def test_a_packet_fills_several_buffers(port: PortProcess, wire: Wire, driver: str) -> None:
    if kept_back(port, driver, MRG_RXBUF):
        return
    large = HEADER + bytes(range(256)) * 4
    with guest(port, VIRTIO | MRG_RXBUF) as peer:
        offer(peer, *[512] * 16)
        wire.socket.send(large)
        assert first_packet(peer) == (large, 3)
    with guest(port, VIRTIO) as peer:
        offer(peer, *[512] * 16)
        wire.socket.send(large)
        wire.send(120)
        assert first_packet(peer) == (frame(120), 1), "a packet that fits no buffer is not for this guest"


def test_header_and_packet_are_cut_anywhere(port: PortProcess, wire: Wire) -> None:
    data = bytes(NET_HEADER_SIZE) + frame(130)
    with guest(port) as peer:
        for sizes in ((NET_HEADER_SIZE,), (5,), (1, 1, 20), (NET_HEADER_SIZE + 3, 1)):
            peer.queues[TX].add(*pieces(peer, data, *sizes))
            peer.queues[TX].kick()
            wire.expect(130)
            peer.queues[TX].wait_used()
        for turn in range(8):
            at = PIECES + 0x8000 * turn
            room = [Buffer(at + 0x1000 * n, size, writable=True) for n, size in enumerate((7, 9, 1, 200))]
            peer.queues[RX].add(*room)
        peer.queues[RX].kick()
        wire.send(131)
        assert first_packet(peer) == (frame(131), 1)


def test_indirect_descriptors(port: PortProcess, wire: Wire, driver: str) -> None:
    if kept_back(port, driver, INDIRECT):
        return
    data = bytes(NET_HEADER_SIZE) + frame(140)

    def send(peer: SocketFrontEnd) -> None:
        peer.queues[TX].add_indirect(PIECES + 0x8000, pieces(peer, data, NET_HEADER_SIZE, 14))
        peer.queues[TX].kick()

    with guest(port, VIRTIO | INDIRECT) as peer:
        for _ in range(3):
            send(peer)
            wire.expect(140)
            peer.queues[TX].wait_used()
    with guest(port) as peer:
        send(peer)
        assert peer.ended()
    assert "needs a reset" in str(port.wait_state("waiting")["last_error"])


def test_interrupts_come_where_the_guest_wants_them(port: PortProcess, wire: Wire, driver: str) -> None:
    """At the fourth frame, says the guest; without the feature nobody looks there."""
    if kept_back(port, driver, EVENT_IDX):
        return
    with guest(port, VIRTIO | EVENT_IDX) as peer:
        assert interrupts(peer, wire, 1) == 1
    with guest(port) as peer:
        assert interrupts(peer, wire, 3) == 3


def interrupts(peer: SocketFrontEnd, wire: Wire, expected: int) -> int:
    """How many interrupts three frames make, sent one by one by a guest that asks for the last one's."""
    queue, seen = peer.queues[TX], 0
    for number in range(4):
        transmit(peer, 150 + number)
        wire.expect(150 + number)
        wait_for("a used buffer", partial(used_index_is, queue, number + 1), 5)
        if number == 0:  # which has one in any case
            interrupted(queue)
            queue.seen = 3
            queue.want_interrupt()
    while seen < expected:
        seen += interrupted(queue)
    return seen


def interrupted(queue: Virtqueue) -> int:
    """Wait for interrupts; how many have come since the last look."""
    assert select.select([queue.call_fd], [], [], 5)[0], "no interrupt"
    return os.eventfd_read(queue.call_fd)


def used_index_is(queue: Virtqueue, number: int) -> bool:
    return queue.used_index == number


def test_numbers_of_each_ring(port: PortProcess, wire: Wire, driver: str) -> None:
    with guest(port) as peer:
        before = ask(port.control, "query-stats")
        offer_buffers(peer)
        both_ways(peer, wire, 160)
        after = ask(port.control, "query-stats")
        for ring in (RX, TX):
            assert after[f"kicks.{ring}"] > before[f"kicks.{ring}"]
            if driver == "mlx5":
                done = f"completed_descriptors.{ring}"
                assert after[done] > before[done]


# The protocol, which is the same with every driver


@contextmanager
def front_end(port: PortProcess, without: ProtocolFeature | None = None) -> Iterator[SocketFrontEnd]:
    """One that has connected and negotiated all protocol features, or all but one."""
    port.wait_state("waiting")
    protocol = PROTOCOL_FEATURES & ~(bit(without) if without is not None else 0)
    with closing(SocketFrontEnd.dial(port.socket, protocol)) as peer:
        peer.connect()
        yield peer


def test_the_number_of_queue_pairs_is_told(port: PortProcess) -> None:
    with front_end(port) as peer:
        assert peer.tell(Request.GET_QUEUE_NUM) == port.status()["queue_pairs"]
    with front_end(port, without=ProtocolFeature.MQ) as peer, pytest.raises(ConnectionError):
        peer.tell(Request.GET_QUEUE_NUM)


def test_who_asks_is_told_how_it_went(port: PortProcess) -> None:
    too_much = 65000
    with front_end(port) as peer:
        peer.need_reply = True
        assert peer.tell(Request.NET_SET_MTU, 1400) == 0
        assert peer.tell(Request.NET_SET_MTU, too_much) != 0
        assert peer.tell(Request.SET_VRING_ENABLE, VringState(RX, 1)) == 0
    with front_end(port, without=ProtocolFeature.REPLY_ACK) as peer:
        peer.need_reply = True
        assert peer.tell(Request.NET_SET_MTU, too_much) is None
        peer.need_reply = False
        assert peer.tell(Request.GET_FEATURES) & VIRTIO == VIRTIO, "nothing was answered before"
