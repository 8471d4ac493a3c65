"""What follows, for a migration, from what the ports of its domain do, and from what they do not do in time.

Looks only; what is found is fed to the migration by migration.py.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from libvirt_vdpa.migration_figures import connected, logs, part, runs
from libvirt_vdpa.migration_life import Happening, Phase
from libvirt_vdpa.migration_told import Migration
from libvirt_vdpa.ports import State
from libvirt_vdpa.supervisor import Port

#: Phases in which a port that runs must log.
LOGGED = (Phase.STARTING, Phase.COPYING)
#: States of a port that no QEMU has reached yet, and that is as it should be.
TO_BE_REACHED = (State.IDLE, State.STARTING, State.SERVING)


@dataclass(frozen=True)
class Limits:
    """Times in seconds."""

    #: Between two looks at a migration.
    poll: float = 0.5
    #: For a port to answer in one look.
    answer: float = 1.0
    #: For a port that runs to log, from when the migration is active or the port is back.
    log: float = 2.0
    #: For ports to stop logging when the guest stays.
    quiet: float = 3.0
    #: For a port at the destination to be brought back, and what QEMU, which looks for it from time to time,
    #: has to reach it then; whichever is longer.
    lost: float = 10.0
    reconnect: float = 5.0
    #: Between two tries to end a migration.
    again: float = 2.0
    #: For the rings of a guest that has arrived to run.
    start: float = 0.5
    #: For libvirt to tell what a hook or the ports have told already, and its figures.
    grace: float = 2.0


@dataclass(frozen=True)
class Verdict:
    """What has happened to a migration, by its ports."""

    happening: Happening
    #: The port that something is wrong with, and what; empty where nothing is.
    mac: str = ""
    problem: str = ""


def judge(migration: Migration, ports: Collection[Port], limits: Limits, now: float) -> Verdict | None:
    """Draw conclusions from what the ports of a domain are doing; None when there are none.

    :param now: seconds, by the clock of all calls for this migration.
    """
    if migration.side == "destination":
        return judge_incoming(migration, ports, limits, now)
    if migration.phase in LOGGED or migration.phase is Phase.SWITCHING:
        return judge_logs(migration, ports, limits, now)
    if migration.phase is Phase.RETURNING:
        return judge_quiet(migration, ports, limits, now)
    return None


def judge_logs(migration: Migration, ports: Collection[Port], limits: Limits, now: float) -> Verdict | None:
    """At the source: whether all that runs marks what it writes."""
    for port in ports:
        figures = migration.ports.get(port.record.mac)
        if figures is not None and (problem := figures.log_problem(port)):
            return Verdict(Happening.PROBLEM, port.record.mac, problem)
    if migration.phase not in LOGGED:
        return None
    late = overdue(migration, [port for port in ports if not logs(port)], lambda _: limits.log, now)
    if late is not None:
        problem = f"its writes are not marked after {limits.log:g} s"
        return Verdict(Happening.PROBLEM, late.record.mac, problem)
    return None if migration.waiting_since else Verdict(Happening.LOGGING)


def judge_quiet(migration: Migration, ports: Collection[Port], limits: Limits, now: float) -> Verdict | None:
    """At the source, where the guest stays: whether no port logs any more."""
    loud = [port for port in ports if part(port, "log").get("wanted")]
    late = overdue(migration, loud, lambda _: limits.quiet, now)
    if late is not None:
        problem = f"still marks its writes {limits.quiet:g} s after the migration has ended"
        return Verdict(Happening.QUIET, late.record.mac, problem)
    return None if loud else Verdict(Happening.QUIET)


def judge_incoming(
    migration: Migration, ports: Collection[Port], limits: Limits, now: float
) -> Verdict | None:
    """At the destination: whether the guest runs, or will have to do without a port."""
    if any(runs(port) for port in ports):
        return Verdict(Happening.RUNS)

    def limit(port: Port) -> float:
        return max(limits.lost, port.record.reconnect + limits.reconnect)

    migration.reached.update(port.record.mac for port in ports if connected(port))
    away = [port for port in ports if is_away(port, reached=port.record.mac in migration.reached)]
    late = overdue(migration, away, limit, now)
    if late is None or migration.phase is not Phase.INCOMING:
        return None
    why = late.problem or "QEMU has not come back to it (is there a <reconnect>?)"
    return Verdict(Happening.PROBLEM, late.record.mac, f"not brought back within {limit(late):g} s: {why}")


def is_away(port: Port, *, reached: bool) -> bool:
    """Whether a port is not what it has to be for a QEMU that is to start.

    :param reached: whether that QEMU has been connected to it.
    """
    return not connected(port) if reached else port.state not in TO_BE_REACHED


def overdue(
    migration: Migration, unready: Collection[Port], limit: Callable[[Port], float], now: float
) -> Port | None:
    """Note since when ports are not what they have to be; one that is not for longer than its limit."""
    since = {port.record.mac: migration.waiting_since.get(port.record.mac, now) for port in unready}
    migration.waiting_since = since
    return next((port for port in unready if now - since[port.record.mac] >= limit(port)), None)


def link_is_down(port: Port) -> bool:
    """Whether QEMU reaches a port that its guest has a driver for, and does not use it for no good reason."""
    record = port.record
    idle = connected(port) and not runs(port) and record.negotiated is not None
    return idle and record.link_up and port.status.get("link") != "down"
