"""Who marks what the VF writes, in which log, and why that may not be relied on.

Between the front-end, which gives a log (SET_LOG_BASE) and wants it kept or not (LOG_ALL), and the device:

- the device marks its writes from the moment that there is both, a log and the wish for it;
- where it cannot, every page counts as written when rings stop, which is before the front-end reads the log
  for the last time: a guest that is saved while it runs is saved whole, only not as quickly;
- so it does in a log that follows one in which the device did not mark, or has failed to its end;
- what a back-end before this one may have had written is marked before rings run, see `suspects.py`.

A log is used as far as guest memory needs it, however large the front-end says that it is.

Nothing here is an error to the front-end: see `log_exchange.py`. Owns the logs of one session.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from datapath.vdpa import DeviceError, DeviceLostError, LogMode, Ring, VdpaDevice
from datapath.vhost_user.log import PAGE, DirtyLog
from datapath.vhost_user.memory import GuestMemory
from datapath.vhost_user.messages import ProtocolError
from datapath.vhost_user.suspects import TooManyError, suspects
from datapath.vhost_user.timing import Timing


@dataclass(frozen=True)
class LogStatus:
    """How writes are logged now."""

    #: Whether the front-end wants them logged.
    wanted: bool = False
    #: Who marks pages: "hardware", "software"; "all" when every page counts as written; None: nobody.
    mode: str | None = None
    #: Why the log cannot be relied on, in a line.
    problem: str | None = None


class Marking:
    """The dirty log of one session."""

    def __init__(
        self, device: VdpaDevice, memory: GuestMemory, timing: Timing, report: Callable[[str], None]
    ) -> None:
        self.wanted = False
        self._device = device
        self._memory = memory
        self._timing = timing
        self._report = report
        self._log: DirtyLog | None = None
        #: The log that the device was last told of, whether it marks its writes there, and if not, why.
        self._settled_log: DirtyLog | None = None
        self._device_marks = False
        self._failure: str | None = None
        #: Pages beyond the log, when it was begun.
        self._missed_before = 0
        #: Whether an earlier session may have been logging, and rings seen to since.
        self._inherited = False
        self._looked_through: set[int] = set()
        #: Rings have run that were to be logged, and what they wrote is not in the log there is now.
        self._unlogged = False

    def want(self, wanted: bool, *, first: bool, started: bool) -> None:
        """Have a log kept, or not (SET_FEATURES).

        :param first: whether these are the session's first features: who wants a log from the beginning has
            had one before.
        :param started: whether rings have been started. If not, the front-end starts anew, and its log,
            which it has let go with the rings, is still to come.
        """
        if first:
            self._inherited = wanted
        elif not wanted:
            self._inherited = self._unlogged = False
            self._replace(None)  # there is no other message that ends logging
        elif self.wanted and not started:
            self._replace(None)
        self.wanted = wanted

    def give(self, log: DirtyLog | None) -> None:
        """Have another log (SET_LOG_BASE). The same one again changes nothing."""
        if log is not None and self._log is not None and log.same_as(self._log):
            log.close()
        else:
            self._replace(log)

    def settle(self, running: bool) -> bool:
        """Make the device mark its writes in the log that is valid now, if there is one.

        :param running: whether rings run.
        :return: False when the device has failed at that; whether its rings run is not known then.
        :raise DeviceError: when it failed to end logging; DeviceLostError, when it is gone.
        """
        log = self._log if self.wanted else None
        wider = log is not None and log.cover(self._needed())
        if log is self._settled_log and not wider:
            return True
        before, self._settled_log = self._settled_log, log
        marked, self._device_marks, self._failure = self._device_marks, False, None
        if before is not None and self.wanted and running:
            self._unlogged |= log is None or not marked
        try:
            if log is not None:
                if log is not before:
                    self._missed_before = self._device.log_missed
                self._begin(log)
            if marked and not self._device_marks:
                with self._timing.rerouting("logging ended", self._rerouted()):
                    self._device.stop_logging()
        except DeviceLostError:
            raise
        except DeviceError as error:
            if log is None:
                raise
            self._fail(str(error))
            return False
        finally:
            if before is not None and before is not log:
                before.close()
        if log is not None and self._unlogged:
            self._unlogged = False
            self._mark_all(log)
        return True

    def _begin(self, log: DirtyLog) -> None:
        """:raise DeviceError: when the device does not mark its writes."""
        try:
            bitmap = log.bitmap
        except OSError as error:
            self._fail(f"the log cannot be mapped: {error}")
            return
        with self._timing.rerouting("logging began", self._rerouted()):
            self._device.start_logging(bitmap)
        self._device_marks = True

    def _rerouted(self) -> Callable[[], bool]:
        """To be asked after a call: whether it has led rings another way, which costs a pause."""
        before = self._device.shadowed
        return lambda: self._device.shadowed != before

    def _fail(self, reason: str) -> None:
        self._failure = f"{self._device.name} marks no writes: {reason}"
        self._report(self._failure)

    def rings_stopped(self) -> None:
        """Rings have stopped: if there is a log in which the device marks nothing, all is marked now."""
        if self._log is not None and self.wanted and not self._device_marks:
            self._mark_all(self._log)

    @contextmanager
    def covered(self) -> Iterator[None]:
        """Around a call that makes rings start or stop. If it fails, all is marked: the device marks its
        writes, but who knows whether to the end."""
        try:
            yield
        except DeviceError:
            if self._log is not None and self.wanted:
                self._mark_all(self._log)
            raise

    def rings_begin(self, rings: Mapping[int, Ring]) -> None:
        """Rings are about to run: mark what a session before this one may have had written."""
        if not self.wanted:
            return
        if self._log is None:
            self._unlogged = True
            return
        for index in rings.keys() - self._looked_through if self._inherited else ():
            self._look_through(self._log, rings[index])
            self._looked_through.add(index)

    def _look_through(self, log: DirtyLog, ring: Ring) -> None:
        try:
            for address, length in suspects(self._memory, ring):
                log.mark(address, length)
        except (TooManyError, ProtocolError):
            self._mark_all(log)
        except OSError as error:
            self._failure = f"what was written before is not logged: {error}"
            self._report(self._failure)

    def _mark_all(self, log: DirtyLog) -> None:
        try:
            for mapping in self._memory:
                log.fill(mapping.memory.guest_address, mapping.memory.size)
        except OSError as error:
            self._failure = f"what {self._device.name} wrote is not logged: {error}"
            self._report(self._failure)

    def describe(self, running: bool) -> LogStatus:
        """How writes are logged now.

        :param running: whether rings run.
        """
        if not self.wanted:
            return LogStatus()
        return LogStatus(True, self._mode(), self._problem(running))

    def _mode(self) -> str | None:
        if not self._device_marks:
            return None if self._log is None else "all"
        return (self._device.log_mode or LogMode.SOFTWARE).value

    def _problem(self, running: bool) -> str | None:
        if self._failure is not None:
            return self._failure
        if self._log is None:
            return "the front-end gave no dirty log" if running else None
        needed = self._needed()
        if self._log.size < needed:
            end = self._end_of_memory()
            return f"the dirty log has {self._log.size} bytes, guest memory up to {end:#x} needs {needed}"
        if missed := self._device.log_missed - self._missed_before:
            return (
                f"{missed} written pages could not be marked: they lie beyond the dirty log, or it has gone"
            )
        return None

    def _end_of_memory(self) -> int:
        return max((m.memory.guest_address + m.memory.size for m in self._memory), default=0)

    def _needed(self) -> int:
        """How many bytes a log of all guest memory has."""
        return -(-self._end_of_memory() // (8 * PAGE))

    def end(self) -> None:
        """The session ends, and logging with it.

        :raise DeviceError: when the device fails at that.
        """
        self._replace(None)
        self.settle(running=False)

    def close(self) -> None:
        """Let go of the logs, whatever the device has come to."""
        self._replace(None)
        if self._settled_log is not None:  # the device is lost, and marks nothing any more
            self._settled_log.close()
            self._settled_log = None

    def _replace(self, log: DirtyLog | None) -> None:
        """Have another log, or none. One that the device may still use is for `settle` to close."""
        if self._log is not None and self._log is not self._settled_log:
            self._log.close()
        self._log = log
