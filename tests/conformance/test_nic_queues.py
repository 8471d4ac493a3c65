"""Several queue pairs of an emulated NIC: flows spread over them, and each stays where its guest sends it."""

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from datapath.vhost_user.backend import F_LOG_ALL, F_PROTOCOL_FEATURES
from datapath.vhost_user.messages import LogArea, Request, VringState
from datapath.virtio import NET_HEADER_SIZE, Feature, bit
from tests.harness.connectx import ConnectX
from tests.harness.dirty_log import PAGE
from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.front_end import BUFFERS, MEMORY_SIZE, VIRTIO, SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.offloads import PORTS, SOURCE, TARGET, UDP, IpPacket, payload_of
from tests.harness.processes import wait_for
from tests.harness.raw_vfio_user import (
    COMMON_BAR,
    DEVICE_CONFIG,
    LM_BAR,
    MSIX,
    RX_DATA,
    TX_DATA,
    RawClient,
    RawDriver,
)
from tests.harness.virtqueue import Buffer, Virtqueue

PAIRS = 4
MQ = VIRTIO | bit(Feature.NET_F_MQ)
CTRL_VQ = bit(Feature.NET_F_CTRL_VQ)
MQ_AND_CTRL_VQ = bit(Feature.NET_F_MQ) | CTRL_VQ
FLOWS = range(24)
BUFFERS_EACH = 48
BUFFER_SIZE = 2048
LOG_SIZE = MEMORY_SIZE // PAGE // 8


def rx(pair: int) -> int:
    return 2 * pair


def tx(pair: int) -> int:
    return 2 * pair + 1


def incoming(flow: int, number: int = 0) -> bytes:
    """A UDP frame to the guest."""
    return IpPacket(4, UDP, struct.pack(">I", number), ports=(PORTS[0] + flow, PORTS[1])).frame


def outgoing(flow: int) -> bytes:
    """A frame of the same flow from the guest: addresses and ports are the other way round."""
    frame = IpPacket(4, UDP, b"out", ports=(PORTS[1], PORTS[0] + flow)).frame
    return SOURCE + TARGET + frame[12:26] + frame[30:34] + frame[26:30] + frame[34:]


class Guest(SocketFrontEnd):
    """A guest with four queue pairs."""

    pairs = PAIRS

    def run(self, features: int = MQ) -> None:
        """Start all rings, with buffers to receive into."""
        self.connect()
        self.start(features)
        for pair in range(PAIRS):
            for number in range(BUFFERS_EACH):
                self._offer(pair, number)
            self.queues[rx(pair)].kick()

    def use_pairs(self, pairs: int) -> None:
        """What QEMU says when the guest changes the number of its queues."""
        for pair in range(PAIRS):
            for index in (rx(pair), tx(pair)):
                self.tell(Request.SET_VRING_ENABLE, VringState(index, int(pair < pairs)))
        self.settle()

    def transmit(self, pair: int, flow: int) -> None:
        """Send a frame of a flow from one queue."""
        data = bytes(NET_HEADER_SIZE) + outgoing(flow)
        at = BUFFERS + BUFFER_SIZE * (BUFFERS_EACH * PAIRS + pair)
        self.memory.write(at, data)
        self.queues[tx(pair)].add(Buffer(at, len(data)))
        self.queues[tx(pair)].kick()
        self.queues[tx(pair)].wait_used()

    def receive(self) -> list[tuple[int, int, int]]:
        """What has come by now: flow, number, and the pair that it came in."""
        came = []
        for pair in range(PAIRS):
            queue = self.queues[rx(pair)]
            for head, length in queue.collect():
                place = queue.descriptors + 16 * head
                at = int.from_bytes(self.memory.read(place, 8), "little")
                frame = self.memory.read(at, length)[NET_HEADER_SIZE:]
                if frame.startswith(TARGET + SOURCE):
                    (port,) = struct.unpack_from(">H", frame, 34)
                    came.append((port - PORTS[0], int.from_bytes(payload_of(frame)[:4], "big"), pair))
                self._offer(pair, (at - BUFFERS) // BUFFER_SIZE % BUFFERS_EACH)
            queue.kick()
        return came

    def _offer(self, pair: int, number: int) -> None:
        at = BUFFERS + BUFFER_SIZE * (BUFFERS_EACH * pair + number)
        self.queues[rx(pair)].add(Buffer(at, BUFFER_SIZE, writable=True))


@pytest.fixture(scope="module")
def nic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedNic]:
    with (
        NetworkNamespace() as network,
        EmulatedNic(tmp_path_factory.mktemp("nic"), network, 1, f"--queue-pairs={PAIRS}") as running,
    ):
        yield running


@pytest.fixture
def card(network: NetworkNamespace, tmp_path: Path) -> ConnectX:
    return ConnectX(tmp_path / "card", network, pairs=PAIRS)


@pytest.fixture
def port(nic: EmulatedNic, tmp_path: Path) -> Iterator[PortProcess]:
    with PortProcess(tmp_path, nic.device(0), "--log-mode=software") as running:
        yield running


@pytest.fixture
def guest(port: PortProcess) -> Iterator[Guest]:
    with closing(Guest.dial(port.socket)) as peer:
        yield peer


def uses(nic: EmulatedNic, pairs: int) -> bool:
    """Whether the VF receives in so many pairs."""
    return bool(nic.query(0)["queue_pairs_in_use"] == pairs)


def pairs_of_flows(network: NetworkNamespace, guest: Guest) -> dict[int, int]:
    """Let a frame of each flow come; which pair each came in."""
    came: dict[int, int] = {}

    def look() -> bool:
        came.update({flow: pair for flow, _, pair in guest.receive()})
        return len(came) == len(FLOWS)

    with network.packet_socket("vf0") as wire:
        for flow in FLOWS:
            wire.send(incoming(flow))
        wait_for("a frame of each flow", look, 5)
    return came


def test_flows_spread_over_the_queues(nic: EmulatedNic, port: PortProcess, guest: Guest) -> None:
    assert port.status()["queue_pairs"] == nic.query(0)["queue_pairs"] == PAIRS
    guest.run()
    assert set(pairs_of_flows(nic.namespace, guest).values()) == set(range(PAIRS))


def test_a_flow_comes_where_the_guest_sends_it(nic: EmulatedNic, guest: Guest) -> None:
    guest.run()
    for shift in (0, 1, 3):
        for flow in FLOWS:
            guest.transmit((flow + shift) % PAIRS, flow)
        assert pairs_of_flows(nic.namespace, guest) == {flow: (flow + shift) % PAIRS for flow in FLOWS}


def test_the_number_of_queues_changes_while_running(nic: EmulatedNic, guest: Guest) -> None:
    """Flows move to the queues that are left, whatever queue they had; later they spread again."""
    guest.run()
    for flow in FLOWS:
        guest.transmit(flow % PAIRS, flow)
    for pairs in (2, 1, 3, PAIRS):
        guest.use_pairs(pairs)
        # The word of it is under way; frames in a queue that goes out of use are lost.
        wait_for("the NIC to hear of it", partial(uses, nic, pairs), 5)
        assert set(pairs_of_flows(nic.namespace, guest).values()) <= set(range(pairs))
        for flow in FLOWS:
            guest.transmit(flow % pairs, flow)
        assert pairs_of_flows(nic.namespace, guest) == {flow: flow % pairs for flow in FLOWS}


def test_without_the_feature_there_is_one_pair(nic: EmulatedNic, guest: Guest) -> None:
    guest.run(VIRTIO)
    for flow in FLOWS:
        guest.transmit(flow % PAIRS, flow)
    assert set(pairs_of_flows(nic.namespace, guest).values()) == {0}


def test_frames_wait_while_rings_are_routed_anew(nic: EmulatedNic, port: PortProcess, guest: Guest) -> None:
    """All rings stop and start when the relay begins to log, and ends: nothing that comes is lost."""
    guest.run()
    for pair in range(PAIRS):
        guest.transmit(pair, pair)
    log = os.memfd_create("log")
    os.ftruncate(log, LOG_SIZE)
    done = threading.Event()
    sent = [0]

    def send() -> None:
        with nic.namespace.packet_socket("vf0") as wire:
            while not done.wait(0.0005):
                wire.send(incoming(sent[0] % PAIRS, sent[0]))
                sent[0] += 1

    sender = threading.Thread(target=send)
    sender.start()
    came: list[int] = []
    try:
        for turn in range(6):
            logged = turn % 2 == 0
            if logged:
                guest.tell(Request.SET_LOG_BASE, LogArea(LOG_SIZE, 0), log)
            guest.tell(Request.SET_FEATURES, MQ | F_PROTOCOL_FEATURES | (F_LOG_ALL if logged else 0))
            for index in guest.indices:
                guest.tell(Request.SET_VRING_ADDR, guest.address(index, flags=int(logged)))
            guest.settle()
            assert port.status()["shadowed"] is logged
            came += [number for _, number, _ in guest.receive()]
    finally:
        done.set()
        sender.join()
        os.close(log)

    def all_came() -> bool:
        came.extend(number for _, number, _ in guest.receive())
        return len(came) >= sent[0]

    wait_for("all frames", all_came, 5)
    assert sorted(came) == list(range(sent[0]))
    assert sent[0] > PAIRS


def numbers_in_use(port: PortProcess) -> list[int]:
    """The rings of a port that run."""
    return [ring["index"] for ring in port.status()["rings"] if ring["running"]]


def spread(card: ConnectX, guest: Guest) -> set[int]:
    """The pairs in which frames of all flows come."""
    assert card.namespace is not None
    return set(pairs_of_flows(card.namespace, guest).values())


def test_flows_spread_over_the_queues_of_a_connectx(card: ConnectX, tmp_path: Path) -> None:
    """Over those that the guest uses, while it runs."""
    with card.port(tmp_path) as port, closing(Guest.dial(port.socket)) as guest:
        assert port.status()["queue_pairs"] == PAIRS
        guest.run()
        assert spread(card, guest) == set(range(PAIRS))
        for pairs in (2, 1, 3, PAIRS):
            guest.use_pairs(pairs)
            # Rings that have sent go on to send what is left.
            receiving = [index for index in numbers_in_use(port) if index % 2 == 0]
            assert receiving == [rx(pair) for pair in range(pairs)]
            assert spread(card, guest) == set(range(pairs))


def test_without_the_feature_a_connectx_has_one_pair(card: ConnectX, tmp_path: Path) -> None:
    with card.port(tmp_path) as port, closing(Guest.dial(port.socket)) as guest:
        guest.run(VIRTIO)
        assert spread(card, guest) == {0}


def test_a_nic_with_one_pair_offers_no_more(tmp_path: Path) -> None:
    with (
        NetworkNamespace() as network,
        EmulatedNic(tmp_path, network, 1) as single,
        PortProcess(tmp_path, single.device(0)) as port,
        closing(SocketFrontEnd.dial(port.socket)) as peer,
    ):
        peer.connect()
        assert not peer.tell(Request.GET_FEATURES) & bit(Feature.NET_F_MQ)
        assert peer.tell(Request.GET_QUEUE_NUM) == 1


@pytest.mark.parametrize(
    ("driver", "offered", "pairs"), [("ifcvf", MQ_AND_CTRL_VQ, PAIRS), ("virtio", CTRL_VQ, 1)]
)
def test_several_pairs_are_offered_with_a_control_queue_alone(
    nic: EmulatedNic, tmp_path: Path, driver: str, offered: int, pairs: int
) -> None:
    """MQ needs CTRL_VQ (section 5.1.3.1): the VF has none, the front-end has."""
    with (
        PortProcess(tmp_path, nic.device(0, driver)) as port,
        closing(SocketFrontEnd.dial(port.socket)) as peer,
    ):
        peer.connect()
        assert peer.tell(Request.GET_FEATURES) & MQ_AND_CTRL_VQ == offered
        assert peer.tell(Request.GET_QUEUE_NUM) == pairs


@pytest.mark.parametrize("doorbell", ["eventfd", "mapped"])
def test_the_raw_device_has_as_many_queues(tmp_path: Path, doorbell: str) -> None:
    """Driven by messages, doorbells and registers alone: the last pair sends and receives like the first."""
    options = (f"--queue-pairs={PAIRS}", f"--doorbell={doorbell}")
    with (
        NetworkNamespace() as network,
        EmulatedNic(tmp_path, network, 1, *options) as running,
        closing(RawDriver(RawClient(running.folder / "vf0.sock"))) as driver,
        network.packet_socket("vf0") as wire,
    ):
        driver.start(1 << 32 | bit(Feature.NET_F_MQ))
        assert driver.client.read(COMMON_BAR, 0x12, 2) == 2 * PAIRS + 1
        assert driver.client.read(COMMON_BAR, DEVICE_CONFIG + 8, 2) == PAIRS
        last = [Virtqueue(driver.memory, 0x30000 + 0x10000 * n) for n in (0, 1)]
        calls = tuple(queue.call_fd for queue in last)
        driver.client.set_irqs(0x24, MSIX, 1 + rx(PAIRS - 1), 2, calls)
        for index, queue in zip((rx(PAIRS - 1), tx(PAIRS - 1)), last, strict=True):
            driver.enable(index, queue)
        driver.client.write(LM_BAR, 0x28, 4, PAIRS)
        driver.memory.write(TX_DATA, bytes(NET_HEADER_SIZE) + outgoing(1))
        last[1].add(Buffer(TX_DATA, NET_HEADER_SIZE + len(outgoing(1))))
        driver.kick(tx(PAIRS - 1))
        last[1].wait_used()
        last[0].add(Buffer(RX_DATA, BUFFER_SIZE, writable=True))
        driver.kick(rx(PAIRS - 1))
        wire.send(incoming(1))
        ((_, length),) = last[0].wait_used()
        assert driver.memory.read(RX_DATA, length)[NET_HEADER_SIZE:] == incoming(1)
        driver.client.write(COMMON_BAR, 0x16, 2, tx(PAIRS - 1))
        driver.client.write(COMMON_BAR, 0x1C, 2, 0)
        assert driver.client.read(LM_BAR, 0x20 + 0x40 * (PAIRS - 1) + 4, 4) == 1 << 16 | 1
        for queue in last:
            queue.close()
