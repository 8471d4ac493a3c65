"""What is said, and when, of a migration that is to be ended."""

import pytest

from libvirt_vdpa.migration_life import Phase
from libvirt_vdpa.ports import State
from tests.harness.migration_world import LEFT, LIMITS, MAC, RESUMED, UUID, World, copying, run

PROBLEM = "the log is too small"


async def ending(world: World) -> None:
    """Let a port fail that has to log."""
    await copying(world)
    world.port.log(problem=PROBLEM)
    world.changed()
    assert world.last["status"] == "ending"


def test_a_guest_that_left_though_its_log_failed(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        await ending(world)
        world.qemu("completed")
        world.libvirt(LEFT)
        assert world.last["status"] == "completed"
        # No migration was ended by it.
        assert world.port.problem == ""

    run(test)
    (line,) = [record for record in caplog.records if "has left though" in record.getMessage()]
    assert (line.levelname, PROBLEM in line.getMessage()) == ("ERROR", True)


def test_a_port_has_ended_a_migration_only_once_it_has_ended() -> None:
    async def test(world: World) -> None:
        await ending(world)
        assert world.port.problem == ""
        world.qemu("cancelled")
        world.port.log(wanted=False)
        await world.phase(Phase.FAILED)
        assert world.port.problem == f"migration ended: {PROBLEM}"

    run(test)


def test_a_guest_that_arrived_though_its_port_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        world.port.stand_still()
        world.migrations.incoming(UUID)
        world.port.state = State.RETRYING
        await world.looks()
        world.now = LIMITS.lost
        await world.phase(Phase.REFUSING)
        world.libvirt(RESUMED)

    run(test)
    assert "the guest has arrived though its migration was to be ended" in caplog.text


def test_qemu_has_the_time_that_its_xml_gives_it_to_come_back() -> None:
    async def test(world: World) -> None:
        world.port.record.reconnect = 30
        world.port.stand_still()
        world.migrations.incoming(UUID)
        await world.looks()
        world.port.status["front_end"] = False
        await world.looks()
        world.now = 34.9
        await world.looks()
        assert world.last["status"] == "incoming"
        world.now = 35.0
        await world.phase(Phase.REFUSING)
        assert world.last["reason"].startswith(f"interface {MAC}: not brought back within 35 s: ")

    run(test)
