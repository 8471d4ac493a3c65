"""Child processes with a log, a deadline to start and a deadline to end, and the waiting for conditions.

Owns what it starts and ends it by pid. What the processes are, other modules know.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")

#: Seconds between two looks at a condition.
POLL_INTERVAL = 0.02
#: Seconds that a process gets to end after SIGTERM.
STOP_TIME = 5.0


class HarnessError(Exception):
    """Something that the tests or the demo need did not work; the text is one line that says what."""


def wait_for(what: str, condition: Callable[[], T], seconds: float) -> T:
    """Wait until `condition` returns something true, and return that.

    :param what: completes "waited N s for …" in the error.
    :raise HarnessError: when the time is over.
    """
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise HarnessError(f"waited {seconds:g} s for {what}")
        time.sleep(POLL_INTERVAL)


def tail(log: Path, lines: int = 3) -> str:
    """The last lines of a log, joined into one for an error message."""
    if not log.exists():
        return "(no log)"
    text = log.read_text(errors="replace").splitlines()[-lines:]
    return " | ".join(line.strip() for line in text) or "(empty log)"


def run(
    argv: Sequence[str | Path],
    *,
    prefix: Sequence[str] = (),
    check: bool = True,
    seconds: float = 60.0,
    text_in: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and collect its output.

    :param prefix: words before the command that say where it runs; errors leave them out.
    :raise HarnessError: when it takes too long or, with `check`, exits non-zero.
    """
    command = [str(word) for word in argv]
    try:
        done = subprocess.run(
            [*prefix, *command],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=env,
            cwd=cwd,
            input=text_in,
            # A command without input of its own must not read the terminal's.
            stdin=subprocess.DEVNULL if text_in is None else None,
        )
    except subprocess.TimeoutExpired:
        raise HarnessError(f"'{' '.join(command)}' did not end within {seconds:g} s") from None
    except FileNotFoundError:
        raise HarnessError(f"'{command[0]}' is not installed") from None
    if check and done.returncode != 0:
        output = " | ".join((done.stderr or done.stdout).strip().splitlines())
        raise HarnessError(f"'{' '.join(command)}' exited {done.returncode}: {output}")
    return done


class Process:
    """One long-running child, its output in a log file; as a context manager it is stopped at the end."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        """Start it; whether it works is seen by waiting for something it does (`wait_for`)."""
        self.argv = [str(word) for word in argv]
        self.name = Path(self.argv[0]).name
        self.log = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                self.argv,
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env) if env is not None else None,
                pass_fds=tuple(pass_fds),
                # Ctrl-C in a terminal is for the program that started it, which then ends it in order.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.running:
            os.kill(self.pid, number)

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def wait_for(self, what: str, condition: Callable[[], T], seconds: float = 10.0) -> T:
        """As the function of that name, but fails at once when the process ends meanwhile."""

        def ready() -> T | None:
            result = condition()
            if not result and not self.running:
                raise HarnessError(
                    f"{self.name} exited {self.popen.returncode} before {what}: {tail(self.log)}"
                )
            return result

        result = wait_for(f"{what} of {self.name}", ready, seconds)
        assert result is not None
        return result

    def stop(self, seconds: float = STOP_TIME) -> int:
        """End it with SIGTERM, after `seconds` with SIGKILL; returns its exit code. Idempotent."""
        self.signal(signal.SIGTERM)
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            return self.popen.wait()

    def kill(self) -> None:
        """End it as a crash would."""
        self.signal(signal.SIGKILL)
        self.popen.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
