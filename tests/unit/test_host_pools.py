"""Pools of PCI functions: created, bound and gone through again as the host changes."""

import asyncio
import logging
from pathlib import Path

import pytest

from libvirt_vdpa.config import PoolConfig
from libvirt_vdpa.host_pools import HostPools
from libvirt_vdpa.inventory import Holder, Inventory, InventoryError
from libvirt_vdpa.uevents import concerns_pci
from tests.harness.fake_kernel import FakeKernel

PF, VF1, VF2 = "0000:04:00.0", "0000:04:00.1", "0000:04:00.2"
ONE = "0000:01:00.0"
SRIOV = {"sriov_totalvfs": "4", "sriov_numvfs": "0", "sriov_drivers_autoprobe": "1"}
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
            self.pools.stop()

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

    refresh_all = pools._refresh_all

    async def through_and_then_it_comes(inventory: Inventory) -> None:
        await refresh_all(inventory)
        if bench.kernel.identity(ONE) is None:
            bench.kernel.add(ONE, group=7, driver="virtio-pci")
            pools._follow(inventory)

    async def run() -> None:
        await pools.start(inventory)
        bench.kernel.remove(ONE)
        pools._follow(inventory)
        assert pools._following is not None
        await pools._following
        bench.kernel.add(ONE, group=7, driver="virtio-pci")
        pools._follow(inventory)
        await pools._following
        assert bench.kernel.driver_of(ONE) == "vfio-pci"

        # And of one that comes while the pools are gone through.
        bench.kernel.remove(ONE)
        monkeypatch.setattr(pools, "_refresh_all", through_and_then_it_comes)
        pools._follow(inventory)
        await pools._following
        pools.stop()

    asyncio.run(run())
    assert bench.kernel.driver_of(ONE) == "vfio-pci"


@pytest.mark.parametrize(
    ("event", "ours"),
    [
        (b"add@/devices/pci0000:00/0000:00:02.0/0000:01:00.0\0ACTION=add\0SUBSYSTEM=pci\0SEQNUM=1\0", True),
        (b"remove@/devices/pci0000:00/0000:01:00.0\0ACTION=remove\0SUBSYSTEM=pci\0", True),
        (b"bind@/devices/pci0000:00/0000:01:00.0\0ACTION=bind\0SUBSYSTEM=pci\0", False),
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


def test_one_that_others_wait_for_does_not_hold_them_up(bench: Bench) -> None:
    bench.kernel.add(ONE, group=7, driver="virtio-pci")
    inventory = bench.start(PoolConfig("p", "virtio", devices=(ONE,)))

    async def run() -> None:
        release = asyncio.Event()

        async def slow(inventory: Inventory) -> None:
            await release.wait()

        bench.pools._refresh_all = slow  # type: ignore[method-assign]
        await bench.pools.refresh(inventory, limit=0.01)
        await bench.pools.refresh(inventory, limit=0.01)
        release.set()
        await bench.pools.refresh(inventory)

    asyncio.run(run())
