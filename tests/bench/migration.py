"""What a migration costs, and what our share of it is.

The peer is the same guest under the same traffic with an ordinary NIC: virtio-net in QEMU, on a TAP. Each
kind of guest is migrated back and forth between two private hosts; none has its own announcements, so that
QEMU has the port send RARP, and itself does for the TAP. Figures are medians and, in brackets, the most.
What is past its limit is an error.
"""

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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
KINDS = ("hardware", "software", "TAP")


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


def measure(runs: int) -> None:
    """Print the table.

    :raise HarnessError: when what is ours takes longer than it may.
    """
    print(f"{'':<40}" + "".join(f"{kind:>18}" for kind in KINDS))
    found: dict[str, list[Run]] = {}
    gaps: dict[str, list[float]] = {}
    with TwoHosts() as hosts:
        for kind in KINDS:
            found[kind], gaps[kind] = migrate(hosts, kind, runs)
    ours = KINDS[:2]
    show("total time, ms", [[run.total for run in found[kind]] for kind in KINDS])
    show("downtime by libvirt, ms", [[run.downtime for run in found[kind]] for kind in KINDS])
    show("longest gap in what the guest sends, ms", [gaps[kind] for kind in KINDS])
    show("our handlers in the blackout, ms", [[run.handlers for run in found[kind]] for kind in ours])
    show("  stop at the source", [[run.stop for run in found[kind]] for kind in ours])
    show("  start at the destination", [[run.start for run in found[kind]] for kind in ours])
    show("    of it mapping the guest's memory", [[run.memory for run in found[kind]] for kind in ours])
    show("first RARP after the last message, ms", [[run.rarp for run in found[kind]] for kind in ours])
    ninetieth = [percentile([run.rarp for run in found[kind]], 90) for kind in ours]
    print(f"{'  90th percentile':<40}" + "".join(f"{value:>18.1f}" for value in ninetieth))
    print(f"limits: {HANDLERS_LIMIT} ms for our handlers, {RARP_LIMIT} ms for RARP; {runs} of each kind")
    if runs < FEW_RUNS:
        print(f"with fewer than {FEW_RUNS} of each kind the 90th percentile is the most")
    if past := past_limits({kind: found[kind] for kind in ours}):
        raise HarnessError("; ".join(past))


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


def migrate(hosts: TwoHosts, kind: str, runs: int) -> tuple[list[Run], list[float]]:
    """Migrate a guest of one kind so many times; each run, and the longest gap of each."""
    domain = DomainXml.example().boot(guest_image(), GUEST_ADDRESS)
    domain = domain.with_tap(BRIDGE) if kind == "TAP" else domain.migrating(kind)
    hosts.a.start_guest(domain.override("guest_announce", "bool", "false"))
    try:
        with Traffic(hosts.a, GUEST_ADDRESS) as traffic, Announcements(hosts.a) as announcements:
            found = list(each(hosts, domain, traffic, announcements, runs))
            summary = traffic.stop()
    finally:
        hosts.remove(domain)
    gaps = [
        max((gap.ms for gap in summary.gaps if run.begun <= gap.begin <= run.over), default=0.0)
        for run in found
    ]
    return found, gaps


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


def percentile(values: Sequence[float], rank: int) -> float:
    """The least of the values that `rank` percent of them do not exceed."""
    return sorted(values)[math.ceil(len(values) * rank / 100) - 1]


def show(label: str, columns: Sequence[Sequence[float]]) -> None:
    """One line: the median of each kind, and the most."""
    cells = (f"{statistics.median(values):.1f} ({max(values):.1f})" for values in columns)
    print(f"{label:<40}" + "".join(f"{cell:>18}" for cell in cells))
