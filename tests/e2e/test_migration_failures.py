"""Whatever fails while a guest migrates: it runs on exactly one host afterwards, with its NIC working.

A cell is a phase of the migration and an event in it. Phases are reached by waiting for what the ports
say, and held by a slow copy or a libvirtd that is stopped, never by sleeping. Left out is a source port that
dies within the exchange that starts logging: QEMU before 10.1 does not survive that.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from qemu.qmp import QMPError

from tests.harness.domain_xml import DomainXml
from tests.harness.guest import guest_image
from tests.harness.guest_traffic import Traffic
from tests.harness.processes import wait_for
from tests.harness.two_hosts import BridgedHost, Migration, TwoHosts
from tests.harness.vdpa_host import GUEST_ADDRESS

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]

#: MiB/s at which the guest's memory takes a minute and more, and at which it takes no time.
SLOW, FAST = 1, 10_000
#: Seconds for virsh to say how it went, for hosts to be rid of what is not theirs, and for traffic to flow.
END, TIDY, BACK = 90.0, 30.0, 30.0


class Attempt:
    """One migration that something happens to."""

    def __init__(self, hosts: TwoHosts, domain: DomainXml) -> None:
        self.hosts = hosts
        self.domain = domain
        self.source = hosts.home(domain)
        self.destination = hosts.other(self.source)
        self.migration: Migration | None = None
        #: What brings the hosts back to order, the last first.
        self.repairs: list[Callable[[], object]] = []
        #: Whether what the source has of the guest may go at any moment.
        self.leaving = False
        #: Whether the next test may have the same guest.
        self.guest_is_well = False

    def begin(self, *flags: str, speed: int) -> None:
        """Start migrating through the cable, at so many MiB/s."""
        self.set_speed(speed)
        self.migration = self.hosts.begin_migration(self.domain, *flags, to=self.destination, via="tcp")

    def homes(self) -> list[BridgedHost]:
        """The hosts on which the guest runs."""
        return [host for host in self.hosts.both if host.state(self.domain.name) == "running"]

    def set_speed(self, speed: int) -> None:
        self.source.virsh("migrate-setspeed", self.domain.name, str(speed), check=False)

    def hurry_later(self) -> None:
        """Hold the migration's end up no more by the time that it is looked at."""
        self.repairs.append(lambda: self.set_speed(FAST))

    def status(self, host: BridgedHost) -> dict[str, Any]:
        """What the port on a host says; empty when it does not answer."""
        with suppress(QMPError, OSError):
            told: dict[str, Any] = host.ask_port(self.domain, "query-status")
            return told
        return {}

    def port_pid(self, host: BridgedHost) -> int:
        """The port process on a host."""
        pid: int = host.port(self.domain)["pid"]
        return pid

    def wait_for(self, what: str, condition: Callable[[], object]) -> None:
        """Wait for a phase, which does not come once virsh has ended."""
        migration = self.migration
        assert migration is not None

        def reached() -> bool:
            found = bool(condition())
            assert found or migration.running, f"no {what}: {migration.output()}"
            return found

        wait_for(what, reached, 30)

    def repair(self) -> None:
        """Put in order what the event has broken and the hosts do not mend by themselves."""
        while self.repairs:
            self.repairs.pop()()


# Phases


def before_logging(attempt: Attempt) -> None:
    """The destination has a port, and the source's does not log yet."""
    attempt.begin(speed=SLOW)
    attempt.wait_for(
        "port at the destination", lambda: attempt.status(attempt.destination).get("state") == "connected"
    )
    attempt.hurry_later()


def copying(attempt: Attempt) -> None:
    """The source's port logs, and memory is copied slowly."""
    attempt.begin(speed=SLOW)
    attempt.wait_for("logging", lambda: logs(attempt))
    attempt.hurry_later()


def switching(attempt: Attempt) -> None:
    """The guest is stopped and its rings are handed over; libvirt does not go on before `repair`."""
    attempt.begin(speed=FAST)
    attempt.wait_for("logging", lambda: logs(attempt))
    libvirtd = attempt.source.libvirtd
    libvirtd.signal(signal.SIGSTOP)
    attempt.repairs.append(lambda: libvirtd.signal(signal.SIGCONT))
    attempt.wait_for("stop of the rings", lambda: attempt.status(attempt.source).get("state") != "running")


def after(attempt: Attempt) -> None:
    """The guest runs at the destination, and libvirt may not know yet."""
    attempt.begin(speed=FAST)
    attempt.wait_for("start", lambda: attempt.status(attempt.destination).get("state") == "running")
    attempt.leaving = True


def logs(attempt: Attempt) -> bool:
    """Whether QEMU has the source's port log, and the exchange that starts it is over."""
    return bool(attempt.status(attempt.source).get("log", {}).get("wanted"))


PHASES = {one.__name__: one for one in (before_logging, copying, switching, after)}

# Events


def abort(attempt: Attempt) -> None:
    """`virsh domjobabort`, which waits for its turn where libvirtd is stopped."""
    attempt.source.spawn("abort", ["virsh", "-c", "qemu:///system", "domjobabort", attempt.domain.name])


def kill_destination_qemu(attempt: Attempt) -> None:
    (qemu,) = attempt.destination.running("qemu-system-x86_64")
    attempt.destination.kill(qemu.inner_pid)


def cut_and_abort(attempt: Attempt) -> None:
    attempt.hosts.cut()
    attempt.repairs.append(attempt.hosts.mend)
    abort(attempt)


def kill_source_port(attempt: Attempt) -> None:
    with suppress(ValueError) if attempt.leaving else nullcontext():  # there is none
        attempt.source.kill(attempt.port_pid(attempt.source))


def kill_destination_port(attempt: Attempt) -> None:
    attempt.destination.kill(attempt.port_pid(attempt.destination))


def kill_source_daemon(attempt: Attempt) -> None:
    attempt.source.daemon.kill()
    attempt.repairs.append(attempt.source.start_daemon)


def kill_destination_daemon(attempt: Attempt) -> None:
    attempt.destination.daemon.kill()
    attempt.repairs.append(attempt.destination.start_daemon)


def restart_source_daemon(attempt: Attempt) -> None:
    attempt.source.daemon.stop()
    attempt.source.start_daemon()


def restart_destination_daemon(attempt: Attempt) -> None:
    attempt.destination.daemon.stop()
    attempt.destination.start_daemon()


def kill_source_nic(attempt: Attempt) -> None:
    kill_nic(attempt.source)


def kill_destination_nic(attempt: Attempt) -> None:
    kill_nic(attempt.destination)


def kill_nic(host: BridgedHost) -> None:
    (nic,) = host.running("virt-vdpa-nic")
    host.kill(nic.inner_pid)


def lose_destination_back_end(attempt: Attempt) -> None:
    """The port dies and nobody is there to bring it back: QEMU waits for it without an end."""
    kill = attempt.port_pid(attempt.destination)
    kill_destination_daemon(attempt)
    attempt.destination.kill(kill)


def lose_source_back_end(attempt: Attempt) -> None:
    """The port dies and is not brought back before the guest has left, with its link down to QEMU."""
    pid = attempt.port_pid(attempt.source)
    kill_source_daemon(attempt)
    attempt.source.kill(pid)
    attempt.set_speed(FAST)
    wait_for("the guest to leave", lambda: attempt.destination in attempt.homes(), END)


EVENTS = {
    one.__name__: one
    for one in (
        abort,
        kill_destination_qemu,
        cut_and_abort,
        kill_source_port,
        kill_destination_port,
        kill_source_daemon,
        kill_destination_daemon,
        restart_source_daemon,
        restart_destination_daemon,
        kill_source_nic,
        kill_destination_nic,
        lose_destination_back_end,
        lose_source_back_end,
    )
}
#: Events that have time to happen in one phase only.
ONLY_IN = {"lose_source_back_end": "copying"}
#: What ends the guest itself, see `test_guest_that_dies_where_it_has_arrived`.
FATAL = {("after", "kill_destination_qemu")}
#: Those of every run; the others only with --full.
SAMPLE = {
    ("copying", "abort"),
    ("copying", "kill_source_port"),
    ("copying", "kill_destination_qemu"),
    ("copying", "kill_destination_port"),
    ("copying", "lose_source_back_end"),
    ("switching", "kill_destination_port"),
}
CELLS = [
    pytest.param(phase, event, marks=() if (phase, event) in SAMPLE else pytest.mark.full)
    for phase in PHASES
    for event in EVENTS
    if ONLY_IN.get(event, phase) == phase and (phase, event) not in FATAL
]
#: Events after which a descriptor may be carried out again: who carried it out is dead, and nobody knows.
UNTIDY = (
    "kill_source_port",
    "kill_destination_port",
    "kill_source_nic",
    "kill_destination_nic",
    "lose_source_back_end",
)


@pytest.fixture(scope="module")
def shared() -> DomainXml:
    return DomainXml.example().boot(guest_image(), GUEST_ADDRESS)


@pytest.fixture
def attempt(hosts: TwoHosts, shared: DomainXml) -> Iterator[Attempt]:
    """A migration of one guest for all tests: wherever an earlier one has left it, or a new one."""
    if not any(host.state(shared.name) == "running" and host.ping()[1] for host in hosts.both):
        hosts.remove(shared)
        hosts.a.start_guest(shared)
    made = Attempt(hosts, shared)
    yield made
    with suppress(Exception):
        made.repair()
    if made.migration is not None and made.migration.running:
        made.migration.kill()
    if not made.guest_is_well:
        hosts.remove(shared)


@pytest.mark.parametrize(("phase", "event"), CELLS)
def test_guest_is_well_afterwards(attempt: Attempt, phase: str, event: str) -> None:
    with Traffic(attempt.hosts.a, GUEST_ADDRESS) as traffic:
        PHASES[phase](attempt)
        EVENTS[event](attempt)
        attempt.repair()
        home = assert_truth(attempt)
        assert_one_home(attempt, home)
        traffic.wait_until_flowing(BACK)
        assert traffic.stop().damage(may_double=event in UNTIDY) == []
    attempt.guest_is_well = True


@pytest.mark.full
def test_guest_that_dies_where_it_has_arrived(attempt: Attempt) -> None:
    """It is lost, or goes on at the source where libvirt did not know of the arrival yet."""
    after(attempt)
    kill_destination_qemu(attempt)
    assert attempt.migration is not None
    if attempt.migration.wait(END) != 0:
        assert_one_home(attempt, attempt.source)
        attempt.guest_is_well = True
        return
    for host in attempt.hosts.both:
        assert_nothing_left(attempt, host)


def test_time_out(attempt: Attempt) -> None:
    """virsh suspends the guest when it takes too long, and libvirt resumes it at the destination."""
    with Traffic(attempt.hosts.a, GUEST_ADDRESS) as traffic:
        attempt.begin("--timeout", "1", speed=SLOW)
        attempt.wait_for("pause", lambda: attempt.source.state(attempt.domain.name) == "paused")
        attempt.set_speed(FAST)
        home = assert_truth(attempt)
        assert home is attempt.destination
        assert_one_home(attempt, home)
        traffic.wait_until_flowing(BACK)
        assert traffic.stop().damage() == []
    attempt.guest_is_well = True


def assert_truth(attempt: Attempt) -> BridgedHost:
    """The guest runs where virsh says that it does; that host."""
    assert attempt.migration is not None
    code = attempt.migration.wait(END)
    home = attempt.destination if code == 0 else attempt.source
    wait_for(
        f"the guest to run on {home.name} only, since virsh exited {code}: {attempt.migration.output()}",
        lambda: (
            [host for host in attempt.hosts.both if host.state(attempt.domain.name) == "running"] == [home]
        ),
        TIDY,
    )
    return home


def assert_one_home(attempt: Attempt, home: BridgedHost) -> None:
    """One host has the guest with one VF that does not log, the other has nothing of it."""
    assert_nothing_left(attempt, attempt.hosts.other(home))
    wait_for("the port to serve", lambda: attempt.status(home).get("state") == "running", TIDY)
    assert len(home.lent()) == 1
    wait_for("the port to log no more", lambda: not attempt.status(home)["log"]["wanted"], TIDY)


def assert_nothing_left(attempt: Attempt, host: BridgedHost) -> None:
    """A host has no VF lent and no process of the guest's."""
    wait_for(
        f"{host.name} to have nothing of {attempt.domain.name}",
        lambda: not host.lent() and not host.running("virt-vdpa-port", "qemu-system-x86_64"),
        TIDY,
    )
