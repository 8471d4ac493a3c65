"""DPDK's virtio-user, a front-end that is not ours, passes traffic through the port and an emulated VF."""

import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.netns import NetworkNamespace
from tests.harness.testpmd import Testpmd

pytestmark = pytest.mark.dpdk

FRAMES = 2000
#: Frames on their way at a time: fewer than the ring has, so none need be dropped.
WINDOW = 32
#: Destination, source and EtherType (for experiments, RFC 7042) of what is sent to the VF.
STATION = bytes.fromhex("020000000001")
PEER = bytes.fromhex("020000000002")
HEADER_OUT = PEER + STATION + b"\x88\xb5"
#: What macswap makes of the addresses.
HEADER_BACK = STATION + PEER + b"\x88\xb5"
#: Seconds for a frame to come back, the front-end's start included.
PATIENCE = 20.0


@pytest.fixture(scope="module")
def nic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedNic]:
    with NetworkNamespace() as namespace, EmulatedNic(tmp_path_factory.mktemp("nic"), namespace) as running:
        yield running


@pytest.fixture
def port(nic: EmulatedNic, tmp_path: Path) -> Iterator[PortProcess]:
    with PortProcess(tmp_path, nic.device(0)) as running:
        yield running


@pytest.fixture
def wire(nic: EmulatedNic) -> Iterator[socket.socket]:
    """The TAP of VF 0, seen from the host's side."""
    with closing(nic.namespace.packet_socket("vf0")) as made:
        yield made


def next_frame(wire: socket.socket, header: bytes, peer: Testpmd) -> bytes:
    """The payload of the next frame from the VF with that header."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        data, address = wire.recvfrom(2048)
        if data.startswith(header) and address[2] != socket.PACKET_OUTGOING:
            return data[len(header) :]
    pytest.fail(f"no frame came from the VF within {PATIENCE:g} s; testpmd: {peer.log.read_text()[-300:]}")


def wait_until_forwarding(wire: socket.socket, peer: Testpmd) -> None:
    """Greet a macswap peer until it answers: what it receives before it forwards, it drops."""
    greeter = bytes.fromhex("020000000003")
    wire.settimeout(0.1)

    def answered() -> bool:
        wire.send(PEER + greeter + b"\x88\xb5" + bytes(46))
        with suppress(TimeoutError):
            while not wire.recv(2048).startswith(greeter + PEER):
                pass
            return True
        return False

    peer.wait_for("an answer", answered, PATIENCE)
    wire.settimeout(PATIENCE)


def test_frames_come_back_in_order(port: PortProcess, wire: socket.socket, tmp_path: Path) -> None:
    payloads = [number.to_bytes(4, "big") + bytes(number % 1000 + 46) for number in range(FRAMES)]
    with Testpmd(tmp_path, port.socket, "macswap") as peer:
        wait_until_forwarding(wire, peer)
        for begin in range(0, FRAMES, WINDOW):
            window = payloads[begin : begin + WINDOW]
            for payload in window:
                wire.send(HEADER_OUT + payload)
            for payload in window:
                assert next_frame(wire, HEADER_BACK, peer) == payload


def test_front_end_transmits_without_end(
    port: PortProcess, nic: EmulatedNic, wire: socket.socket, tmp_path: Path
) -> None:
    before = nic.query(0)["tx_packets"]
    with Testpmd(tmp_path, port.socket, "txonly") as peer:
        # testpmd's txonly sends UDP over IPv4 to this address.
        for _ in range(FRAMES):
            next_frame(wire, bytes.fromhex("020000000000"), peer)
        assert nic.query(0)["tx_packets"] - before >= FRAMES


def test_next_front_end_is_served(port: PortProcess, wire: socket.socket, tmp_path: Path) -> None:
    for round_number in range(2):
        folder = tmp_path / str(round_number)
        folder.mkdir()
        with Testpmd(folder, port.socket, "macswap") as peer:
            wait_until_forwarding(wire, peer)
            wire.send(HEADER_OUT + b"hello" + bytes(46))
            assert next_frame(wire, HEADER_BACK, peer).startswith(b"hello")
            # As a crash would: the port, not the front-end, cleans up.
            peer.kill()
        port.wait_state("waiting")
