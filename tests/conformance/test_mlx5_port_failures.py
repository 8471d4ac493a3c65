"""A port whose ConnectX fails at some command: it says why, its guest loses the link, and nothing hangs."""

from contextlib import closing, suppress
from pathlib import Path

import pytest

from datapath.virtio import Feature, bit
from tests.harness.connectx import ConnectX
from tests.harness.emulated_nic import PortProcess
from tests.harness.front_end import SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import HarnessError, wait_for
from tests.harness.traffic import both_ways, offer_buffers
from tests.harness.wire import Wire

VERSION_1 = bit(Feature.F_VERSION_1)
#: Seconds that a port may take to end: what its firmware has, twice over, and a process' end.
END = 15.0
HOW = ["fail", "dead", "hang"]
#: Two of the commands of a port's life with one guest: in a start, and in its stop. There are about 70.
SAMPLE = [30, 55]


def live(port: PortProcess, network: NetworkNamespace, number: int) -> bool:
    """A guest's life with a port; whether it was served to its end. If not, its link went down."""
    with closing(SocketFrontEnd.dial(port.socket)) as peer, closing(Wire(network, "vf0")) as wire:
        try:
            peer.connect()
            peer.start(VERSION_1)
            offer_buffers(peer)
            both_ways(peer, wire, number)
            peer.stop()
        except (ConnectionError, TimeoutError):
            assert peer.ended(), "a front-end that is not served is not let go either"
            return False
        return True


def lines(log: Path) -> list[str]:
    """What a port has said, which is nothing but lines of its own."""
    said = log.read_text().splitlines()
    assert all(line.startswith("virt-vdpa-port: port: ") for line in said), said
    return said


def fails(network: NetworkNamespace, folder: Path, how: str, number: int) -> None:
    folder.mkdir()
    connectx = ConnectX(folder / "nic", network, **{how: number})
    port = None
    with suppress(HarnessError):  # it ends before it serves anybody
        port = connectx.port(folder)
    if port is None:
        (line,) = lines(folder / "port.log")
        assert f"mlx5,ibdev={connectx.name}: " in line
        return
    with port:
        served = False
        with suppress(HarnessError, OSError):  # a port that has ended takes nobody
            served = live(port, network, 1)
        if not served and how == "fail" and port.running:
            assert live(port, network, 2), "another guest is served after what failed once"
        if served or how == "fail":
            assert port.stop(END) in (0, 1)
        wait_for("the port to end", lambda: not port.running, END)
        why = [line for line in lines(port.log)[1:] if f"mlx5,ibdev={connectx.name}: " in line]
        assert served or why


@pytest.mark.parametrize("number", SAMPLE)
@pytest.mark.parametrize("how", HOW)
def test_a_command_fails(how: str, number: int, network: NetworkNamespace, tmp_path: Path) -> None:
    fails(network, tmp_path / "run", how, number)


@pytest.mark.full
@pytest.mark.parametrize("how", HOW)
def test_every_command_fails(how: str, network: NetworkNamespace, tmp_path: Path) -> None:
    for number in range(1, 75):
        fails(network, tmp_path / str(number), how, number)
