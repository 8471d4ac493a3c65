"""Checksums and segmentation that guests leave to the emulated NIC, and it to them, on real packets.

Two guests behind ports, their VFs in one bridge: what the first leaves undone, the kernel does or the second
has agreed to. A packet socket on the first VF's TAP sees what comes out of it.
"""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from datapath.virtio import NET_HEADER_SIZE, Feature, bit
from tests.harness.bridged_guests import Guest, bridged, bridged_cards
from tests.harness.emulated_nic import EmulatedNic, PortProcess, ask
from tests.harness.front_end import BUFFERS, VIRTIO
from tests.harness.netns import SOL_PACKET, NetworkNamespace
from tests.harness.offloads import (
    ACK,
    CWR,
    GSO_NONE,
    NEEDS_CSUM,
    TCP,
    UDP,
    IpPacket,
    NetHeader,
    checksum_is_right,
    is_ours,
    payload_of,
    tcp_flags,
)
from tests.harness.virtqueue import Buffer

RX, TX = 0, 1
#: linux/if_packet.h: frames come and go with a virtio header of 10 bytes before them.
PACKET_VNET_HDR, SHORT_HEADER = 15, 10
SEGMENT = 1400
LARGE = bytes(range(250)) * 80
CSUM = VIRTIO | bit(Feature.NET_F_CSUM)
GUEST_CSUM = VIRTIO | bit(Feature.NET_F_GUEST_CSUM)
TSO = {4: CSUM | bit(Feature.NET_F_HOST_TSO4), 6: CSUM | bit(Feature.NET_F_HOST_TSO6)}
GUEST_TSO = {
    4: GUEST_CSUM | bit(Feature.NET_F_GUEST_TSO4),
    6: GUEST_CSUM | bit(Feature.NET_F_GUEST_TSO6),
}
TAKES_LARGE = bit(Feature.NET_F_GUEST_TSO4) | bit(Feature.NET_F_GUEST_TSO6)
MERGED = bit(Feature.NET_F_MRG_RXBUF)


@dataclass
class Pair:
    """Two guests whose VFs share a bridge."""

    #: None of ConnectX, which are in their ports' processes.
    nic: EmulatedNic | None
    network: NetworkNamespace
    sender: Guest
    receiver: Guest

    def dropped(self) -> int:
        """Packets that the sender's VF has dropped; a ConnectX counts them with those that it has sent."""
        if self.nic is None:
            return 0
        count: int = self.nic.query(0)["tx_dropped"]
        return count

    def lacks(self, features: int) -> bool:
        """Whether the driver is a ConnectX', which knows none of these features, and offers none."""
        if self.nic is None:
            assert not self.sender.offered & features
        return self.nic is None


#: A NIC or none, where the TAPs are, and both ports.
Switch = tuple[EmulatedNic | None, NetworkNamespace, list[PortProcess]]


@pytest.fixture(scope="module", params=["ifcvf", "virtio", "mlx5"])
def switch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Switch]:
    """Two ports, with each driver."""
    folder = tmp_path_factory.mktemp("offloads")
    if request.param == "mlx5":
        with bridged_cards(folder) as (network, ports):
            yield None, network, ports
        return
    with bridged(folder, driver=request.param) as (nic, ports):
        yield nic, nic.namespace, ports


@pytest.fixture
def pair(switch: Switch) -> Iterator[Pair]:
    nic, network, ports = switch
    with closing(Guest(ports[0])) as sender, closing(Guest(ports[1])) as receiver:
        yield Pair(nic, network, sender, receiver)


@contextmanager
def watched(network: NetworkNamespace, link: str) -> Iterator[socket.socket]:
    """A packet socket that sees the header of each frame, of 10 bytes."""
    with network.packet_socket(link) as listener:
        listener.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        yield listener


def seen(listener: socket.socket) -> tuple[NetHeader, bytes]:
    """The next frame of ours that came out of the VF."""
    while True:
        data, address = listener.recvfrom(1 << 17)
        if is_ours(data[SHORT_HEADER:]) and address[2] != socket.PACKET_OUTGOING:
            return NetHeader.unpack(data[:SHORT_HEADER] + bytes(2)), data[SHORT_HEADER:]


def tcp(version: int, flags: int = ACK) -> IpPacket:
    return IpPacket(version, TCP, LARGE, flags)


@pytest.mark.parametrize("version", [4, 6])
def test_a_large_frame_leaves_in_one_piece(pair: Pair, version: int) -> None:
    packet = tcp(version)
    header = packet.net_header(SEGMENT)
    pair.sender.start(TSO[version])
    with watched(pair.network, "vf0") as listener:
        pair.sender.send(packet, header)
        kernels, frame = seen(listener)
    assert frame == packet.frame
    assert (kernels.flags, kernels.gso_type, kernels.gso_size) == (NEEDS_CSUM, header.gso_type, SEGMENT)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("accepted", ["nothing", "checksum alone", "the other version"])
def test_who_does_not_take_large_frames_gets_segments(pair: Pair, version: int, accepted: str) -> None:
    """The kernel cuts them, and computes checksums for a guest that does not."""
    features = {"nothing": VIRTIO, "checksum alone": GUEST_CSUM, "the other version": GUEST_TSO[10 - version]}
    if accepted == "the other version" and pair.lacks(TAKES_LARGE):
        return
    packet = tcp(version)
    pair.sender.start(TSO[version])
    pair.receiver.start(features[accepted])
    pair.sender.send(packet, packet.net_header(SEGMENT))
    frames = pair.receiver.receive_payload(len(LARGE))
    assert b"".join(payload_of(frame) for _, frame in frames) == LARGE
    assert {len(payload_of(frame)) for _, frame in frames[:-1]} == {SEGMENT}
    for header, frame in frames:
        assert header.gso_type == GSO_NONE
        if accepted == "nothing":
            assert header == NetHeader(buffers=1)
            assert checksum_is_right(frame)


@pytest.mark.parametrize("version", [4, 6])
def test_who_takes_large_frames_gets_them_whole(pair: Pair, version: int) -> None:
    if pair.lacks(TAKES_LARGE):
        return
    packet = tcp(version)
    pair.sender.start(TSO[version])
    pair.receiver.start(GUEST_TSO[version])
    pair.sender.send(packet, packet.net_header(SEGMENT))
    header, frame = pair.receiver.receive()
    assert frame == packet.frame
    given = packet.net_header(SEGMENT)
    assert (header.flags, header.gso_type, header.gso_size) == (given.flags, given.gso_type, SEGMENT)
    assert (header.checksum_start, header.checksum_offset) == (given.checksum_start, given.checksum_offset)


def test_a_large_frame_in_merged_buffers(pair: Pair) -> None:
    if pair.lacks(TAKES_LARGE | MERGED):
        return
    packet = tcp(4)
    pair.sender.start(TSO[4])
    peer = pair.receiver.peer
    peer.start(GUEST_TSO[4] | MERGED)
    places = [BUFFERS + 2048 * number for number in range(16)]
    for at in places:
        peer.queues[RX].add(Buffer(at, 2048, writable=True))
    peer.queues[RX].kick()
    pair.sender.send(packet, packet.net_header(SEGMENT))
    used = peer.queues[RX].wait_used(10)
    data = b"".join(peer.memory.read(at, length) for at, (_, length) in zip(places, used, strict=False))
    assert NetHeader.unpack(data).buffers == len(used) == 10
    assert data[NET_HEADER_SIZE:] == packet.frame


@pytest.mark.parametrize("accepts", [True, False])
def test_congestion_marks(pair: Pair, accepts: bool) -> None:
    """CWR belongs into the first segment only (RFC 3168): a guest must know that to be given the whole."""
    if pair.lacks(TAKES_LARGE | bit(Feature.NET_F_GUEST_ECN) | bit(Feature.NET_F_HOST_ECN)):
        return
    ecn = bit(Feature.NET_F_GUEST_ECN)
    packet = tcp(4, ACK | CWR)
    pair.sender.start(TSO[4] | bit(Feature.NET_F_HOST_ECN))
    pair.receiver.start(GUEST_TSO[4] | (ecn if accepts else 0))
    pair.sender.send(packet, packet.net_header(SEGMENT))
    frames = pair.receiver.receive_payload(len(LARGE))
    assert (len(frames) == 1) is accepts
    if accepts:
        assert frames[0][0].gso_type == packet.net_header(SEGMENT).gso_type
    else:
        assert [tcp_flags(frame) & CWR for _, frame in frames] == [CWR] + [0] * (len(frames) - 1)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("accepts", [True, False])
def test_a_partial_checksum(pair: Pair, version: int, accepts: bool) -> None:
    packet = IpPacket(version, UDP, b"a datagram of odd length.")
    assert not checksum_is_right(packet.frame)
    pair.sender.start(CSUM)
    pair.receiver.start(GUEST_CSUM if accepts else VIRTIO)
    pair.sender.send(packet, packet.net_header())
    header, frame = pair.receiver.receive()
    if accepts:
        assert header == replace(packet.net_header(), buffers=1)
        assert frame == packet.frame
    else:
        assert header == NetHeader(buffers=1)
        assert payload_of(frame) == packet.payload
        assert checksum_is_right(frame)


@pytest.mark.parametrize(
    ("features", "gso_size"), [(VIRTIO, 0), (CSUM, SEGMENT), (TSO[6], SEGMENT)], ids=["csum", "tso", "tso4"]
)
def test_what_the_guest_did_not_accept_does_not_leave(pair: Pair, features: int, gso_size: int) -> None:
    before = pair.dropped()
    packet = tcp(4) if gso_size else IpPacket(4, UDP, b"a datagram")
    pair.sender.start(features)
    with watched(pair.network, "vf0") as listener:
        pair.sender.send(packet, packet.net_header(gso_size))
        assert pair.nic is None or pair.dropped() == before + 1
        plain = IpPacket(4, UDP, b"the next one")
        pair.sender.send(plain, NetHeader())
        assert seen(listener)[1] == plain.frame


def test_another_driver_gets_what_it_takes(switch: Switch) -> None:
    """From a guest that takes large frames to one that does not (its firmware, say), and back."""
    nic, _, ports = switch
    if nic is None:
        return  # no guest of a ConnectX takes large frames
    packet = tcp(4)
    with closing(Guest(ports[0])) as sender:
        sender.start(TSO[4])
        for features, whole in ((GUEST_TSO[4], True), (VIRTIO, False), (GUEST_TSO[4], True)):
            with closing(Guest(ports[1])) as receiver:
                receiver.start(features)
                sender.send(packet, packet.net_header(SEGMENT))
                assert (len(receiver.receive_payload(len(LARGE))) == 1) is whole
            ports[1].wait_state("waiting")


def test_frames_that_are_sent_for_a_guest_have_no_header(pair: Pair) -> None:
    if pair.nic is None:
        return  # there is no NIC beside the port that could send
    packet = IpPacket(4, UDP, b"sent by the NIC itself")
    pair.receiver.start(VIRTIO)
    ask(pair.nic.control, "vf-send", vf=0, frame=packet.frame.hex())
    assert pair.receiver.receive() == (NetHeader(buffers=1), packet.frame)


def test_a_nic_without(tmp_path: Path) -> None:
    """What --without withholds is not offered, and the kernel does what the guests cannot be given."""
    withheld = ("guest_tso4", "host_ecn", "mrg_rxbuf")
    with (
        bridged(tmp_path, f"--without={','.join(withheld)}") as (_, ports),
        closing(Guest(ports[0])) as sender,
        closing(Guest(ports[1])) as receiver,
    ):
        kept = ("GUEST_ECN", "HOST_TSO4", "GUEST_TSO6", "CSUM", "GUEST_CSUM")
        assert all(sender.offered & bit(Feature[f"NET_F_{name}"]) for name in kept)
        assert not any(sender.offered & bit(Feature[f"NET_F_{name.upper()}"]) for name in withheld)
        packet = tcp(4)
        sender.start(TSO[4])
        receiver.start(GUEST_TSO[4] & receiver.offered)
        sender.send(packet, packet.net_header(SEGMENT))
        assert len(receiver.receive_payload(len(LARGE))) == len(LARGE) // SEGMENT + 1
