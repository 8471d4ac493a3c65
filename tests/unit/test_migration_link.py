"""A guest that arrives with its link down, as its port was away when it left: QEMU is made to come anew."""

from collections.abc import Callable

import libvirt
import pytest

from libvirt_vdpa.migration_life import Phase
from tests.harness.migration_world import MAC, RESUMED, UUID, FakePort, World, run

PAUSED = (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_PAUSED)


async def arrive(world: World, event: tuple[int, int] = RESUMED) -> None:
    """Let the guest arrive while QEMU does not start the rings of its port."""
    world.port.stand_still()
    world.migrations.incoming(UUID)
    world.qemu("active", "completed")
    world.libvirt(event)
    await world.phase(Phase.COMPLETED)


def with_driver() -> FakePort:
    """A port whose guest has a driver up."""
    port = FakePort()
    port.record.negotiated = 1 << 32
    return port


def test_the_link_is_plugged_in_and_the_guest_announced() -> None:
    async def test(world: World) -> None:
        await arrive(world)
        await world.until(lambda: world.port.asked)
        world.port.status["state"] = "running"
        world.changed()
        assert ("late", MAC) in world.announced
        assert world.port.asked == ["disconnect"]

    run(test, with_driver())


def no_driver(port: FakePort) -> None:
    port.record.negotiated = None


def link_down(port: FakePort) -> None:
    port.record.link_up = False


def cable_out(port: FakePort) -> None:
    port.status["link"] = "down"


def away(port: FakePort) -> None:
    port.status["front_end"] = False


@pytest.mark.parametrize("reason", [no_driver, link_down, cable_out, away])
def test_what_is_as_it_should_be_stays(reason: Callable[[FakePort], None]) -> None:
    async def test(world: World) -> None:
        reason(world.port)
        told = len(world.told)
        await arrive(world)
        await world.until(lambda: len(world.told) > told + 3)  # the last word, with the final figures
        assert world.port.asked == []

    run(test, with_driver())


def test_a_guest_that_is_paused_needs_no_rings() -> None:
    async def test(world: World) -> None:
        await arrive(world, PAUSED)
        await world.until(lambda: world.last["ended"] is not None)
        await world.looks()
        assert world.port.asked == []

    run(test, with_driver())


def test_rings_that_run_in_time_are_left_alone() -> None:
    async def test(world: World) -> None:
        await arrive(world)
        world.port.status["state"] = "running"
        world.changed()
        await world.looks()
        assert world.port.asked == []

    run(test, with_driver())
