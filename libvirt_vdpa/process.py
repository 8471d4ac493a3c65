"""Processes that outlive the daemon: started detached, found again, watched through a pidfd.

A pid alone is reused by the kernel; with the process's start time it names one process for ever, across
restarts of the daemon. A pidfd then holds on to exactly that process. Knows nothing of what runs in it.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

#: Bytes of a log that are searched for a process's last words.
LOG_TAIL = 4096


class ProgramError(Exception):
    """A program that cannot be found or started; the text names it."""


def find_program(name: str) -> str:
    """A program of this package: beside the running one, beside the interpreter, else in PATH.

    :raise ProgramError: when it is nowhere.
    """
    for beside in (sys.argv[0], sys.executable):
        candidate = Path(beside).absolute().parent / name
        if os.access(candidate, os.X_OK):
            return str(candidate)
    found = shutil.which(name)
    if found is None:
        raise ProgramError(f"program {name} is neither beside {sys.argv[0]} nor in PATH")
    return found


class _Stat(NamedTuple):
    """What is used of /proc/PID/stat (proc(5))."""

    state: str
    start_time: int


def _stat(pid: int) -> _Stat:
    # The command name, in parentheses, may contain anything; the state, field 3, follows it.
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return _Stat(values[0], int(values[22 - 3]))


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when it is not there or has ended."""
    try:
        stat = _stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if stat.state in "ZX" else stat.start_time


class Process:
    """One running process, ours or found again."""

    def __init__(self, pid: int, started: int, pidfd: int, child: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self.start_time = started
        #: How it ended: an exit code, or a signal's number, negated. Not known of a process that was found.
        self.exit_code: int | None = None
        self._pidfd = pidfd
        self._child = child
        self._watched = False

    @classmethod
    def spawn(cls, arguments: Sequence[str], log: Path) -> "Process":
        """Start a program in a session of its own, its output appended to a log.

        :raise ProgramError: when it cannot be started.
        """
        try:
            with log.open("ab") as output:
                child = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd="/",
                    start_new_session=True,
                )
        except OSError as error:
            raise ProgramError(f"{error.filename or arguments[0]}: {error.strerror or error}") from None
        try:
            # A child stays a zombie until it is reaped, so both find it however short its life.
            return cls(child.pid, _stat(child.pid).start_time, os.pidfd_open(child.pid), child)
        except OSError as error:
            child.kill()
            child.wait()
            raise ProgramError(f"{arguments[0]}: {error.strerror or error}") from None

    @classmethod
    def find(cls, pid: int, started: int) -> "Process | None":
        """The process that an earlier daemon started; None when it has ended."""
        try:
            pidfd = os.pidfd_open(pid)
        except (OSError, ValueError, OverflowError):
            return None
        # Looked at only now: the pidfd pins whatever the pid means at this moment.
        if start_time(pid) != started:
            os.close(pidfd)
            return None
        return cls(pid, started, pidfd, None)

    def watch(self, ended: Callable[[], None]) -> None:
        """Have the event loop call `ended` once, when the process has ended."""

        def readable() -> None:
            self.close()
            ended()

        self._watched = True
        asyncio.get_running_loop().add_reader(self._pidfd, readable)

    def send(self, number: signal.Signals) -> None:
        """Signal the process; nothing happens when it has ended."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Let go of the process, which runs on; reap it when it has ended. Idempotent."""
        if self._pidfd < 0:
            return
        if self._watched:
            asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        if self._child is not None:
            self.exit_code = self._child.poll()
            # Not our concern any more; keeps subprocess from warning that it still runs.
            self._child.returncode = self._child.returncode or 0

    def obituary(self, program: str, log: Path, since: int) -> str:
        """Why it ended: its last words in its log, unless a signal took it before it could say any.

        :param since: size of the log when the process was started.
        """
        if self.exit_code is not None and self.exit_code < 0:
            return f"{program} was killed by {signal.Signals(-self.exit_code).name}"
        words = last_words(log, since).removeprefix(f"{program}: ")
        code = "" if self.exit_code is None else f" (exit code {self.exit_code})"
        return words or f"{program} ended without a word{code}"


def log_size(log: Path) -> int:
    """Bytes in a log; 0 when there is none, or none to be had: who writes to it will be told the reason."""
    try:
        return log.stat().st_size
    except OSError:
        return 0


def last_words(log: Path, since: int) -> str:
    """The last line that was written to a log after its first `since` bytes; empty when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(since, log_size(log) - LOG_TAIL))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
