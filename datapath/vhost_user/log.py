"""The dirty log: the bitmap in which a front-end that saves or moves a guest learns what was written.

Bit n says that page n of guest memory (4 KiB) was written (QEMU docs/interop/vhost-user.rst, "Migration").
No driver logs its VF's writes one by one yet. Until one does, every page counts as written when rings
stop, which is before the front-end reads the log for the last time: a guest that is saved while it runs
is then saved whole, only not as quickly.

Owns the log's descriptor. A log that cannot be used is not the protocol's affair: QEMU before 10.1 aborts,
and takes the guest with it, when a log message is refused.
"""

import os

from datapath.descriptors import close_all
from datapath.vhost_user.messages import LogArea

_CHUNK = 1 << 20


class DirtyLog:
    """One log, from SET_LOG_BASE until the next one or the end of logging."""

    def __init__(self, fd: int, area: LogArea) -> None:
        """Take the descriptor over; `area` is where the bitmap lies in it, in bytes."""
        self._fd = fd
        self._area = area

    def mark_all(self) -> None:
        """Set every bit.

        :raise OSError: when the log cannot be written, or has shrunk away.
        """
        end = self._area.offset + self._area.size
        if os.fstat(self._fd).st_size < end:
            raise OSError(f"the dirty log has {os.fstat(self._fd).st_size} bytes instead of {end}")
        for start in range(self._area.offset, end, _CHUNK):
            os.pwrite(self._fd, b"\xff" * min(_CHUNK, end - start), start)

    def close(self) -> None:
        """Let go of the descriptor."""
        close_all([self._fd])
