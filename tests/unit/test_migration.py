"""What the daemon does about a domain's ports while it migrates, with a libvirt, QEMU and ports that do as
they are told. Real ones are e2e's."""

import libvirt
import pytest

from libvirt_vdpa.hypervisor import HypervisorError
from libvirt_vdpa.migration_life import ENDS, Phase
from libvirt_vdpa.ports import State
from tests.harness.migration_world import (
    LEFT,
    LIMITS,
    MAC,
    RESUMED,
    SUSPENDED,
    UUID,
    FakePort,
    World,
    copying,
    run,
)


def test_a_migration_that_goes_well() -> None:
    async def test(world: World) -> None:
        await copying(world)
        world.port.log(pages=142)
        await world.until(lambda: world.last["ports"][0]["pages"] == 42)
        world.port.stand_still()
        world.qemu("pre-switchover", "device", "completed")
        assert world.migrations.migrating(UUID)
        world.libvirt(LEFT)
        world.migrations.job_event(UUID, {"downtime": 60, "operation": 5})
        await world.until(lambda: world.last["progress"].get("downtime_ms") == 60)
        assert (world.last["status"], world.last["side"]) == ("completed", "source")
        assert (world.last["ports"][0]["pages"], world.last["ports"][0]["mode"]) == (42, "hardware")
        assert not world.migrations.migrating(UUID)
        assert world.hypervisor.calls == []

    run(test)


def test_without_qemus_events() -> None:
    # A connection that may only read gets libvirt's own.
    async def test(world: World) -> None:
        world.migrations.iteration_event(UUID, 1)
        world.port.log(wanted=True, mode="software")
        await world.phase(Phase.COPYING)
        world.port.stand_still()
        world.libvirt(SUSPENDED)
        world.migrations.ended(UUID)  # the hook comes before libvirt's event
        world.libvirt(LEFT)
        await world.phase(Phase.COMPLETED)

    run(test)


def test_a_port_that_does_not_log_in_time_ends_the_migration() -> None:
    async def test(world: World) -> None:
        world.qemu("setup", "active")
        await world.looks()
        world.now = LIMITS.log - 0.1
        await world.looks()
        assert world.last["status"] == "starting"
        world.now = LIMITS.log
        await world.phase(Phase.ENDING)
        assert world.last["reason"] == f"interface {MAC}: its writes are not marked after 2 s"
        # Without a monitor of its own, through libvirt; and again, as long as it goes on.
        await world.until(lambda: world.hypervisor.calls.count("abort") >= 2)
        world.qemu("cancelling", "cancelled")
        await world.phase(Phase.FAILED)
        assert "its writes are not marked" in world.last["reason"]
        assert world.port.problem.startswith("migration ended: ")
        calls = len(world.hypervisor.calls)
        await world.looks()
        assert len(world.hypervisor.calls) == calls

    run(test)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ({"problem": "the log is too small"}, "the log is too small"),
        ({"missed": 3}, "3 writes of the VF were outside the log"),
    ],
)
def test_a_log_that_fails_ends_the_migration_at_once(log: dict[str, object], reason: str) -> None:
    async def test(world: World) -> None:
        world.monitors.present = True
        await copying(world)
        world.port.log(**log)
        world.changed()
        assert world.last["status"] == "ending"
        assert world.last["reason"] == f"interface {MAC}: {reason}"
        await world.until(lambda: "migrate_cancel" in world.monitors.calls)
        assert "abort" not in world.hypervisor.calls

    run(test)


def test_writes_missed_before_are_no_problem_now() -> None:
    async def test(world: World) -> None:
        world.port.log(missed=3)
        await copying(world)
        await world.looks()
        assert world.last["status"] == "copying"

    run(test)


def test_a_log_that_failed_is_seen_when_the_guest_stands_still() -> None:
    async def test(world: World) -> None:
        await copying(world)
        world.port.stand_still()
        world.qemu("pre-switchover")
        world.port.log(problem="out of memory")
        world.changed()
        await world.until(lambda: "abort" in world.hypervisor.calls)

    run(test)


def test_every_port_must_log() -> None:
    async def test(world: World) -> None:
        world.qemu("setup", "active")
        world.port.log(wanted=True, mode="hardware")
        await world.looks()
        assert world.last["status"] == "starting"
        world.now = LIMITS.log
        await world.phase(Phase.ENDING)
        assert "52:54:00:76:64:02" in world.last["reason"]

    run(test, FakePort(), FakePort("52:54:00:76:64:02"))


def test_a_guest_that_stands_still_need_not_log() -> None:
    # virsh save stops the guest first.
    async def test(world: World) -> None:
        world.port.stand_still()
        world.qemu("setup", "active")
        world.now = 2 * LIMITS.log
        await world.phase(Phase.COPYING)
        await world.looks()
        assert world.last["status"] == "copying"

    run(test)


def test_a_port_that_comes_back_must_log_again() -> None:
    async def test(world: World) -> None:
        await copying(world)
        world.port.state = State.RESTARTING
        await world.looks()
        world.now = 100.0
        await world.looks()
        assert world.last["status"] == "copying"
        world.port.state = State.SERVING
        world.port.record.pid = 2
        world.port.log(wanted=False, mode=None, pages=0)
        await world.looks()
        world.now += LIMITS.log
        await world.phase(Phase.ENDING)

    run(test)


def test_pages_of_a_port_that_was_restarted_are_added() -> None:
    async def test(world: World) -> None:
        await copying(world)
        world.port.log(pages=142)
        await world.until(lambda: world.last["ports"][0]["pages"] == 42)
        world.port.record.pid = 2
        world.port.log(pages=8)
        await world.until(lambda: world.last["ports"][0]["pages"] == 50)

    run(test)


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_migration_that_fails(status: str) -> None:
    async def test(world: World) -> None:
        await copying(world)
        world.qemu(status)
        assert world.last["status"] == "returning"
        world.port.log(wanted=False, mode=None)
        await world.phase(Phase.FAILED)
        assert world.last["reason"] == f"QEMU says: migration {status}"

    run(test)


def test_a_port_that_does_not_stop_logging_is_told_of() -> None:
    async def test(world: World) -> None:
        await copying(world)
        world.qemu("failed")
        await world.looks()
        assert world.last["status"] == "returning"
        world.now += LIMITS.quiet
        await world.phase(Phase.FAILED)
        assert f"{MAC} still marks its writes 3 s after" in world.last["reason"]

    run(test)


def test_a_failure_that_only_libvirt_tells() -> None:
    async def test(world: World) -> None:
        await copying(world)
        world.hypervisor.figures = {}
        await world.phase(Phase.RETURNING)

    run(test)


def test_the_destination_cannot_go_on() -> None:
    async def test(world: World) -> None:
        await copying(world)
        world.qemu("pre-switchover", "completed")
        world.libvirt(RESUMED)
        assert world.last["status"] == "returning"

    run(test)


def test_a_live_snapshot() -> None:
    # To QEMU it is a migration, after which the guest goes on here.
    async def test(world: World) -> None:
        world.hypervisor.figures = {"data_total": 10, "operation": "snapshot"}
        await copying(world)
        await world.until(lambda: world.last["operation"] == "snapshot")
        world.qemu("pre-switchover", "completed")
        world.libvirt(RESUMED)
        await world.phase(Phase.COMPLETED)

    run(test)


def test_another_one_begins_while_the_last_one_is_not_quiet() -> None:
    async def test(world: World) -> None:
        await copying(world)
        world.qemu("failed")
        world.port.log(wanted=False, mode=None)
        await world.phase(Phase.FAILED)
        world.qemu("setup")
        assert world.last["status"] == "setup"
        assert [each["status"] for each in world.migrations.describe_all()] == ["failed", "setup"]

    run(test)


class TestDestination:
    def test_arrives(self) -> None:
        async def test(world: World) -> None:
            world.port.stand_still()
            world.migrations.incoming(UUID)
            world.qemu("setup", "active", "completed")
            assert (world.last["side"], world.last["status"]) == ("destination", "arriving")
            world.libvirt(RESUMED)
            assert world.announced == [("arrived", [MAC])]
            world.port.status["state"] = "running"
            world.changed()
            await world.phase(Phase.COMPLETED)
            # Rings and libvirt's word for it are one arrival.
            assert len(world.announced) == 1

        run(test)

    def test_arrives_though_no_hook_has_told(self) -> None:
        # As a restored domain does: QEMU migrates before libvirt says that it is there.
        async def test(world: World) -> None:
            world.libvirt(LEFT)
            world.port.stand_still()
            world.qemu("setup", "active")
            world.libvirt((libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_RESTORED))
            assert (world.last["side"], world.last["status"]) == ("destination", "incoming")
            world.qemu("completed")
            world.libvirt(RESUMED)
            await world.phase(Phase.COMPLETED)
            world.qemu("setup")
            assert world.last["side"] == "source"

        run(test)

    def test_arrives_though_libvirt_is_away(self) -> None:
        async def test(world: World) -> None:
            world.port.stand_still()
            world.migrations.incoming(UUID)
            await world.looks()
            world.port.status["state"] = "running"
            world.changed()
            await world.phase(Phase.COMPLETED)

        run(test)

    def test_a_paused_guest_arrives(self) -> None:
        async def test(world: World) -> None:
            world.port.stand_still()
            world.migrations.incoming(UUID)
            paused = (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_PAUSED)
            world.libvirt(paused)
            assert world.last["status"] == "incoming"
            world.qemu("completed")
            world.libvirt(paused)
            await world.phase(Phase.COMPLETED)

        run(test)

    def test_a_port_that_is_brought_back(self) -> None:
        async def test(world: World) -> None:
            world.port.stand_still()
            world.migrations.incoming(UUID)
            world.qemu("active")
            world.port.state = State.RETRYING
            await world.looks()
            world.now = LIMITS.lost - 0.1
            world.port.state = State.SERVING
            await world.looks()
            world.now += LIMITS.lost
            await world.looks()
            assert world.last["status"] == "incoming"

        run(test)

    def test_a_port_that_is_lost_ends_the_migration(self) -> None:
        async def test(world: World) -> None:
            world.port.stand_still()
            world.migrations.incoming(UUID)
            world.qemu("active")
            world.port.state = State.RETRYING
            world.port.problem = "the VF is gone"
            world.port.record.arriving = True
            world.hypervisor.error = HypervisorError("busy")
            await world.looks()
            world.now = LIMITS.lost
            await world.phase(Phase.REFUSING)
            assert world.last["reason"] == f"interface {MAC}: not brought back within 10 s: the VF is gone"
            await world.until(lambda: world.hypervisor.calls.count("destroy") >= 2)
            world.migrations.ended(UUID)
            await world.phase(Phase.FAILED)
            assert "abort" not in world.hypervisor.calls
            assert world.announced == []

        run(test)

    def test_a_port_that_qemu_does_not_come_back_to(self) -> None:
        async def test(world: World) -> None:
            world.port.stand_still()
            world.migrations.incoming(UUID)
            await world.looks()
            world.port.status["front_end"] = False
            await world.looks()
            world.now = LIMITS.lost
            await world.phase(Phase.REFUSING)
            assert "<reconnect>" in world.last["reason"]

        run(test)

    def test_a_port_that_was_away_announces_when_it_is_back(self) -> None:
        async def test(world: World) -> None:
            world.port.stand_still()
            world.migrations.incoming(UUID)
            world.qemu("active")
            world.port.state = State.RESTARTING
            world.qemu("completed")
            world.libvirt(RESUMED)
            assert world.announced == [("arrived", [])]
            world.port.state = State.SERVING
            world.changed()
            assert len(world.announced) == 1
            world.port.status["state"] = "running"
            world.changed()
            world.changed()
            assert world.announced[1:] == [("late", MAC)]

        run(test)

    def test_the_source_gives_up(self) -> None:
        async def test(world: World) -> None:
            world.port.stand_still()
            world.migrations.incoming(UUID)
            world.qemu("active", "failed")
            world.migrations.ended(UUID)
            world.ports.clear()
            await world.phase(Phase.FAILED)

        run(test)


class TestRestartedDaemon:
    """libvirt tells what is under way."""

    def test_at_the_source(self) -> None:
        async def test(world: World) -> None:
            world.port.log(wanted=True, mode="hardware")
            world.migrations.libvirt_found({UUID: {"side": "source", "operation": "migration"}})
            await world.phase(Phase.COPYING)
            assert world.monitors.followed == {UUID}

        run(test)

    def test_at_the_destination(self) -> None:
        async def test(world: World) -> None:
            world.port.stand_still()
            world.migrations.libvirt_found({UUID: {"side": "destination"}})
            assert (world.last["side"], world.last["status"]) == ("destination", "incoming")

        run(test)

    def test_what_has_ended_meanwhile(self) -> None:
        async def test(world: World) -> None:
            await copying(world)
            world.migrations.libvirt_found({UUID: {}})
            assert world.last["status"] == "returning"
            world.migrations.libvirt_found({})
            assert world.last["status"] == "failed"

        run(test)

    def test_domains_of_others(self) -> None:
        async def test(world: World) -> None:
            other = UUID.replace("0001", "0002")
            world.migrations.libvirt_found({other: {"side": "source"}})
            world.migrations.monitor_event(other, "MIGRATION", {"status": "active"})
            world.migrations.lifecycle_event(other, libvirt.VIR_DOMAIN_EVENT_STARTED, 1)
            assert (world.told, world.monitors.followed) == ([], {UUID})

        run(test)


def test_every_end_is_one_that_is_told() -> None:
    assert {phase.value for phase in ENDS} == {"completed", "failed"}
