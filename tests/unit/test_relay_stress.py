"""The notify relay's C code under load and under the sanitizers; what is checked stands in relay_stress.c."""

from pathlib import Path

import pytest

from tests.harness.processes import run
from tests.harness.sanitizers import NATIVE, SANITIZERS, build

SOURCE = Path(__file__).parent / "native" / "relay_stress.c"


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_relay_stress(sanitizer: str, tmp_path: Path) -> None:
    run([build(sanitizer, tmp_path / "relay_stress", SOURCE, NATIVE / "relay.c")], seconds=60)
