"""Two private hosts joined by a cable, between which guests migrate.

    virt-vdpa-nic ── TAPs ── br0 ── cable ════════ cable ── br0 ── TAPs ── virt-vdpa-nic
          host a    10.76.0.1                              10.76.0.3    host b

Guests have other addresses of that network, so a peer on either host reaches a guest wherever it is, as
soon as the bridges know where that is. Owns the cable and the calls of `virsh migrate`.
"""

import re
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.harness.domain_xml import DomainXml
from tests.harness.host import HostProcess, PrivateHosts
from tests.harness.processes import run, wait_for
from tests.harness.vdpa_host import CONFIGURATION, VdpaHost

BRIDGE = "br0"
CABLE = "cable"
ADDRESSES = {"a": "10.76.0.1/24", "b": "10.76.0.3/24"}
BRIDGED = f'{CONFIGURATION}bridge = "{BRIDGE}"\n'
#: Seconds for a migration that nothing hinders, on a busy machine.
MIGRATION_TIME = 120.0
#: Seconds that a guest may be unreachable in a migration, however busy the machine: what is lost in a longer
#: time is not excused.
LONGEST_BLACKOUT = 3.0

#: Milliseconds that QEMU may plan for the switch-over; what it takes is what the guest has written last.
MOST_DOWNTIME = 2000

Via = Literal["unix", "tcp"]


class BridgedHost(VdpaHost):
    """A host whose emulated NIC has its TAPs in a bridge, and the host's address is the bridge's."""

    def __init__(self, name: str, address: str, *, configuration: str = BRIDGED, keep: bool = False) -> None:
        super().__init__(name, configuration=configuration, keep=keep)
        self.address = address

    def make_links(self) -> None:
        # Without an address of its own it would be another when the TAPs of a killed NIC go, and the other
        # host's migration would be sent to an address that nobody has, for a minute.
        self.make_bridge(BRIDGE, f"02:76:64:00:00:{int(self.ip.rpartition('.')[2]):02x}", self.address)

    @property
    def ip(self) -> str:
        """The host's address without the length of its network."""
        return self.address.partition("/")[0]

    @property
    def uri(self) -> str:
        """The connection URI of the host's libvirtd for a client on any host: /tmp is everybody's."""
        return f"qemu+unix:///system?socket={self.path('/run/libvirt/libvirt-sock')}"


class Migration:
    """A `virsh migrate` under way."""

    def __init__(self, process: HostProcess) -> None:
        self._process = process

    @property
    def running(self) -> bool:
        return self._process.running

    def output(self) -> str:
        """What virsh has said."""
        return self._process.log.read_text().strip()

    def wait(self, seconds: float = MIGRATION_TIME) -> int:
        """virsh's exit code, once it has ended.

        :raise HarnessError: when it does not end in time.
        """
        wait_for("virsh migrate to end", lambda: not self.running, seconds)
        return self._process.popen.wait()

    def succeed(self, seconds: float = MIGRATION_TIME) -> None:
        """Wait for an end, which must be a good one."""
        code = self.wait(seconds)
        assert code == 0, f"virsh migrate exited {code}: {self.output()}"

    def fail(self, seconds: float = MIGRATION_TIME) -> str:
        """Wait for an end, which must be a bad one; what virsh says."""
        code = self.wait(seconds)
        assert code != 0, f"virsh migrate went well: {self.output()}"
        return self.output()

    def kill(self) -> None:
        """End virsh as a crash would."""
        self._process.kill()


@dataclass(frozen=True)
class PortFigures:
    """What one port at the source and the one that took over from it did. Times of day in seconds."""

    mac: str
    #: Who marked the pages: "hardware", "software" or "all".
    mode: str
    pages: int
    #: Milliseconds that the port at the source took to stop its rings, and when it had.
    stop_ms: float
    stopped: float
    #: The same of the other port's start, and how much of that was for mapping the guest's memory.
    start_ms: float
    memory_ms: float
    started: float

    @property
    def start_begun(self) -> float:
        """When the start was, less what it took: no ring ran earlier."""
        return self.started - self.start_ms / 1000

    @property
    def blackout(self) -> tuple[float, float]:
        """From the source's first message of the stop to the destination's last one of the start."""
        return self.stopped - self.stop_ms / 1000, self.started


@dataclass(frozen=True)
class MigrationFigures:
    """What is known of a migration that has ended well."""

    total_ms: int
    downtime_ms: int
    ports: list[PortFigures]


class TwoHosts(PrivateHosts):
    """The two hosts."""

    def __init__(self, *, configuration: str = BRIDGED, keep: bool = False) -> None:
        self.a, self.b = (
            BridgedHost(name, address, configuration=configuration, keep=keep)
            for name, address in ADDRESSES.items()
        )
        self._migrations = 0

    def start(self) -> None:
        """Start both and plug the cable in."""
        for host in self.both:
            host.start()
        # By pids as they are seen here, so only the network namespace is entered.
        enter = ["nsenter", f"--target={self.a.init_pid}", "--net"]
        peer = ["peer", "name", CABLE, "netns", str(self.b.init_pid)]
        run([*enter, "ip", "link", "add", CABLE, "type", "veth", *peer])
        for host in self.both:
            host.run(["ip", "link", "set", CABLE, "master", BRIDGE, "up"])
            # The first incoming migration is not to ask QEMU for its capabilities, which takes seconds.
            host.virsh("domcapabilities")

    def end(self) -> None:
        with ExitStack() as ends:
            for host in self.both:
                ends.callback(host.end)

    def save_logs(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for host in self.both:
            host.save_logs(folder / host.name)

    @property
    def both(self) -> tuple[BridgedHost, BridgedHost]:
        return self.a, self.b

    @property
    def logs(self) -> dict[str, Path]:
        """Folders of the hosts' logs, by the beginning of a title."""
        return {f"{host.name}: ": host.logs for host in self.both}

    def other(self, host: BridgedHost) -> BridgedHost:
        """The host that is not this one."""
        return self.b if host is self.a else self.a

    def begin_migration(
        self,
        domain: DomainXml,
        *flags: str,
        to: BridgedHost,
        via: Via = "unix",
    ) -> Migration:
        """Start `virsh migrate --live` on the other host; the domain is defined only where it runs.

        :param flags: further ones, such as `--p2p`.
        :param via: what the guest's memory goes through: a socket on this machine, or the cable.
        """
        self._migrations += 1
        # One pass over the memory, then the switch-over: native/metronome.c says what others cost.
        self.other(to).virsh("migrate-setmaxdowntime", domain.name, str(MOST_DOWNTIME), check=False)
        through = f"unix://{to.folder}/migration.sock" if via == "unix" else f"tcp://{to.ip}"
        words = ["migrate", "--live", "--persistent", "--undefinesource", *flags]
        command = ["virsh", "-c", "qemu:///system", *words, domain.name, to.uri, "--migrateuri", through]
        return Migration(self.other(to).spawn(f"migrate-{self._migrations}", command))

    def migrate(self, domain: DomainXml, *flags: str, to: BridgedHost, via: Via = "unix") -> None:
        """Migrate a domain; as `begin_migration`, and it must go well."""
        self.begin_migration(domain, *flags, to=to, via=via).succeed()
        # Where it was, its ports end with the hook's `release`, which virsh does not wait for.
        source = self.other(to)
        wait_for("the ports at the source to end", lambda: not source.ports_of(domain), 10)

    def figures(self, domain: DomainXml, *, to: BridgedHost) -> MigrationFigures:
        """What libvirt and both daemons know of a domain's last migration."""
        downtime, total = downtime_and_total(to, domain)
        return MigrationFigures(total_ms=total, downtime_ms=downtime, ports=self.port_figures(domain, to=to))

    def port_figures(self, domain: DomainXml, *, to: BridgedHost) -> list[PortFigures]:
        """What both daemons know of the ports in a domain's last migration to a host."""
        before, after = self._told(domain, self.other(to), "source"), self._told(domain, to, "destination")
        return [port_figures(mac, port, after[mac]) for mac, port in before.items()]

    def _told(self, domain: DomainXml, host: BridgedHost, side: str) -> dict[str, Any]:
        """What a daemon says of the ports in a domain's last migration, by MAC, once that has ended."""

        def last() -> dict[str, Any] | None:
            told = host.virt_vdpa("migrations")["migrations"]
            of_domain = [one for one in told if (one["uuid"], one["side"]) == (domain.uuid, side)]
            return of_domain[-1] if of_domain and of_domain[-1]["ended"] else None

        migration = wait_for(f"host {host.name}'s daemon to know how the migration went", last, 10)
        return {port["mac"]: port for port in (migration or {})["ports"]}

    def home(self, domain: DomainXml) -> BridgedHost:
        """The one host on which a domain runs.

        :raise AssertionError: when it runs on none or on both.
        """
        homes = [host for host in self.both if host.state(domain.name) == "running"]
        assert len(homes) == 1, f"{domain.name} runs on {[host.name for host in homes] or 'no host'}"
        return homes[0]

    def remove(self, domain: DomainXml) -> None:
        """End a domain wherever it is."""
        for host in self.both:
            host.remove(domain)

    def cut(self) -> None:
        """Pull the cable."""
        self.a.run(["ip", "link", "set", CABLE, "down"])

    def mend(self) -> None:
        """Plug the cable in again."""
        self.a.run(["ip", "link", "set", CABLE, "up"])


def port_figures(mac: str, source: dict[str, Any], destination: dict[str, Any]) -> PortFigures:
    """What the daemons at both sides say of an interface's ports."""
    stop, start = source["timing"]["stop"], destination["timing"]["start"]
    return PortFigures(
        mac=mac,
        mode=source["mode"],
        pages=source["pages"],
        stop_ms=stop["handlers_ms"],
        stopped=stop["at"],
        start_ms=start["handlers_ms"],
        memory_ms=start["memory_ms"],
        started=start["at"],
    )


def downtime_and_total(to: BridgedHost, domain: DomainXml) -> tuple[int, int]:
    """Milliseconds of a domain's last migration, as libvirt at its destination has them."""
    job = job_info(to, domain, completed=True)
    return int(job["Total downtime"].split()[0]), int(job["Time elapsed"].split()[0])


def job_info(host: VdpaHost, domain: DomainXml, *, completed: bool = False) -> dict[str, str]:
    """`virsh domjobinfo` by its labels, such as "Total downtime"; empty when there is no job to tell about.

    :param completed: of the last one that ended well; the destination knows it as the source did.
    """
    words = ["domjobinfo", domain.name, *(["--completed", "--keep-completed"] if completed else [])]
    done: subprocess.CompletedProcess[str] = host.virsh(*words, check=False)
    if done.returncode != 0:
        return {}
    return {
        name: " ".join(value.split())
        for name, value in re.findall(r"^([^:\n]+):\s+(.+?)\s*$", done.stdout, re.MULTILINE)
    }
