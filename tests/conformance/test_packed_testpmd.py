"""DPDK's virtio-user, a front-end that is not ours, with packed rings and with rings in order."""

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.testpmd import HEADER_OUT, Testpmd

pytestmark = pytest.mark.dpdk

FRAMES = 1000
#: Frames on their way at a time: fewer than the ring has, so none need be dropped.
WINDOW = 32


@pytest.fixture
def wire(nic: EmulatedNic) -> Iterator[socket.socket]:
    """The TAP of VF 0, seen from the host's side."""
    with closing(nic.namespace.packet_socket("vf0")) as made:
        yield made


def exchange(port: PortProcess, wire: socket.socket, folder: Path, device: str) -> list[str]:
    """Pass frames both ways, which come back in order; the features that the front-end has accepted."""
    payloads = [number.to_bytes(4, "big") + bytes(number % 1000 + 46) for number in range(FRAMES)]
    with Testpmd(folder, port.socket, "macswap", device=device) as peer:
        peer.wait_until_forwarding(wire)
        for begin in range(0, FRAMES, WINDOW):
            window = payloads[begin : begin + WINDOW]
            for payload in window:
                wire.send(HEADER_OUT + payload)
            for payload in window:
                assert peer.next_frame(wire) == payload
        names: list[str] = port.status()["feature_names"]
        return names


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_frames_pass(
    nic: EmulatedNic, wire: socket.socket, tmp_path: Path, packed: bool, in_order: bool
) -> None:
    device = f"packed_vq={packed:d},in_order={in_order:d}"
    with PortProcess(tmp_path, nic.device(0, "virtio"), *["--packed"] * packed) as port:
        names = exchange(port, wire, tmp_path, device)
    assert ("F_RING_PACKED" in names) == packed
    assert ("F_IN_ORDER" in names) == in_order
