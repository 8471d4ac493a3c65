"""Packed rings and rings in order through a port and the driver `virtio`, with others' front-ends."""

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from qemu.qmp import QMPError

from datapath.vhost_user.backend import F_PROTOCOL_FEATURES
from datapath.vhost_user.messages import Request, VringAddress, VringFd, VringState
from datapath.virtio import Feature, bit
from tests.harness.emulated_nic import EmulatedNic, PortProcess, ask
from tests.harness.front_end import BUFFERS, USER, VIRTIO, SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.packed_virtqueue import PackedVirtqueue
from tests.harness.processes import HarnessError
from tests.harness.testpmd import HEADER_OUT, Testpmd
from tests.harness.vhost_user_guest import VhostUserGuest
from tests.harness.virtqueue import Buffer

FRAMES = 1000
HOST, GUEST = "10.96.0.1", "10.96.0.2"
PACKED, IN_ORDER, LOG = (
    bit(feature) for feature in (Feature.F_RING_PACKED, Feature.F_IN_ORDER, Feature.VHOST_F_LOG_ALL)
)


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
        for sent, came in peer.exchange(wire, payloads):
            assert came == sent
        names: list[str] = port.status()["feature_names"]
        return names


@pytest.mark.dpdk
@pytest.mark.parametrize(("packed", "in_order"), [(True, True), (True, False), (False, True)])
def test_frames_pass(
    nic: EmulatedNic, wire: socket.socket, tmp_path: Path, packed: bool, in_order: bool
) -> None:
    device = f"packed_vq={packed:d},in_order={in_order:d}"
    with PortProcess(tmp_path, nic.device(0, "virtio"), *["--packed"] * packed) as port:
        names = exchange(port, wire, tmp_path, device)
        assert not port.status()["last_error"], "it was told where its rings stand"
    assert ("F_RING_PACKED" in names) == packed
    assert ("F_IN_ORDER" in names) == in_order


@pytest.mark.parametrize(
    ("driver", "options", "withheld", "offered"),
    [
        ("virtio", ["--packed"], "", PACKED | IN_ORDER),
        ("virtio", [], "", IN_ORDER | LOG),
        ("virtio", ["--packed"], "in_order", PACKED),
        ("ifcvf", [], "", LOG),
    ],
)
def test_what_is_offered(
    network: NetworkNamespace, tmp_path: Path, driver: str, options: list[str], withheld: str, offered: int
) -> None:
    without = [f"--without={withheld}"] * bool(withheld)
    with (
        EmulatedNic(tmp_path / "nic", network, 1, "--echo", *without) as nic,
        PortProcess(tmp_path, nic.device(0, driver), *options) as port,
        closing(SocketFrontEnd.dial(port.socket)) as peer,
    ):
        assert peer.tell(Request.GET_FEATURES) & (PACKED | IN_ORDER | LOG) == offered


def test_a_function_without_packed_rings_is_told(network: NetworkNamespace, tmp_path: Path) -> None:
    with (
        EmulatedNic(tmp_path / "nic", network, 1, "--echo") as nic,
        pytest.raises(HarnessError, match="has no packed rings: leave --packed out"),
    ):
        PortProcess(tmp_path, nic.device(0, "ifcvf"), "--packed")


def test_a_ring_of_five(nic: EmulatedNic, wire: socket.socket, tmp_path: Path) -> None:
    """A packed ring's size need not be a power of two (virtio 1.3 section 2.8)."""
    with (
        PortProcess(tmp_path, nic.device(0, "virtio"), "--packed") as port,
        closing(SocketFrontEnd.dial(port.socket)) as peer,
    ):
        mine = [PackedVirtqueue(peer.memory, queue.descriptors, size=5) for queue in peer.queues]
        peer.connect()
        peer.enable()
        peer.tell(Request.SET_FEATURES, VIRTIO | PACKED | F_PROTOCOL_FEATURES)
        peer.share_memory()
        for index, ring in enumerate(mine):
            parts = (USER + ring.descriptors, USER + ring.used, USER + ring.avail)
            peer.tell(Request.SET_VRING_NUM, VringState(index, ring.size))
            peer.tell(Request.SET_VRING_BASE, VringState(index, 0x8000))
            peer.tell(Request.SET_VRING_ADDR, VringAddress(index, 0, *parts, 0))
            peer.tell(Request.SET_VRING_CALL, VringFd(index, True), ring.call_fd)
            peer.tell(Request.SET_VRING_KICK, VringFd(index, True), ring.kick_fd)
        peer.driver_ok()
        peer.settle()
        for number in range(12):
            payload = bytes([number]) * 50
            peer.memory.write(BUFFERS, bytes(12) + HEADER_OUT + payload)
            mine[1].add(Buffer(BUFFERS, 12 + len(HEADER_OUT + payload)))
            mine[1].kick()
            mine[1].wait_used()
            while wire.recv(2048)[len(HEADER_OUT) :] != payload:
                pass  # the host's own
        for ring in mine:
            ring.close()


def answers(network: NetworkNamespace) -> bool:
    """Whether the guest answers a ping."""
    try:
        network.run("ping", "-q", "-c", "1", "-W", "1", GUEST)
    except HarnessError:
        return False
    return True


@pytest.mark.guest
@pytest.mark.full
def test_a_linux_guest_with_packed_rings(tmp_path: Path) -> None:
    """Its frames pass; it cannot be migrated, as QEMU says, nor go on after a pause, as the port says."""
    with (
        NetworkNamespace() as network,
        EmulatedNic(tmp_path / "nic", network, 1) as nic,
        PortProcess(tmp_path, nic.device(0, "virtio"), "--packed") as port,
    ):
        network.run("ip", "address", "add", f"{HOST}/24", "dev", "vf0")
        network.run("ip", "link", "set", "vf0", "up")
        with VhostUserGuest(tmp_path, port.socket, f"{GUEST}/24", "packed=on") as guest:
            guest.wait_for("an answer", lambda: answers(network), 60)
            assert "F_RING_PACKED" in port.status()["feature_names"]
            network.run("ping", "-q", "-c", "300", "-i", "0.01", "-s", "1400", GUEST)
            with pytest.raises(QMPError, match="VHOST_F_LOG_ALL"):
                ask(guest.qmp, "migrate", uri=f"unix:{tmp_path}/nobody")
            ask(guest.qmp, "stop")
            ask(guest.qmp, "cont")
            guest.wait_for("an error", lambda: "have been in use" in str(port.status()["last_error"]), 20)
