"""./demo --migrate: a guest moves to another host and back, its vDPA NIC with it. Read `show` to see how.

Two private hosts (tests/harness/two_hosts.py), each with a libvirtd, a virtvdpad and an emulated NIC of its
own, and a cable between their bridges (with `--driver mlx5` the VF is in the port's own process):

          host a                                                host b
    guest ── VF ── vdpa0 ── br0 ──────── cable ──────── br0 ── vdpa0 ── VF ── (guest)
                   the peer, 10.76.0.1

The peer exchanges traffic with the guest all the while, and accounts for every byte of it
(tests/harness/native/traffic.c). On the way to b, the VF itself marks which pages of the guest's memory it
writes ("hardware"); on the way back, the port does ("software"), unless the driver leaves that to the VF.
"""

import time
from dataclasses import dataclass, field

from tests.demo_parts import Ending, Progress, private
from tests.harness.announcements import Announcements
from tests.harness.domain_xml import DomainXml
from tests.harness.guest import guest_image
from tests.harness.guest_traffic import Summary, Traffic
from tests.harness.two_hosts import BRIDGED, LONGEST_BLACKOUT, BridgedHost, TwoHosts
from tests.harness.vdpa_host import GUEST_ADDRESS


@dataclass
class Moved:
    """One migration. Times in milliseconds."""

    source: str
    destination: str
    #: Who marked the pages that the VF wrote: "hardware" or "software".
    mode: str
    #: From the beginning to the end, and the part of it in which the guest ran nowhere.
    total_ms: int
    downtime_ms: int
    #: Our share of that: what the port at the source took to stop its rings, and that at the destination to
    #: start them.
    stop_ms: float
    start_ms: float
    #: Pages that the port's VF wrote and that were marked.
    pages: int
    #: From the port's last message of the start to the first word on the bridge of where the guest is now;
    #: negative where that was said as soon as the rings ran.
    announced_ms: float
    announced_by: str
    #: When the NIC at the source stopped, and when the bridges were told where the guest is now, in seconds
    #: since the epoch, as are when it began and when traffic flowed again.
    dark: float
    light: float
    begun: float
    over: float = 0.0
    #: Numbered datagrams to the guest that did not come, and the longest time in which none came from it.
    datagrams_lost: int = 0
    gap_ms: float = 0.0

    @property
    def ours_ms(self) -> float:
        """Our share of the downtime."""
        return self.stop_ms + self.start_ms

    @property
    def blackout(self) -> float:
        """Seconds in which nobody could reach the guest."""
        return self.light - self.dark


@dataclass
class Report(Ending):
    """What `--report` writes."""

    #: "completed" once the guest is back where it was.
    migration: str = "not done"
    modes: list[str] = field(default_factory=list)
    #: Bytes of the TCP streams, both ways together, that were sent; and that were lost or came altered.
    bytes: int = 0
    lost_bytes: int = 0
    altered_bytes: int = 0
    #: Numbered datagrams, both ways together: how many were sent, came twice or altered, were lost.
    datagrams: int = 0
    datagrams_doubled: int = 0
    datagrams_altered: int = 0
    datagrams_lost: int = 0
    #: Of those lost: how many before the guest's NIC stopped, or after the bridges were told where it is.
    datagrams_lost_outside: int = 0
    migrations: list[Moved] = field(default_factory=list)


#: Driver -> who marks the pages on either way.
MODES = {"ifcvf": ["hardware", "software"], "mlx5": ["hardware", "hardware"]}


def show(hosts: TwoHosts, driver: str, report: Report, step: Progress) -> None:
    """The demonstration itself, on two hosts that run libvirtd, virtvdpad and our hook."""
    # How a domain's interfaces are migrated is in its metadata. It is read when a port starts.
    there, back = MODES[driver]
    domain = DomainXml.example("vdpa-demo.xml").boot(guest_image(), GUEST_ADDRESS).migrating(there)
    domain.use_pool(0, driver, "default")
    hosts.a.start_guest(domain)
    step("the guest runs on host a and answers ping")

    with Traffic(hosts.a, GUEST_ADDRESS) as traffic, Announcements(hosts.a) as announcements:
        step("a peer on host a exchanges traffic with the guest: a TCP stream and numbered datagrams")
        # Who is to mark at b, when its turn comes: the live domain's metadata goes with it.
        domain.migrating(back)
        hosts.a.set_metadata(domain)
        for destination in (hosts.b, hosts.a):
            moved = migrate(hosts, domain, destination, announcements)
            traffic.wait_until_flowing()
            moved.over = time.time()
            report.migrations.append(moved)
            step(f"migrated to host {destination.name} in {moved.total_ms} ms; traffic flows")
        account(report, traffic.stop())
    report.migration = "completed"
    report.modes = [moved.mode for moved in report.migrations]
    print(f"\n{table(report)}\n")


def migrate(
    hosts: TwoHosts, domain: DomainXml, destination: BridgedHost, announcements: Announcements
) -> Moved:
    """Migrate the guest as an operator would, and collect what is known of that."""
    source = hosts.other(destination)
    begun = time.time()
    hosts.migrate(domain, to=destination)
    figures = hosts.figures(domain, to=destination)
    (port,) = figures.ports
    announced = announcements.wait_for(domain.mac, since=port.start_begun)[0]
    return Moved(
        source=source.name,
        destination=destination.name,
        mode=port.mode,
        total_ms=figures.total_ms,
        downtime_ms=figures.downtime_ms,
        stop_ms=port.stop_ms,
        start_ms=port.start_ms,
        pages=port.pages,
        announced_ms=round(1000 * (announced.at - port.started), 1),
        announced_by=announced.kind,
        dark=port.blackout[0],
        light=announced.at,
        begun=begun,
    )


def account(report: Report, summary: Summary) -> None:
    """Take down what became of the traffic."""
    streams = (summary.stream_to_guest, summary.stream_from_guest)
    ways = (summary.to_guest, summary.from_guest)
    report.bytes = sum(stream.sent for stream in streams)
    report.lost_bytes = summary.lost_bytes
    report.altered_bytes = sum(stream.altered for stream in streams)
    report.datagrams = sum(way.sent for way in ways)
    report.datagrams_doubled = sum(way.doubled for way in ways)
    report.datagrams_altered = sum(way.altered for way in ways)
    report.datagrams_lost = sum(len(way.lost) for way in ways)
    dark = [(moved.dark, moved.light) for moved in report.migrations]
    report.datagrams_lost_outside = sum(len(way.lost_outside(dark)) for way in ways)
    for moved in report.migrations:
        moved.datagrams_lost = sum(moved.begun <= lost.after <= moved.over for lost in summary.to_guest.lost)
        moved.gap_ms = summary.longest_gap(moved.begun, moved.over)


def table(report: Report) -> str:
    """The figures, a column for each migration."""
    rows: list[tuple[str, list[object]]] = [
        ("", [f"{moved.source} -> {moved.destination}" for moved in report.migrations]),
        ("pages marked by", [moved.mode for moved in report.migrations]),
        ("total time, ms", [moved.total_ms for moved in report.migrations]),
        ("downtime, ms", [moved.downtime_ms for moved in report.migrations]),
        ("our share of it, ms", [f"{moved.ours_ms:.1f}" for moved in report.migrations]),
        ("  stop at the source", [f"{moved.stop_ms:.1f}" for moved in report.migrations]),
        ("  start at the destination", [f"{moved.start_ms:.1f}" for moved in report.migrations]),
        ("pages marked by the port", [moved.pages for moved in report.migrations]),
        ("datagrams lost", [moved.datagrams_lost for moved in report.migrations]),
        ("longest gap, ms", [moved.gap_ms for moved in report.migrations]),
        ("announced after, ms", [moved.announced_ms for moved in report.migrations]),
        ("announced by", [moved.announced_by for moved in report.migrations]),
    ]
    lines = [f"    {name:<28}" + "".join(f"{value!s:>12}" for value in values) for name, values in rows]
    sent = f"{report.bytes:,} bytes of TCP and {report.datagrams:,} datagrams were sent"
    lines.append(f"    {sent}, {report.lost_bytes} bytes lost, {report.altered_bytes} altered")
    return "\n".join(lines)


def verdict(driver: str, report: Report) -> str | None:
    """What is wrong with what was seen; None when all is as it should be."""
    damage = {
        "bytes lost": report.lost_bytes,
        "bytes altered": report.altered_bytes,
        "datagrams doubled": report.datagrams_doubled,
        "datagrams altered": report.datagrams_altered,
        "datagrams lost while the guest had its NIC": report.datagrams_lost_outside,
    }
    for what, count in damage.items():
        if count:
            return f"{count} {what}"
    for moved in report.migrations:
        if moved.blackout > LONGEST_BLACKOUT:
            return f"the guest was out of reach for {moved.blackout:.1f} s on its way to {moved.destination}"
    if report.modes != MODES[driver]:
        wanted = " and ".join(MODES[driver])
        return f"pages were marked by {' and '.join(map(str, report.modes))}, not by {wanted}"
    if report.leftovers:
        return f"left behind: {', '.join(report.leftovers)}"
    return None


def run(driver: str, report: Report) -> str | None:
    """Make the hosts, show, clean up; what is wrong with what was seen.

    :param driver: of the VFs on both hosts.
    :raise HarnessError: when something does not work; the hosts are ended then as well.
    """
    step = Progress()
    step(
        "making two private hosts, each with a libvirtd, a virtvdpad and an emulated NIC, and a cable between"
    )
    hosts = TwoHosts(configuration=BRIDGED.replace('driver = "ifcvf"', f'driver = "{driver}"'))
    with private(hosts, report, step, keep=False):
        show(hosts, driver, report, step)
    return verdict(driver, report)
