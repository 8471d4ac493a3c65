"""The relay's C code under load and under the sanitizers; what is checked stands in the C programs."""

from pathlib import Path

import pytest

from tests.harness.processes import run
from tests.harness.sanitizers import NATIVE, SANITIZERS, build

PROGRAMS = Path(__file__).parent / "native"
RELAY = [NATIVE / f"{unit}.c" for unit in ("relay", "forwarder", "shadow", "written", "log", "dma", "guard")]


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_relay_stress(sanitizer: str, tmp_path: Path) -> None:
    run([build(sanitizer, tmp_path / "relay_stress", PROGRAMS / "relay_stress.c", *RELAY)], seconds=60)
