"""A port on an emulated ConnectX: frames by its TAP, whose they are, and a firmware that dies."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from qemu.qmp import QMPError

from datapath.announce import rarp_frame
from datapath.vhost_user.messages import Request
from datapath.virtio import NET_HEADER_SIZE, Feature, bit
from tests.harness.bridged_guests import bridge
from tests.harness.connectx import ConnectX
from tests.harness.emulated_nic import PortProcess, ask
from tests.harness.front_end import SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.notifier_front_end import WITH_NOTIFIERS, NotifierFrontEnd
from tests.harness.processes import wait_for
from tests.harness.traffic import RX, both_ways, offer_buffers
from tests.harness.wire import HEADER, Wire, frame

VERSION_1 = bit(Feature.F_VERSION_1)
MAC = "52:54:00:76:64:01"
#: Commands that a port needs for less than the life of its first guest.
LIFE = 150


@contextmanager
def guest(port: PortProcess) -> Iterator[SocketFrontEnd]:
    """A front-end whose guest runs."""
    port.wait_state("waiting")
    with closing(SocketFrontEnd.dial(port.socket)) as peer:
        peer.connect()
        peer.start(VERSION_1)
        assert port.status()["state"] == "running"
        yield peer


@pytest.fixture
def connectx(network: NetworkNamespace, tmp_path: Path) -> ConnectX:
    return ConnectX(tmp_path / "nic", network)


def test_frames_pass_both_ways_by_the_tap(
    connectx: ConnectX, network: NetworkNamespace, tmp_path: Path
) -> None:
    with connectx.port(tmp_path) as port, closing(Wire(network, "vf0")) as wire:
        for number in (1, 50):  # a second guest finds all as the first one did
            with guest(port) as peer:
                offer_buffers(peer)
                both_ways(peer, wire, number)
        assert port.stop() == 0


def test_the_tap_goes_with_the_port(connectx: ConnectX, network: NetworkNamespace, tmp_path: Path) -> None:
    with connectx.port(tmp_path):
        assert "mtu 1500" in network.run("ip", "link", "show", "vf0")
    assert "vf0" not in network.run("ip", "link")


def reach(peer: SocketFrontEnd, wire: Wire, *destinations: str) -> list[int]:
    """Which of frames to these addresses, numbered from 0, the guest receives."""
    last = len(destinations)
    offer_buffers(peer, last + 1)
    for number, to in enumerate(destinations):
        wire.socket.send(bytes.fromhex(to.replace(":", "")) + frame(number)[6:])
    wire.send(last)  # to all, after which none is to come
    numbers: list[int] = []
    while last not in numbers:
        for head, length in peer.queues[RX].wait_used(1):
            descriptor = peer.memory.read(peer.queues[RX].descriptors + 16 * head, 8)
            data = peer.memory.read(int.from_bytes(descriptor, "little"), length)[NET_HEADER_SIZE:]
            if data[6:14] == HEADER[6:]:  # not one of the host's
                numbers.append(int.from_bytes(data[14:18], "big"))
    return numbers[:-1]


OTHER, GROUP = "52:54:00:76:64:02", "01:00:5e:00:00:05"


@pytest.mark.parametrize(
    ("options", "of_device", "expected"),
    [
        ([f"--mac={MAC}"], {}, [0, 2]),
        ([f"--mac={MAC}"], {"promiscuous": 1}, [0, 1, 2]),
        ([], {}, [0, 1, 2]),
    ],
)
def test_whose_frames_a_guest_gets(
    connectx: ConnectX,
    network: NetworkNamespace,
    tmp_path: Path,
    options: list[str],
    of_device: dict[str, int],
    expected: list[int],
) -> None:
    with (
        connectx.port(tmp_path, *options, **of_device) as port,
        closing(Wire(network, "vf0")) as wire,
        guest(port) as peer,
    ):
        assert reach(peer, wire, MAC, OTHER, GROUP) == expected


@pytest.mark.parametrize("how", ["dead", "hang"])
def test_a_firmware_that_dies(network: NetworkNamespace, tmp_path: Path, how: str) -> None:
    """While a guest runs: the port says so and ends, which unplugs the guest's link; frames stop at once."""
    connectx = ConnectX(tmp_path / "nic", network, **{how: LIFE})
    with connectx.port(tmp_path) as port, closing(Wire(network, "vf0")) as wire, guest(port) as peer:
        offer_buffers(peer)
        both_ways(peer, wire, 1)
        with suppress(QMPError, OSError, EOFError):
            while port.running:  # each time that the counters are read takes it nearer to its end
                ask(port.control, "query-stats")
        wait_for("the port to end", lambda: not port.running, 10.0)
        assert peer.ended()
    assert [line for line in port.log_lines()[1:] if connectx.name in line] == [
        f"virt-vdpa-port: port: mlx5,ibdev={connectx.name}: the device is gone"
    ]


def test_a_kick_goes_to_the_doorbell_page(
    connectx: ConnectX, network: NetworkNamespace, tmp_path: Path
) -> None:
    """Which the guest writes to itself: the relay sees none of it."""
    with (
        connectx.port(tmp_path, "--host-notifiers=on") as port,
        closing(Wire(network, "vf0")) as wire,
        closing(NotifierFrontEnd.dial(port.socket, WITH_NOTIFIERS)) as peer,
    ):
        peer.connect()
        peer.start(VERSION_1)
        assert [area.has_fd for area in peer.serve(2)] == [True, True]
        wait_for("both pages to be given", lambda: all(given(port)), 5)
        before = kicks(port)
        offer_buffers(peer)
        for number in (100, 110, 120):
            both_ways(peer, wire, number)
        assert kicks(port) == before


def given(port: PortProcess) -> list[bool]:
    """Of each ring, whether the port knows that the guest writes to the doorbell."""
    return [ring["host_notifier"] for ring in port.status()["rings"]]


def kicks(port: PortProcess) -> list[int]:
    """Kicks that the relay has seen."""
    counted = ask(port.control, "query-stats")
    return [counted[f"kicks.{ring}"] for ring in (0, 1)]


def test_a_guest_that_cannot_is_announced(tmp_path: Path) -> None:
    """It was not offered GUEST_ANNOUNCE: QEMU asks the back-end, which has the bridge for its uplink."""
    everything = (1 << 64) - 1
    announce = bit(Feature.NET_F_GUEST_ANNOUNCE)
    options = [f"--mac={MAC}", "--uplink=interface=br0", f"--features={everything & ~announce:#x}"]
    with bridge() as network:
        network.run("ip", "link", "add", "far", "type", "veth", "peer", "name", "near")
        network.run("ip", "link", "set", "near", "master", "br0", "up")
        network.run("ip", "link", "set", "far", "up")
        card = ConnectX(tmp_path / "nic", network, bridge="br0")
        with (
            card.port(tmp_path, *options) as port,
            network.packet_socket("far") as far,
            closing(SocketFrontEnd.dial(port.socket)) as peer,
        ):
            peer.connect()
            assert not peer.tell(Request.GET_FEATURES) & announce
            peer.start(VERSION_1)
            peer.tell(Request.SEND_RARP, int.from_bytes(bytes.fromhex(MAC.replace(":", "")), "little"))
            far.settimeout(5)
            while far.recv(2048) != rarp_frame(bytes.fromhex(MAC.replace(":", ""))):
                pass
