"""Migrations that follow one another closely, and guests that are not what they seem."""

from libvirt_vdpa.migration_life import Phase
from libvirt_vdpa.ports import State
from tests.harness.migration_world import (
    LEFT,
    LIMITS,
    MAC,
    RESUMED,
    UUID,
    World,
    copying,
    run,
)


def statuses(world: World) -> list[tuple[object, object]]:
    """Side and status of all migrations that were told."""
    return [(each["side"], each["status"]) for each in world.migrations.describe_all()]


async def refusing(world: World) -> None:
    """Let a guest be on its way here whose port is lost for good."""
    world.port.stand_still()
    world.migrations.incoming(UUID)
    world.qemu("active")
    world.port.state = State.RETRYING
    await world.looks()
    world.now = LIMITS.lost
    await world.phase(Phase.REFUSING)


def test_a_second_one_begins_at_once_after_a_failed_one() -> None:
    async def test(world: World) -> None:
        await copying(world)
        world.qemu("failed")
        world.qemu("setup", "active")
        await world.looks()
        assert statuses(world) == [("source", "failed"), ("source", "copying")]
        assert "still marks" not in str(world.migrations.describe_all()[0]["reason"])

    run(test)


def test_a_paused_guest_whose_migration_fails_late_can_leave_again() -> None:
    # Nothing resumes it, so nothing but the want of a job tells that it stays.
    async def test(world: World) -> None:
        world.port.stand_still()
        world.qemu("setup", "active", "completed")
        assert world.last["status"] == "leaving"
        world.hypervisor.figures = {}
        await world.phase(Phase.FAILED)
        world.qemu("setup")
        assert statuses(world)[-1] == ("source", "setup")

    run(test)


def test_the_guest_is_asked_of_libvirt_though_qemu_can_be_asked() -> None:
    async def test(world: World) -> None:
        world.monitors.present = True
        await copying(world)
        await world.looks()
        world.port.log(wanted=False, mode=None)
        world.hypervisor.figures = {}
        world.qemu("completed")
        await world.phase(Phase.FAILED)

    run(test)


def test_a_guest_that_comes_back_at_once() -> None:
    async def test(world: World) -> None:
        await copying(world)
        world.qemu("pre-switchover", "completed")
        world.migrations.ended(UUID)
        assert world.last["status"] == "leaving"
        world.port.stand_still()
        world.migrations.incoming(UUID)
        assert statuses(world) == [("source", "completed"), ("destination", "incoming")]
        # libvirt says only now that it had left.
        world.libvirt(LEFT)
        world.libvirt(RESUMED)
        assert world.last["status"] == "completed"
        assert world.announced == [("arrived", [MAC])]

    run(test)


def test_a_domain_that_no_port_says_to_be_arriving_is_not_destroyed() -> None:
    async def test(world: World) -> None:
        await refusing(world)
        await world.looks()
        assert world.hypervisor.calls == []

    run(test)


def test_a_guest_that_has_arrived_is_not_destroyed_any_more() -> None:
    # QEMU has everything: libvirt resumes it any moment.
    async def test(world: World) -> None:
        world.port.record.arriving = True
        await refusing(world)
        await world.until(lambda: "destroy" in world.hypervisor.calls)
        world.qemu("completed")
        calls = len(world.hypervisor.calls)
        await world.looks()
        assert (world.last["status"], len(world.hypervisor.calls)) == ("arriving", calls)
        world.libvirt(RESUMED)
        assert world.last["status"] == "completed"

    run(test)


class TestFound:
    """What a daemon concludes from what it finds after a restart, or when libvirt is back."""

    def test_a_guest_that_arrived_meanwhile_is_welcomed(self) -> None:
        async def test(world: World) -> None:
            world.port.record.arriving = True
            world.migrations.libvirt_found({UUID: {}})
            assert statuses(world) == [("destination", "completed")]
            assert world.announced == [("arrived", [MAC])]
            assert not world.port.record.arriving
            world.migrations.libvirt_found({UUID: {}})
            assert len(world.announced) == 1

        run(test)

    def test_a_guest_that_still_arrives_is_waited_for(self) -> None:
        async def test(world: World) -> None:
            world.port.record.arriving = True
            world.port.stand_still()
            world.migrations.libvirt_found({UUID: {"side": "destination"}})
            assert (world.last["status"], world.announced) == ("incoming", [])
            assert world.port.record.arriving
            world.migrations.libvirt_found({UUID: {}})
            assert (world.last["status"], world.announced) == ("completed", [("arrived", [MAC])])

        run(test)

    def test_a_guest_that_leaves_has_arrived(self) -> None:
        async def test(world: World) -> None:
            world.port.record.arriving = True
            world.migrations.libvirt_found({UUID: {"side": "source"}})
            assert (world.last["side"], world.port.record.arriving) == ("source", False)

        run(test)

    def test_what_libvirt_could_not_tell_changes_nothing(self) -> None:
        async def test(world: World) -> None:
            await copying(world)
            world.migrations.libvirt_found({UUID: None})
            assert world.last["status"] == "copying"

        run(test)

    def test_a_guest_that_was_to_come_is_followed_though_libvirt_is_busy(self) -> None:
        async def test(world: World) -> None:
            world.port.record.arriving = True
            world.port.stand_still()
            world.migrations.libvirt_found({UUID: None})
            assert (world.last["side"], world.last["status"]) == ("destination", "incoming")
            world.port.status["state"] = "running"
            world.changed()
            assert world.announced == [("arrived", [MAC])]

        run(test)

    def test_a_snapshot_is_no_failed_migration(self) -> None:
        async def test(world: World) -> None:
            await copying(world)
            world.migrations.libvirt_found({UUID: {"side": None, "operation": "snapshot"}})
            assert world.last["status"] == "copying"

        run(test)

    def test_a_snapshot_of_memory_is_followed_and_one_of_disks_is_not(self) -> None:
        async def test(world: World) -> None:
            world.migrations.libvirt_found({UUID: {"side": None, "operation": "snapshot"}})
            assert world.told == []
            world.migrations.libvirt_found(
                {UUID: {"side": None, "operation": "snapshot", "memory_iteration": 1}}
            )
            assert (world.last["side"], world.last["status"]) == ("source", "starting")

        run(test)


def test_nothing_is_kept_of_a_domain_that_is_gone() -> None:
    async def test(world: World) -> None:
        await copying(world)
        world.qemu("completed")
        world.libvirt(LEFT)
        port = world.port
        world.ports.clear()
        world.changed(port)
        world.migrations.job_event(UUID, {"downtime": 60})
        await world.until(lambda: world.last["progress"].get("downtime_ms") == 60)
        await world.until(lambda: world.migrations.describe(UUID, MAC) is None)
        assert statuses(world) == [("source", "completed")]

    run(test)


def test_nothing_is_kept_of_a_guest_that_came_and_ended() -> None:
    async def test(world: World) -> None:
        world.migrations.incoming(UUID)
        world.libvirt(RESUMED)
        await world.looks()
        assert world.migrations.describe(UUID, MAC) is not None
        port = world.port
        world.ports.clear()
        world.changed(port)
        assert world.migrations.describe(UUID, MAC) is None

    run(test)
