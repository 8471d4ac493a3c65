"""The judge of the emulated ConnectX: DPDK's own mlx5 vDPA driver, unchanged, runs on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.dpdk_vdpa import DpdkVdpa
from tests.harness.testpmd import Testpmd

pytestmark = pytest.mark.dpdk

#: What DPDK's driver makes of a device with all but packed rings: PROTOCOL_FEATURES, ANY_LAYOUT, MQ,
#: GUEST_ANNOUNCE, ORDER_PLATFORM, LOG_ALL, MTU, HOST_TSO4, HOST_TSO6, CSUM, GUEST_CSUM and VERSION_1.
FEATURES = 0x114C60180B
PROTOCOL_FEATURES = 0x10C33
#: Frames that testpmd has on their way at a time, and how many are to come back at least.
BURST = 32
FRAMES = 2000


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[DpdkVdpa]:
    with DpdkVdpa(tmp_path) as running:
        yield running


def test_probes_and_reads_what_the_device_can(peer: DpdkVdpa) -> None:
    assert peer.answer(0) == {"pairs": 8, "features": FEATURES, "protocol_features": PROTOCOL_FEATURES}
    assert peer.finish() == 0


@pytest.mark.parametrize("event_mode", [1, 2])
def test_passes_frames(tmp_path: Path, event_mode: int) -> None:
    """testpmd sends a burst and whatever comes back again, and again: what is lost once is lost for ever."""
    with DpdkVdpa(tmp_path, arguments=f"event_mode={event_mode}") as peer:
        peer.answer(0)
        with Testpmd(tmp_path, peer.socket, "io", options=["--tx-first"]) as front_end:

            def received() -> int:
                return peer.counters(0).get("completed_descriptors", 0)

            front_end.wait_for(f"{FRAMES} frames", lambda: received() >= FRAMES, 60.0)
            sent = peer.counters(1)
            assert sent["completed_descriptors"] >= FRAMES
            assert {value for name, value in sent.items() if not name.endswith("_descriptors")} == {0}
        assert peer.finish() == 0
