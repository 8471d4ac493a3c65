"""The shell on a guest's serial console: runs commands in the guest, without a network."""

import os
import re
import select
import time
import tty
from pathlib import Path

from tests.harness.closeable import Closeable
from tests.harness.processes import HarnessError

#: Seconds after which the shell is greeted again while the guest boots.
GREETING_INTERVAL = 1.0


class Console(Closeable):
    """A guest's console by the PTY that QEMU made for it; one at a time can read it."""

    def __init__(self, terminal: Path, *, seconds: float = 60.0) -> None:
        """
        Wait for the guest's shell and make it quiet: no echo, no prompt.

        :param terminal: the PTY, as `virsh ttyconsole` says it.
        :raise HarnessError: when no shell answers in `seconds`.
        """
        self._fd = os.open(terminal, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        tty.setraw(self._fd)
        self._received = ""
        self._commands = 0
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.send("stty -echo; PS1=; echo guest-$((6 * 7))\n")
            if self._read_until("guest-42", GREETING_INTERVAL) is not None:
                # A greeting that the shell got twice is answered twice.
                self.run("true")
                return
        self.close()
        raise HarnessError(f"no shell on the guest's console {terminal} within {seconds:g} s: {self._last()}")

    def send(self, text: str) -> None:
        """Type something, without waiting for anything."""
        os.write(self._fd, text.encode())

    def run(self, command: str, *, check: bool = True, seconds: float = 20.0) -> str:
        """Run a shell command in the guest and return what it printed.

        :raise HarnessError: when it does not end in time or, with `check`, exits non-zero.
        """
        self._commands += 1
        mark = f"end-of-command-{self._commands}"
        # The quotes keep an echo of the command, should there be one, from looking like its end.
        self.send(f"{command}; echo '{mark[:6]}''{mark[6:]}:'$?\n")
        end = self._read_until(rf"{mark}:(\d+)\n", seconds)
        if end is None:
            raise HarnessError(f"'{command}' in the guest did not end within {seconds:g} s: {self._last()}")
        output, status = end
        if check and status != "0":
            raise HarnessError(f"'{command}' in the guest exited {status}: {' | '.join(output.split())}")
        return output

    def _read_until(self, pattern: str, seconds: float) -> tuple[str, str] | None:
        """What came before a pattern, and its first group; None when it does not come in time."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self._received)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            if select.select([self._fd], [], [], left)[0]:
                try:
                    self._received += os.read(self._fd, 4096).decode(errors="replace").replace("\r", "")
                except OSError as error:
                    raise HarnessError(f"the guest's console went away: {error.strerror}") from None
        before, self._received = self._received[: found.start()], self._received[found.end() :]
        return before, found.group(1) if found.re.groups else ""

    def _last(self) -> str:
        return "it last said: " + " | ".join(self._received.split("\n")[-3:])

    def close(self) -> None:
        """Let the terminal go."""
        os.close(self._fd)
