"""A port whose VF is a virtio NIC that is not ours, behind kernel VFIO: for front-ends of ours and of others.

One port serves all of these tests, in their order.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.harness import traffic
from tests.harness.emulated_nic import PortProcess
from tests.harness.front_end import RING_STRIDE, SocketFrontEnd
from tests.harness.host_pci import bound, remove, rescan
from tests.harness.nested_hardware import FUNCTIONS
from tests.harness.testpmd import HEADER_OUT, Testpmd
from tests.harness.wire import Wire

FIRST = FUNCTIONS[0]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PortProcess]:
    with bound(FIRST), PortProcess(tmp_path_factory.mktemp("port"), f"virtio,pci={FIRST}") as running:
        yield running


@pytest.fixture
def wire() -> Iterator[Wire]:
    """The other end of the function's cable."""
    with closing(Wire(None, "w1")) as made:
        yield made


@contextmanager
def front_end(port: PortProcess) -> Iterator[SocketFrontEnd]:
    """A front-end whose guest runs and has offered buffers."""
    with closing(SocketFrontEnd.dial(port.socket)) as peer:
        peer.lay_rings_out(RING_STRIDE)
        peer.connect()
        peer.start()
        traffic.offer_buffers(peer, 16)
        yield peer


def test_a_front_end_passes_frames_both_ways(port: PortProcess, wire: Wire) -> None:
    with front_end(port) as peer:
        traffic.both_ways(peer, wire, 100)
        assert peer.stop() == [1, 1]
        peer.start(share=False)
        traffic.both_ways(peer, wire, 200)
        status = port.status()
        assert (status["state"], status["driver"]) == ("running", "virtio")
    port.wait_state("waiting")
    with front_end(port) as peer:
        traffic.both_ways(peer, wire, 300)


@pytest.mark.dpdk
def test_dpdk_passes_frames_both_ways(port: PortProcess, wire: Wire, tmp_path: Path) -> None:
    payloads = [number.to_bytes(4, "big") + bytes(number % 1000 + 46) for number in range(200)]
    # Every page is prepared by DPDK, and pinned for the function: few of them start sooner.
    with Testpmd(tmp_path, port.socket, "macswap", memory=32, buffers=2048) as peer:
        peer.wait_until_forwarding(wire.socket)
        for begin in range(0, len(payloads), 20):
            window = payloads[begin : begin + 20]
            for payload in window:
                wire.socket.send(HEADER_OUT + payload)
            for payload in window:
                assert peer.next_frame(wire.socket) == payload
    port.wait_state("waiting")


def test_a_port_ends_when_its_function_is_removed(port: PortProcess, wire: Wire) -> None:
    with front_end(port) as peer:
        traffic.both_ways(peer, wire, 100)
        try:
            remove(FIRST)  # returns when the port has let go
            port.popen.wait(10.0)
        finally:
            rescan(FIRST)
    assert port.popen.returncode not in (0, None)
    said = port.log.read_text()
    assert "is gone" in said
    assert "Traceback" not in said
