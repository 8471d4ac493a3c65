"""What a session costs its guest: time in our handlers when rings start and stop, and pauses of the VF.

A front-end starts and stops rings in an exchange of messages, during which its guest stands still. Owns the
figures of the last one of each kind and the last pauses; they outlive the session. No I/O: two clocks, which
a test may replace.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from datapath.vhost_user.messages import Request, request_name

#: Pauses that are kept.
MAX_PAUSES = 16
#: Seconds without a message after which the next one begins another exchange.
GAP = 1.0
#: What stops rings, and goes on coming when they have stopped: QEMU 7.2 sends SET_STATUS first, later ones
#: send it last.
STOPPING = frozenset({Request.GET_VRING_BASE, Request.SET_STATUS, Request.GET_STATUS})


@dataclass
class Exchange:
    """The messages of one start or stop, so far; durations in seconds."""

    #: When the first one came and the last one had been handled (time.time).
    begin: float
    at: float = 0.0
    handlers: float = 0.0
    memory: float = 0.0
    device: float = 0.0
    messages: int = 0

    def describe(self) -> dict[str, object]:
        """What query-status tells."""
        return {
            "at": self.at,
            "handlers_ms": round(1000 * self.handlers, 3),
            "memory_ms": round(1000 * self.memory, 3),
            "device_ms": round(1000 * self.device, 3),
            "messages": self.messages,
        }


@dataclass
class Pause:
    """An interval in which the VF ran no ring (time.time); it lasts while `end` is None."""

    begin: float
    end: float | None
    reason: str


class Timing:
    """Fed by the back-end: each message while it is handled, and when rings begin and stop to run."""

    def __init__(
        self, monotonic: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._running = False
        self._last_message = 0.0
        #: Messages that may turn out to start, or to stop, rings.
        self._starting: Exchange | None = None
        self._stopping: Exchange | None = None
        self._start: Exchange | None = None
        self._stop: Exchange | None = None
        self._reason = ""
        self._memory = self._device = 0.0
        self._pauses: deque[Pause] = deque(maxlen=MAX_PAUSES)

    def describe(self) -> dict[str, object]:
        """The last start and the last stop of rings, as query-status tells them."""
        kinds = {"start": self._start, "stop": self._stop}
        return {kind: exchange and exchange.describe() for kind, exchange in kinds.items()}

    def pauses(self) -> list[dict[str, object]]:
        """The last pauses, oldest first."""
        return [vars(pause).copy() for pause in self._pauses]

    @contextmanager
    def message(self, request: int) -> Iterator[None]:
        """Around the handling of one message."""
        begun, ran = self._monotonic(), self._running
        if begun - self._last_message > GAP or (request == Request.GET_VRING_BASE and not ran):
            self._starting = None
        if begun - self._last_message > GAP or request not in STOPPING:
            self._stopping = None
        self._memory = self._device = 0.0
        self._reason = request_name(request)
        came = self._wall()
        if not ran:
            self._starting = self._starting or Exchange(came)
        if request in STOPPING:
            self._stopping = self._stopping or Exchange(came)
        starting, stopping = self._starting, self._stopping
        try:
            yield
        finally:
            self._last_message = self._monotonic()
            for exchange in (starting, stopping):
                if exchange is not None:
                    self._add(exchange, self._last_message - begun)
            if not ran and self._running:
                self._start, self._starting = starting, None
            elif ran and not self._running and stopping is not None:
                self._stop = stopping
            self._reason = "the session ended"

    def _add(self, exchange: Exchange, seconds: float) -> None:
        exchange.at = self._wall()
        exchange.handlers += seconds
        exchange.memory += self._memory
        exchange.device += self._device
        exchange.messages += 1

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Around the mapping of guest memory for the VF."""
        begun = self._monotonic()
        try:
            yield
        finally:
            self._memory += self._monotonic() - begun

    @contextmanager
    def device(self) -> Iterator[None]:
        """Around whatever makes the VF start or stop rings."""
        begun = self._monotonic()
        try:
            yield
        finally:
            self._device += self._monotonic() - begun

    @contextmanager
    def starting_rings(self) -> Iterator[None]:
        """Around the start of the VF; it ends the pause that lasts."""
        with self.device():
            yield
        now = self._wall()
        if self._pauses and self._pauses[-1].end is None:
            self._pauses[-1].end = now
        elif self._starting is not None:
            self._pauses.append(Pause(self._starting.begin, now, "start"))
        self._running = True

    @contextmanager
    def stopping_rings(self) -> Iterator[None]:
        """Around the stop of all rings; it begins a pause, whatever comes of it."""
        self.stopped()
        with self.device():
            yield

    def stopped(self) -> None:
        """The VF runs no ring from now on."""
        if self._running:
            self._pauses.append(Pause(self._wall(), None, self._reason))
        self._running = False

    @contextmanager
    def rerouting(self, reason: str, rerouted: Callable[[], bool]) -> Iterator[None]:
        """Around a call that may stop and start rings on its own; `rerouted` is asked after it."""
        begin = self._wall()
        yield
        if self._running and rerouted():
            self._pauses.append(Pause(begin, self._wall(), reason))
