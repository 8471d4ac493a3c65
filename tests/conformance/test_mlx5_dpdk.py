"""The judge of the emulated ConnectX: DPDK's own mlx5 vDPA driver, unchanged, runs on it."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness.dpdk_vdpa import DpdkVdpa
from tests.harness.processes import HarnessError
from tests.harness.testpmd import Testpmd

pytestmark = pytest.mark.dpdk

#: What DPDK's driver makes of a device with all but packed rings: PROTOCOL_FEATURES, ANY_LAYOUT, MQ,
#: GUEST_ANNOUNCE, ORDER_PLATFORM, LOG_ALL, MTU, HOST_TSO4, HOST_TSO6, CSUM, GUEST_CSUM and VERSION_1.
FEATURES = 0x114C60180B
PROTOCOL_FEATURES = 0x10C33
#: Frames that testpmd has on their way at a time, and how many each queue is to pass at least.
BURST = 32
FRAMES = 2000
#: Commands until a device is probed, which of them the driver tries again (they take the doorbell page and
#: the UAR), and those until a first front-end has come and gone.
PROBING = 8
TRIED_AGAIN = {4, 8}
LAST_OF_A_LIFE = 80
#: That which registers guest memory: when it fails, DPDK 22.11's driver reads a NULL region's key and dies.
KILLS_THE_DRIVER = 9
#: Seconds after which a front-end will see no frame any more.
PATIENCE = 3.0


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


@pytest.mark.parametrize("number", range(1, PROBING + 1))
def test_a_command_fails_while_it_probes(tmp_path: Path, number: int) -> None:
    """The driver says so and ends, or tries again."""
    with DpdkVdpa(tmp_path, options={"latency_us": 0, "fail": number}) as peer:
        with suppress(HarnessError):
            peer.answer(0)
        assert peer.finish() == (0 if peer.answers() else 1)
        assert bool(peer.answers()) == (number in TRIED_AGAIN)


@pytest.mark.full
@pytest.mark.parametrize("number", sorted({*range(PROBING + 1, LAST_OF_A_LIFE + 1)} - {KILLS_THE_DRIVER}))
def test_a_command_fails_later(tmp_path: Path, number: int) -> None:
    """Whether frames pass or not, it lives, and takes the next front-end, whose commands all succeed."""
    with DpdkVdpa(tmp_path, options={"latency_us": 0, "fail": number}) as peer:
        peer.answer(0)
        with (
            suppress(HarnessError),
            Testpmd(tmp_path, peer.socket, "io", options=["--tx-first"]) as front_end,
        ):
            front_end.wait_for("a frame", lambda: completed(peer, 1) >= BURST, PATIENCE)
        pass_frames(peer, tmp_path)
        assert peer.finish() == 0
