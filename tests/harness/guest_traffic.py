"""Traffic between a guest and a peer of which every byte is accounted for: native/traffic.c at the peer.

    with Traffic(hosts.a, "10.76.0.2") as traffic:
        ...
        traffic.wait_until_flowing()
        summary = traffic.stop()

Owns the peer's process; the guest's is in its image. Times are seconds since the epoch.
"""

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Self

from tests.harness.compiled import compiled
from tests.harness.guest import TRAFFIC_PORT
from tests.harness.host import Host
from tests.harness.processes import HarnessError, tail, wait_for

#: What a guest under emulation can do beside everything else, both ways each.
DATAGRAMS_PER_SECOND = 200
BYTES_PER_SECOND = 400_000
#: Datagrams that must come each way before traffic is called flowing.
FLOWING = 5
#: Seconds around an interval in which a lost datagram was under way too: it was not there yet, or the peer
#: was not scheduled between taking the time and sending.
MARGIN = 0.05


@dataclass(frozen=True)
class Progress:
    """The counts at one moment."""

    at: float
    datagrams_sent: int
    #: The highest number of ours that the guest says it received, plus 1.
    datagrams_heard: int
    datagrams_received: int
    bytes_sent: int
    bytes_received: int
    altered: int


@dataclass(frozen=True)
class Stream:
    """One direction of the TCP stream, in bytes."""

    sent: int
    received: int
    altered: int

    @property
    def lost(self) -> int:
        return self.sent - self.received


@dataclass(frozen=True)
class Lost:
    """A datagram that did not come; it was sent between two times (the same for one of the peer's)."""

    number: int
    after: float
    before: float


@dataclass(frozen=True)
class Datagrams:
    """One direction of the numbered datagrams."""

    sent: int
    received: int
    doubled: int
    altered: int
    #: At most 2000 of them.
    lost: tuple[Lost, ...]

    def lost_outside(self, intervals: list[tuple[float, float]]) -> list[Lost]:
        """Those that were certainly not under way within any of some intervals."""
        return [
            lost
            for lost in self.lost
            if not any(
                begin - MARGIN <= lost.before and lost.after <= end + MARGIN for begin, end in intervals
            )
        ]


@dataclass(frozen=True)
class Gap:
    """A time in which none of the guest's datagrams came."""

    begin: float
    ms: float


@dataclass(frozen=True)
class Summary:
    """What became of all that was sent."""

    stream_to_guest: Stream
    stream_from_guest: Stream
    to_guest: Datagrams
    from_guest: Datagrams
    #: Those longer than 20 ms.
    gaps: tuple[Gap, ...]

    @property
    def lost_bytes(self) -> int:
        """Bytes of the streams that did not come."""
        return self.stream_to_guest.lost + self.stream_from_guest.lost

    def longest_gap(self, begin: float, end: float) -> float:
        """Milliseconds of the longest gap that began between two times; 0 when none did."""
        return max((gap.ms for gap in self.gaps if begin <= gap.begin <= end), default=0.0)

    def damage(self, *, may_double: bool = False) -> list[str]:
        """What no network may do either: bytes of a stream lost or altered, datagrams doubled or altered.

        :param may_double: take no offence at doubled datagrams.
        """
        found = []
        for way, stream in (("to", self.stream_to_guest), ("from", self.stream_from_guest)):
            if stream.lost or stream.altered:
                found.append(f"stream {way} the guest: {stream.lost} bytes lost, {stream.altered} altered")
        for way, datagrams in (("to", self.to_guest), ("from", self.from_guest)):
            if datagrams.altered or (datagrams.doubled and not may_double):
                text = f"{datagrams.doubled} doubled, {datagrams.altered} altered"
                found.append(f"datagrams {way} the guest: {text}")
        return found


class Traffic:
    """Traffic between a guest and a peer on a host; as a context manager it is ended, without a summary."""

    def __init__(
        self,
        host: Host,
        address: str,
        *,
        port: int = TRAFFIC_PORT,
        datagrams: int = DATAGRAMS_PER_SECOND,
        stream: int = BYTES_PER_SECOND,
    ) -> None:
        """
        Start it, and wait until it flows both ways.

        :param address: the guest's, with or without the length of its network.
        :param port: where the guest serves.
        :param datagrams: datagrams per second, each way.
        :param stream: bytes per second, each way.
        """
        name = f"traffic-{len(list(host.logs.glob('traffic-*')))}"
        words = ["drive", address.partition("/")[0], str(port), str(datagrams), str(stream)]
        self._process = host.spawn(name, [compiled("traffic", "-static"), *words])
        try:
            self._process.wait_for("a first word", lambda: next(self._told("progress"), None), 20)
            self.wait_until_flowing()
        except BaseException:
            self._process.kill()
            raise

    def _told(self, what: str) -> Iterator[dict[str, Any]]:
        """What the program said, the last first."""
        lines = self._process.log.read_text(errors="replace").split("\n")
        # What follows the last line's end is half a line.
        for line in reversed(lines[:-1]):
            if line.startswith(f'{{"{what}"'):
                yield json.loads(line)[what]

    @property
    def running(self) -> bool:
        return self._process.running

    def progress(self) -> Progress:
        """The counts a moment ago."""
        told = next(self._told("progress"))
        return Progress(**{field.name: told[field.name] for field in fields(Progress)})

    def wait_until_flowing(self, seconds: float = 30.0) -> Progress:
        """Wait until some more of everything has come, both ways; where it stands then.

        :raise HarnessError: when it does not in time, or the program has ended.
        """
        before = now = self.progress()

        def flows() -> bool:
            nonlocal now
            if not self.running:
                raise HarnessError(f"the traffic ended: {tail(self._process.log, 1)}")
            now = self.progress()
            # What the guest says it heard counts from the moment on at which we asked.
            heard = now.datagrams_heard >= before.datagrams_sent + FLOWING
            answered = now.datagrams_received >= before.datagrams_received + FLOWING
            return heard and answered and now.bytes_received > before.bytes_received

        try:
            wait_for("traffic to flow both ways", flows, seconds)
        except HarnessError as error:
            raise HarnessError(f"{error}: from {before} to {now}") from None
        return now

    def stop(self) -> Summary:
        """End it in good order: what became of everything.

        :raise HarnessError: when an end cannot be reached, such as for a stream that was cut.
        """
        self._process.signal(signal.SIGTERM)
        wait_for("the traffic to end", lambda: not self.running, 150)
        told = next(self._told("summary"), None)
        if told is None:
            raise HarnessError(f"no end of the traffic: {tail(self._process.log, 1)}")
        return read_summary(told)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()


def read_summary(told: dict[str, Any]) -> Summary:
    """What the program printed."""

    def stream(way: str) -> Stream:
        found = told["stream"][way]
        return Stream(found["sent"], found["received"], found["altered"])

    def datagrams(way: str) -> Datagrams:
        found = told["datagrams"][way]
        lost = tuple(
            Lost(one["number"], one.get("after", one.get("sent")), one.get("before", one.get("sent")))
            for one in found["lost"]
        )
        return Datagrams(found["sent"], found["received"], found["doubled"], found["altered"], lost)

    return Summary(
        stream_to_guest=stream("to_guest"),
        stream_from_guest=stream("from_guest"),
        to_guest=datagrams("to_guest"),
        from_guest=datagrams("from_guest"),
        gaps=tuple(Gap(gap["begin"], gap["ms"]) for gap in told["gaps"]),
    )
