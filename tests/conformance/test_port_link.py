"""The port tells whether its VF has a link, while rings run and while none does."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.harness.emulated_nic import EmulatedNic, PortProcess, ask
from tests.harness.front_end import SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import wait_for
from tests.harness.traffic import both_ways, offer_buffers
from tests.harness.wire import Wire


@pytest.fixture(autouse=True)
def plugged_in(nic: EmulatedNic) -> Iterator[None]:
    """The link is up again after each test."""
    yield
    ask(nic.control, "vf-start", vf=0)


def wait_link(port: PortProcess, link: str) -> None:
    wait_for(f"link '{link}'", lambda: port.status()["link"] == link, 5)


def test_link_of_a_running_vf(
    nic: EmulatedNic, port: PortProcess, front_end: SocketFrontEnd, wire: Wire
) -> None:
    front_end.start()
    offer_buffers(front_end, 4)
    assert port.status()["link"] == "up"
    with closing(QEMUMonitorProtocol(str(port.control))) as monitor:
        monitor.connect()
        for command, link in (("vf-stop", "down"), ("vf-start", "up")):
            ask(nic.control, command, vf=0)
            event = monitor.pull_event(wait=5.0)
            assert event is not None
            assert (event["event"], event["data"]) == ("PORT_LINK", {"link": link})
            assert port.status()["link"] == link
    both_ways(front_end, wire, 100)


def test_link_that_comes_back_while_no_ring_runs(
    nic: EmulatedNic, port: PortProcess, front_end: SocketFrontEnd, wire: Wire
) -> None:
    """As it is for a guest that has been told of the loss: QEMU stops its rings."""
    front_end.start()
    offer_buffers(front_end, 4)
    ask(nic.control, "vf-stop", vf=0)
    wait_link(port, "down")
    front_end.stop()
    ask(nic.control, "vf-start", vf=0)
    wait_link(port, "up")
    front_end.start(share=False)
    both_ways(front_end, wire, 200)


def test_link_that_is_down_from_the_beginning(nic: EmulatedNic, tmp_path: Path) -> None:
    ask(nic.control, "vf-stop", vf=0)
    with PortProcess(tmp_path, nic.device(0)) as port:
        assert port.status()["link"] == "down"
        ask(nic.control, "vf-start", vf=0)
        wait_link(port, "up")


def test_link_that_is_lost_while_no_ring_runs(
    nic: EmulatedNic, port: PortProcess, front_end: SocketFrontEnd
) -> None:
    ask(nic.control, "vf-stop", vf=0)
    front_end.start()
    wait_link(port, "down")


def test_a_vf_that_goes_while_its_link_is_down(tmp_path: Path) -> None:
    """A port that looks at a link ends as ever when there is no VF any more."""
    with NetworkNamespace() as network, EmulatedNic(tmp_path / "nic", network, 1) as nic:
        ask(nic.control, "vf-stop", vf=0)
        with PortProcess(tmp_path, nic.device(0)) as port:
            assert port.status()["link"] == "down"
            nic.kill()
            wait_for("the port to end", lambda: not port.running, 5)
            assert "is gone" in port.log_lines()[-1]
