"""The pytest inside the nested machine: a plugin that writes its reports for the pytest outside to replay.

The file has one Python literal per line, which unlike JSON knows tuples from lists, as reports do:
("start", node id), ("report", what pytest makes of a report to send it), ("finish", node id), and ("warning",
(text, file, line, node id)).
PYTEST_DONT_REWRITE
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

#: The node ids to run, one per line.
SELECTED = "selected"
REPORTS = "reports"


class Recorder:
    """Writes down what happens, each line at once."""

    def __init__(self, config: pytest.Config, file: Path) -> None:
        self._config = config
        self._fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _write(self, kind: str, what: Any) -> None:
        os.write(self._fd, f"{(kind, what)!r}\n".encode())

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook
        self._write("report", hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write("finish", nodeid)

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, nodeid: str) -> None:
        text = f"{warning_message.category.__name__}: {warning_message.message}"
        self._write("warning", (text, warning_message.filename, warning_message.lineno, nodeid))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reports", type=Path, required=True, help="where to write reports")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config, config.getoption("--reports")))


def command(python: str, folder: Path, arguments: Sequence[str]) -> list[str]:
    """The command that runs the tests of `SELECTED` in a folder and writes `REPORTS` there.

    :param arguments: more of them for pytest.
    """
    # Entry points are looked for in every installed package, which takes seconds under emulation.
    words = ["env", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1", python, "-m", "pytest", "-p", __name__]
    return [
        *words,
        "-p",
        "no:cacheprovider",
        *arguments,
        f"--reports={folder / REPORTS}",
        f"@{folder / SELECTED}",
    ]
