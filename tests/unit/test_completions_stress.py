"""The C code for completions under load and under the sanitizers; what is checked stands in the C program."""

from pathlib import Path

import pytest

from tests.harness.processes import run
from tests.harness.sanitizers import COMPLETIONS, SANITIZERS, build

PROGRAM = Path(__file__).parent / "native" / "completions_stress.c"


@pytest.mark.parametrize("sanitizer", [None, *SANITIZERS])
def test_completions_stress(sanitizer: str | None, tmp_path: Path) -> None:
    run([build(sanitizer, tmp_path / "completions_stress", PROGRAM, *COMPLETIONS)], seconds=120)
