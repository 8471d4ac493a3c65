"""The judge of the emulated ConnectX: DPDK's own mlx5 vDPA driver, unchanged, runs on it."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from datapath.vhost_user.messages import VringArea
from tests.harness.dirty_log import PAGE
from tests.harness.dpdk_front_end import PATIENCE, PROTOCOL, WITH_NOTIFIERS, Cable, DpdkFrontEnd
from tests.harness.dpdk_vdpa import DpdkVdpa
from tests.harness.testpmd import Testpmd
from tests.harness.traffic import RX, TX

pytestmark = pytest.mark.dpdk

#: What DPDK's driver makes of a device with all but packed rings: PROTOCOL_FEATURES, ANY_LAYOUT, MQ,
#: GUEST_ANNOUNCE, ORDER_PLATFORM, LOG_ALL, MTU, HOST_TSO4, HOST_TSO6, CSUM, GUEST_CSUM and VERSION_1.
FEATURES = 0x114C60180B
PROTOCOL_FEATURES = 0x10C33
#: How many frames each queue of testpmd's is to pass at least.
FRAMES = 2000


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[DpdkVdpa]:
    with DpdkVdpa(tmp_path) as running:
        yield running


def test_probes_and_reads_what_the_device_can(peer: DpdkVdpa) -> None:
    assert peer.answer(0) == {"pairs": 8, "features": FEATURES, "protocol_features": PROTOCOL_FEATURES}
    assert peer.finish() == 0


def completed(peer: DpdkVdpa, queue: int) -> int:
    """Descriptors that a queue has completed; none before it is set up."""
    return peer.counters(queue).get("completed_descriptors", 0)


def pass_frames(peer: DpdkVdpa, folder: Path, pairs: int = 1) -> None:
    """testpmd sends a burst on each queue, and what comes back again: what is lost once is lost for ever."""
    before = [completed(peer, queue) for queue in range(2 * pairs)]
    with Testpmd(folder, peer.socket, "io", queue_pairs=pairs, options=["--tx-first"]) as front_end:

        def all_have() -> bool:
            return all(completed(peer, queue) >= before[queue] + FRAMES for queue in range(2 * pairs))

        front_end.wait_for(f"{FRAMES} frames in each queue", all_have, 60.0)
        for queue in range(2 * pairs):
            counted = peer.counters(queue)
            errors = {value for name, value in counted.items() if not name.endswith("_descriptors")}
            assert errors == {0}, counted


@pytest.mark.parametrize(
    "arguments",
    [
        "event_mode=1",
        "event_mode=2",
        pytest.param("event_mode=0,event_us=20", marks=pytest.mark.full),
        pytest.param("max_conf_threads=4", marks=pytest.mark.full),
        pytest.param("queues=1,queue_size=256", marks=pytest.mark.full),
        pytest.param("hw_latency_mode=1,hw_max_latency_us=10,hw_max_pending_comp=5", marks=pytest.mark.full),
    ],
)
def test_passes_frames(tmp_path: Path, arguments: str) -> None:
    with DpdkVdpa(tmp_path, arguments=arguments) as peer:
        peer.answer(0)
        pass_frames(peer, tmp_path)
        assert peer.finish() == 0


def test_pairs_and_a_second_life(peer: DpdkVdpa, tmp_path: Path) -> None:
    peer.answer(0)
    for pairs in (3, 2):
        pass_frames(peer, tmp_path, pairs)
    assert peer.finish() == 0


@pytest.fixture
def cable() -> Iterator[Cable]:
    with Cable() as made:
        yield made


@pytest.fixture
def guest(tmp_path: Path, cable: Cable) -> Iterator[DpdkFrontEnd]:
    """A guest whose front-end maps doorbells when it is told to, with a kick on each ring."""
    with (
        DpdkVdpa(tmp_path, cable=cable.fd) as peer,
        closing(DpdkFrontEnd.dial(peer.socket, WITH_NOTIFIERS)) as front_end,
    ):
        front_end.begin()
        front_end.offer(1)
        yield front_end


def test_a_guest_rings_the_mapped_doorbell(guest: DpdkFrontEnd, cable: Cable) -> None:
    """The driver tells of the page at each ring's first kick, and waits to be told that it is mapped."""
    areas = guest.serve(1)
    guest.transmit(1)
    areas += guest.serve(1)
    assert areas == [VringArea(index, True, PAGE, areas[0].offset) for index in (RX, TX)], "one page for all"
    assert cable.receive(1) == [1]
    cable.send(2)
    guest.receive(1)
    for number in range(10, 50, 2):
        guest.transmit(number)
        assert cable.receive(1) == [number]
        cable.send(number + 1)
        guest.offer(1)
        assert list(guest.receive(1)) == [number + 1]


def refuse(guest: DpdkFrontEnd, index: int) -> None:
    """Tell that a doorbell cannot be mapped: the driver takes it back, and asks that to be confirmed."""
    assert guest.serve(1, result=1)[0].index == index
    guest.queues[index].page = None
    assert guest.serve(1) == [VringArea(index, has_fd=False)]


def test_a_guest_that_maps_no_doorbell_kicks(guest: DpdkFrontEnd, cable: Cable) -> None:
    refuse(guest, RX)
    guest.transmit(0)
    refuse(guest, TX)
    for number in range(10):
        assert cable.receive(1) == [number]
        guest.transmit(number + 1)


def test_a_broken_ring_is_given_up(tmp_path: Path, cable: Cable) -> None:
    """The driver makes the queue again, which breaks again. The other goes on, and another guest has both."""
    with DpdkVdpa(tmp_path, cable=cable.fd) as peer:
        with closing(DpdkFrontEnd.dial(peer.socket, PROTOCOL)) as guest:
            guest.begin()
            guest.offer(10)
            guest.transmit(1)
            assert cable.receive(1) == [1]
            guest.queues[TX].publish(guest.queues[TX].size)
            guest.queues[TX].kick()
            peer.wait_for("an error", lambda: peer.counters(TX)["bad descriptor errors"] > 1, PATIENCE)
            cable.send(2, 3)
            assert list(guest.receive(2)) == [2, 3]
            assert peer.counters(RX)["bad descriptor errors"] == 0
            guest.stop()
        with closing(DpdkFrontEnd.dial(peer.socket, PROTOCOL)) as guest:
            guest.begin()
            guest.offer(10)
            guest.transmit(4)
            assert cable.receive(1) == [4]
            cable.send(5)
            assert list(guest.receive(1)) == [5]
        assert peer.finish() == 0
