"""Host notifiers: a guest that writes to the VF's own doorbell, past the port."""

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from datapath.vhost_user.backend import F_LOG_ALL, F_PROTOCOL_FEATURES, NOTIFIER_FEATURES
from datapath.vhost_user.messages import LogArea, ProtocolFeature, Request, VringArea, VringState
from datapath.virtio import bit
from tests.harness.dirty_log import PAGE
from tests.harness.emulated_nic import BIN, EmulatedNic, PortProcess, ask
from tests.harness.front_end import MEMORY_SIZE, VIRTIO, SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.notifier_front_end import WITH_NOTIFIERS, NotifierFrontEnd
from tests.harness.processes import run, wait_for
from tests.harness.traffic import RX, TX, both_ways, offer_buffers
from tests.harness.wire import Wire

LOG_SIZE = MEMORY_SIZE // PAGE // 8


@pytest.fixture(scope="module")
def nic(network: NetworkNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedNic]:
    """A NIC whose doorbells are pages."""
    with EmulatedNic(tmp_path_factory.mktemp("nic"), network, 1, "--keep", "--doorbell=mapped") as running:
        yield running


@pytest.fixture
def driver() -> str:
    """Which driver the port has; tests may want others."""
    return "ifcvf"


@pytest.fixture
def log_mode() -> str:
    """Who marks what the VF writes."""
    return "software"


@pytest.fixture
def port(nic: EmulatedNic, tmp_path: Path, driver: str, log_mode: str) -> Iterator[PortProcess]:
    options = ("--host-notifiers=on", f"--log-mode={log_mode}")
    with PortProcess(tmp_path, nic.device(0, driver), *options) as running:
        yield running


@pytest.fixture
def idle(port: PortProcess) -> Iterator[NotifierFrontEnd]:
    """A front-end whose rings have been started, and which has not looked at its back channel."""
    with closing(NotifierFrontEnd.dial(port.socket, WITH_NOTIFIERS)) as peer:
        peer.connect()
        peer.start()
        yield peer


@pytest.fixture
def guest(port: PortProcess, idle: NotifierFrontEnd) -> NotifierFrontEnd:
    """A front-end that has mapped its doorbells, as the port knows."""
    assert [(area.index, area.has_fd, area.size) for area in idle.serve(2)] == [
        (0, True, PAGE),
        (1, True, PAGE),
    ]
    wait_given(port, [True, True])
    return idle


def given(port: PortProcess) -> list[bool]:
    """Of each ring, whether the port knows that the guest writes to the VF's doorbell."""
    return [ring["host_notifier"] for ring in port.status()["rings"]]


def wait_given(port: PortProcess, wanted: list[bool]) -> None:
    wait_for(f"host notifiers {wanted}", lambda: given(port) == wanted, 5)


def kicks(port: PortProcess) -> dict[str, int]:
    """Kicks that the relay has seen."""
    return {name: n for name, n in ask(port.control, "query-stats").items() if name.startswith("kicks.")}


def switch_logging(peer: SocketFrontEnd, on: bool) -> None:
    """As QEMU does when a running guest begins to move, or is not to move any more."""
    if on:
        log = os.memfd_create("log")
        os.ftruncate(log, LOG_SIZE)
        peer.tell(Request.SET_LOG_BASE, LogArea(LOG_SIZE, 0), log)
        os.close(log)
    peer.tell(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES | (F_LOG_ALL if on else 0))
    for index in (RX, TX):
        peer.tell(Request.SET_VRING_ADDR, peer.address(index, flags=int(on)))
    peer.settle()


def taken_back(*indices: int) -> list[VringArea]:
    return [VringArea(index, has_fd=False) for index in indices]


@pytest.mark.parametrize("driver", ["ifcvf", "virtio"])
def test_a_kick_goes_to_the_page(
    guest: NotifierFrontEnd, port: PortProcess, nic: EmulatedNic, wire: Wire
) -> None:
    before, rung = kicks(port), nic.query(0)["kicks"]
    offer_buffers(guest)
    for turn in range(3):
        both_ways(guest, wire, 100 + 10 * turn)
    assert kicks(port) == before, "nothing for the relay"
    assert nic.query(0)["kicks"] > rung
    assert port.status()["shadowed"] is False


@pytest.mark.parametrize(
    "missing",
    [
        ProtocolFeature.HOST_NOTIFIER,
        pytest.param(ProtocolFeature.BACKEND_SEND_FD, marks=pytest.mark.full),
        pytest.param(ProtocolFeature.REPLY_ACK, marks=pytest.mark.full),
    ],
)
def test_without_the_bit_the_relay_works(port: PortProcess, wire: Wire, missing: ProtocolFeature) -> None:
    protocol = WITH_NOTIFIERS & ~bit(missing)
    with closing(NotifierFrontEnd.dial(port.socket, protocol)) as peer:
        peer.connect()
        peer.start()
        offer_buffers(peer)
        before = kicks(port)["kicks.1"]
        both_ways(peer, wire, 200)
        assert kicks(port)["kicks.1"] > before
        peer.channel.settimeout(1.5)
        with pytest.raises(TimeoutError):
            peer.take_area()
        assert given(port) == [False, False]


def test_rings_that_are_relayed_are_kicked_at_the_relay(
    guest: NotifierFrontEnd, port: PortProcess, wire: Wire
) -> None:
    offer_buffers(guest, 32)
    for turn in range(2):
        switch_logging(guest, True)
        assert port.status()["shadowed"]
        assert given(port) == [False, False]
        # Still mapped, as the front-end has not looked: the VF is told what the relay should be.
        assert all(queue.page for queue in guest.queues)
        both_ways(guest, wire, 300 + 100 * turn)
        assert guest.serve(2) == taken_back(RX, TX)
        both_ways(guest, wire, 320 + 100 * turn)
        switch_logging(guest, False)
        assert [area.has_fd for area in guest.serve(2)] == [True, True]
        wait_given(port, [True, True])
        before = kicks(port)
        both_ways(guest, wire, 340 + 100 * turn)
        assert kicks(port) == before
    assert port.log_lines()[1:] == []


@pytest.mark.full
@pytest.mark.parametrize("log_mode", ["hardware"])
def test_rings_that_the_vf_logs_are_kicked_at_the_relay(
    guest: NotifierFrontEnd, port: PortProcess, wire: Wire
) -> None:
    """A page that is mapped would keep a killed port's VF going, when its guest is about to leave."""
    offer_buffers(guest, 8)
    switch_logging(guest, True)
    assert guest.serve(2) == taken_back(RX, TX)
    assert port.status()["shadowed"] is False
    before = kicks(port)["kicks.1"]
    both_ways(guest, wire, 300)
    assert kicks(port)["kicks.1"] > before
    switch_logging(guest, False)
    assert [area.has_fd for area in guest.serve(2)] == [True, True]


@pytest.mark.full
def test_a_ring_that_stops_is_taken_back(guest: NotifierFrontEnd, port: PortProcess, wire: Wire) -> None:
    guest.tell(Request.SET_VRING_ENABLE, VringState(RX, 0))
    assert guest.serve(2) == taken_back(RX, TX)
    assert guest.serve(1)[0].index == TX
    guest.tell(Request.SET_VRING_ENABLE, VringState(RX, 1))
    assert guest.serve(1) == taken_back(TX)
    assert [area.has_fd for area in guest.serve(2)] == [True, True]
    guest.stop()
    assert guest.serve(2) == taken_back(RX, TX)
    guest.start(share=False)
    assert [area.has_fd for area in guest.serve(2)] == [True, True]
    offer_buffers(guest)
    both_ways(guest, wire, 400)


@pytest.mark.full
def test_a_vf_that_is_lost_is_taken_back(tmp_path: Path) -> None:
    with (
        NetworkNamespace() as network,
        EmulatedNic(tmp_path / "nic", network, 1, "--doorbell=mapped") as nic,
        PortProcess(tmp_path, nic.device(0), "--host-notifiers=auto") as port,
        closing(NotifierFrontEnd.dial(port.socket, WITH_NOTIFIERS)) as peer,
    ):
        peer.connect()
        peer.start()
        peer.serve(2)
        wait_given(port, [True, True])
        nic.kill()
        assert [peer.take_area() for _ in range(2)] == taken_back(RX, TX)
        assert peer.ended()
        wait_for("the port's end", lambda: not port.running, 10)


def test_who_refuses_is_not_asked_again(port: PortProcess, idle: NotifierFrontEnd, wire: Wire) -> None:
    """QEMU without page-per-vq: a second request would have it write to memory that it has freed."""
    lines = len(port.log_lines())
    for _ in range(2):
        area = idle.take_area()
        idle.queues[area.index].page = None
    idle.answer(1)
    idle.answer(1)
    said = wait_for("a line about that", lambda: port.log_lines()[lines:], 5)
    assert [line.partition(": port: ")[2] for line in said or []] == [
        "the front-end takes no host notifiers, kicks go through the relay:"
        " its NIC needs page_per_vq for that"
    ]
    offer_buffers(idle)
    both_ways(idle, wire, 500)
    idle.stop()
    idle.start(share=False)
    idle.channel.settimeout(1.5)
    with pytest.raises(TimeoutError):
        idle.take_area()
    idle.socket.shutdown(socket.SHUT_RDWR)
    port.wait_state("waiting")
    with closing(SocketFrontEnd.dial(port.socket)) as again:
        assert not again.tell(Request.GET_PROTOCOL_FEATURES) & NOTIFIER_FEATURES


@pytest.mark.full
def test_who_never_answers_is_told_of(port: PortProcess, idle: NotifierFrontEnd, wire: Wire) -> None:
    """It may have mapped the pages or not, so kicks that reach the relay count, and so do those in a page."""
    areas = [idle.take_area() for _ in range(2)]
    assert [area.has_fd for area in areas] == [True, True]
    offer_buffers(idle, 32)
    both_ways(idle, wire, 600)
    lines = wait_for("a line about that", lambda: port.log_lines()[1:], 10)
    assert [line.rpartition(": ")[2] for line in lines or []] == ["it has not answered within 5 s"]
    switch_logging(idle, True)
    both_ways(idle, wire, 620)
    for queue in idle.queues:
        queue.page = None
    both_ways(idle, wire, 640)


def test_a_device_without_pages(tmp_path: Path) -> None:
    with NetworkNamespace() as network, EmulatedNic(tmp_path / "nic", network, 1) as nic:
        command: list[str | Path] = [
            BIN / "virt-vdpa-port",
            f"--device={nic.device(0)}",
            f"--socket-path={tmp_path}/p.sock",
        ]
        ended = run([*command, "--host-notifiers=on"], check=False)
        assert ended.returncode == 1
        assert ended.stderr.count("\n") == 1
        assert "its doorbells have no mappable pages of their own" in ended.stderr
        with (
            PortProcess(tmp_path, nic.device(0), "--host-notifiers=auto") as port,
            closing(SocketFrontEnd.dial(port.socket)) as peer,
        ):
            assert not peer.tell(Request.GET_PROTOCOL_FEATURES) & NOTIFIER_FEATURES
