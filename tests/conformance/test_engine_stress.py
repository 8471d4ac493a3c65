"""The packet engine under a fast driver and the sanitizers; what is checked stands in engine_stress.c."""

from pathlib import Path

import pytest

from tests.harness.processes import run
from tests.harness.sanitizers import NATIVE, SANITIZERS, build

SOURCE = Path(__file__).parent / "native" / "engine_stress.c"
NAMES = (
    "guard",
    "interrupt",
    "dma",
    "ring",
    "packed",
    "offload",
    "packets",
    "filter",
    "echo",
    "worker",
    "engine",
)
UNITS = [NATIVE / f"{unit}.c" for unit in NAMES]


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("event_idx", [0, 1])
def test_engine_stress(sanitizer: str, event_idx: int, tmp_path: Path) -> None:
    run([build(sanitizer, tmp_path / "engine_stress", SOURCE, *UNITS), str(event_idx)], seconds=60)


@pytest.mark.parametrize(
    "sanitizer", ["address", *(pytest.param(other, marks=pytest.mark.full) for other in (None, "thread"))]
)
def test_echo_stress(sanitizer: str | None, tmp_path: Path) -> None:
    run([build(sanitizer, tmp_path / "echo_stress", SOURCE, *UNITS), "0", "echo"], seconds=120)
