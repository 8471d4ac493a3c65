"""What demonstrations have in common: progress lines, private hosts that leave nothing, the report file."""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from qemu.qmp import QMPError

from tests.harness.guest import CACHE, guest_image
from tests.harness.host import PrivateHosts
from tests.harness.leftovers import Machine
from tests.harness.processes import HarnessError

#: Where the logs of a demo that failed are kept.
LOGS = CACHE / "demo-logs"


@dataclass
class Ending:
    """What every report ends with."""

    #: Seconds of the whole demo.
    total_s: float = 0.0
    #: What is on the machine that was not there before; None when it was kept.
    leftovers: list[str] | None = None
    error: str | None = None


class Progress:
    """One line for each step, with the time."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._begin, 2)

    def __call__(self, text: str) -> None:
        print(f"{self.seconds:6.1f} s  {text}", flush=True)


@contextmanager
def private(hosts: PrivateHosts, ending: Ending, step: Progress, *, keep: bool) -> Iterator[None]:
    """Start private hosts, end them, and look whether that was everything.

    :param keep: leave them running, unless something fails.
    :raise HarnessError: when something does not work; the hosts are ended then as well.
    """
    before = Machine.look()
    guest_image()
    try:
        hosts.start()
        yield
    except BaseException as error:
        # Cleaning up takes a moment, and is not to be cut short by a second Ctrl-C.
        on_signals(signal.SIG_IGN)
        hosts.save_logs(LOGS)
        hosts.end()
        if isinstance(error, HarnessError | QMPError):
            raise HarnessError(f"{error}; the logs are in {LOGS}") from None
        raise
    if not keep:
        hosts.end()
        ending.leftovers = before.leftovers()
        step(f"the private network is ended; left on the machine: {', '.join(ending.leftovers) or 'nothing'}")
    ending.total_s = step.seconds


def report_file(text: str) -> Path:
    """A file that can be written, which is better known before the demo than after it."""
    path = Path(text)
    try:
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from None
    return path


def on_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """Handle the signals that ask us to end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def carry_out(demonstrate: Callable[[], str | None], report: Ending, path: Path | None) -> int:
    """Demonstrate, write the report, and say on stderr what went wrong; the exit code.

    :param demonstrate: returns what is wrong with what was seen.
    """
    # Whoever ends us by a signal gets the same clean-up as Ctrl-C; a shell starts background jobs with
    # SIGINT ignored.
    on_signals(signal.default_int_handler)
    try:
        report.error = demonstrate()
    except (HarnessError, QMPError) as error:
        report.error = str(error)
    except KeyboardInterrupt:
        report.error = "interrupted"
    if path is not None:
        path.write_text(json.dumps(asdict(report), indent=2) + "\n")
    if report.error:
        print(f"demo: {report.error}", file=sys.stderr)
        return 1
    return 0
