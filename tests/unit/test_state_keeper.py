"""When the daemon writes down what a guest uses, with a libvirt and ports that do as they are told."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lxml import etree

from libvirt_vdpa import state_keeper
from libvirt_vdpa.hypervisor import HypervisorError
from libvirt_vdpa.ports import State
from libvirt_vdpa.state import NAMESPACE, InterfaceState, read_state
from libvirt_vdpa.state_keeper import StateKeeper

UUID = "7664d0a0-0001-4000-8000-000000000001"
MAC = "52:54:00:76:64:01"
LOG_ALL, PROTOCOL = 1 << 26, 1 << 30
RING = {"size": 256, "running": True}


class FakePort:
    def __init__(self) -> None:
        self.record = SimpleNamespace(uuid=UUID, mac=MAC, key=(UUID, MAC))
        self.state = State.SERVING
        self.status: dict[str, Any] = {
            "state": "running",
            "features_offered": 0x1F0000000,
            "features_acked": 0x100000000 | LOG_ALL | PROTOCOL,
            "rings": [{"index": index, **RING} for index in range(4)],
        }

    async def query_status(self) -> None:
        return None


class FakeLibvirt:
    """A running domain's metadata."""

    def __init__(self) -> None:
        self.state = ""
        self.writes = 0
        self.error: HypervisorError | None = None

    async def domain_xml(self, uuid: str) -> str:
        return f"<domain><metadata>{self.state}</metadata></domain>"

    async def set_metadata(self, uuid: str, namespace: str, element: str) -> None:
        assert (uuid, namespace) == (UUID, NAMESPACE)
        if self.error is not None:
            raise self.error
        self.state = element
        self.writes += 1

    @property
    def says(self) -> dict[str, InterfaceState]:
        return read_state(etree.fromstring(f"<domain><metadata>{self.state}</metadata></domain>"))


class World:
    def __init__(self) -> None:
        self.port = FakePort()
        self.ports = [self.port]
        self.libvirt = FakeLibvirt()
        self.migrating = False
        #: How often the keeper has set about writing.
        self.tries = 0
        self.keeper = self.another_keeper()

    def another_keeper(self) -> StateKeeper:
        supervisor = SimpleNamespace(
            of_domain=lambda uuid: self.ports, ports={port.record.key: port for port in self.ports}
        )
        return StateKeeper(cast(Any, supervisor), cast(Any, self.libvirt), self._asked)

    def _asked(self, _uuid: str) -> bool:
        self.tries += 1
        return self.migrating

    async def changed(self) -> None:
        self.keeper.port_changed(cast(Any, self.port))
        await self.settle()

    async def changed_in_vain(self) -> None:
        """A change that the keeper has tried to write, and tried again."""
        self.keeper.port_changed(cast(Any, self.port))
        async with asyncio.timeout(5):
            while self.tries < 3:
                await asyncio.sleep(0.001)

    async def settle(self) -> None:
        async with asyncio.timeout(5):
            while self.keeper._writers:
                await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_keeper, "SETTLE", 0.001)
    monkeypatch.setattr(state_keeper, "RETRY_INTERVAL", 0.001)
    monkeypatch.setattr(state_keeper, "LOOK_INTERVAL", 0.005)


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def whole() -> None:
        world = World()
        try:
            await test(world)
        finally:
            world.keeper.stop()

    asyncio.run(whole())


def test_what_a_guest_uses_is_written_once() -> None:
    async def test(world: World) -> None:
        await world.changed()
        # vhost's own bits are no concern of another VF.
        assert world.libvirt.says == {MAC: InterfaceState(MAC, 0x1F0000000, 0x100000000, 2, 256)}
        await world.changed()
        await world.changed()
        assert world.libvirt.writes == 1

    run(test)


def test_what_changes_is_written_again() -> None:
    async def test(world: World) -> None:
        await world.changed()
        world.port.status["features_acked"] = 0x120000000
        await world.changed()
        assert (world.libvirt.writes, world.libvirt.says[MAC].negotiated) == (2, 0x120000000)

    run(test)


def test_queues_that_come_without_a_word_are_seen() -> None:
    async def test(world: World) -> None:
        world.port.status["rings"][2:] = []
        await world.changed()
        assert world.libvirt.says[MAC].queue_pairs == 1
        world.keeper.start()
        world.port.status["rings"] = [{"index": index, **RING} for index in range(6)]
        async with asyncio.timeout(5):
            while world.libvirt.says[MAC].queue_pairs != 3:
                await asyncio.sleep(0.001)

    run(test)


def test_what_is_there_already_is_not_written() -> None:
    # As after a restart of the daemon, or a guest's arrival.
    async def test(world: World) -> None:
        await world.changed()
        world.keeper = world.another_keeper()
        await world.changed()
        assert world.libvirt.writes == 1

    run(test)


def test_a_guest_that_stands_still_uses_what_it_used() -> None:
    async def test(world: World) -> None:
        await world.changed()
        before = world.libvirt.says
        world.port.status.update(state="connected", rings=[], features_acked=0)
        await world.changed()
        assert world.libvirt.says == before

    run(test)


def test_nothing_is_written_before_a_driver_is_up() -> None:
    async def test(world: World) -> None:
        world.port.status.update(state="connected", rings=[], features_acked=0)
        await world.changed()
        assert world.libvirt.writes == 0

    run(test)


def test_nothing_is_written_while_the_domain_migrates() -> None:
    async def test(world: World) -> None:
        world.migrating = True
        await world.changed_in_vain()
        assert world.libvirt.writes == 0
        world.migrating = False
        await world.settle()
        assert world.libvirt.writes == 1

    run(test)


def test_a_libvirt_that_is_busy_is_tried_again() -> None:
    async def test(world: World) -> None:
        world.libvirt.error = HypervisorError("busy")
        await world.changed_in_vain()
        assert world.libvirt.writes == 0
        world.libvirt.error = None
        await world.settle()
        assert world.libvirt.writes == 1

    run(test)


def test_a_domain_that_has_ended_is_left_alone() -> None:
    async def test(world: World) -> None:
        world.libvirt.error = HypervisorError("no such domain")
        await world.changed_in_vain()
        (writer,) = world.keeper._writers.values()
        world.ports.clear()
        await world.changed()
        await asyncio.wait([writer], timeout=5)
        assert writer.cancelled()

    run(test)


def test_a_failure_that_nobody_expected_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        world.libvirt.error = ValueError("odd")  # type: ignore[assignment]
        await world.changed()
        assert f"domain {UUID}: writing its metadata failed" in caplog.text
        world.libvirt.error = None
        await world.changed()
        assert world.libvirt.writes == 1

    run(test)
