"""The exchange of messages by which a front-end begins or ends to log, and what fails in it.

QEMU before 10.1 aborts, and takes the guest with it, when a message of this exchange is refused or the
connection ends within it. So what fails there is kept until the exchange is over, which it is with the first
message of another kind or after a while without one. For each queue pair QEMU sends

    SET_LOG_BASE, SET_FEATURES with LOG_ALL, GET_STATUS, SET_VRING_ADDR of both rings with VRING_F_LOG

to begin, and all but the first, without the flags, to end; without REPLY_ACK a GET_FEATURES after each as a
barrier. Owns that rule; no I/O but a clock.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from datapath.vhost_user.messages import Request

#: What may come in an exchange.
BELONGING = frozenset(
    {
        Request.SET_LOG_BASE,
        Request.SET_LOG_FD,
        Request.SET_FEATURES,
        Request.GET_FEATURES,
        Request.GET_STATUS,
        Request.SET_VRING_ADDR,
    }
)
#: Seconds without a message after which an exchange is over. QEMU sends it in one go. However long a message
#: takes us, which is several seconds with a VF that does not answer, they begin when it has been answered.
QUIET = 1.0


class LogExchange:
    """Whether such an exchange is under way, and what has failed in it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end: float | None = None
        #: What ends the connection once the exchange is over.
        self.failure: Exception | None = None

    @property
    def active(self) -> bool:
        """Whether the front-end may be in the middle of it."""
        return self._end is not None and self._clock() < self._end

    @property
    def deadline(self) -> float | None:
        """When to call `check` (time.monotonic); None when nothing has failed."""
        return None if self.failure is None else self._end

    @contextmanager
    def message(self, request: int, opens: bool) -> Iterator[None]:
        """Around the handling of a message.

        :param opens: whether it begins an exchange, should none be under way.
        :raise Exception: what has failed, when the exchange ends with this message.
        """
        if not (opens or (self.active and request in BELONGING)):
            self._end = None
            self.check()
            yield
            return
        self._end = math.inf
        try:
            yield
        finally:
            self._end = self._clock() + QUIET

    def check(self) -> None:
        """See whether the exchange is over.

        :raise Exception: what has failed, if it is.
        """
        if self.failure is not None and not self.active:
            failure, self.failure = self.failure, None
            raise failure

    def defer(self, failure: Exception) -> bool:
        """Keep a failure for the end of the exchange; the first one counts. False when none is under way."""
        if not self.active:
            return False
        self.failure = self.failure or failure
        return True
