"""Guests that come from another host or from a file: what is promised, refused and told, in which words."""

import asyncio
from dataclasses import replace

import pytest

from libvirt_vdpa.inventory import PROMISE_LIMIT
from libvirt_vdpa.ports import State
from libvirt_vdpa.supervisor import PortError
from tests.harness.lifecycle_bench import (
    ABLE,
    DEMO,
    DEMO_UUID,
    MAC,
    SERVER,
    STATE,
    TWO_NICS,
    VF0,
    VF1,
    Bench,
    StandInPort,
    with_state,
)


@pytest.fixture
def bench() -> Bench:
    return Bench()


class TestArrival:
    """A guest that comes from another host, or from a file."""

    def test_migrate_promises_and_prepare_lends(self, bench: Bench) -> None:
        xml = with_state(STATE)
        assert bench.hook("migrate", xml=xml) is None
        assert (bench.clean, bench.promised, bench.probed) == (True, [MAC], [VF0])
        bench.hook("prepare", xml=xml)
        assert (bench.lent, bench.promised, bench.states) == (1, [], [State.SERVING])
        assert bench.records[0].arriving
        assert bench.migrations.told == ["incoming"]
        bench.hook("start", "started", xml=xml)

    @pytest.mark.parametrize("operation", ["migrate", "restore"])
    def test_the_port_offers_what_the_source_did(self, bench: Bench, operation: str) -> None:
        bench.hook(operation, "prepare", xml=with_state(STATE))
        (record,) = bench.records
        assert (record.features, record.negotiated) == (STATE.offered, STATE.negotiated)

    def test_what_it_sees_of_its_link_is_not_known_to_a_daemon_that_was_away(self, bench: Bench) -> None:
        """From before QEMU came until the guest had arrived, so that `arriving` is gone when it looks."""
        bench.hook("migrate", "prepare", xml=with_state(STATE))
        (record,) = bench.records
        assert record.link_cut
        bench.hook("stopped", "release")
        bench.hook("prepare", xml=DEMO)
        (record,) = bench.records
        assert not record.link_cut

    def test_an_ordinary_start_knows_nothing_of_that(self, bench: Bench) -> None:
        bench.hook("prepare", xml=with_state(STATE))
        (record,) = bench.records
        assert (record.features, record.negotiated) == (None, None)
        assert (bench.records[0].arriving, bench.migrations.told) == (False, [])

    def test_what_comes_from_a_file_is_not_incoming(self, bench: Bench) -> None:
        bench.hook("restore", xml=with_state(STATE))
        assert (bench.clean, bench.promised) == (True, [MAC])
        bench.hook("prepare", xml=with_state(STATE))
        assert (bench.records[0].arriving, bench.migrations.told) == (False, [])
        assert "not shared" in bench.refused("restore", DEMO.replace(b"'shared'", b"'private'"))

    @pytest.mark.parametrize("end", [("stopped",), ("release",), ("stopped", "release")])
    def test_a_migration_that_fails_leaves_nothing(self, bench: Bench, end: tuple[str, ...]) -> None:
        bench.hook("migrate", "prepare", xml=with_state(STATE))
        bench.hook(*end)
        assert bench.migrations.told == ["incoming", *("ended" for _ in end)]
        assert bench.clean == ("release" in end)

    def test_a_prepare_that_fails_leaves_no_promise(self, bench: Bench) -> None:
        async def fail(port: StandInPort) -> None:
            raise PortError("no such VF")

        bench.supervisor.on_start = fail
        bench.hook("migrate", xml=with_state(STATE))
        bench.refused("prepare", with_state(STATE))
        assert (bench.clean, bench.promised, bench.migrations.told) == (True, [], [])

    def test_a_prepare_that_gets_no_vf_leaves_no_promise(self, bench: Bench) -> None:
        bench.hook("migrate", xml=TWO_NICS)
        assert len(bench.promised) == 2
        bench.inventory.pools["default"].problem = "the NIC is away"
        assert "the NIC is away" in bench.refused("prepare", TWO_NICS)
        assert (bench.clean, bench.promised) == (True, [])

    def test_a_migrate_that_nobody_follows_expires(self, bench: Bench) -> None:
        bench.hook("migrate", xml=with_state(STATE))
        assert bench.promised == [MAC]
        bench.now += PROMISE_LIMIT
        assert bench.promised == []
        bench.hook("prepare", xml=with_state(STATE))
        assert (bench.records[0].features, bench.records[0].arriving) == (None, False)

    def test_a_second_migrate_takes_the_place_of_the_first(self, bench: Bench) -> None:
        bench.hook("migrate", "migrate", xml=with_state(STATE))
        assert bench.promised == [MAC]

    def test_two_interfaces_are_promised_two_vfs(self, bench: Bench) -> None:
        bench.hook("migrate", xml=TWO_NICS)
        assert bench.promised == ["52:54:00:76:64:02", "52:54:00:76:65:02"]
        assert "no free VF: 2 of 2 promised to domain 'vdpa-kvm'" in bench.refused("prepare")
        bench.hook("prepare", xml=TWO_NICS)
        assert [(record.device, record.mac) for record in bench.records] == [
            (VF0, "52:54:00:76:64:02"),
            (VF1, "52:54:00:76:65:02"),
        ]

    def test_one_interface_too_many_takes_the_others_back(self, bench: Bench) -> None:
        bench.hook("prepare")
        assert "interface 52:54:00:76:65:02: pool 'default' has no free VF" in bench.refused(
            "migrate", TWO_NICS
        )
        assert bench.promised == []

    def test_a_hook_that_is_gone_promises_nothing(self, bench: Bench) -> None:
        async def run() -> None:
            begun = asyncio.Event()

            async def hang(_device: str) -> None:
                begun.set()
                await asyncio.Event().wait()

            bench.on_probe = hang
            hook = asyncio.create_task(bench.lifecycle.hook("migrate", "a-domain", DEMO))
            await begun.wait()
            assert bench.promised == [MAC]
            hook.cancel()
            with pytest.raises(asyncio.CancelledError):
                await hook

        asyncio.run(run())
        assert bench.promised == []

    def test_a_vf_that_is_asked_is_lent_to_nobody(self, bench: Bench) -> None:
        async def run() -> None:
            asked, answer = asyncio.Event(), asyncio.Event()

            async def wait(_device: str) -> None:
                asked.set()
                await answer.wait()

            bench.on_probe = wait
            hook = asyncio.create_task(bench.lifecycle.hook("migrate", "a-domain", DEMO))
            await asked.wait()
            await bench.lifecycle.hook("prepare", "other", SERVER)
            answer.set()
            await hook

        asyncio.run(run())
        assert [record.device for record in bench.records] == [VF1]
        assert bench.promised == [MAC]

    def test_reconnect_while_a_guest_arrives_disturbs_nothing(self, bench: Bench) -> None:
        bench.hook("migrate", "prepare", xml=with_state(STATE))
        before = bench.records
        bench.hook("reconnect", xml=with_state(STATE))
        assert (bench.records, bench.states, bench.supervisor.released) == (before, [State.SERVING], [])
        assert (bench.records[0].arriving, bench.migrations.told) == (True, ["incoming"])

    def test_a_port_that_a_running_guest_lacks_offers_what_the_guest_knows(self, bench: Bench) -> None:
        bench.hook("reconnect", xml=with_state(STATE))
        (record,) = bench.records
        assert (record.features, record.negotiated) == (STATE.offered, None)

    def test_an_arrival_that_was_lost_sight_of_is_cleared_away(self, bench: Bench) -> None:
        bench.hook("migrate", "prepare", xml=with_state(STATE))
        assert asyncio.run(bench.lifecycle.reconcile(set(), bench.lifecycle.snapshot()))
        assert bench.clean
        assert bench.migrations.told == ["incoming", "ended"]

    def test_ports_of_an_earlier_try_are_replaced(self, bench: Bench) -> None:
        bench.hook("migrate", "prepare", "migrate", "prepare", xml=with_state(STATE))
        assert (bench.supervisor.released, bench.lent, bench.states) == ([MAC], 1, [State.SERVING])


class TestLocalXml:
    """The hook's stdout."""

    OTHER = DEMO.replace(b"/run/libvirt-vdpa/", b"/srv/")

    @pytest.mark.parametrize("operation", ["migrate", "restore"])
    def test_socket_paths_of_another_host_are_made_ours(self, bench: Bench, operation: str) -> None:
        changed = bench.hook(operation, xml=self.OTHER)
        assert changed is not None
        assert f"/run/libvirt-vdpa/{DEMO_UUID}/{MAC}.sock" in changed
        bench.hook("prepare", xml=changed.encode())
        assert bench.states == [State.SERVING]

    def test_nowhere_else(self, bench: Bench) -> None:
        assert "the path must be '/run/libvirt-vdpa/" in bench.refused("prepare", self.OTHER)


class TestMetadata:
    """What the operator says of migration is with the port."""

    def test_by_default(self, bench: Bench) -> None:
        bench.hook("prepare")
        (record,) = bench.records
        assert (record.log_mode, record.announce, record.announce_rounds) == ("auto", "auto", 0)

    def test_all_of_it(self, bench: Bench) -> None:
        said = b"pool='default' migration='software' announce='guest' announce-rounds='3'"
        bench.hook("prepare", xml=DEMO.replace(b"pool='default'", said))
        (record,) = bench.records
        assert (record.log_mode, record.announce, record.announce_rounds) == ("software", "guest", 3)

    def test_the_uplink_of_the_vf(self, bench: Bench) -> None:
        bench.inventory.set_pool("default", [(VF0, 1)], {VF0: "nic=/n/control,vf=0"})
        bench.hook("prepare")
        assert [record.uplink for record in bench.records] == ["nic=/n/control,vf=0"]

    @pytest.mark.parametrize(("announce", "told"), [("auto", 1), ("rarp", 1), ("guest", 0), ("off", 0)])
    def test_that_there_is_no_uplink_is_told_once(
        self, bench: Bench, caplog: pytest.LogCaptureFixture, announce: str, told: int
    ) -> None:
        xml = DEMO.replace(b"pool='default'", f"pool='default' announce='{announce}'".encode())
        for _ in range(3):
            bench.hook("prepare", "release", xml=xml)
        assert caplog.text.count("has no uplink") == told


class TestVeto:
    """Guests that this host's VFs do not fit, in the words that the user of `virsh migrate` reads."""

    @pytest.mark.parametrize(
        ("state", "able", "reason"),
        [
            (
                {"negotiated": 0x1_2000_8001},
                {},
                "lacks NET_F_CSUM, which the guest has negotiated",
            ),
            (
                {"negotiated": None, "offered": 0x1_2000_8001},
                {},
                "lacks NET_F_CSUM, which the source's VF has offered",
            ),
            (
                {"negotiated": 0x2000_8000},
                {},
                "needs VERSION_1, which the guest, one of virtio 0.95, has not negotiated",
            ),
            ({"queue_pairs": 2}, {}, "has 1 queue pair, the guest uses 2"),
            ({"ring_size": 1024}, {}, "has rings of at most 256 descriptors, the guest's have 1024"),
            (
                {},
                {"features": 0x1_2000_0020, "max_queue_size": 128},
                "lacks NET_F_MRG_RXBUF, which the guest has negotiated; it has rings of at most 128"
                " descriptors, the guest's have 256",
            ),
        ],
    )
    def test_by_what_the_guest_uses(
        self, bench: Bench, state: dict[str, int | None], able: dict[str, int], reason: str
    ) -> None:
        bench.able = {device: replace(ABLE, **able) for device in (VF0, VF1)}  # type: ignore[arg-type]
        xml = with_state(replace(STATE, **state))  # type: ignore[arg-type]
        assert bench.refused("migrate", xml) == (
            f"domain 'vdpa-demo': interface {MAC}: VF '{VF0}' {reason}; choose a host or pool whose VFs fit"
            " (none of 2 free VFs of pool 'default' fits)"
        )
        assert (bench.clean, bench.promised) == (True, [])

    def test_a_guest_of_virtio_0_95_goes_where_one_is_served(self, bench: Bench) -> None:
        bench.able = {VF0: replace(ABLE, serves_legacy=True)}
        bench.hook("migrate", xml=with_state(replace(STATE, negotiated=0x2000_8000)))
        assert bench.promised == [MAC]

    def test_what_front_end_and_back_end_agree_on_is_not_the_guests(self, bench: Bench) -> None:
        bench.hook("migrate", xml=with_state(replace(STATE, negotiated=0x1_4400_8000)))
        assert bench.promised == [MAC]

    def test_features_that_only_the_source_offered_are_no_reason(self, bench: Bench) -> None:
        bench.hook("migrate", xml=with_state(replace(STATE, offered=0x1_3FFF_FFFF)))
        assert bench.promised == [MAC]

    def test_without_state_by_the_xml(self, bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
        bench.inventory.set_pool("default", [(VF0, None)])
        driver = b"<model type='virtio'/><driver queues='2' rx_queue_size='512'/>"
        xml = DEMO.replace(b"<model type='virtio'/>", driver)
        assert bench.refused("migrate", xml) == (
            f"domain 'vdpa-demo': interface {MAC}: VF '{VF0}' has 1 queue pair, <driver queues='2'> asks for"
            " more; it has rings of at most 256 descriptors, <driver> asks for 512; choose a host or pool"
            " whose VFs fit"
        )
        assert "the domain does not say what its guest uses" in caplog.text
        caplog.clear()
        bench.hook("migrate", xml=with_state(STATE))
        assert "does not say" not in caplog.text

    @pytest.mark.parametrize("mode", ["hardware", "software", "auto"])
    def test_by_who_can_log(self, bench: Bench, mode: str) -> None:
        bench.able = {VF0: replace(ABLE, log_modes=frozenset(["software"]))}
        xml = DEMO.replace(b"pool='default'", f"pool='default' migration='{mode}'".encode())
        bench.hook("migrate", xml=xml)
        bench.hook("prepare", xml=xml)
        # The other VF of the pool can.
        assert [record.device for record in bench.records] == [VF1 if mode == "hardware" else VF0]
        bench.hook("release")
        bench.able[VF1] = bench.able[VF0]
        if mode == "hardware":
            words = "cannot log what it writes by itself, as migration='hardware' asks"
            assert words in bench.refused("migrate", xml)

    def test_a_vf_that_logs_by_itself_alone(self, bench: Bench) -> None:
        """As a ConnectX does."""
        bench.able = dict.fromkeys((VF0, VF1), replace(ABLE, log_modes=frozenset(["hardware"])))
        xml = DEMO.replace(b"pool='default'", b"pool='default' migration='software'")
        words = "cannot have what it writes logged by the relay, as migration='software' asks"
        assert words in bench.refused("migrate", xml)

    def test_another_vf_of_the_pool_is_taken(self, bench: Bench) -> None:
        bench.able = {VF0: "it does not answer"}
        bench.hook("migrate", xml=with_state(STATE))
        assert bench.probed == [VF0, VF1]
        bench.hook("prepare", xml=with_state(STATE))
        assert [record.device for record in bench.records] == [VF1]

    @pytest.mark.parametrize("first", [VF0, VF1])
    def test_the_reason_that_is_nearest_is_told(self, bench: Bench, first: str) -> None:
        second = VF1 if first == VF0 else VF0
        bench.able = {first: "it does not answer", second: replace(ABLE, features=0)}
        assert f"VF '{second}' lacks NET_F_MRG_RXBUF, F_VERSION_1" in bench.refused(
            "migrate", with_state(STATE)
        )

    def test_one_that_cannot_be_opened(self, bench: Bench) -> None:
        bench.inventory.set_pool("default", [(VF0, 1)])
        bench.able = {VF0: "cannot connect: No such file or directory"}
        assert bench.refused("migrate") == (
            f"domain 'vdpa-demo': interface {MAC}: VF '{VF0}' cannot be used: cannot connect:"
            " No such file or directory"
        )

    def test_no_more_are_asked_than_there_is_time_for(self, bench: Bench) -> None:
        async def take_long(_device: str) -> None:
            bench.now += 10

        bench.on_probe = take_long
        bench.able = {VF0: "it does not answer"}
        assert "it does not answer" in bench.refused("migrate")
        assert bench.probed == [VF0]

    def test_no_pool_no_free_vf_and_memory(self, bench: Bench) -> None:
        assert "pool='no': not configured" in bench.refused("migrate", DEMO.replace(b"'default'", b"'no'"))
        assert "guest memory is not shared" in bench.refused(
            "migrate", DEMO.replace(b"'shared'", b"'private'")
        )
        bench.hook("prepare", xml=TWO_NICS)
        assert "pool 'default' has no free VF: 2 of 2 lent to" in bench.refused("migrate")
        assert bench.probed == []
