"""DPDK's virtio-user, a front-end that is not ours, passes traffic through the port and an emulated VF."""

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.netns import NetworkNamespace
from tests.harness.testpmd import HEADER_OUT, TXONLY, Testpmd

pytestmark = pytest.mark.dpdk

FRAMES = 2000


@pytest.fixture(scope="module")
def nic(network: NetworkNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedNic]:
    with EmulatedNic(tmp_path_factory.mktemp("nic"), network) as running:
        yield running


@pytest.fixture
def wire(nic: EmulatedNic) -> Iterator[socket.socket]:
    """The TAP of VF 0, seen from the host's side."""
    with closing(nic.namespace.packet_socket("vf0")) as made:
        yield made


def test_frames_come_back_in_order(port: PortProcess, wire: socket.socket, tmp_path: Path) -> None:
    payloads = [number.to_bytes(4, "big") + bytes(number % 1000 + 46) for number in range(FRAMES)]
    with Testpmd(tmp_path, port.socket, "macswap") as peer:
        peer.wait_until_forwarding(wire)
        for sent, came in peer.exchange(wire, payloads):
            assert came == sent


def test_front_end_transmits_without_end(
    port: PortProcess, nic: EmulatedNic, wire: socket.socket, tmp_path: Path
) -> None:
    before = nic.query(0)["tx_packets"]
    with Testpmd(tmp_path, port.socket, "txonly") as peer:
        for _ in range(FRAMES):
            peer.next_frame(wire, TXONLY)
        assert nic.query(0)["tx_packets"] - before >= FRAMES


def test_next_front_end_is_served(port: PortProcess, wire: socket.socket, tmp_path: Path) -> None:
    for round_number in range(2):
        folder = tmp_path / str(round_number)
        folder.mkdir()
        with Testpmd(folder, port.socket, "macswap") as peer:
            peer.wait_until_forwarding(wire)
            wire.send(HEADER_OUT + b"hello" + bytes(46))
            assert peer.next_frame(wire).startswith(b"hello")
            # As a crash would: the port, not the front-end, cleans up.
            peer.kill()
        port.wait_state("waiting")
