"""The tests of tests/nested as a tier: collected here, run by one pytest in a nested machine, replayed here.

Owns the machine of a pytest session: it boots at the first of these tests, gets all that are selected, and is
gone after the last. As each is due here, what the pytest inside has reported of it becomes this one's report.
What cannot be had (no kernel package) skips them; a machine that does not boot, dies or hangs fails each.
"""

import ast
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import pytest

from tests.harness import nested_inner
from tests.harness.debian_packages import UnavailableError
from tests.harness.nested_machine import NestedMachine
from tests.harness.processes import POLL_INTERVAL, HarnessError

FOLDER = Path(__file__).resolve().parents[1] / "nested"

#: Seconds that a test may take inside, unless its marker `nested_seconds` says otherwise.
TEST_TIME = 300.0
#: Seconds from then on which the pytest inside says where it hangs.
TRACE_TIME = 240.0

When = Literal["setup", "call", "teardown"]


class Machine(Protocol):
    """What the tier needs of a `NestedMachine`, which says what these are."""

    inside: ClassVar[Path]
    exchange: Path

    def __init__(self, command: Sequence[str], files: Mapping[str, str]) -> None: ...
    @property
    def status(self) -> int | None: ...
    def boot(self) -> None: ...
    def check(self) -> None: ...
    def last_words(self) -> dict[str, str]: ...
    def close(self) -> None: ...


class InnerRun:
    """A machine that runs some tests, and what it has reported of them so far."""

    def __init__(self, machine: type[Machine], nodeids: Sequence[str], arguments: Sequence[str]) -> None:
        """
        Start it.

        :raise HarnessError: when the machine's image cannot be had.
        """
        command = nested_inner.command(sys.executable, machine.inside, arguments)
        selected = "".join(f"{nodeid}\n" for nodeid in nodeids)
        self._machine = machine(command, {nested_inner.SELECTED: selected})
        self._lines = b""
        self._read = 0
        self._reports: dict[str, list[dict[str, Any]]] = {}
        self._finished: set[str] = set()
        #: Text, file, line and test of warnings inside that nobody has taken yet.
        self.warnings: list[tuple[str, str, int, str]] = []
        #: When it last told something, by the monotonic clock.
        self._heard = time.monotonic()

    def boot(self) -> None:
        """
        :raise HarnessError: when the machine does not boot.
        """
        self._machine.boot()
        self._heard = time.monotonic()

    def reports(self, nodeid: str, seconds: float) -> Iterator[dict[str, Any]]:
        """What was reported of a test, as it comes.

        :param seconds: how long it may be silent.
        :raise HarnessError: when the machine ends before the test does, or hangs.
        """
        while True:
            # In this order, so that what it said before it ended is not missed.
            ended = self._machine.status
            self._listen()
            yield from self._reports.pop(nodeid, ())
            if nodeid in self._finished:
                return
            self._machine.check()
            if ended is not None:
                raise HarnessError(f"the pytest inside exited {ended} without having finished this test")
            if time.monotonic() > self._heard + seconds:
                raise HarnessError(f"nothing was heard from inside the machine for {seconds:g} s")
            time.sleep(POLL_INTERVAL)

    def _listen(self) -> None:
        file = self._machine.exchange / nested_inner.REPORTS
        if not file.exists():
            return
        with file.open("rb") as lines:
            lines.seek(self._read)
            new = lines.read()
        self._read += len(new)
        *whole, self._lines = (self._lines + new).split(b"\n")
        for line in whole:
            self._heard = time.monotonic()
            kind, what = ast.literal_eval(line.decode())
            if kind == "report":
                self._reports.setdefault(what["nodeid"], []).append(what)
            elif kind == "finish":
                self._finished.add(what)
            elif kind == "warning":
                self.warnings.append(what)

    def last_words(self) -> list[tuple[str, str]]:
        """Sections for the report of a machine that failed."""
        return [(f"nested machine: {name}", text) for name, text in self._machine.last_words().items()]

    def close(self) -> None:
        """End the machine."""
        self._machine.close()


@dataclass(frozen=True)
class Ending:
    """What tests get that have no machine (any more)."""

    outcome: Literal["failed", "skipped"]
    message: str
    sections: list[tuple[str, str]] = field(default_factory=list)

    def report(self, item: pytest.Item, when: When) -> pytest.TestReport:
        skipped = (str(item.path), 1, f"Skipped: {self.message}")
        longrepr = skipped if self.outcome == "skipped" else self.message
        return pytest.TestReport(
            item.nodeid, item.location, {}, self.outcome, longrepr, when, sections=self.sections
        )


class NestedTier:
    """The plugin of the pytest outside."""

    def __init__(
        self, config: pytest.Config, folder: Path = FOLDER, machine: type[Machine] = NestedMachine
    ) -> None:
        """
        :param folder: where the tests are.
        :param machine: what runs them.
        """
        self._config = config
        self._folder = folder
        self._machine = machine
        #: The tests that are still to be replayed.
        self._due: list[str] = []
        self._run: InnerRun | None = None
        #: Why there is no machine (any more).
        self._ending: Ending | None = None

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        if not self._config.getoption("--nested"):
            return None
        return None if _related(collection_path, self._folder) else True

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._due = [item.nodeid for item in session.items if item.path.is_relative_to(self._folder)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if item.nodeid not in self._due:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._replay(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        self._due.remove(item.nodeid)
        if not self._due:
            self.pytest_sessionfinish()
        return True

    def pytest_sessionfinish(self) -> None:
        """End the machine, if there is one."""
        if self._run is not None:
            self._run.close()
            self._run = None

    def _replay(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        if self._ending is not None:
            yield self._ending.report(item, "setup")
            return
        marker = item.get_closest_marker("nested_seconds")
        # A test that runs when the machine fails is told from one that has not begun.
        when: When = "setup"
        try:
            for data in self._running().reports(item.nodeid, marker.args[0] if marker else TEST_TIME):
                yield self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
                when = "call"
            self._warn()
        except UnavailableError as error:
            ending = self._ending = Ending("skipped", str(error))
        except HarnessError as error:
            ending = Ending("failed", str(error), self._run.last_words() if self._run else [])
            self._ending = Ending("failed", f"{error} when {item.nodeid} was due")
        else:
            return
        self.pytest_sessionfinish()
        yield ending.report(item, when)

    def _warn(self) -> None:
        """Tell what was warned of inside, as a warning here."""
        assert self._run is not None
        for text, file, line, nodeid in self._run.warnings:
            message = warnings.WarningMessage(pytest.PytestWarning(text), pytest.PytestWarning, file, line)
            told = {"warning_message": message, "when": "runtest", "nodeid": nodeid, "location": None}
            self._config.hook.pytest_warning_recorded.call_historic(kwargs=told)
        self._run.warnings.clear()

    def _running(self) -> InnerRun:
        """The machine, booted at the first call; one that hangs while it boots gets a second chance.

        Once in dozens of runs an emulated machine has said nothing at all, not even its kernel.
        """
        if self._run is None:
            self._run = InnerRun(self._machine, self._due, self._arguments())
            try:
                self._run.boot()
            except HarnessError:
                self._run.close()
                self._run = InnerRun(self._machine, self._due, self._arguments())
                self._run.boot()
        return self._run

    def _arguments(self) -> list[str]:
        """What the pytest inside has to know of our command line; which tests, it is told by node ids."""
        option = self._config.getoption
        arguments = ["-o", f"faulthandler_timeout={TRACE_TIME}", f"--tb={option('--tb')}"]
        arguments += ["-v"] * self._config.get_verbosity()
        return [*arguments, *(["--full"] if option("--full") else [])]


def _related(path: Path, other: Path) -> bool:
    return path.is_relative_to(other) or other.is_relative_to(path)
