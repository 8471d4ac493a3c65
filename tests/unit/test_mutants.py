"""What is concluded from the tests of a copy of the project, against tests of a few lines."""

import sys
from pathlib import Path

import pytest

from tests.harness.mutants import passes
from tests.harness.processes import HarnessError, wait_for
from tests.harness.procfs import running


def write(folder: Path, text: str) -> str:
    """A file of tests, and its node."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(f"import pytest, subprocess, time\n{text}\n")
    return "test_it.py"


@pytest.mark.parametrize("passing", [True, False])
def test_a_test_passes_or_fails(tmp_path: Path, passing: bool) -> None:
    node = write(tmp_path, f"def test_it():\n    assert {passing}")
    assert passes(tmp_path, node) is passing


@pytest.mark.parametrize(
    "text",
    [
        "@pytest.fixture\ndef broken():\n    raise OSError\ndef test_it(broken):\n    pass",
        "def test_it():\n    pytest.skip('nothing here')",
        "import nothing_of_that_name",
        "",
    ],
    ids=["fixture", "skipped", "import", "no test"],
)
def test_anything_else_says_nothing(tmp_path: Path, text: str) -> None:
    node = write(tmp_path, text)
    with pytest.raises(HarnessError, match=r"^test_it.py neither passed nor failed: "):
        passes(tmp_path, node)


def test_one_that_does_not_end_is_ended_with_what_it_started(tmp_path: Path) -> None:
    """Its child has a session of its own, as whatever the harness starts."""
    argv = [sys.executable, "-c", "import time; time.sleep(600)"]
    node = write(
        tmp_path,
        "def test_it():\n"
        f"    child = subprocess.Popen({argv!r}, start_new_session=True)\n"
        "    with open('pid', 'w') as file:\n"
        "        file.write(str(child.pid))\n"
        "    time.sleep(600)",
    )
    with pytest.raises(HarnessError, match=r"^test_it.py did not end within 3 s: "):
        passes(tmp_path, node, patience=3)
    pid = int((tmp_path / "pid").read_text())
    wait_for("the end of the test's child", lambda: running(pid) is None, 5)
