"""What happens to the ports of a domain while it migrates, on either side.

QEMU makes the ports log, libvirt moves the guest; this sees to it that neither ends in a guest that has lost
writes or its network. At the source: every port that runs must mark what it writes, or the migration is
cancelled. At the destination: a port that cannot be brought back ends the migration, since QEMU would wait
for it for ever, or go on without it. migration_life.py is the table of what follows from what; here is
where its happenings come from (libvirt, QEMU, ports, hooks) and how its actions are carried out.

Nothing here waits for libvirt where a hook waits for us.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import libvirt

from libvirt_vdpa.announce import Announcer
from libvirt_vdpa.background import Tasks
from libvirt_vdpa.client import ControlError
from libvirt_vdpa.hypervisor import Hypervisor, HypervisorError
from libvirt_vdpa.migration_figures import PortFigures, connected, from_libvirt, from_qemu, runs
from libvirt_vdpa.migration_judge import LOGGED, Limits, judge, link_is_down
from libvirt_vdpa.migration_life import ENDS, Action, Happening, Phase
from libvirt_vdpa.migration_told import Migration, summary
from libvirt_vdpa.monitor import GuestMonitors
from libvirt_vdpa.supervisor import Port, Supervisor

logger = logging.getLogger(__name__)

#: Ended migrations that query-migrations still tells of.
REMEMBERED = 32
#: Seconds between looks at ports that are about to run.
LOOK_INTERVAL = 0.01
#: `status` of QEMU's MIGRATION event (qapi/migration.json, MigrationStatus) -> what it means.
STATUSES = {
    "active": Happening.ACTIVE,
    "pre-switchover": Happening.SWITCH,
    "device": Happening.SWITCH,
    "completed": Happening.SENT,
    "failed": Happening.STOPPED,
    "cancelled": Happening.STOPPED,
}
#: Phases in which libvirt knows of a job.
ACTIVE = (*LOGGED, Phase.SWITCHING, Phase.LEAVING, Phase.ENDING)
#: How the problem of a port begins that has ended a migration.
ENDED = "migration ended: "


class Migrations:
    """All migrations of this host's domains that have ports. Used in the event loop."""

    def __init__(
        self,
        supervisor: Supervisor,
        hypervisor: Hypervisor,
        monitors: GuestMonitors,
        announcer: Announcer,
        tell: Callable[[dict[str, object]], None],
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """None is under way.

        :param tell: called with a description whenever one has changed.
        """
        self._supervisor = supervisor
        self._hypervisor = hypervisor
        self._monitors = monitors
        self._announcer = announcer
        self._notify = tell
        self._limits = limits or Limits()
        self._clock = clock
        #: UUID -> the migration that is under way, or was the last of a domain that has ports still.
        self._current: dict[str, Migration] = {}
        self._past: deque[Migration] = deque(maxlen=REMEMBERED)
        self._tasks = Tasks()
        #: UUIDs of domains that libvirt has told to be there: what migrates before that comes here.
        self._started: set[str] = set()
        #: (UUID, MAC) of ports that were not there when their guest arrived.
        self._late: set[tuple[str, str]] = set()

    def stop(self) -> None:
        """Let whatever is under way go on without us."""
        self._tasks.stop()
        self._announcer.stop()

    def migrating(self, uuid: str) -> bool:
        """Whether a migration of the domain is under way here."""
        return uuid in self._current and self._current[uuid].phase not in ENDS

    def describe(self, uuid: str, mac: str) -> dict[str, object] | None:
        """The domain's migration, or its last one, with what it means for one port."""
        if (migration := self._current.get(uuid)) is None:
            return None
        figures = migration.ports.get(mac)
        shown = {**migration.describe(), "port": dict(figures.latest) if figures else None}
        del shown["ports"]
        return shown

    def describe_all(self) -> list[dict[str, object]]:
        """All that are under way, and the last ones."""
        ended = [migration.describe() for migration in self._past]
        return [*ended, *(m.describe() for m in self._current.values() if m.phase not in ENDS)]

    # Told by hooks

    def incoming(self, uuid: str) -> None:
        """The domain is about to be started here as the destination of a migration. Idempotent."""
        migration = self._current.get(uuid)
        if migration is not None and migration.side == "source":
            # It was followed until libvirt says more; what is here now is another QEMU, or none yet.
            self._feed(migration, Happening.GONE, "the domain has ended")
        if not self.migrating(uuid):
            self._begin(uuid, "destination")

    def ended(self, uuid: str) -> None:
        """The domain's QEMU has left this host. Idempotent."""
        self._monitors.leave(uuid)
        self._started.discard(uuid)
        self._late = {key for key in self._late if key[0] != uuid}
        migration = self._current.get(uuid)
        reason = "the domain has ended"
        if migration is None or migration.phase in ENDS:
            return
        if migration.side == "destination":
            self._feed(migration, Happening.GONE, reason)
        else:
            # libvirt says more precisely what has happened, but after its hooks.
            self._start(self._feed_later(migration, Happening.GONE, reason))

    # Told by libvirt and QEMU: events.Listener

    def libvirt_found(self, jobs: Mapping[str, Mapping[str, object] | None]) -> None:
        """Take up what has happened while nobody told us."""
        for uuid, job in jobs.items():
            if not self._supervisor.of_domain(uuid):
                continue
            self._monitors.follow(uuid)
            self._started.add(uuid)
            arriving = any(port.record.arriving for port in self._supervisor.of_domain(uuid))
            if job is None:
                if arriving:
                    self.incoming(uuid)  # if it is here already, its rings or libvirt will tell
            elif job.get("side") == "destination":
                self.incoming(uuid)
            # A job that passes over the memory is a migration to QEMU, whatever it is to libvirt.
            elif job.get("side") == "source" or job.get("memory_iteration"):
                self.monitor_event(uuid, "MIGRATION", {"status": "active"})
            elif arriving:
                self._found_here(uuid)
            elif not job and self.migrating(uuid):
                self._nothing_is_done(self._current[uuid])
        for uuid, migration in self._current.items():
            if uuid not in jobs and migration.side == "source":
                self._feed(migration, Happening.GONE, "the domain ended while libvirt was away")

    def _found_here(self, uuid: str) -> None:
        """A guest has come here, and nobody has told us."""
        if not self.migrating(uuid):
            self._begin(uuid, "destination")
        self._feed(self._current[uuid], Happening.RUNS)

    def lifecycle_event(self, uuid: str, event: int, detail: int) -> None:
        """A domain was started, stopped, suspended, or resumed."""
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            self._started.discard(uuid)
        if not self._supervisor.of_domain(uuid) and uuid not in self._current:
            return
        if event == libvirt.VIR_DOMAIN_EVENT_STARTED:
            self._monitors.follow(uuid)
            self._started.add(uuid)
        if (migration := self._current.get(uuid)) is None:
            return
        if event == libvirt.VIR_DOMAIN_EVENT_RESUMED:
            self._stays(migration, Happening.RUNS, "the destination could not go on; the guest runs here")
        elif event == libvirt.VIR_DOMAIN_EVENT_SUSPENDED:
            if migration.side == "source" and detail == libvirt.VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED:
                self._feed(migration, Happening.SWITCH)
            elif migration.phase is Phase.ARRIVING:
                migration.paused = True
                self._feed(migration, Happening.RUNS)
        elif event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            left = detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED
            self._feed(migration, Happening.LEFT if left else Happening.GONE, "the domain has ended")

    def iteration_event(self, uuid: str, iteration: int) -> None:
        """Another pass over the memory: at the source."""
        self.monitor_event(uuid, "MIGRATION", {"status": "active"})
        if (migration := self._current.get(uuid)) is not None:
            migration.progress["iteration"] = iteration

    def job_event(self, uuid: str, figures: Mapping[str, object]) -> None:
        """A job has ended well."""
        if (migration := self._current.get(uuid)) is not None:
            migration.progress.update(from_libvirt(figures))
            migration.counted.set()

    def monitor_event(self, uuid: str, name: str, data: Mapping[str, object]) -> None:
        """An event of a domain's QEMU, by whichever way."""
        status = data.get("status")
        if name != "MIGRATION" or not isinstance(status, str):
            return
        if status == "setup" and (migration := self._current.get(uuid)) is not None:
            self._stays(migration, Happening.AGAIN, "another migration has begun")
        # Only a beginning begins one: what comes later than its end belongs to the one that has ended.
        if status in ("setup", "active") and not self.migrating(uuid) and self._supervisor.of_domain(uuid):
            # A restored domain arrives as well.
            self._begin(uuid, "source" if uuid in self._started else "destination")
        if (migration := self._current.get(uuid)) is not None and status in STATUSES:
            self._feed(migration, STATUSES[status], f"QEMU says: migration {status}")

    # Told by the supervisor

    def port_changed(self, port: Port) -> None:
        """Whatever happened to a port."""
        uuid, mac = port.record.key
        if (uuid, mac) in self._late and runs(port):
            self._late.discard((uuid, mac))
            self._announcer.late(uuid, port)
        self._forget(uuid)
        if self.migrating(uuid):
            if not self._supervisor.of_domain(uuid):
                self.ended(uuid)
            self._take_down(self._current[uuid])
            self._judge(self._current[uuid])

    # How one goes on

    def _begin(self, uuid: str, side: str) -> None:
        ports = self._supervisor.of_domain(uuid)
        for port in ports:
            if port.problem.startswith(ENDED):
                port.problem = ""
            if side == "source":
                port.arrived()  # or it could not leave
        migration = self._current[uuid] = Migration(uuid, side, ports)
        logger.info("domain '%s': migration: %s: begins", migration.domain, side)
        self._tell(migration)
        self._start(self._attend(migration))

    def _feed(self, migration: Migration, happening: Happening, reason: str = "") -> None:
        before = migration.phase
        action = migration.life.feed(happening)
        if migration.phase is before:
            return
        # Of several reasons the first is the cause.
        if migration.phase in (Phase.ENDING, Phase.RETURNING, Phase.REFUSING, Phase.FAILED):
            migration.reason = migration.reason or reason
        logger.info(
            "domain '%s': migration: %s -> %s (%s)",
            migration.domain,
            before.value,
            migration.phase.value,
            happening.value,
        )
        migration.waiting_since.clear()
        ACTIONS[action](self, migration)
        self._tell(migration)
        if migration.phase not in ENDS:
            self._judge(migration)

    def _stays(self, migration: Migration, happening: Happening, reason: str) -> None:
        """Something happens that shows that the guest is still on this host."""
        if migration.phase is Phase.LEAVING and migration.operation not in (None, "migration"):
            # It was only written to a file.
            self._feed(migration, Happening.LEFT)
        self._feed(migration, happening, reason)

    async def _feed_later(self, migration: Migration, happening: Happening, reason: str) -> None:
        await asyncio.sleep(self._limits.grace)
        self._feed(migration, happening, reason)

    def _tell(self, migration: Migration) -> None:
        self._notify(migration.describe())

    async def _attend(self, migration: Migration) -> None:
        """Look at a migration from time to time until it has ended."""
        while migration.phase not in ENDS:
            before = migration.describe()
            await self.look(migration)
            if migration.phase not in ENDS and migration.describe() != before:
                self._tell(migration)
            await asyncio.sleep(self._limits.poll)

    async def look(self, migration: Migration) -> None:
        """Ask ports, and QEMU or libvirt, how it goes."""
        await asyncio.gather(self._ask_ports(migration), self._ask_progress(migration))
        if migration.phase not in ENDS:
            self._judge(migration)

    async def _ask_ports(self, migration: Migration) -> None:
        async def ask(port: Port) -> None:
            async with asyncio.timeout(self._limits.answer):
                await port.query_status()

        ports = self._supervisor.of_domain(migration.uuid)
        # Who does not answer is the supervisor's.
        results = await asyncio.gather(*(ask(port) for port in ports), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, ControlError | TimeoutError):
                raise result
        self._take_down(migration)

    def _take_down(self, migration: Migration) -> None:
        for port in self._supervisor.of_domain(migration.uuid):
            if (figures := migration.ports.get(port.record.mac)) is None:
                figures = migration.ports[port.record.mac] = PortFigures(port)
            figures.update(port)
            migration.domain = port.record.domain

    async def _ask_progress(self, migration: Migration) -> None:
        if migration.side != "source":
            return
        try:
            by_qemu = self._monitors.has(migration.uuid) and migration.operation is not None
            # Whether the guest has left is libvirt's to say.
            if by_qemu and migration.phase is not Phase.LEAVING:
                answer = await self._monitors.execute(migration.uuid, "query-migrate")
                if isinstance(answer, Mapping):
                    migration.progress.update(from_qemu(answer))
                return
            job = await self._hypervisor.job(migration.uuid)
        except HypervisorError as error:
            logger.debug("domain '%s': %s", migration.domain, error)
            return
        migration.operation = job.get("operation") or migration.operation
        migration.progress.update(from_libvirt(job, ended=False))
        if not job:
            self._nothing_is_done(migration)

    def _nothing_is_done(self, migration: Migration) -> None:
        """libvirt does nothing with the domain, and it is here: a migration that was active has failed."""
        if migration.phase in ACTIVE:
            self._stays(migration, Happening.STOPPED, "libvirt has ended it")

    def _judge(self, migration: Migration) -> None:
        """Draw conclusions from what the ports are doing."""
        ports = self._supervisor.of_domain(migration.uuid)
        verdict = judge(migration, ports, self._limits, self._clock())
        if verdict is None:
            return
        reason = ""
        if verdict.happening is Happening.PROBLEM:
            reason = f"interface {verdict.mac}: {verdict.problem}"
            logger.error("domain '%s': the migration is ended: %s", migration.domain, reason)
            migration.blamed[verdict.mac] = verdict.problem
        elif verdict.problem:
            logger.error("%s/%s: %s", migration.domain, verdict.mac, verdict.problem)
            migration.reason += f"; {verdict.mac} {verdict.problem}"
        self._take_down(migration)
        self._feed(migration, verdict.happening, reason)

    # What the table orders

    def _take_figures(self, migration: Migration) -> None:
        self._start(self._ask_ports(migration))

    def _cancel(self, migration: Migration) -> None:
        self._start(self._repeat(migration, Phase.ENDING, self._cancel_once))

    async def _cancel_once(self, uuid: str) -> None:
        try:
            await self._monitors.execute(uuid, "migrate_cancel")
        except HypervisorError:
            await self._hypervisor.abort_job(uuid)

    def _refuse(self, migration: Migration) -> None:
        self._start(self._repeat(migration, Phase.REFUSING, self._refuse_once))

    async def _refuse_once(self, uuid: str) -> None:
        # What libvirt says of a domain is not enough to destroy it: one that leaves looks much the same.
        if not any(port.record.arriving for port in self._supervisor.of_domain(uuid)):
            raise HypervisorError("no port of it was made for a guest that is to come")
        await self._hypervisor.destroy_incoming(uuid)

    async def _repeat(
        self, migration: Migration, phase: Phase, work: Callable[[str], Awaitable[None]]
    ) -> None:
        """Do something again and again until it has worked: the migration has left the phase."""
        complained = False
        while migration.phase is phase:
            try:
                await work(migration.uuid)
            except HypervisorError as error:
                level = logging.DEBUG if complained else logging.ERROR
                logger.log(level, "domain '%s': the migration cannot be ended: %s", migration.domain, error)
                complained = True
            await asyncio.sleep(self._limits.again)

    def _welcome(self, migration: Migration) -> None:
        ports = self._supervisor.of_domain(migration.uuid)
        self._late |= {port.record.key for port in ports if not connected(port)}
        for port in ports:
            port.arrived()
        self._announcer.arrived(migration.uuid, [port for port in ports if connected(port)])
        self._finish(migration)

    def _finish(self, migration: Migration) -> None:
        migration.ended = time.time()
        self._blame(migration)
        self._past.append(migration)
        self._start(self._conclude(migration))

    def _blame(self, migration: Migration) -> None:
        """Say of a port that it has ended a migration, or that it should have and could not."""
        if migration.phase is Phase.FAILED:
            for port in self._supervisor.of_domain(migration.uuid):
                if (problem := migration.blamed.get(port.record.mac)) is not None:
                    port.problem = port.problem or f"{ENDED}{problem}"
        elif migration.blamed:
            gone = "left" if migration.side == "source" else "arrived"
            text = "domain '%s': the guest has %s though its migration was to be ended: %s"
            logger.error(text, migration.domain, gone, migration.reason)

    async def _conclude(self, migration: Migration) -> None:
        """Say how it went, with libvirt's and the ports' final figures."""
        if migration.phase is Phase.COMPLETED and migration.side == "source":
            await self._within(self._limits.grace, migration.counted.wait())
        elif (
            migration.phase is Phase.COMPLETED
            and not migration.paused
            and not await self._within(self._limits.start, self._rings(migration))
        ):
            await self._plug_in(migration)
            await self._within(self._limits.grace, self._rings(migration))
        await self._ask_ports(migration)
        level = logging.INFO if migration.phase is Phase.COMPLETED else logging.WARNING
        logger.log(level, "domain '%s': migration: %s", migration.domain, summary(migration))
        self._tell(migration)
        migration.concluded = True
        self._forget(migration.uuid)

    def _forget(self, uuid: str) -> None:
        """Keep the last migration of no domain that is gone; `_past` has the last ones of all."""
        migration = self._current.get(uuid)
        if migration is not None and migration.concluded and not self._supervisor.of_domain(uuid):
            del self._current[uuid]

    @staticmethod
    async def _within(limit: float, work: Awaitable[object]) -> bool:
        """Wait for something for so many seconds; whether it has come."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await work
            return True
        return False

    async def _plug_in(self, migration: Migration) -> None:
        """Have QEMU come anew to ports that it reaches and does not use.

        A port that was away when the guest left its host is a link that is down to QEMU there. That goes with
        the guest, and QEMU here starts no ring; it takes the link up when its back-end comes back.
        """
        for port in self._supervisor.of_domain(migration.uuid):
            if link_is_down(port):
                text = "%s: its guest arrived with the link down; QEMU is to come anew"
                logger.warning(text, port.record.label)
                self._late.add(port.record.key)
                with contextlib.suppress(ControlError):  # the supervisor brings back who does not answer
                    await port.ask("disconnect", {})

    async def _rings(self, migration: Migration) -> None:
        """Wait until the ports of a guest that has arrived run."""
        while not all(runs(port) for port in self._supervisor.of_domain(migration.uuid)):
            await asyncio.sleep(LOOK_INTERVAL)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.start(work, "following a migration")


ACTIONS: dict[Action, Callable[[Migrations, Migration], None]] = {
    Action.NONE: lambda migrations, migration: None,
    Action.TAKE_FIGURES: Migrations._take_figures,
    Action.CANCEL: Migrations._cancel,
    Action.REFUSE: Migrations._refuse,
    Action.WELCOME: Migrations._welcome,
    Action.FINISH: Migrations._finish,
}
