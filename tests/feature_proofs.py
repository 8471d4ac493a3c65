"""No "Y" in the feature table without a test that has passed: a plugin that holds sessions against the table.

Every session fails when a test that proves a cell was to run and has not passed. One of all tests (`./test`
without a selection) fails as well when such a test was skipped, or is not there at all. Cases of a test that
are left to --full count only where they run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import pytest

#: Why a test is skipped that is left to longer runs.
ONLY_WITH_FULL = "only with --full"
#: Options that leave tests out without a word to other plugins.
SELECTING = ("nested", "ignore", "ignore_glob", "lf", "collectonly")


@dataclass(frozen=True)
class Outcome:
    """How one test ended."""

    kind: Literal["passed", "failed", "skipped"]
    reason: str = ""


@dataclass(frozen=True)
class Proof:
    """A test that shows a cell."""

    #: "ifcvf: mac".
    cell: str
    #: Node id, without parameters where all cases are meant.
    test: str

    def meant(self, nodeid: str) -> bool:
        """Whether a test is the proof, or a case of it."""
        return self.test in (nodeid, nodeid.partition("[")[0])


def declared() -> list[Proof]:
    """The proofs of all cells of all drivers."""
    from datapath.feature_table import cells, columns

    return [
        Proof(f"{column.driver}: {row.value}", test)
        for column in columns()
        for row, cell in cells(column).items()
        for test in cell.proofs
    ]


def doubts(proof: Proof, outcomes: Mapping[str, Outcome | None], whole: bool) -> str | None:
    """What a session leaves to be said against a proof; None for nothing.

    :param outcomes: by node id, of all tests that were to run; None for one that has not ended.
    :param whole: whether that was to be all tests there are.
    """
    cases = {nodeid: outcome for nodeid, outcome in outcomes.items() if proof.meant(nodeid)}
    if not cases:
        return f"there is no test {proof.test}" if whole else None
    for nodeid, outcome in cases.items():
        if outcome is not None and outcome.kind == "failed":
            return f"{nodeid} has not passed"
    if not whole:
        return None
    for nodeid, outcome in cases.items():
        if outcome is None:
            return f"{nodeid} has not run"
        if outcome.kind == "skipped" and outcome.reason != ONLY_WITH_FULL:
            return f"{nodeid} was skipped: {outcome.reason}"
    if not any(outcome is not None and outcome.kind == "passed" for outcome in cases.values()):
        return f"{proof.test} runs {ONLY_WITH_FULL}, and a default run is to show it"
    return None


class FeatureProofs:
    """The plugin."""

    def __init__(self, config: pytest.Config, proofs: list[Proof] | None = None) -> None:
        """:param proofs: those that are declared, if not said."""
        self._proofs = proofs
        self._whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
        self._whole &= not any(config.getoption(name, None) for name in SELECTING)
        self._outcomes: dict[str, Outcome | None] = {}
        self._doubts: list[str] = []

    def pytest_deselected(self) -> None:
        self._whole = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._outcomes = {item.nodeid: None for item in session.items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        before = self._outcomes.get(report.nodeid)
        if before is not None and before.kind != "passed":
            return  # what comes after a failure or a skip makes nothing good
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self._outcomes[report.nodeid] = Outcome("skipped", reason.removeprefix("Skipped: "))
        elif not report.passed or hasattr(report, "wasxfail"):
            self._outcomes[report.nodeid] = Outcome("failed")
        elif report.when == "call":
            self._outcomes[report.nodeid] = Outcome("passed")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.config.getoption("collectonly"):
            return
        # Of one that was broken off nothing can be said but what has failed.
        whole = self._whole and not (session.shouldstop or session.shouldfail)
        self._doubts = list(self._told(whole))
        if self._doubts and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _told(self, whole: bool) -> Iterator[str]:
        """A line for each test that is doubted, with the cells that it was to prove."""
        cells: dict[str, list[str]] = {}
        for proof in declared() if self._proofs is None else self._proofs:
            if (doubt := doubts(proof, self._outcomes, whole)) is not None:
                cells.setdefault(doubt, []).append(proof.cell)
        for doubt, doubted in cells.items():
            yield f"{', '.join(doubted)}: {doubt}"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._doubts:
            terminalreporter.section("feature table: not proven", red=True)
            for line in self._doubts:
                terminalreporter.write_line(line)
