"""What a migration costs, and what our share of it is.

The peer is the same guest under the same traffic with an ordinary NIC: virtio-net in QEMU, on a TAP. Each
kind of guest in turn is migrated there and back between two private hosts; none has its own announcements, so
that QEMU has the port send RARP, and itself does for the TAP. What is past its limit is an error.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tests.bench.rows import Row, less_is_better, percentile
from tests.harness.announcements import Announcements
from tests.harness.domain_xml import DomainXml
from tests.harness.guest import guest_image
from tests.harness.guest_traffic import Traffic
from tests.harness.processes import HarnessError
from tests.harness.two_hosts import BRIDGE, TwoHosts, downtime_and_total
from tests.harness.vdpa_host import GUEST_ADDRESS

#: Milliseconds that our handlers may take in the blackout with one queue pair (the median), and that the
#: first RARP may come after the port's last message of the start (the median and the 90th percentile).
HANDLERS_LIMIT, RARP_LIMIT = 15, 20
#: Runs below which a 90th percentile says no more than the most does.
FEW_RUNS = 10
TAP = "TAP"
OURS = ("hardware", "software")
KINDS = (*OURS, TAP)
#: There and back; then it is the next kind's turn.
RUNS_OF_A_GUEST = 2


@dataclass(frozen=True)
class Run:
    """One migration; milliseconds. Ours is 0 for a TAP."""

    total: float
    downtime: float
    begun: float
    over: float
    stop: float = 0.0
    start: float = 0.0
    memory: float = 0.0
    rarp: float = 0.0

    @property
    def handlers(self) -> float:
        """Our share of the blackout."""
        return self.stop + self.start


@dataclass
class Found:
    """All migrations of one kind of guest."""

    runs: list[Run] = field(default_factory=list)
    #: The longest gap in the guest's traffic of each; milliseconds.
    gaps: list[float] = field(default_factory=list)


def measure(runs: int) -> Iterator[Row | str]:
    """Rows of both ways of logging beside the TAP, then what is ours alone.

    :raise HarnessError: when what is ours takes longer than it may.
    """
    found = {kind: Found() for kind in KINDS}
    yield "the peer is the same guest with an ordinary TAP NIC"
    with TwoHosts() as hosts:
        for begin in range(0, runs, RUNS_OF_A_GUEST):
            for kind in KINDS:
                migrate(hosts, kind, min(RUNS_OF_A_GUEST, runs - begin), found[kind])
    tap, ours = found[TAP], {kind: found[kind] for kind in OURS}
    for kind in OURS:
        yield from beside_tap(kind, found[kind], tap)
    for kind in OURS:
        yield from alone(kind, found[kind].runs)
    yield f"limits: {HANDLERS_LIMIT} ms for our handlers, {RARP_LIMIT} ms for RARP; {runs} of each kind"
    if runs < FEW_RUNS:
        yield f"with fewer than {FEW_RUNS} of each kind the 90th percentile is the most"
    if past := past_limits({kind: each.runs for kind, each in ours.items()}):
        raise HarnessError("; ".join(past))


def beside_tap(kind: str, ours: Found, tap: Found) -> Iterator[Row]:
    """What a guest of any kind has."""
    for name, times in (
        ("total time", lambda found: [run.total for run in found.runs]),
        ("downtime by libvirt", lambda found: [run.downtime for run in found.runs]),
        ("longest gap in what the guest sends", lambda found: found.gaps),
    ):
        yield less_is_better(f"{kind}: {name}", "ms", times(ours), times(tap))


def alone(kind: str, runs: Sequence[Run]) -> Iterator[Row | str]:
    """Our share."""
    for name, times in (
        ("our handlers in the blackout", [run.handlers for run in runs]),
        ("  stop at the source", [run.stop for run in runs]),
        ("  start at the destination", [run.start for run in runs]),
        ("    of it mapping the guest's memory", [run.memory for run in runs]),
        ("first RARP after the last message", [run.rarp for run in runs]),
    ):
        yield less_is_better(f"{kind}: {name}", "ms", times)
    yield f"{kind}: 90th percentile of the first RARP is {percentile([run.rarp for run in runs], 90):.1f} ms"


def past_limits(found: Mapping[str, Sequence[Run]]) -> list[str]:
    """What took longer than it may, by kind of guest."""
    past = []
    for kind, runs in found.items():
        rarp = [run.rarp for run in runs]
        for what, value, limit in (
            ("median of our handlers", statistics.median(run.handlers for run in runs), HANDLERS_LIMIT),
            ("median of the first RARP", statistics.median(rarp), RARP_LIMIT),
            ("90th percentile of the first RARP", percentile(rarp, 90), RARP_LIMIT),
        ):
            if value > limit:
                past.append(f"{kind}: {what} is {value:.1f} ms, more than {limit} ms")
    return past


def migrate(hosts: TwoHosts, kind: str, runs: int, found: Found) -> None:
    """Start a guest of one kind and migrate it so many times."""
    domain = DomainXml.example().boot(guest_image(), GUEST_ADDRESS)
    domain = domain.with_tap(BRIDGE) if kind == TAP else domain.migrating(kind)
    hosts.a.start_guest(domain.override("guest_announce", "bool", "false"))
    try:
        with Traffic(hosts.a, GUEST_ADDRESS) as traffic, Announcements(hosts.a) as announcements:
            done = list(each(hosts, domain, traffic, announcements, runs))
            summary = traffic.stop()
    finally:
        hosts.remove(domain)
    found.runs += done
    found.gaps += [summary.longest_gap(run.begun, run.over) for run in done]


def each(
    hosts: TwoHosts, domain: DomainXml, traffic: Traffic, announcements: Announcements, runs: int
) -> Iterator[Run]:
    """One migration after another."""
    for number in range(runs):
        destination = hosts.a if number % 2 else hosts.b
        begun = time.time()
        hosts.migrate(domain, to=destination)
        downtime, total = downtime_and_total(destination, domain)
        traffic.wait_until_flowing()
        if domain.is_ours:
            (port,) = hosts.figures(domain, to=destination).ports
            rarp = announcements.wait_for(domain.mac, since=begun, kind="rarp")[0].at - port.started
            times = (port.stop_ms, port.start_ms, port.memory_ms, 1000 * rarp)
            yield Run(total, downtime, begun, time.time(), *times)
        else:
            yield Run(total, downtime, begun, time.time())
