"""No uplink: what a VF's driver sends comes back to it, for measurements of its virtqueues alone.

The engine does it (native/echo.c); this is what stands in place of a TAP.
"""

import errno
import os


class Echo:
    """The far end of a VF that has none."""

    #: Nothing can be left to the other side.
    has_header = False

    def __init__(self, pairs: int) -> None:
        #: None of each queue pair, which the engine takes for an echo.
        self.fds = (-1,) * pairs
        #: Those that have something come back.
        self.used_pairs = pairs

    def accept(self, features: int) -> None:
        """Nobody is there to finish what a driver leaves unfinished."""

    def use_pairs(self, pairs: int) -> None:
        """What is sent on a pair comes back on it."""
        self.used_pairs = pairs

    def send(self, frame: bytes) -> None:
        """A frame of the NIC's own has nowhere to go.

        :raise OSError: always.
        """
        raise OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))

    def close(self) -> None:
        """Nothing to do."""
