"""What pytest tells of tests that another pytest runs inside a machine, here one that is only a process.

The tests of tests/nested show that the machine itself works; how it fails can be shown without it.
"""

import sys
from pathlib import Path

import pytest

from tests.harness.guest import CHECKOUT
from tests.harness.processes import run

#: The configuration of a folder with such tests: {fate} is what becomes of the machine.
CONFTEST = """
import os
import subprocess
from pathlib import Path

from tests.harness.debian_packages import UnavailableError
from tests.harness.nested_tier import NestedTier
from tests.harness.processes import HarnessError

HERE = Path(__file__).parent

class Machine:
    inside = HERE
    exchange = HERE

    def __init__(self, command, files):
        if {fate!r} == "cannot be had":
            raise UnavailableError("no package of a kernel")
        for name, text in files.items():
            (HERE / name).write_text(text)
        self.child = subprocess.Popen(command, cwd=HERE, stdout=(HERE / "output").open("w"))
        (HERE / "pids").open("a").write(f"{{self.child.pid}}\\n")

    @property
    def status(self):
        status = self.child.poll()
        return None if status is None or status < 0 else status

    def boot(self):
        first = len((HERE / "pids").read_text().splitlines()) == 1
        if {fate!r} == "does not boot" or ({fate!r} == "boots at last" and first):
            raise HarnessError("it did not boot")

    def check(self):
        if (self.child.poll() or 0) < 0:
            raise HarnessError("it died")

    def last_words(self):
        return {{"inside": "(output)", "console": "Kernel panic"}}

    def close(self):
        self.child.kill()
        self.child.wait()

def pytest_addoption(parser):
    for name in ("--full", "--nested"):
        parser.addoption(name, action="store_true")

def pytest_configure(config):
    config.addinivalue_line("markers", "nested_seconds(seconds)")
    if not config.pluginmanager.hasplugin("tests.harness.nested_inner"):
        config.pluginmanager.register(NestedTier(config, HERE / "nested", Machine))
"""


class Folder:
    """A folder with tests that are run inside a machine, and one that is not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "nested").mkdir()
        (path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
        (path / "test_outside.py").write_text("def test_outside(): pass\n")

    def run(self, tests: str, *arguments: str, fate: str = "") -> str:
        """What pytest says of tests that are inside, with all outcomes in its summary."""
        (self.path / "conftest.py").write_text(CONFTEST.format(fate=fate))
        (self.path / "nested/test_inside.py").write_text(f"import os, time, pytest\n{tests}")
        command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *arguments]
        environment = {"PYTHONPATH": str(CHECKOUT), "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
        return run(command, cwd=self.path, env=environment, check=False).stdout

    def leaves_nothing(self) -> bool:
        """Whether no machine that was started still runs."""
        pids = (self.path / "pids").read_text().split()
        return bool(pids) and not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_every_outcome(folder: Folder) -> None:
    said = folder.run(
        """
def test_passes(): pass
@pytest.mark.parametrize("what", ["a b", "[c]", "d::e"])
def test_parameter(what): assert os.environ["PYTEST_CURRENT_TEST"]
def test_fails():
    print("said inside")
    word = "wrong"
    assert word == "right"
def test_skips(): pytest.skip("for a reason")
@pytest.mark.xfail
def test_expected(): assert False
@pytest.fixture
def broken():
    yield
    raise OSError("broken fixture")
def test_teardown(broken): pass
def test_warns():
    import warnings
    warnings.warn("of something")
"""
    )
    inside = "nested/test_inside.py"
    for outcome in (
        f"PASSED {inside}::test_passes",
        f"PASSED {inside}::test_parameter[a b]",
        f"PASSED {inside}::test_parameter[[c]]",
        f"PASSED {inside}::test_parameter[d::e]",
        f"FAILED {inside}::test_fails - AssertionError: assert 'wrong' == 'right'",
        f"SKIPPED [1] {inside}:10: for a reason",
        f"XFAIL {inside}::test_expected",
        f"ERROR {inside}::test_teardown - OSError: broken fixture",
        "PASSED test_outside.py::test_outside",
        "1 failed, 7 passed, 1 skipped, 1 xfailed, 1 warning, 1 error",
        '>       assert word == "right"',
        "Captured stdout call",
        "said inside",
        "PytestWarning: UserWarning: of something",
    ):
        assert outcome in said
    assert folder.leaves_nothing()


def test_selection(folder: Folder) -> None:
    tests = "def test_one(): pass\ndef test_two(): pass\n"
    said = folder.run(tests, "--nested", "-k", "two or outside")
    assert "1 passed, 1 deselected" in said
    assert (folder.path / "selected").read_text() == "nested/test_inside.py::test_two\n"
    assert "1 passed in" in folder.run(tests, "--nested", "nested/test_inside.py::test_one")
    assert (folder.path / "selected").read_text() == "nested/test_inside.py::test_one\n"


DIES = """
def test_before(): pass
def test_during(): os.kill(os.getpid(), 9)
def test_after(): pass
"""


def test_machine_that_dies(folder: Folder) -> None:
    said = folder.run(DIES)
    assert "FAILED nested/test_inside.py::test_during - it died" in said
    assert "ERROR nested/test_inside.py::test_after - it died when nested/test_inside.py::test_during" in said
    assert said.count("Kernel panic") == 1
    assert "1 failed, 2 passed, 1 error" in said
    assert folder.leaves_nothing()


def test_machine_that_hangs(folder: Folder) -> None:
    said = folder.run("@pytest.mark.nested_seconds(1)\ndef test_hangs(): time.sleep(1000)\n")
    assert "nothing was heard from inside the machine for 1 s" in said
    assert "1 failed, 1 passed" in said
    assert folder.leaves_nothing()


def test_machine_that_does_not_boot(folder: Folder) -> None:
    said = folder.run("def test_one(): pass\ndef test_two(): pass\n", fate="does not boot")
    assert "ERROR nested/test_inside.py::test_one - it did not boot" in said
    assert "1 passed, 2 errors" in said
    assert folder.leaves_nothing()


def test_machine_that_boots_when_tried_again(folder: Folder) -> None:
    said = folder.run("def test_one(): pass\n", fate="boots at last")
    assert "2 passed" in said
    assert folder.leaves_nothing()


def test_pytest_that_ends(folder: Folder) -> None:
    said = folder.run("def test_one(): os._exit(7)\n")
    assert "the pytest inside exited 7 without having finished this test" in said
    assert folder.leaves_nothing()


def test_machine_that_cannot_be_had(folder: Folder) -> None:
    said = folder.run("def test_one(): pass\ndef test_two(): pass\n", fate="cannot be had")
    assert "SKIPPED [2] nested/test_inside.py:1: no package of a kernel" in said
    assert "1 passed, 2 skipped" in said


def test_interrupted_session(folder: Folder) -> None:
    said = folder.run(DIES.replace("test_before(): pass", "test_before(): assert False"), "-x")
    assert "1 failed in" in said
    assert folder.leaves_nothing()
