"""The relay's C code under load and under the sanitizers; what is checked stands in the C programs."""

from pathlib import Path

import pytest

from tests.harness.processes import run
from tests.harness.sanitizers import RELAY, SANITIZERS, SHADOW, build

PROGRAMS = Path(__file__).parent / "native"


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_relay_stress(sanitizer: str, tmp_path: Path) -> None:
    run([build(sanitizer, tmp_path / "relay_stress", PROGRAMS / "relay_stress.c", *RELAY)], seconds=60)


@pytest.mark.parametrize("sanitizer", [None, *SANITIZERS])
def test_shadow_stress(sanitizer: str | None, tmp_path: Path) -> None:
    run([build(sanitizer, tmp_path / "shadow_stress", PROGRAMS / "shadow_stress.c", *RELAY)], seconds=180)


def test_shadow_barriers(tmp_path: Path) -> None:
    run([build(None, tmp_path / "shadow_litmus", PROGRAMS / "shadow_litmus.c", *SHADOW)], seconds=60)
