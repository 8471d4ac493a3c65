"""Hook operations on stand-ins for ports: what is lent, started, ended and undone, and in which words."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from libvirt_vdpa.domain import parse_domain
from libvirt_vdpa.inventory import Holder, Vf
from libvirt_vdpa.lifecycle import device_for, log_name
from libvirt_vdpa.metadata import xml_folder
from libvirt_vdpa.ports import State
from libvirt_vdpa.supervisor import PortError
from tests.harness.lifecycle_bench import (
    DEMO,
    DEMO_UUID,
    SERVER,
    TWO_NICS,
    Bench,
    StandInPort,
)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_domain_starts_and_ends(bench: Bench) -> None:
    bench.hook("prepare")
    (port,) = bench.supervisor.ports.values()
    assert port.record.device == "ifcvf,vfio-user=/vf0.sock"
    assert port.record.control == f"/run/libvirt-vdpa/ports/{DEMO_UUID}/52:54:00:76:64:01.ctl"
    assert (port.record.reconnect, port.record.arriving) == (1, False)
    assert (bench.states, bench.lent) == ([State.SERVING], 1)
    bench.hook("start", "started")
    assert bench.states == [State.SERVING]
    bench.hook("stopped")
    assert (bench.states, bench.lent) == ([State.LINGERING], 1)
    bench.hook("release")
    assert bench.clean


@pytest.mark.parametrize(
    ("domain", "name"),
    [
        ("vdpa-demo", "vdpa-demo-52:54:00:76:64:01.log"),
        ("../a", ".._a-52:54:00:76:64:01.log"),
        (300 * "x", 200 * "x" + "-52:54:00:76:64:01.log"),
        (300 * "€", 66 * "€" + "-52:54:00:76:64:01.log"),
    ],
)
def test_a_log_has_a_name_that_fits(domain: str, name: str) -> None:
    assert log_name(domain, "52:54:00:76:64:01") == name
    assert len(name.encode()) <= 255


def test_in_server_mode_the_port_starts_when_qemu_is_about_to_listen(bench: Bench) -> None:
    async def reach_qemu(port: StandInPort) -> None:
        port.status["front_end"] = True

    bench.supervisor.on_start = reach_qemu
    bench.hook("prepare", xml=SERVER)
    assert bench.states == [State.IDLE]
    bench.hook("start", "started", xml=SERVER)
    assert bench.states == [State.SERVING]


def test_in_server_mode_a_qemu_that_is_not_reached_is_not_started(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libvirt_vdpa.lifecycle.CONNECTED_LIMIT", 0.05)
    bench.hook("prepare", "start", xml=SERVER)
    assert "the port has not reached QEMU on /run/libvirt-vdpa/" in bench.refused("started", SERVER)


def test_a_start_that_fails_leaves_nothing_of_any_interface(bench: Bench) -> None:
    async def fail(port: StandInPort) -> None:
        if port.record.mac == "52:54:00:76:65:02":
            raise PortError("no such VF")

    bench.supervisor.on_start = fail
    message = bench.refused("prepare", TWO_NICS)
    assert message == "domain 'vdpa-kvm': interface 52:54:00:76:65:02: no such VF"
    assert bench.clean
    assert len(bench.supervisor.released) == 2


def test_an_interface_that_gets_no_vf_takes_the_others_back(bench: Bench) -> None:
    bench.hook("prepare")
    message = bench.refused("prepare", TWO_NICS)
    assert message.startswith("domain 'vdpa-kvm': interface 52:54:00:76:65:02: pool 'default' has no free VF")
    assert bench.lent == 1


def test_a_hook_that_is_gone_is_undone(bench: Bench) -> None:
    async def run() -> None:
        begun = asyncio.Event()

        async def hang(_port: StandInPort) -> None:
            begun.set()
            await asyncio.Event().wait()

        bench.supervisor.on_start = hang
        hook = asyncio.create_task(bench.lifecycle.hook("prepare", "a-domain", TWO_NICS))
        await begun.wait()
        assert bench.lent == 2
        hook.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hook

    asyncio.run(run())
    assert bench.clean


def test_a_prepare_that_takes_too_long_is_refused_and_undone(bench: Bench) -> None:
    async def hang(_port: StandInPort) -> None:
        await asyncio.Event().wait()

    bench.supervisor.on_start = hang
    assert (
        bench.refused("prepare") == "domain 'a-domain': prepare took longer than 0.8 s; see virtvdpad's log"
    )
    assert bench.clean


def test_queues_are_compared_with_those_of_a_vf_that_no_pool_describes(bench: Bench) -> None:
    xml = DEMO.replace(b"pool='default'", b"device='vfio-user=/x.sock'")
    xml = xml.replace(b"<model type='virtio'/>", b"<model type='virtio'/><driver queues='2'/>")
    message = "interface 52:54:00:76:64:01: <driver queues='2'>: the VF has 1 queue pair; lower queues"
    assert bench.refused("prepare", xml) == f"domain 'vdpa-demo': {message}"
    assert bench.clean


def test_rings_larger_than_the_vfs_are_refused(bench: Bench) -> None:
    async def describe(port: StandInPort) -> None:
        port.status["max_queue_size"] = 256

    bench.supervisor.on_start = describe
    xml = DEMO.replace(b"<model type='virtio'/>", b"<model type='virtio'/><driver rx_queue_size='512'/>")
    assert "asks for rings of 512: the VF's have at most 256 descriptors" in bench.refused("prepare", xml)
    assert bench.clean


@pytest.mark.parametrize(
    ("asked", "given"), [("", "off"), ("page_per_vq='off'", "off"), ("page_per_vq='on'", "auto")]
)
def test_host_notifiers_need_a_page_for_each_queue(bench: Bench, asked: str, given: str) -> None:
    driver = f"<model type='virtio'/><driver {asked}/>".encode()
    bench.hook("prepare", xml=DEMO.replace(b"<model type='virtio'/>", driver))
    assert [record.host_notifiers for record in bench.records] == [given]


def test_an_mtu_larger_than_the_vfs_is_refused(bench: Bench) -> None:
    async def describe(port: StandInPort) -> None:
        port.status["max_mtu"] = 1500

    bench.supervisor.on_start = describe
    xml = DEMO.replace(b"<model type='virtio'/>", b"<model type='virtio'/><mtu size='1501'/>")
    text = "MTU 1501: the VF carries packets of at most 1500 bytes; lower it"
    assert bench.refused("prepare", xml) == f"domain 'vdpa-demo': interface 52:54:00:76:64:01: {text}"
    assert bench.clean
    bench.hook("prepare", xml=xml.replace(b"1501", b"1500"))


def test_ports_left_over_are_replaced_unless_a_qemu_uses_them(bench: Bench) -> None:
    bench.hook("prepare", "prepare")
    assert (bench.supervisor.released, bench.lent) == (["52:54:00:76:64:01"], 1)
    (port,) = bench.supervisor.ports.values()
    port.status["front_end"] = True
    assert "still connected to a running QEMU" in bench.refused("prepare")
    assert list(bench.supervisor.ports.values()) == [port]


def test_start_without_prepare_is_refused(bench: Bench) -> None:
    assert "interface 52:54:00:76:64:01: it was not prepared" in bench.refused("start")


def test_reconnect_keeps_what_is_there_and_makes_what_is_missing(bench: Bench) -> None:
    bench.hook("prepare")
    (port,) = bench.supervisor.ports.values()
    bench.hook("reconnect")
    assert list(bench.supervisor.ports.values()) == [port]
    bench.supervisor.ports.clear()
    bench.inventory.give_back(port.record.device, Holder("vdpa-demo", DEMO_UUID, "52:54:00:76:64:01"))
    bench.hook("reconnect")
    assert bench.states == [State.SERVING]


def test_stopped_and_release_need_no_valid_xml(bench: Bench) -> None:
    bench.hook("prepare")
    broken = DEMO.replace(b"</devices>", b"").replace(b"'shared'", b"'private'")
    bench.hook("stopped", "release", xml=broken)
    assert bench.clean


@pytest.mark.parametrize("operation", ["attach", "no-such", ""])
def test_an_unknown_operation_does_nothing(bench: Bench, operation: str) -> None:
    bench.hook(operation)
    assert bench.clean


def test_a_foreign_domain_is_not_even_parsed(bench: Bench) -> None:
    bench.hook("prepare", "start", "release", xml=b"not XML")
    assert bench.clean


class TestNothingIsKept:
    """Domains come and go for as long as the daemon runs."""

    def test_of_a_domain_that_is_released(self, bench: Bench) -> None:
        bench.hook("prepare", "start", "stopped")
        assert list(bench.lifecycle._last_operation) == [DEMO_UUID]
        bench.hook("release")
        assert bench.lifecycle._last_operation == {}

    def test_of_a_domain_that_was_refused(self, bench: Bench) -> None:
        bench.refused("prepare", DEMO.replace(b"'shared'", b"'private'"))
        assert bench.lifecycle._last_operation == {}

    def test_of_a_domain_that_was_reconciled(self, bench: Bench) -> None:
        bench.hook("prepare")
        asyncio.run(bench.lifecycle.reconcile(set(), bench.lifecycle.snapshot()))
        assert bench.lifecycle._last_operation == {}

    def test_but_of_one_that_starts_while_its_last_end_is_under_way(self, bench: Bench) -> None:
        async def run() -> None:
            await bench.lifecycle.hook("prepare", "a", DEMO)
            # As it is of a port that an earlier daemon has left.
            bench.lifecycle._last_operation.clear()
            snapshot = bench.lifecycle.snapshot()
            release = asyncio.create_task(bench.lifecycle.hook("release", "a", DEMO))
            await asyncio.sleep(0)
            prepare = asyncio.create_task(bench.lifecycle.hook("prepare", "a", DEMO))
            await asyncio.gather(release, prepare)
            assert bench.lifecycle.snapshot().keys() == {DEMO_UUID}
            assert bench.lifecycle.snapshot() != snapshot
            await bench.lifecycle.reconcile(set(), snapshot)

        asyncio.run(run())
        assert bench.states == [State.SERVING]


class TestReconcile:
    """After a restart, or a hook that never came."""

    def test_ports_of_domains_that_do_not_run_are_released(self, bench: Bench) -> None:
        bench.hook("prepare")
        bench.hook("prepare", xml=SERVER)
        assert asyncio.run(bench.lifecycle.reconcile({DEMO_UUID}, bench.lifecycle.snapshot()))
        assert [port.record.uuid for port in bench.supervisor.ports.values()] == [DEMO_UUID]

    def test_a_domain_that_was_started_meanwhile_is_left_alone(self, bench: Bench) -> None:
        bench.hook("prepare")
        snapshot = bench.lifecycle.snapshot()
        bench.hook("release", "prepare")
        asyncio.run(bench.lifecycle.reconcile(set(), snapshot))
        assert bench.states == [State.SERVING]

    def test_a_port_that_a_qemu_uses_is_left_alone(self, bench: Bench) -> None:
        bench.hook("prepare")
        (port,) = bench.supervisor.ports.values()
        port.status["front_end"] = True
        assert not asyncio.run(bench.lifecycle.reconcile(set(), bench.lifecycle.snapshot()))
        assert bench.states == [State.SERVING]

    def test_a_port_that_does_not_answer_is_no_reason_to_keep_it(self, bench: Bench) -> None:
        bench.hook("prepare")
        (port,) = bench.supervisor.ports.values()
        port.answers = False
        asyncio.run(bench.lifecycle.reconcile(set(), bench.lifecycle.snapshot()))
        assert bench.clean


@pytest.mark.parametrize(
    ("device", "trusted", "expected"),
    [
        ("mlx5,pci=0000:01:00.2", True, "mlx5,pci=0000:01:00.2,promiscuous=1"),
        ("mlx5,pci=0000:01:00.2", False, "mlx5,pci=0000:01:00.2"),
        ("mlx5,pci=0000:01:00.2,promiscuous=0", True, "mlx5,pci=0000:01:00.2,promiscuous=0"),
        ("ifcvf,pci=0000:01:00.2", True, "ifcvf,pci=0000:01:00.2"),
    ],
)
def test_a_trusted_guest_gets_all_that_reaches_a_connectx(device: str, trusted: bool, expected: str) -> None:
    """As the pool does not say otherwise."""
    vf = Vf(device, device.partition(",")[0], None)
    (wanted,) = parse_domain((xml_folder() / "vdpa-demo.xml").read_bytes(), Path("/run/libvirt-vdpa")).ports
    assert device_for(vf, replace(wanted, trusted=trusted)) == expected
