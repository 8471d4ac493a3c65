"""A NIC without TAPs: what a guest sends comes back to it, addresses exchanged (virt-vdpa-nic --echo)."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from datapath.virtio import NET_HEADER_SIZE
from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.front_end import BUFFERS, SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.virtqueue import Buffer

RX, TX = 0, 1
DESTINATION, SOURCE = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
#: As many as the VF shows at a time, and some that are left over.
FRAMES = 70


@pytest.fixture
def front_end(network: NetworkNamespace, tmp_path: Path) -> Iterator[SocketFrontEnd]:
    """A front-end whose rings run."""
    with (
        EmulatedNic(tmp_path / "nic", network, 1, "--echo") as nic,
        PortProcess(tmp_path, nic.device(0)) as port,
        closing(SocketFrontEnd.dial(port.socket)) as front,
    ):
        front.connect()
        front.start()
        yield front
        assert "vf0" not in network.run("ip", "link")
        found = nic.query(0)
        assert (found["rx_packets"], found["tx_packets"]) == (FRAMES, FRAMES)
        assert (found["rx_dropped"], found["tx_dropped"]) == (0, 0)


def payload(number: int) -> bytes:
    return b"\x88\xb5" + number.to_bytes(2, "big") + bytes(number + place for place in range(100))


def send(front: SocketFrontEnd, count: int, first: int | None = None) -> None:
    """Make numbered frames available, the header in a buffer of its own, and tell the VF once.

    :param first: bytes of each frame that are in another buffer than the rest, and not beside it; None: all.
    """
    for number in range(count):
        at = BUFFERS + 0x400 * number
        frame = DESTINATION + SOURCE + payload(number)
        buffers = [Buffer(at, NET_HEADER_SIZE), Buffer(at + 0x100, len(frame[:first]))]
        front.memory.write(at + 0x100, frame[:first])
        if first is not None:
            front.memory.write(at + 0x300, frame[first:])
            buffers.append(Buffer(at + 0x300, len(frame[first:])))
        front.queues[TX].add(*buffers)
    front.queues[TX].kick()


def offer(front: SocketFrontEnd, begin: int, end: int, first: int = 0x100) -> None:
    """Receive buffers, each of two pieces, the second not beside one that is shorter than 256 bytes."""
    for number in range(begin, end):
        at = BUFFERS + 0x20000 + 0x200 * number
        pieces = Buffer(at, first, writable=True), Buffer(at + 0x100, 0x100, writable=True)
        front.queues[RX].add(*pieces)
    front.queues[RX].kick()


def expect(front: SocketFrontEnd, begin: int, end: int, first: int = 0x100) -> None:
    """Frames come back in order, each with its addresses exchanged."""
    used = front.queues[RX].wait_used(end - begin)
    assert len(used) == end - begin
    for number, (_, length) in zip(range(begin, end), used, strict=True):
        at = BUFFERS + 0x20000 + 0x200 * number
        data = front.memory.read(at, first) + front.memory.read(at + 0x100, 0x100)
        assert data[NET_HEADER_SIZE:length] == SOURCE + DESTINATION + payload(number)


def test_frames_come_back(front_end: SocketFrontEnd) -> None:
    offer(front_end, 0, FRAMES)
    send(front_end, FRAMES)
    expect(front_end, 0, FRAMES)
    assert len(front_end.queues[TX].wait_used(FRAMES)) == FRAMES


@pytest.mark.parametrize(("sent", "received"), [(70, 0x100), (None, 0x40), (5, 0x10)])
def test_frames_and_buffers_in_pieces(front_end: SocketFrontEnd, sent: int | None, received: int) -> None:
    """One in one piece goes another way than the rest."""
    offer(front_end, 0, FRAMES, received)
    send(front_end, FRAMES, sent)
    expect(front_end, 0, FRAMES, received)


def test_frames_wait_for_buffers(front_end: SocketFrontEnd) -> None:
    offer(front_end, 0, 3)
    send(front_end, FRAMES)
    expect(front_end, 0, 3)
    assert front_end.queues[TX].wait_used(3)
    offer(front_end, 3, FRAMES)
    expect(front_end, 3, FRAMES)
