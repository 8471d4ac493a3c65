"""The packet engine and the header before each packet (virtio 1.3 section 5.1.6): what may pass.

The uplink is a socket that shows the header as a TAP with IFF_VNET_HDR would see it.
"""

import itertools
import struct

import pytest

from datapath.virtio import Feature, bit
from tests.harness.nic_engine import HEADER, RX, TX, TX_DATA, Bench, bench, wait_for
from tests.harness.virtqueue import Buffer

#: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers
NET_HEADER = struct.Struct("<BBHHHHH")
NEEDS_CSUM, DATA_VALID, RSC_INFO = 1, 2, 4
GSO_NONE, TCPV4, UDP, TCPV6, UDP_L4, ECN = 0, 1, 3, 4, 5, 0x80
FRAME = bytes(range(250)) * 4
PLAIN = NET_HEADER.pack(0, 0, 0, 0, 0, 0, 0)
CHECKSUM = NET_HEADER.pack(NEEDS_CSUM, 0, 0, 0, 34, 16, 0)

CSUM, GUEST_CSUM = bit(Feature.NET_F_CSUM), bit(Feature.NET_F_GUEST_CSUM)
TSO4, TSO6, HOST_ECN = (
    CSUM | bit(feature)
    for feature in (Feature.NET_F_HOST_TSO4, Feature.NET_F_HOST_TSO6, Feature.NET_F_HOST_ECN)
)
GUEST_TSO4, GUEST_TSO6, GUEST_ECN = (
    GUEST_CSUM | bit(feature)
    for feature in (Feature.NET_F_GUEST_TSO4, Feature.NET_F_GUEST_TSO6, Feature.NET_F_GUEST_ECN)
)


def gso(kind: int, flags: int = NEEDS_CSUM, size: int = 100, start: int = 34, length: int = 54) -> bytes:
    """The header of a TCP frame to be cut into segments of `size` bytes."""
    return NET_HEADER.pack(flags, kind, length, size, start, 16, 0)


def transmit(b: Bench, header: bytes, frame: bytes = FRAME) -> None:
    """Let the driver send a frame after this header, in one buffer, and wait until it is used."""
    b.memory.write(TX_DATA, header + frame)
    b.tx.add(Buffer(TX_DATA, HEADER + len(frame)))
    b.kick(TX)
    b.tx.wait_used()


def assert_goes_on(b: Bench) -> None:
    """The next plain frame comes out, and before it nothing did."""
    transmit(b, PLAIN, b"after all")
    assert b.receive_from_wire() == PLAIN + b"after all"


@pytest.mark.parametrize(
    ("features", "header"),
    [
        (0, PLAIN),
        (CSUM, CHECKSUM),
        (TSO4, gso(TCPV4)),
        (TSO6, gso(TCPV6)),
        (TSO4 | HOST_ECN, gso(TCPV4 | ECN)),
        (TSO6 | HOST_ECN, gso(TCPV6 | ECN)),
    ],
    ids=["plain", "checksum", "tso4", "tso6", "tso4 with ecn", "tso6 with ecn"],
)
def test_what_was_negotiated_reaches_the_uplink(features: int, header: bytes) -> None:
    with bench(has_header=True) as b:
        b.engine.accept(features)
        b.run()
        transmit(b, header)
        assert b.receive_from_wire() == header + FRAME
        counters = b.engine.count(TX)
        assert (counters.packets, counters.bytes, counters.dropped) == (1, len(FRAME), 0)


ALL = TSO4 | TSO6 | HOST_ECN


@pytest.mark.parametrize(
    ("features", "header"),
    [
        (GUEST_CSUM, CHECKSUM),
        (CSUM, gso(TCPV4)),
        (TSO6, gso(TCPV4)),
        (TSO4, gso(TCPV6)),
        (TSO4, gso(TCPV4 | ECN)),
        (bit(Feature.NET_F_HOST_TSO4), gso(TCPV4)),
        (ALL, gso(UDP)),
        (ALL, gso(UDP_L4)),
        (ALL, gso(2)),
        (ALL, gso(0x7F)),
        (ALL, gso(ECN)),
        (ALL, gso(TCPV4, flags=0)),
        (ALL, gso(TCPV4, flags=DATA_VALID)),
        (ALL, gso(TCPV4, size=0)),
        (ALL, gso(TCPV4, start=len(FRAME) - 17)),
        (ALL, gso(TCPV4, start=0xFFFF)),
        (CSUM, NET_HEADER.pack(NEEDS_CSUM, 0, 0, 0, 0xFFFF, 0xFFFF, 0)),
        (CSUM, NET_HEADER.pack(NEEDS_CSUM, 0, 0, 0, 34, len(FRAME) - 35, 0)),
    ],
)
def test_what_was_not_negotiated_or_cannot_be_is_dropped(features: int, header: bytes) -> None:
    with bench(has_header=True) as b:
        b.engine.accept(features)
        b.run()
        transmit(b, header)
        assert b.engine.count(TX).dropped == 1
        assert_goes_on(b)
        assert b.engine.fault() is None


@pytest.mark.parametrize(
    ("header", "passed"),
    [
        (NET_HEADER.pack(RSC_INFO | DATA_VALID | 0x80, 0, 9, 9, 9, 9, 9), PLAIN),
        (NET_HEADER.pack(NEEDS_CSUM | DATA_VALID, 0, 9, 9, 34, 16, 9), CHECKSUM),
        (gso(TCPV4, length=0xFFFF), gso(TCPV4, length=0)),
        (gso(TCPV4, start=len(FRAME) - 18), gso(TCPV4, start=len(FRAME) - 18)),
    ],
    ids=["unknown flags", "no segments", "a hint beyond the frame", "a checksum at the very end"],
)
def test_fields_without_a_meaning_do_not_matter(header: bytes, passed: bytes) -> None:
    with bench(has_header=True) as b:
        b.engine.accept(ALL)
        b.run()
        transmit(b, header)
        assert b.receive_from_wire() == passed + FRAME


@pytest.mark.parametrize(
    "cuts",
    [(HEADER,), (5,), (HEADER + 1,), (1, 2, 3, HEADER + 500), (HEADER, HEADER + 1), (500,)],
)
def test_a_header_may_lie_anyhow(cuts: tuple[int, ...]) -> None:
    with bench(has_header=True) as b:
        b.engine.accept(TSO4)
        b.run()
        whole = gso(TCPV4) + FRAME
        b.memory.write(TX_DATA, whole)
        edges = (0, *cuts, len(whole))
        b.tx.add(*(Buffer(TX_DATA + begin, end - begin) for begin, end in itertools.pairwise(edges)))
        b.kick(TX)
        b.tx.wait_used()
        assert b.receive_from_wire() == whole


def test_a_frame_of_64_kilobytes() -> None:
    """The largest TCP packet that IPv4 has; one byte more than the engine holds is dropped."""
    frame = bytes(65535 + 14)
    with bench(has_header=True) as b:
        b.engine.accept(TSO4)
        b.run()
        transmit(b, gso(TCPV4, size=1448), frame)
        assert b.receive_from_wire() == gso(TCPV4, size=1448) + frame
        transmit(b, gso(TCPV4, size=1448), bytes(65664))
        assert b.engine.count(TX).dropped == 1


def test_an_uplink_without_headers_takes_nothing_unfinished() -> None:
    with bench() as b:
        b.engine.accept(ALL)
        b.run()
        transmit(b, CHECKSUM)
        transmit(b, gso(TCPV4))
        assert b.engine.count(TX).dropped == 2
        transmit(b, PLAIN)
        assert b.receive_from_wire() == FRAME


def receive(b: Bench, header: bytes, frame: bytes = FRAME) -> bytes:
    """What the driver finds in its buffers when this comes from the uplink."""
    places = b.offer(4096)
    b.wire.send(header + frame)
    ((_, length),) = b.rx.wait_used()
    return b.memory.read(places[0], length)


@pytest.mark.parametrize(
    ("features", "header", "delivered"),
    [
        (0, PLAIN, PLAIN),
        (0, NET_HEADER.pack(DATA_VALID, 0, 0, 0, 0, 0, 0), PLAIN),
        (GUEST_CSUM, NET_HEADER.pack(DATA_VALID, 0, 0, 0, 0, 0, 0), NET_HEADER.pack(DATA_VALID, *[0] * 6)),
        (GUEST_CSUM, CHECKSUM, CHECKSUM),
        (GUEST_TSO4, gso(TCPV4), gso(TCPV4)),
        (GUEST_TSO6, gso(TCPV6), gso(TCPV6)),
        (GUEST_TSO4 | GUEST_ECN, gso(TCPV4 | ECN), gso(TCPV4 | ECN)),
    ],
)
def test_the_driver_gets_the_header_that_it_can_take(features: int, header: bytes, delivered: bytes) -> None:
    with bench(has_header=True) as b:
        b.engine.accept(features)
        b.run()
        assert receive(b, header) == delivered[:10] + b"\x01\0" + FRAME


@pytest.mark.parametrize(
    ("features", "header"),
    [
        (0, CHECKSUM),
        (CSUM, CHECKSUM),
        (GUEST_CSUM, gso(TCPV4)),
        (GUEST_TSO6, gso(TCPV4)),
        (GUEST_TSO4, gso(TCPV4 | ECN)),
        (GUEST_TSO4, gso(UDP_L4)),
    ],
)
def test_the_driver_gets_nothing_unfinished_that_it_did_not_accept(features: int, header: bytes) -> None:
    """Such a frame may have come into the TAP for the driver before."""
    with bench(has_header=True) as b:
        b.engine.accept(features)
        b.run()
        b.wire.send(header + FRAME)
        wait_for(lambda: b.engine.count(RX).dropped == 1, "a dropped frame")
        assert receive(b, PLAIN, b"good") == PLAIN[:10] + b"\x01\0good"


@pytest.mark.parametrize(("gso_size", "passes"), [(1000, True), (1001, False)])
def test_segments_obey_the_mtu_and_what_they_are_cut_from_does_not(gso_size: int, passes: bool) -> None:
    with bench(has_header=True, mtu=1000) as b:
        b.engine.accept(TSO4)
        b.run()
        large = bytes(20000)
        transmit(b, gso(TCPV4, size=gso_size), large)
        assert b.engine.count(TX).dropped == (0 if passes else 1)
        if passes:
            assert b.receive_from_wire() == gso(TCPV4, size=gso_size) + large


def test_a_reset_takes_the_features_back() -> None:
    with bench(has_header=True) as b:
        b.engine.accept(TSO4)
        b.engine.reset()
        b.run()
        transmit(b, gso(TCPV4))
        assert b.engine.count(TX).dropped == 1


def test_a_large_frame_comes_in_many_buffers() -> None:
    with bench(has_header=True) as b:
        b.engine.accept(GUEST_TSO4)
        b.run()
        frame = bytes(range(256)) * 250
        places = b.offer(*[4096] * 20)
        b.wire.send(gso(TCPV4) + frame)
        used = b.rx.wait_used(16)
        found = b"".join(b.memory.read(at, length) for at, (_, length) in zip(places, used, strict=False))
        assert found == gso(TCPV4)[:10] + struct.pack("<H", 16) + frame


def test_what_is_shorter_than_a_header_is_no_frame() -> None:
    with bench(has_header=True) as b:
        b.run()
        b.wire.send(b"short")
        b.wire.send(PLAIN)
        assert receive(b, PLAIN, b"good") == PLAIN[:10] + b"\x01\0good"
