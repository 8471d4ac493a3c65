"""Pools of PCI functions: created, bound and gone through again as the host changes."""

import asyncio
import errno
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from libvirt_vdpa.config import PoolConfig
from libvirt_vdpa.host_pools import UNDER_WAY, HostPools
from libvirt_vdpa.inventory import Holder, Inventory, InventoryError
from libvirt_vdpa.uevents import PciEvents, concerns_pci
from tests.harness.fake_kernel import FakeKernel
from tests.harness.sysfs_tree import bind

PF, VF1, VF2 = "0000:04:00.0", "0000:04:00.1", "0000:04:00.2"
ONE, NEIGHBOUR, TWO = "0000:01:00.0", "0000:01:00.1", "0000:02:00.0"
SRIOV = {"sriov_totalvfs": "4", "sriov_numvfs": "0", "sriov_drivers_autoprobe": "1"}
#: Seconds after which a test fails rather than hangs.
DEADLINE = 10.0
A = Holder("a", "uuid-a", "52:54:00:00:00:01")


class Bench:
    """One pool, its inventory and a kernel."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernel = FakeKernel(folder)

    def start(self, pool: PoolConfig) -> Inventory:
        self.pools = HostPools([pool], self.kernel, self.folder / "run")
        self.inventory = Inventory([pool], self.pools.obstacle)

        async def start() -> None:
            await self.pools.start(self.inventory)
            await self.pools.stop()

        asyncio.run(start())
        return self.inventory

    def refresh(self) -> None:
        asyncio.run(self.pools.refresh(self.inventory))

    @property
    def shown(self) -> list[tuple[str, str]]:
        return [(vf.device, self.inventory.problem(vf)) for vf in self.inventory]

    def lend(self) -> str:
        return self.inventory.lend("any", "p", None, 1, A).device


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_nothing_is_changed_unasked(bench: Bench) -> None:
    bench.kernel.add(ONE, group=7, driver="virtio-pci")
    bench.kernel.add(PF, group=8, driver="nvme", files=SRIOV)
    bench.start(PoolConfig("p", "virtio", devices=(ONE,)))
    assert bench.shown == [(f"virtio,pci={ONE}", f"bound to virtio-pci: virt-vdpa bind {ONE}")]
    bench.start(PoolConfig("p", "virtio", pf=PF))
    assert bench.shown == []
    with pytest.raises(InventoryError, match=f"pool 'p' has no usable VF: {PF} has no VFs"):
        bench.lend()
    assert bench.kernel.writes == []


def test_vfs_are_created_and_bound_without_another_driver_in_between(bench: Bench) -> None:
    bench.kernel.add(PF, group=8, driver="nvme", files=SRIOV)
    bench.start(PoolConfig("p", "virtio", pf=PF, vfs=2, bind=True))
    assert bench.shown == [(f"virtio,pci={VF1}", ""), (f"virtio,pci={VF2}", "")]
    assert not [name for name, _ in bench.kernel.writes if name.endswith("/unbind")]
    assert bench.kernel.read(f"bus/pci/devices/{PF}/sriov_drivers_autoprobe") == "1"
    assert bench.lend() == f"virtio,pci={VF1}"


def test_vfs_that_are_not_as_configured_are_used_nevertheless(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.kernel.add(PF, group=8, driver="nvme", files=SRIOV)
    bench.kernel.write(f"bus/pci/devices/{PF}/sriov_numvfs", "1")
    bench.start(PoolConfig("p", "virtio", pf=PF, vfs=2, bind=True))
    assert f"pool 'p': {PF}: has 1 VFs, not 2, and nothing is changed" in caplog.text
    assert bench.inventory.pools["p"].warning.startswith(f"{PF}: has 1 VFs, not 2")
    assert bench.lend() == f"virtio,pci={VF1}"


def test_no_physical_function(bench: Bench) -> None:
    bench.start(PoolConfig("p", "virtio", pf=PF, vfs=2))
    with pytest.raises(InventoryError) as refused:
        bench.lend()
    assert str(refused.value) == f"pool 'p' has no usable VF: {PF}: no such PCI function on this host"


def test_one_that_goes_and_comes_back_is_bound_again(bench: Bench) -> None:
    bench.kernel.add(ONE, group=7, driver="virtio-pci")
    bench.start(PoolConfig("p", "virtio", devices=(ONE,), bind=True))
    assert bench.shown == [(f"virtio,pci={ONE}", "")]
    bench.kernel.remove(ONE)
    with pytest.raises(InventoryError, match=f"no usable VF: {ONE}: no such PCI function on this host"):
        bench.lend()
    bench.refresh()
    bench.kernel.add(ONE, group=7, driver="virtio-pci")
    bench.refresh()
    assert bench.lend() == f"virtio,pci={ONE}"


def test_one_that_comes_back_is_bound_by_the_kernel_s_word_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.kernel.add(ONE, group=7, driver="virtio-pci")
    pool = PoolConfig("p", "virtio", devices=(ONE,), bind=True)
    pools = HostPools([pool], bench.kernel, bench.folder / "run")
    inventory = Inventory([pool], pools.obstacle)

    refresh = pools._refresh

    async def through_and_then_it_comes(pool: PoolConfig, inventory: Inventory) -> None:
        await refresh(pool, inventory)
        if bench.kernel.identity(ONE) is None:
            bench.kernel.add(ONE, group=7, driver="virtio-pci")
            pools._follow(inventory)

    async def run() -> None:
        await pools.start(inventory)
        bench.kernel.remove(ONE)
        pools._follow(inventory)
        await pools._tasks["p"]
        bench.kernel.add(ONE, group=7, driver="virtio-pci")
        pools._follow(inventory)
        await pools._tasks["p"]
        assert bench.kernel.driver_of(ONE) == "vfio-pci"

        # And of one that comes while the pools are gone through.
        bench.kernel.remove(ONE)
        monkeypatch.setattr(pools, "_refresh", through_and_then_it_comes)
        pools._follow(inventory)
        await pools._tasks["p"]
        await pools.stop()

    asyncio.run(run())
    assert bench.kernel.driver_of(ONE) == "vfio-pci"


@pytest.mark.parametrize(
    ("event", "ours"),
    [
        (b"add@/devices/pci0000:00/0000:00:02.0/0000:01:00.0\0ACTION=add\0SUBSYSTEM=pci\0SEQNUM=1\0", True),
        (b"remove@/devices/pci0000:00/0000:01:00.0\0ACTION=remove\0SUBSYSTEM=pci\0", True),
        (b"bind@/devices/pci0000:00/0000:01:00.0\0ACTION=bind\0SUBSYSTEM=pci\0", True),
        (b"change@/devices/pci0000:00/0000:01:00.1\0ACTION=change\0SUBSYSTEM=pci\0", True),
        (b"unbind@/devices/pci0000:00/0000:01:00.0\0ACTION=unbind\0SUBSYSTEM=pci\0", False),
        (b"add@/devices/virtual/net/tap0\0ACTION=add\0SUBSYSTEM=net\0", False),
        (b"add@/devices/pci0\0SUBSYSTEM=pci_express\0", False),
        (b"libudev\0\xfe\xed\xca\xfe", False),
        (b"", False),
    ],
)
def test_what_the_kernel_says_of_functions(event: bytes, ours: bool) -> None:
    assert concerns_pci(event) is ours


def test_an_operator_who_gives_one_back_is_not_fought(bench: Bench) -> None:
    bench.kernel.add(ONE, group=7, driver="virtio-pci")
    bench.start(PoolConfig("p", "virtio", devices=(ONE,), bind=True))
    bench.kernel.write("bus/pci/drivers/vfio-pci/unbind", ONE)
    bench.kernel.write(f"bus/pci/devices/{ONE}/driver_override", "\n")
    bench.kernel.write("bus/pci/drivers_probe", ONE)
    bench.refresh()
    assert bench.shown == [(f"virtio,pci={ONE}", f"bound to virtio-pci: virt-vdpa bind {ONE}")]


def test_what_is_refused_is_told_once_and_tried_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.kernel.add(ONE, group=7, driver="virtio-pci")
    bench.kernel.add_interface(ONE, "ens1", flags=1)
    with caplog.at_level(logging.ERROR):
        bench.start(PoolConfig("p", "virtio", devices=(ONE,), bind=True))
        bench.refresh()
    assert bench.shown == [
        (
            f"virtio,pci={ONE}",
            "bound to virtio-pci (interface ens1): its interface ens1 is up: ip link set ens1 down",
        )
    ]
    assert caplog.messages == [f"pool 'p': {ONE}: its interface ens1 is up: ip link set ens1 down"]
    (bench.kernel.sysfs / "class/net/ens1/flags").write_text("0x1002")
    bench.refresh()
    assert bench.shown == [(f"virtio,pci={ONE}", "")]


def test_what_fails_is_not_tried_over_and_over(bench: Bench) -> None:
    bench.kernel.add(ONE, group=7, driver="virtio-pci")
    bench.kernel.stubborn.add("vfio-pci")
    bench.start(PoolConfig("p", "virtio", devices=(ONE,), bind=True))
    writes = len(bench.kernel.writes)
    bench.refresh()
    assert len(bench.kernel.writes) == writes
    ((_, problem),) = bench.shown
    assert problem.startswith("vfio-pci did not take it")


class TestOneThatTheKernelKeeps:
    """A write to sysfs that does not return: neither the others nor the daemon's end wait for it."""

    @pytest.fixture
    def kept(self, bench: Bench) -> Iterator[threading.Event]:
        """Set it to let go."""
        bench.kernel.add(ONE, group=7, driver="virtio-pci")
        bench.kernel.add(TWO, group=8, driver="vfio-pci")
        let_go = threading.Event()

        class Keeping(FakeKernel):
            def write(self, name: str, text: str) -> None:
                if name.endswith("virtio-pci/unbind"):
                    let_go.wait(DEADLINE)
                super().write(name, text)

        bench.kernel.__class__ = Keeping
        yield let_go
        let_go.set()

    @pytest.fixture
    def two_pools(self, bench: Bench, kept: threading.Event) -> tuple[HostPools, Inventory]:
        configured = [
            PoolConfig("p", "virtio", devices=(ONE,), bind=True),
            PoolConfig("q", "virtio", devices=(TWO,)),
        ]
        pools = HostPools(configured, bench.kernel, bench.folder / "run", limit=0.05)
        return pools, Inventory(configured, pools.obstacle)

    def test_others_are_served_and_the_end_comes(
        self, two_pools: tuple[HostPools, Inventory], kept: threading.Event
    ) -> None:
        pools, inventory = two_pools

        async def run() -> None:
            await pools.start(inventory)
            assert inventory.lend("any", "q", None, 1, A).device == f"virtio,pci={TWO}"
            with pytest.raises(InventoryError, match=UNDER_WAY):
                inventory.lend("any", "p", None, 1, A)
            await pools.stop()

        asyncio.run(run())
        assert not kept.is_set()
        assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("pool "))

    def test_it_is_served_in_the_end(
        self, two_pools: tuple[HostPools, Inventory], kept: threading.Event
    ) -> None:
        pools, inventory = two_pools

        async def run() -> None:
            await pools.start(inventory)
            kept.set()
            await asyncio.wait_for(pools._tasks["p"], DEADLINE)
            assert inventory.pools["p"].warning == ""
            assert inventory.lend("any", "p", None, 1, A).device == f"virtio,pci={ONE}"
            await pools.stop()

        asyncio.run(run())

    def test_others_are_still_gone_through(
        self, bench: Bench, two_pools: tuple[HostPools, Inventory], kept: threading.Event
    ) -> None:
        pools, inventory = two_pools

        async def run() -> None:
            await pools.start(inventory)
            before = pools._tasks["q"]
            pools._follow(inventory)
            assert pools._tasks["q"] is not before
            await pools.stop()

        asyncio.run(run())


def test_what_comes_while_the_pools_begin_is_not_missed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events are listened for before the pools are gone through first."""
    order: list[str] = []

    class Listening(PciEvents):
        def start(self) -> None:
            order.append("listens")

    async def refresh(pool: PoolConfig, inventory: Inventory) -> None:
        order.append("goes through")

    monkeypatch.setattr("libvirt_vdpa.host_pools.PciEvents", Listening)
    pool = PoolConfig("p", "virtio", devices=(ONE,))
    pools = HostPools([pool], bench.kernel, bench.folder / "run")
    monkeypatch.setattr(pools, "_refresh", refresh)
    asyncio.run(pools.start(Inventory([pool], pools.obstacle)))
    assert order == ["listens", "goes through"]


def test_events_that_cannot_be_had_stop_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(socket.socket):
        def bind(self, _address: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(socket, "socket", Refusing)

    async def run() -> None:
        events = PciEvents(lambda: None)
        events.start()
        events.stop()

    asyncio.run(run())
    assert "PCI functions are looked for only when asked for" in caplog.text


def test_a_group_is_bound_as_a_whole_or_not_at_all(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    for address in (ONE, NEIGHBOUR):
        bench.kernel.add(address, group=7, driver="virtio-pci")
    bench.kernel.add_interface(NEIGHBOUR, "eth5", flags=1)
    bench.kernel.add(TWO, group=8, driver="virtio-pci")
    bench.start(PoolConfig("p", "virtio", devices=(ONE, TWO, NEIGHBOUR), bind=True))
    assert [bench.kernel.driver_of(one) for one in (ONE, NEIGHBOUR)] == ["virtio-pci"] * 2
    assert bench.kernel.driver_of(TWO) == "vfio-pci"
    assert caplog.messages == [f"pool 'p': {NEIGHBOUR}: its interface eth5 is up: ip link set eth5 down"]
    (bench.kernel.sysfs / "class/net/eth5/flags").write_text("0x1002")
    bench.refresh()
    assert [bench.kernel.driver_of(one) for one in (ONE, NEIGHBOUR)] == ["vfio-pci"] * 2


def test_a_physical_function_that_comes_back_gets_its_vfs_again(bench: Bench) -> None:
    bench.kernel.add(PF, group=8, driver="nvme", files=SRIOV)
    bench.start(PoolConfig("p", "virtio", pf=PF, vfs=2, bind=True))
    for address in (VF1, VF2, PF):
        bench.kernel.remove(address)
    bench.refresh()
    assert bench.shown == []
    folder = bench.kernel.add(PF, group=8, files=SRIOV)
    bench.refresh()  # its driver has not got it yet
    assert bench.inventory.pools["p"].warning.startswith(f"{PF}: has no driver")
    bind(bench.kernel.sysfs, folder, "nvme")
    bench.refresh()
    assert bench.shown == [(f"virtio,pci={VF1}", ""), (f"virtio,pci={VF2}", "")]
    assert bench.inventory.pools["p"].warning == ""


def test_vfs_that_an_operator_has_taken_away_are_not_created_again(bench: Bench) -> None:
    folder = bench.kernel.add(PF, group=8, driver="nvme", files=SRIOV)
    bench.start(PoolConfig("p", "virtio", pf=PF, vfs=1, bind=True))
    bench.kernel.remove(VF1)
    (folder / "virtfn0").unlink()
    bench.refresh()
    assert bench.shown == []


def test_drivers_that_are_kept_from_vfs_for_ever_are_told(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.kernel.add(PF, group=8, driver="nvme", files={**SRIOV, "sriov_drivers_autoprobe": "0"})
    bench.start(PoolConfig("p", "virtio", pf=PF, vfs=1, bind=True))
    assert f"pool 'p': {PF}: sriov_drivers_autoprobe is 0" in caplog.text
    assert f"echo 1 > {bench.kernel.sysfs}/bus/pci/devices/{PF}/sriov_drivers_autoprobe" in caplog.text
    assert bench.shown == [(f"virtio,pci={VF1}", "")]
