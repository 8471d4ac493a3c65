"""A host whose libvirt, QEMU and ports do as a test tells them: what `Migrations` sees of the world."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import libvirt

from libvirt_vdpa.hypervisor import HypervisorError
from libvirt_vdpa.migration import Migrations
from libvirt_vdpa.migration_judge import Limits
from libvirt_vdpa.migration_life import Phase
from libvirt_vdpa.ports import State

UUID = "7664d0a0-0001-4000-8000-000000000001"
MAC = "52:54:00:76:64:01"
#: Looks are made by the tests; what is done again is done soon.
LIMITS = Limits(poll=0.002, again=0.002, start=0.02, grace=0.05, log=2.0, quiet=3.0, lost=10.0)
STARTED = (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_BOOTED)
RESUMED = (libvirt.VIR_DOMAIN_EVENT_RESUMED, libvirt.VIR_DOMAIN_EVENT_RESUMED_MIGRATED)
SUSPENDED = (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED)
LEFT = (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED)


class FakePort:
    """A port whose guest uses it, unless told otherwise."""

    def __init__(self, mac: str = MAC, announce: str = "auto") -> None:
        self.record = SimpleNamespace(
            uuid=UUID,
            mac=mac,
            key=(UUID, mac),
            domain="a",
            label=f"a/{mac}",
            pid=1,
            announce=announce,
            negotiated=None,
            arriving=False,
            link_up=True,
            reconnect=1,
        )
        #: Commands that it was given.
        self.asked: list[str] = []
        self.state = State.SERVING
        self.problem = ""
        self.restarts = 0
        self.status: dict[str, Any] = {
            "state": "running",
            "front_end": True,
            "log": {"wanted": False, "mode": None, "problem": None, "pages": 100, "missed": 0},
        }

    def arrived(self) -> None:
        self.record.arriving = False

    async def query_status(self) -> None:
        return None

    async def ask(self, command: str, arguments: Mapping[str, object]) -> object:
        self.asked.append(command)
        return {}

    def log(self, **members: object) -> None:
        self.status["log"] = {**self.status["log"], **members}

    def stand_still(self) -> None:
        self.status["state"] = "connected"


class FakeHypervisor:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: HypervisorError | None = None
        self.figures: dict[str, object] = {"data_total": 10, "side": "source", "operation": "migration"}

    async def _note(self, call: str) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    async def abort_job(self, uuid: str) -> None:
        await self._note("abort")

    async def destroy_incoming(self, uuid: str) -> None:
        await self._note("destroy")

    async def job(self, uuid: str) -> dict[str, object]:
        return self.figures


class FakeMonitors:
    def __init__(self) -> None:
        self.followed: set[str] = set()
        self.calls: list[str] = []
        self.present = False

    def follow(self, uuid: str) -> None:
        self.followed.add(uuid)

    def leave(self, uuid: str) -> None:
        self.followed.discard(uuid)

    def has(self, uuid: str) -> bool:
        return self.present

    async def execute(self, uuid: str, command: str) -> object:
        self.calls.append(command)
        if not self.present:
            raise HypervisorError("no monitor")
        return {"ram": {"remaining": 7}}


class World:
    """A host with one domain."""

    def __init__(self, *ports: FakePort) -> None:
        self.ports = list(ports) or [FakePort()]
        self.hypervisor = FakeHypervisor()
        self.monitors = FakeMonitors()
        self.announced: list[tuple[str, object]] = []
        self.told: list[dict[str, object]] = []
        self.now = 0.0
        supervisor = SimpleNamespace(of_domain=lambda uuid: self.ports if uuid == UUID else [])
        announcer = SimpleNamespace(
            arrived=lambda uuid, ports: self.announced.append(("arrived", [p.record.mac for p in ports])),
            late=lambda uuid, port: self.announced.append(("late", port.record.mac)),
            stop=lambda: None,
        )
        self.migrations = Migrations(
            cast(Any, supervisor),
            cast(Any, self.hypervisor),
            cast(Any, self.monitors),
            cast(Any, announcer),
            self.told.append,
            LIMITS,
            lambda: self.now,
        )
        self.libvirt(STARTED)

    @property
    def port(self) -> FakePort:
        return self.ports[0]

    @property
    def last(self) -> Mapping[str, Any]:
        return self.told[-1]

    def qemu(self, *statuses: str) -> None:
        for status in statuses:
            self.migrations.monitor_event(UUID, "MIGRATION", {"status": status})

    def libvirt(self, event: tuple[int, int]) -> None:
        self.migrations.lifecycle_event(UUID, *event)

    def changed(self, port: FakePort | None = None) -> None:
        self.migrations.port_changed(cast(Any, port or self.port))

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.001)

    async def phase(self, phase: Phase) -> None:
        await self.until(lambda: self.told and self.last["status"] == phase.value)

    async def looks(self) -> None:
        """Let a few looks pass."""
        await asyncio.sleep(10 * LIMITS.poll)


def run(test: Callable[[World], Awaitable[None]], *ports: FakePort) -> None:
    async def whole() -> None:
        world = World(*ports)
        try:
            await test(world)
        finally:
            world.migrations.stop()

    asyncio.run(whole())


async def copying(world: World) -> None:
    """Bring a migration to where memory is copied and the port logs."""
    world.qemu("setup", "active")
    world.port.log(wanted=True, mode="hardware")
    world.changed()
    await world.phase(Phase.COPYING)
