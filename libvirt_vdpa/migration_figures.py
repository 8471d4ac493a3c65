"""What is known of a migration in numbers, put into one form whoever told it.

libvirt (virDomainGetJobStats) and QEMU (query-migrate) name the same things differently; a port tells what
it has marked since its device was opened, and a migration wants to know what it has cost.
"""

from collections.abc import Mapping

from libvirt_vdpa.ports import State
from libvirt_vdpa.supervisor import Port

#: Our name -> libvirt's (VIR_DOMAIN_JOB_*). Sizes in bytes, times in milliseconds, rates in pages a second.
LIBVIRT_NAMES = {
    "total": "data_total",
    "transferred": "data_processed",
    "remaining": "data_remaining",
    "iteration": "memory_iteration",
    "dirty_rate": "memory_dirty_rate",
    "page_size": "memory_page_size",
    "elapsed_ms": "time_elapsed",
    "downtime_ms": "downtime",
    "setup_ms": "setup_time",
}
#: The same -> query-migrate's (QEMU qapi/migration.json, MigrationInfo), as a path.
QEMU_NAMES = {
    "total": ("ram", "total"),
    "transferred": ("ram", "transferred"),
    "remaining": ("ram", "remaining"),
    "iteration": ("ram", "dirty-sync-count"),
    "dirty_rate": ("ram", "dirty-pages-rate"),
    "page_size": ("ram", "page-size"),
    "elapsed_ms": ("total-time",),
    "downtime_ms": ("downtime",),
    "setup_ms": ("setup-time",),
}


def from_libvirt(job: Mapping[str, object], *, ended: bool = True) -> dict[str, int]:
    """Figures of libvirt's job; what it does not know is left out.

    :param ended: whether the job has: before, its downtime is what QEMU may take and not what it took.
    """
    names = LIBVIRT_NAMES if ended else {**LIBVIRT_NAMES, "downtime_ms": ""}
    found = {name: job.get(theirs) for name, theirs in names.items()}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def from_qemu(answer: Mapping[str, object]) -> dict[str, int]:
    """Figures of query-migrate; what it does not know is left out."""
    found: dict[str, int] = {}
    for name, path in QEMU_NAMES.items():
        value: object = answer
        for part in path:
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, int):
            found[name] = value
    return found


def part(port: Port, name: str) -> Mapping[str, object]:
    """A part of a port's status, empty where it tells none."""
    found = port.status.get(name)
    return found if isinstance(found, Mapping) else {}


def count(port: Port, name: str) -> int:
    """A counter of a port's log since its device was opened."""
    value = part(port, "log").get(name)
    return value if isinstance(value, int) else 0


def serves(port: Port) -> bool:
    """Whether a port's process answers."""
    return port.state is State.SERVING


def connected(port: Port) -> bool:
    """Whether a QEMU is connected to a port."""
    return serves(port) and bool(port.status.get("front_end"))


def runs(port: Port) -> bool:
    """Whether a port's VF works on rings of the guest."""
    return serves(port) and port.status.get("state") == "running"


class PortFigures:
    """What one port has done in one migration; kept when the port has ended."""

    def __init__(self, port: Port) -> None:
        """Count from now on."""
        self.mac = port.record.mac
        self._process = port.record.pid
        self._pages = count(port, "pages")
        self._missed = count(port, "missed")
        #: What earlier processes of the port had counted.
        self._earlier = 0
        self.latest: dict[str, object] = {}
        self.update(port)

    def update(self, port: Port) -> None:
        """Take down what the port tells now."""
        if not serves(port) or not port.status:
            return
        if port.record.pid != self._process:
            # Another process counts from 0.
            pages = self.latest.get("pages")
            self._earlier = pages if isinstance(pages, int) else 0
            self._process, self._pages, self._missed = port.record.pid, 0, 0
        log = part(port, "log")
        self.latest = {
            "mac": self.mac,
            # The mode stays in the record when the rings have stopped.
            "mode": log.get("mode") or self.latest.get("mode"),
            "pages": self._earlier + count(port, "pages") - self._pages,
            "missed": self.missed(port),
            "restarts": port.restarts,
            # As the port tells them.
            "log": dict(log),
            "timing": dict(part(port, "timing")),
            "announce": dict(part(port, "announce")),
            "pauses": port.status.get("pauses", []),
        }

    def missed(self, port: Port) -> int:
        """Writes of this migration that the log had no place for."""
        return max(0, count(port, "missed") - self._missed)

    def log_problem(self, port: Port) -> str:
        """Why the port's log cannot be relied on; empty when nothing is wrong with it."""
        problem = part(port, "log").get("problem")
        if isinstance(problem, str) and problem:
            return problem
        if missed := self.missed(port):
            return f"{missed} writes of the VF were outside the log"
        return ""


def logs(port: Port) -> bool:
    """Whether a port marks all that it writes, or writes nothing.

    The process of a port may be older than the daemon and not tell: it is believed that it does.
    """
    log = part(port, "log")
    return not runs(port) or not log or (bool(log.get("wanted")) and log.get("mode") is not None)
