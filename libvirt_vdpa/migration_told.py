"""One migration as this host sees it, and how it is told: to clients, and in the log."""

import asyncio
import time
from collections.abc import Mapping

from libvirt_vdpa.migration_figures import PortFigures
from libvirt_vdpa.migration_life import MigrationLife, Phase
from libvirt_vdpa.supervisor import Port


class Migration:
    """One migration of one domain, as this host sees it."""

    def __init__(self, uuid: str, side: str, ports: list[Port]) -> None:
        """It begins.

        :param side: "source" or "destination".
        """
        self.uuid = uuid
        self.domain = ports[0].record.domain if ports else ""
        self.side = side
        self.life = MigrationLife(Phase.SETUP if side == "source" else Phase.INCOMING)
        #: What libvirt does; at the source "save", "snapshot" and "dump" are migrations to QEMU as well.
        self.operation: object = None
        #: Why it has failed, or is being ended.
        self.reason = ""
        self.begun = time.time()
        self.ended: float | None = None
        #: All has been said of it.
        self.concluded = False
        self.progress: dict[str, int] = {}
        self.ports = {port.record.mac: PortFigures(port) for port in ports}
        #: The guest stands still where it has arrived, as its user wants it.
        self.paused = False
        #: libvirt has told the final figures.
        self.counted = asyncio.Event()
        #: MAC -> since when, by the caller's clock, the port is not what it has to be.
        self.waiting_since: dict[str, float] = {}
        #: MAC -> what is wrong with the port for which we are ending it.
        self.blamed: dict[str, str] = {}
        #: MACs of ports that a QEMU had reached.
        self.reached: set[str] = set()

    @property
    def phase(self) -> Phase:
        """Where it is."""
        return self.life.phase

    def describe(self) -> dict[str, object]:
        """As events and query-migrations show it."""
        return {
            "domain": self.domain,
            "uuid": self.uuid,
            "side": self.side,
            "operation": self.operation,
            "status": self.phase.value,
            "reason": self.reason or None,
            "begun": self.begun,
            "ended": self.ended,
            "progress": self.progress,
            "ports": [dict(figures.latest) for figures in self.ports.values()],
        }


def summary(migration: Migration) -> str:
    """One line for the log."""
    figures = migration.progress
    words = [f"{migration.side}: {migration.phase.value}"]
    if migration.reason:
        words.append(migration.reason)
    if migration.operation not in (None, "migration"):
        words[0] = f"{migration.operation}: {migration.phase.value}"
    if migration.side == "source" and migration.phase is Phase.COMPLETED:
        words.append(f"{figures.get('elapsed_ms', '?')} ms, downtime {figures.get('downtime_ms', '?')} ms")
    for port in migration.ports.values():
        latest = port.latest
        if migration.side == "source":
            words.append(f"{port.mac}: {latest.get('pages', '?')} pages marked ({latest.get('mode')})")
        else:
            words.append(f"{port.mac}: started {shown_timing(latest.get('timing'))}")
    return "; ".join(words)


def shown_timing(timing: object) -> str:
    """How long a port took to start."""
    start = timing.get("start") if isinstance(timing, Mapping) else None
    if not isinstance(start, Mapping):
        return "at an unknown cost"
    return f"in {start.get('handlers_ms')} ms of its handlers, {start.get('memory_ms')} ms of them for memory"
