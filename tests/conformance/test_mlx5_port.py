"""A port on an emulated ConnectX: frames by its TAP, whose they are, and a firmware that dies."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from qemu.qmp import QMPError

from datapath.virtio import NET_HEADER_SIZE, Feature, bit
from tests.harness.connectx import ConnectX
from tests.harness.emulated_nic import PortProcess, ask
from tests.harness.front_end import SocketFrontEnd
from tests.harness.netns import NetworkNamespace
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
