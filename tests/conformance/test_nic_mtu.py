"""The MTU of an emulated NIC: told to guests, and kept to by what passes, both ways."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from datapath.virtio import Feature, bit
from tests.harness.bridged_guests import Guest, bridged
from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.front_end import VIRTIO
from tests.harness.netns import NetworkNamespace
from tests.harness.nic_engine import HEADER, RX, TX, bench, wait_for
from tests.harness.offloads import SOURCE, TARGET
from tests.harness.raw_vfio_user import COMMON_BAR, CONFIG, DEVICE_CONFIG, RawClient

MTU = 4000
ETHERNET, TAG = 14, 4
MERGED = bit(Feature.NET_F_MRG_RXBUF)

Switch = tuple[EmulatedNic, list[PortProcess]]


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Switch]:
    with bridged(tmp_path_factory.mktemp("mtu"), f"--mtu={MTU}") as running:
        yield running


def frame(size: int, *, tagged: bool = False) -> bytes:
    """A frame with a packet of so many bytes, of an EtherType for experiments."""
    tag = bytes.fromhex("81000001") if tagged else b""
    return TARGET + SOURCE + tag + bytes.fromhex("88b5") + bytes(n & 0xFF for n in range(size))


def test_the_nic_tells_its_mtu(tmp_path: Path) -> None:
    with NetworkNamespace() as network, EmulatedNic(tmp_path, network, 1, "--mtu=9000") as nic:
        assert "mtu 9000 " in network.run("ip", "link", "show", "vf0")
        assert nic.query(0)["mtu"] == 9000
        with closing(RawClient(nic.folder / "vf0.sock")) as client:
            client.write(CONFIG, 4, 2, 2)
            assert client.read(COMMON_BAR, DEVICE_CONFIG + 10, 2) == 9000


@pytest.mark.parametrize("tagged", [False, True])
def test_what_the_wire_takes_passes(switch: Switch, tagged: bool) -> None:
    _, ports = switch
    with closing(Guest(ports[0])) as sender, closing(Guest(ports[1])) as receiver:
        sender.start(VIRTIO)
        receiver.start(VIRTIO)
        sender.send_frame(frame(MTU, tagged=tagged))
        assert receiver.receive()[1] == frame(MTU, tagged=tagged)


def test_what_is_longer_does_not_leave(switch: Switch) -> None:
    nic, ports = switch
    with closing(Guest(ports[0])) as sender, closing(Guest(ports[1])) as receiver:
        sender.start(VIRTIO)
        receiver.start(VIRTIO)
        before = nic.query(0)["tx_dropped"]
        sender.send_frame(frame(MTU + TAG + 1))
        assert nic.query(0)["tx_dropped"] == before + 1
        sender.send_frame(frame(60))
        assert receiver.receive()[1] == frame(60)


@pytest.mark.parametrize("merged", [True, False])
def test_buffers_that_are_too_short(switch: Switch, merged: bool) -> None:
    """A guest gets a long frame in several buffers if it can take it so, else not at all."""
    nic, ports = switch
    with closing(Guest(ports[0])) as sender, closing(Guest(ports[1])) as receiver:
        sender.start(VIRTIO)
        receiver.start(VIRTIO | MERGED if merged else VIRTIO, buffer_size=2048)
        before = nic.query(1)["rx_dropped"]
        sender.send_frame(frame(3000))
        if merged:
            assert receiver.receive()[0].buffers == 2
        else:
            wait_for(lambda: nic.query(1)["rx_dropped"] == before + 1, "a frame that was dropped")
            sender.send_frame(frame(60))
            assert receiver.receive()[1] == frame(60)


def test_a_frame_from_the_uplink_that_is_too_long_is_dropped() -> None:
    """No TAP gives one; whoever changes its MTU behind the NIC's back does."""
    with bench(mtu=1000) as b:
        b.run()
        b.offer(4096, 4096)
        b.wire.send(bytes(1000 + ETHERNET + TAG + 1))
        wait_for(lambda: b.engine.count(RX).dropped == 1, "a dropped frame")
        b.wire.send(bytes(1000 + ETHERNET + TAG))
        assert b.rx.wait_used() == [(0, HEADER + 1000 + ETHERNET + TAG)]
        b.send(bytes(1000 + ETHERNET + TAG + 1), bytes(1000 + ETHERNET + TAG))
        assert len(b.receive_from_wire()) == 1000 + ETHERNET + TAG
        assert b.engine.count(TX).dropped == 1
