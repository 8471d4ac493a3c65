"""`./bench guest`: a QEMU guest's TCP and UDP through a VF and its TAP, beside QEMU's own NIC on a TAP.

One guest has both NICs and is loaded over one and then the other, so that both meet the same processor, the
same kernel and the same QEMU. The peer's is virtio-net that QEMU's main thread serves, without vhost, on a
TAP that libvirt makes. The features that say what a packet costs have to be the same. What arrives counts.

Where the time goes is in percent of what all of them took: the guest's vCPU, QEMU's other threads, the
emulated NIC, which is the VF, and the port.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lxml import etree

from datapath.virtio import Feature
from tests.bench.interleaved import interleaved
from tests.bench.rows import Row, less_is_better, more_is_better
from tests.harness.console import Console
from tests.harness.domain_xml import DomainXml
from tests.harness.guest import guest_image
from tests.harness.guest_load import Load, What, load
from tests.harness.processes import HarnessError
from tests.harness.procfs import thread_times
from tests.harness.vdpa_host import GUEST_ADDRESS, VdpaHost

PEER_LINK, PEER_HOST, PEER_GUEST = "qemutap", "10.77.0.1/24", "10.77.0.2/24"
#: Seconds of a sample.
SAMPLE = 1.0
#: Bytes that a call gives to TCP.
CALL = 65536
#: Payloads that make frames of 64 bytes (with their checksum) and of all that an Ethernet carries.
SMALL, FULL = 18, 1472
#: Datagrams per second that the host sends: more than a guest under emulation takes, fewer than would take a
#: processor away from it.
OFFERED = 60_000
#: What a packet goes through depends on these; the other features are of a NIC's configuration.
OF_PACKETS = (
    Feature.NET_F_CSUM,
    Feature.NET_F_GUEST_CSUM,
    *range(Feature.NET_F_GUEST_TSO4, Feature.NET_F_MRG_RXBUF + 1),
    *range(Feature.F_NOTIFY_ON_EMPTY, Feature.F_NOTIFICATION_DATA + 1),
)
THREADS = ("vCPU", "QEMU", "VF", "port")


@dataclass(frozen=True)
class Way:
    """Something that is measured."""

    name: str
    what: What
    size: int
    rate: int = 0


WAYS = (
    Way("TCP, guest to host", "stream-out", CALL),
    Way("TCP, host to guest", "stream-in", CALL),
    Way(f"UDP, guest to host, {SMALL} bytes", "datagrams-out", SMALL),
    Way(f"UDP, guest to host, {FULL} bytes", "datagrams-out", FULL),
    Way(f"UDP, host to guest, {SMALL} bytes", "datagrams-in", SMALL, OFFERED),
    Way(f"UDP, host to guest, {FULL} bytes", "datagrams-in", FULL, OFFERED),
    Way(f"UDP, there and back, {SMALL} bytes", "echo", SMALL),
)


@dataclass(frozen=True)
class Sample:
    """What arrived, and percent of the time that was spent on it by who spent it."""

    load: Load
    cpu: Mapping[str, float]


class Rig:
    """A guest with both NICs."""

    def __init__(self, host: VdpaHost, domain: DomainXml) -> None:
        """:raise HarnessError: when what was negotiated is not the same."""
        self._host = host
        host.start_guest(domain)
        host.set_address(PEER_LINK, PEER_HOST)
        with host.console(domain) as console:
            console.run(f"ip address add {PEER_GUEST} dev eth1; ip link set eth1 up")
            self.features = packet_features(console, "eth0")
            theirs = packet_features(console, "eth1")
        if self.features != theirs:
            raise HarnessError(
                f"features {self.features:#x} were negotiated with ours, {theirs:#x} with QEMU's"
            )
        host.wait_for_ping(PEER_GUEST)

    def measure(self, way: Way, address: str) -> Sample:
        """Load one NIC."""
        before = self._cpu()
        found = load(self._host, address, way.what, size=way.size, seconds=SAMPLE, rate=way.rate)
        after = self._cpu()
        used = {name: after[name] - before[name] for name in THREADS}
        return Sample(found, {name: 100 * used[name] / sum(used.values()) for name in THREADS})

    def _cpu(self) -> dict[str, float]:
        """Seconds of CPU so far."""
        (qemu,) = self._host.running("qemu-system-x86_64")
        by_thread = thread_times(qemu.pid)
        vcpu = sum(seconds for thread, seconds in by_thread.items() if is_vcpu(qemu.pid, thread))
        (nic,), (port,) = self._host.running("virt-vdpa-nic"), self._host.running("virt-vdpa-port")
        nic_time, port_time = (sum(thread_times(process.pid).values()) for process in (nic, port))
        return dict(zip(THREADS, (vcpu, sum(by_thread.values()) - vcpu, nic_time, port_time), strict=True))


def is_vcpu(pid: int, thread: int) -> bool:
    """Whether a thread of QEMU runs the guest, by the name that QEMU gives it."""
    return Path(f"/proc/{pid}/task/{thread}/comm").read_text().startswith("CPU ")


def packet_features(console: Console, link: str) -> int:
    """What a NIC's driver has negotiated in the guest, of what says what a packet costs."""
    bits = console.run(f"cat /sys/class/net/{link}/device/features").strip()
    return sum(1 << bit for bit in OF_PACKETS if bits[bit] == "1")


def with_both_nics() -> DomainXml:
    """The example's guest with QEMU's own NIC beside ours, neither with UFO, which a VF has not got."""
    domain = DomainXml.example().boot(guest_image(), GUEST_ADDRESS)
    domain.add_tap(PEER_LINK)
    driver = domain.root.findall("devices/interface")[1].find("driver")
    assert driver is not None
    for side in ("host", "guest"):
        etree.SubElement(driver, side, ufo="off")
    return domain


def measure(runs: int) -> Iterator[Row | str]:
    """A row for each way, then where the time goes."""
    yield "the peer is QEMU's own virtio-net on a TAP, without vhost, in the same guest"
    domain = with_both_nics()
    with VdpaHost("bench") as host:
        host.set_address()
        rig = Rig(host, domain)
        yield f"features of packets negotiated with both: {rig.features:#x}"
        spent = []
        for way in WAYS:
            ours, peer = interleaved(
                runs,
                partial(rig.measure, way, GUEST_ADDRESS),
                partial(rig.measure, way, PEER_GUEST),
                warm_up=1,
            )
            yield from rows(way, ours, peer)
            spent += [cpu_line(f"{way.name}, ours", ours), cpu_line("  QEMU's", peer)]
        host.remove(domain)
    yield f"  {'where the time goes, percent':<46}" + "".join(f"{name:>8}" for name in THREADS)
    yield from spent


def rows(way: Way, ours: list[Sample], peer: list[Sample]) -> Iterator[Row]:
    """What a way's samples have given."""

    def both(figure: Callable[[Load], float]) -> tuple[list[float], list[float]]:
        mine, theirs = ([figure(sample.load) for sample in samples] for samples in (ours, peer))
        return mine, theirs

    if way.what == "echo":
        yield less_is_better(f"{way.name}, median", "us", *both(lambda found: found.median_us))
        yield less_is_better(f"{way.name}, 99th percentile", "us", *both(lambda found: found.most_us))
    elif way.what in ("stream-in", "stream-out"):
        yield more_is_better(way.name, "MB/s", *both(lambda found: found.bytes / found.seconds / 1e6))
    else:
        yield more_is_better(way.name, "/s", *both(lambda found: found.count / found.seconds))


def cpu_line(name: str, samples: list[Sample]) -> str:
    """Medians of what some samples took."""
    used = (statistics.median(sample.cpu[thread] for sample in samples) for thread in THREADS)
    return f"    {name:<44}" + "".join(f"{percent:8.0f}" for percent in used)
