"""Ping-pong through a NIC that is not ours, behind an IOMMU, while its rings are re-routed.

A function without ring state is re-routed by a reset, which drops a frame that arrives just then: such a
frame is sent again, and there may be no more of them than resets. All else must come once and in order.
"""

import random
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from datapath.drivers.virtio_pci import open_device
from datapath.vdpa import DeviceSpec
from datapath.virtio import Feature, bit
from tests.harness.dirty_log import DirtyLog
from tests.harness.driven_vf import BASE, FEATURES, MEMORY_SIZE, DrivenVf
from tests.harness.host_pci import bound
from tests.harness.nested_hardware import FUNCTIONS
from tests.harness.pingpong import PingPong, Score
from tests.harness.wire import Wire

EVENT_IDX = bit(Feature.F_EVENT_IDX)
#: Frames to and fro with the rings left alone, and with them re-routed.
STEADY, RESTLESS = 500, 500
#: Milliseconds after which a frame counts as lost: the machine is emulated, and slow.
RETRY_MS = 5000


@pytest.fixture(scope="module", autouse=True)
def function() -> Iterator[None]:
    with bound(FUNCTIONS[0]):
        yield


@pytest.fixture
def wire() -> Iterator[Wire]:
    with closing(Wire(None, "w1")) as made:
        yield made


@pytest.fixture(params=[FEATURES, FEATURES | EVENT_IDX], ids=["flags", "event-idx"])
def features(request: pytest.FixtureRequest) -> int:
    chosen: int = request.param
    return chosen


def open_vf(start: int) -> DrivenVf:
    return DrivenVf(open_device(DeviceSpec.parse(f"virtio,pci={FUNCTIONS[0]}")), 64, start)


@pytest.mark.parametrize("start", [0, 0xFF00], ids=["direct", "shadowed"])
def test_rings_left_alone(wire: Wire, tmp_path: Path, features: int, start: int) -> None:
    with closing(open_vf(start)) as vf:
        vf.start(features)
        assert vf.device.shadowed is (start != 0)
        with PingPong(tmp_path, vf, wire.socket, STEADY, event_idx=bool(features & EVENT_IDX)) as game:
            game.popen.wait(200)
        score = game.score()
        assert (score.rounds, score.again, score.doubles) == (STEADY, 0, 0)
        relayed = vf.device.statistics()["relayed.0"]
        assert relayed >= STEADY if start else relayed == 0


def test_the_relay_comes_while_traffic_runs(wire: Wire, tmp_path: Path, features: int) -> None:
    """And a log with it, in which received frames are marked."""
    with closing(DirtyLog(BASE, MEMORY_SIZE)) as log, closing(open_vf(0)) as vf:
        vf.start(features)
        with PingPong(
            tmp_path, vf, wire.socket, STEADY, event_idx=bool(features & EVENT_IDX), retry_ms=RETRY_MS
        ) as game:
            game.wait_for("the first frames", lambda: vf.queues[0].used_index > 50, 30)
            assert not vf.device.shadowed
            vf.device.start_logging(log.bitmap)
            assert vf.device.shadowed
            game.popen.wait(200)
        judge(game.score(), resets=1)
        assert vf.queues[0].used in log.take()


def test_the_function_stops_and_starts_while_traffic_runs(wire: Wire, tmp_path: Path, features: int) -> None:
    chance, resets = random.Random(3), 0
    with closing(open_vf(0)) as vf:
        vf.start(features)
        with PingPong(
            tmp_path, vf, wire.socket, RESTLESS, event_idx=bool(features & EVENT_IDX), retry_ms=RETRY_MS
        ) as game:
            while game.running:
                with suppress(subprocess.TimeoutExpired):
                    game.popen.wait(chance.uniform(0.1, 0.5))
                vf.suspend()
                vf.start(features)
                resets += 1
    judge(game.score(), resets)
    assert resets


def judge(score: Score, resets: int) -> None:
    """What was sent again is no more than what resets can have dropped."""
    assert score.again <= resets
    assert score.doubles <= resets
