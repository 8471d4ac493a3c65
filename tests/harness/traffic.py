"""Frames of a guest behind a vhost-user front-end of ours, and of the other end of its VF's cable.

`header` is the bytes of the header before each packet, of which a guest of virtio 0.95 may have fewer.
"""

from datapath.virtio import NET_HEADER_SIZE
from tests.harness.front_end import BUFFERS, FrontEnd
from tests.harness.virtqueue import Buffer
from tests.harness.wire import Wire, frame, number_of

RX, TX = 0, 1


def transmit(peer: FrontEnd, number: int, header: int = NET_HEADER_SIZE) -> None:
    """Let the guest send a frame."""
    data = bytes(header) + frame(number)
    peer.memory.write(BUFFERS, data)
    peer.queues[TX].add(Buffer(BUFFERS, len(data)))
    peer.queues[TX].kick()


def offer_buffers(peer: FrontEnd, count: int = 4) -> None:
    """Give the guest's receive ring something to fill."""
    for number in range(count):
        peer.queues[RX].add(Buffer(BUFFERS + 0x1000 * (number + 1), 2048, writable=True))
    peer.queues[RX].kick()


def received(peer: FrontEnd, header: int = NET_HEADER_SIZE) -> int:
    """The number of the next frame of ours that the guest receives."""
    while True:
        ((head, length),) = peer.queues[RX].wait_used(1)
        descriptor = peer.memory.read(peer.queues[RX].descriptors + 16 * head, 8)
        data = peer.memory.read(int.from_bytes(descriptor, "little"), length)[header:]
        number = number_of(data)
        if number is not None:
            return number


def both_ways(peer: FrontEnd, wire: Wire, number: int, header: int = NET_HEADER_SIZE) -> None:
    """A frame out and a frame in."""
    transmit(peer, number, header)
    wire.expect(number)
    peer.queues[TX].wait_used()
    wire.send(number + 1)
    assert received(peer, header) == number + 1
