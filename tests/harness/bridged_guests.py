"""Guests behind ports whose VFs share a bridge, driven by the test: any packet, with any header before it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from datapath.vhost_user.messages import Request
from datapath.virtio import NET_HEADER_SIZE
from tests.harness.connectx import ConnectX
from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.front_end import BUFFERS, SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.offloads import IpPacket, NetHeader, is_ours, payload_of
from tests.harness.virtqueue import Buffer

RX, TX = 0, 1
#: A chain of the receive ring that holds any packet, in memory that the transmit ring's packet leaves free.
BUFFER_SIZE = 0x11000
BUFFER_COUNT = 12


class Guest:
    """One guest on a port: its driver accepts what the test says."""

    def __init__(self, port: PortProcess) -> None:
        self.peer = SocketFrontEnd.dial(port.socket)
        self.peer.connect()
        self._next = 0
        self._buffer_size = BUFFER_SIZE
        self._used: list[tuple[int, int]] = []

    @property
    def offered(self) -> int:
        """Features that the port offers."""
        features: int = self.peer.tell(Request.GET_FEATURES)
        return features

    def start(self, features: int, buffer_size: int = BUFFER_SIZE) -> None:
        """Run, with one receive buffer per packet."""
        self.peer.start(features)
        self._buffer_size = buffer_size
        for _ in range(BUFFER_COUNT - 1):
            self._offer()

    def send(self, packet: IpPacket, header: NetHeader) -> None:
        """Transmit and wait until the device is done with it."""
        self.send_frame(packet.frame, header)

    def send_frame(self, frame: bytes, header: NetHeader | None = None) -> None:
        """Transmit any frame."""
        data = (header or NetHeader()).pack() + frame
        at = BUFFERS + BUFFER_COUNT * BUFFER_SIZE
        self.peer.memory.write(at, data)
        self.peer.queues[TX].add(Buffer(at, len(data)))
        self.peer.queues[TX].kick()
        self.peer.queues[TX].wait_used()

    def receive(self) -> tuple[NetHeader, bytes]:
        """The next frame of ours, and its header."""
        while True:
            if not self._used:
                self._used += self.peer.queues[RX].wait_used()
            head, length = self._used.pop(0)
            place = self.peer.queues[RX].descriptors + 16 * head
            at = int.from_bytes(self.peer.memory.read(place, 8), "little")
            data = self.peer.memory.read(at, length)
            self._offer()
            if is_ours(data[NET_HEADER_SIZE:]):
                return NetHeader.unpack(data), data[NET_HEADER_SIZE:]

    def receive_payload(self, size: int) -> list[tuple[NetHeader, bytes]]:
        """The next frames, until they have carried so many bytes."""
        frames: list[tuple[NetHeader, bytes]] = []
        while sum(len(payload_of(frame)) for _, frame in frames) < size:
            frames.append(self.receive())
        return frames

    def close(self) -> None:
        self.peer.close()

    def _offer(self) -> None:
        at = BUFFERS + BUFFER_SIZE * (self._next % BUFFER_COUNT)
        self._next += 1
        self.peer.queues[RX].add(Buffer(at, self._buffer_size, writable=True))
        self.peer.queues[RX].kick()


@contextmanager
def bridged_cards(folder: Path) -> Iterator[tuple[NetworkNamespace, list[PortProcess]]]:
    """As `bridged`, with two ConnectX; where their TAPs are."""
    with ExitStack() as stack:
        network = stack.enter_context(bridge())
        ports = []
        for number in (0, 1):
            place = folder / f"port{number}"
            place.mkdir()
            card = ConnectX(place / "nic", network, tap=f"vf{number}", bridge="br0")
            ports.append(stack.enter_context(card.port(place)))
        yield network, ports


@contextmanager
def bridge() -> Iterator[NetworkNamespace]:
    """A network with a bridge br0."""
    with NetworkNamespace() as network:
        network.run("ip", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        network.run("ip", "link", "set", "br0", "up")
        yield network


@contextmanager
def bridged(
    folder: Path, *options: str, driver: str = "ifcvf"
) -> Iterator[tuple[EmulatedNic, list[PortProcess]]]:
    """A NIC whose VFs are in a bridge, and a port on each."""
    with ExitStack() as stack:
        network = stack.enter_context(bridge())
        nic = stack.enter_context(EmulatedNic(folder / "nic", network, 2, "--bridge=br0", *options))
        ports = [
            stack.enter_context(PortProcess(folder, nic.device(vf, driver), name=f"port{vf}"))
            for vf in (0, 1)
        ]
        yield nic, ports
