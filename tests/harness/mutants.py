"""A copy of the project in which one line is missing, to see that a test misses it too."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.harness.cached import CHECKOUT
from tests.harness.processes import HarnessError, run, tail
from tests.harness.procfs import Running, all_running, running

#: What tests need of the checkout; what is compiled comes along, and is compiled anew where C changes.
PARTS = ("datapath", "hooks", "libvirt_vdpa", "tests", "xml", "pyproject.toml", "setup.cfg", "setup.py")
#: Seconds for the tests of one copy: they have deadlines of their own.
PATIENCE = 300.0
#: Seconds for tests that are broken off to end what they have started.
GRACE = 20.0


@dataclass(frozen=True)
class Mutation:
    """A change of one place in the source that tests must see."""

    #: Path in the checkout, and text that is there exactly once.
    file: str
    text: str
    #: A node for pytest, which fails when the text is replaced.
    seen_by: str
    replacement: str = ""


class ProjectCopy:
    """A copy of the project as it is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for part in PARTS:
            source = CHECKOUT / part
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, folder / part)
        (folder / ".cache").symlink_to(CHECKOUT / ".cache")

    def mutate(self, mutation: Mutation) -> None:
        """Change it.

        :raise AssertionError: when the mutation's text is not in the source just once.
        :raise HarnessError: when it does not compile then.
        """
        file = self._folder / mutation.file
        text = file.read_text()
        assert text.count(mutation.text) == 1, f"{mutation.file}: '{mutation.text}' is not there just once"
        file.write_text(text.replace(mutation.text, mutation.replacement))
        if file.suffix == ".c":
            run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=self._folder, seconds=120)

    def passes(self, node: str) -> bool:
        """Whether its tests pass; see `passes`."""
        return passes(self._folder, node)


def passes(folder: Path, node: str, patience: float = PATIENCE) -> bool:
    """Run tests in a copy of the project: whether all pass, or one fails.

    :param node: which, as pytest wants it.
    :raise HarnessError: when none of that can be said: nothing ran, something beside the test failed, such as
        a fixture, or it took longer than `patience` in seconds.
    """
    report, log = folder / "report.xml", folder / "pytest.log"
    report.unlink(missing_ok=True)
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        node,
    ]
    # Programs are the checkout's scripts; what they import is found here first.
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with log.open("wb") as output:
        tests = subprocess.Popen(
            argv, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        tests.wait(patience)
    except BaseException as error:
        _break_off(tests)
        if isinstance(error, subprocess.TimeoutExpired):
            raise HarnessError(f"{node} did not end within {patience:g} s: {tail(log)}") from None
        raise
    ran, failed = _count(report)
    if failed:
        return False
    if ran and tests.returncode == 0:
        return True
    raise HarnessError(f"{node} neither passed nor failed: {tail(log)}")


def _count(report: Path) -> tuple[int, int]:
    """How many tests have run, and how many of them have failed, by pytest's report."""
    suite = ElementTree.parse(report).find("testsuite") if report.exists() else None
    if suite is None:
        return 0, 0
    tests, skipped, failures = (int(suite.attrib[name]) for name in ("tests", "skipped", "failures"))
    return tests - skipped, failures


def _break_off(tests: "subprocess.Popen[bytes]") -> None:
    """End tests with what they have started, of which much has a session of its own."""
    started = _below(tests.pid)
    os.killpg(tests.pid, signal.SIGINT)  # they end it themselves, if they can
    try:
        tests.wait(GRACE)
    except subprocess.TimeoutExpired:
        started |= _below(tests.pid)
        os.killpg(tests.pid, signal.SIGKILL)
        tests.wait()
    for pid, start_time in started:
        found = running(pid)
        if found is not None and found.start_time == start_time:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _below(pid: int) -> set[tuple[int, int]]:
    """The descendants of a process: pid and time of start."""
    children: dict[int, list[Running]] = {}
    for process in all_running():
        children.setdefault(process.parent, []).append(process)
    found: set[tuple[int, int]] = set()
    ahead = [pid]
    while ahead:
        for child in children.get(ahead.pop(), ()):
            found.add((child.pid, child.start_time))
            ahead.append(child.pid)
    return found
