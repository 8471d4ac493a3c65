"""The inventory: a VF is lent once, whichever way it is asked for."""

from pathlib import Path

import pytest

from datapath.vdpa import DRIVERS
from libvirt_vdpa.config import PoolConfig
from libvirt_vdpa.emulated import in_use
from libvirt_vdpa.inventory import Holder, Inventory, InventoryError

A = Holder("a", "uuid-a", "52:54:00:00:00:01")
B = Holder("b", "uuid-b", "52:54:00:00:00:02")
VF0 = "ifcvf,vfio-user=/vf0.sock"
VF1 = "ifcvf,vfio-user=/vf1.sock"


@pytest.fixture
def inventory() -> Inventory:
    inventory = Inventory([PoolConfig("default", "ifcvf", 2)])
    inventory.set_pool("default", [(VF0, 1), (VF1, 1)])
    return inventory


def test_each_vf_of_a_pool_is_lent_once(inventory: Inventory) -> None:
    assert inventory.lend("any", "default", None, 1, A).device == VF0
    assert inventory.lend("ifcvf", "default", None, 1, B).device == VF1
    with pytest.raises(InventoryError) as refused:
        inventory.lend("any", "default", None, 1, Holder("c", "uuid-c", "mac"))
    assert str(refused.value) == (
        "pool 'default' has no free VF: 2 of 2 lent to domain 'a' (52:54:00:00:00:01), "
        "domain 'b' (52:54:00:00:00:02)"
    )
    inventory.give_back(VF0, A)
    assert inventory.lend("any", "default", None, 1, B).device == VF0


def test_only_the_holder_gives_back(inventory: Inventory) -> None:
    inventory.lend("any", "default", None, 1, A)
    inventory.give_back(VF0, B)
    assert next(iter(inventory)).holder == A


def test_a_named_vf_of_a_pool_is_taken_from_it(inventory: Inventory) -> None:
    inventory.lend("ifcvf", None, "vfio-user=/vf0.sock", 1, A)
    assert inventory.lend("any", "default", None, 1, B).device == VF1
    with pytest.raises(InventoryError, match=r"in use by domain 'a'"):
        inventory.lend("ifcvf", None, "vfio-user=/vf0.sock", 1, B)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("vfio-user=/vf0.sock", "vfio-user=/a/../vf0.sock"),
        ("vfio-user=/vf0.sock", "vfio-user=//vf0.sock"),
        ("vfio-user=/vf0.sock", "vfio-user=/./vf0.sock"),
        ("vfio-user=/vf0.sock", "vfio-user=vf0.sock"),
        ("vfio-user=/x/y.sock", "vfio-user=/x//z/../y.sock"),
        ("pci=0000:06:0A.3", "pci=0000:06:0a.3"),
    ],
)
def test_another_spelling_is_no_other_vf(inventory: Inventory, one: str, other: str) -> None:
    inventory.lend("ifcvf", None, one, 1, A)
    with pytest.raises(InventoryError, match="in use by domain 'a'"):
        inventory.lend("ifcvf", None, other, 1, B)
    inventory.give_back(f"ifcvf,{other}", A)
    assert all(vf.holder is None for vf in inventory)


def test_a_nic_is_in_use_however_its_vf_is_spelled(inventory: Inventory) -> None:
    assert not in_use(Path("/run/nics/old"), inventory)
    inventory.hold("ifcvf,vfio-user=/run/x/../nics//old/vf0.sock", A)
    assert in_use(Path("/run/nics/old"), inventory)
    assert not in_use(Path("/run/nics/o"), inventory)


def test_a_vf_of_no_pool(inventory: Inventory) -> None:
    vf = inventory.lend("ifcvf", None, "vfio-user=/x.sock", 4, A)
    assert (vf.device, vf.pool, vf.queue_pairs) == ("ifcvf,vfio-user=/x.sock", None, None)
    with pytest.raises(InventoryError, match="in use"):
        inventory.lend("ifcvf", None, "vfio-user=/x.sock", 4, B)
    inventory.give_back(vf.device, A)
    assert [vf.device for vf in inventory] == [VF0, VF1]
    inventory.lend("ifcvf", None, "vfio-user=/x.sock", 4, B)


def test_what_does_not_fit_is_refused(inventory: Inventory) -> None:
    for driver, pool, device, queue_pairs, message in (
        ("any", "other", None, 1, "metadata attribute pool='other': not configured; configured: default"),
        ("mlx5", "default", None, 1, "metadata attribute driver='mlx5': pool 'default' has 'ifcvf' VFs"),
        ("any", "default", None, 4, "<driver queues='4'>: the VF has 1 queue pair; lower queues"),
        ("ifcvf", None, "vf=1", 1, "device 'ifcvf,vf=1': names no VF; it needs one of vfio-user, pci"),
        (
            "nix",
            None,
            "pci=1",
            1,
            f"device 'nix,pci=1': no driver 'nix'; use one of: {', '.join(DRIVERS)}",
        ),
        (
            "ifcvf",
            None,
            "pci=06:00.3",
            1,
            "device 'ifcvf,pci=06:00.3': '06:00.3' is no PCI address; write it like 0000:01:00.0",
        ),
    ):
        with pytest.raises(InventoryError) as refused:
            inventory.lend(driver, pool, device, queue_pairs, A)
        assert str(refused.value) == message
    assert all(vf.holder is None for vf in inventory)


def test_a_pool_with_a_problem_lends_nothing_and_says_why(inventory: Inventory) -> None:
    inventory.pools["default"].problem = "virt-vdpa-nic ended"
    with pytest.raises(InventoryError, match="pool 'default' has no usable VF: virt-vdpa-nic ended"):
        inventory.lend("any", "default", None, 1, A)


def test_vfs_of_adopted_ports_stay_held_when_their_pool_appears() -> None:
    inventory = Inventory([PoolConfig("default", "ifcvf", 2)])
    inventory.hold(VF1, A)
    with pytest.raises(InventoryError, match=r"is held by domain 'a'"):
        inventory.hold(VF1, B)
    inventory.set_pool("default", [(VF0, 1), (VF1, 1)])
    assert [(vf.device, vf.pool, vf.holder) for vf in inventory] == [
        (VF0, "default", None),
        (VF1, "default", A),
    ]


class TestPciFunctions:
    """Functions of the host, against which something may stand: here what a dict says."""

    FIRST, SECOND = "0000:06:00.1", "0000:06:00.2"

    @pytest.fixture
    def obstacles(self) -> dict[str, str]:
        return {}

    @pytest.fixture
    def host(self, obstacles: dict[str, str]) -> Inventory:
        inventory = Inventory(
            [PoolConfig("cards", "ifcvf", devices=(self.FIRST, self.SECOND))],
            lambda where, driver, holders: obstacles.get(where, ""),
        )
        inventory.set_pool("cards", [(f"ifcvf,pci={where}", None) for where in (self.FIRST, self.SECOND)])
        return inventory

    def test_one_that_cannot_be_used_is_passed_over(self, host: Inventory, obstacles: dict[str, str]) -> None:
        obstacles[self.FIRST] = "bound to virtio-pci"
        assert host.lend("any", "cards", None, 1, A).device == f"ifcvf,pci={self.SECOND}"
        with pytest.raises(InventoryError) as refused:
            host.lend("any", "cards", None, 1, B)
        assert str(refused.value) == (
            "pool 'cards' has no usable VF: 1 of 2 lent to domain 'a' (52:54:00:00:00:01);"
            " 0000:06:00.1: bound to virtio-pci"
        )
        obstacles.clear()
        assert host.lend("any", "cards", None, 1, B).device == f"ifcvf,pci={self.FIRST}"

    def test_one_that_is_named_is_refused_with_the_reason(
        self, host: Inventory, obstacles: dict[str, str]
    ) -> None:
        obstacles["0000:07:00.0"] = "no such PCI function on this host"
        with pytest.raises(InventoryError) as refused:
            host.lend("ifcvf", None, "pci=0000:07:00.0", 1, A)
        assert str(refused.value) == "device 'ifcvf,pci=0000:07:00.0': no such PCI function on this host"
        assert len(list(host)) == 2

    def test_who_holds_what_is_found_out_once_for_a_list(
        self, host: Inventory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        host.lend("any", "cards", None, 1, A)
        answers = iter([host.holders])
        monkeypatch.setattr(Inventory, "holders", property(lambda _: next(answers)))
        assert [problem for _, problem in host.problems(host)] == ["", ""]

    def test_addresses_are_handed_on_as_the_kernel_writes_them(self, host: Inventory) -> None:
        assert host.lend("ifcvf", None, "pci=0000:0A:00.0", 1, A).device == "ifcvf,pci=0000:0a:00.0"

    def test_one_that_leaves_the_pool_stays_held(self, host: Inventory) -> None:
        lent = host.lend("any", "cards", None, 1, A)
        host.set_pool("cards", [(f"ifcvf,pci={self.SECOND}", None)])
        assert host.holders == {self.FIRST: "domain 'a' (52:54:00:00:00:01)"}
        with pytest.raises(InventoryError, match="in use by domain 'a'"):
            host.lend("ifcvf", None, f"pci={self.FIRST}", 1, B)
        host.set_pool("cards", [(f"ifcvf,pci={where}", None) for where in (self.FIRST, self.SECOND)])
        assert [(vf.device, vf.pool, vf.holder) for vf in host] == [
            (lent.device, "cards", A),
            (f"ifcvf,pci={self.SECOND}", "cards", None),
        ]
        host.give_back(lent.device, A)
        assert host.holders == {}

    def test_a_warning_is_told_when_there_is_nothing_to_lend(
        self, host: Inventory, obstacles: dict[str, str]
    ) -> None:
        host.pools["cards"].warning = "0000:06:00.0: has 2 VFs, not 4"
        host.lend("any", "cards", None, 1, A)
        host.lend("any", "cards", None, 1, B)
        with pytest.raises(InventoryError, match=r"no free VF: 2 of 2 lent to .*; 0000:06:00\.0: has 2 VFs"):
            host.lend("any", "cards", None, 1, A)

    def test_one_that_is_in_two_pools_is_lent_once(self) -> None:
        """A VF by its address, and as one of its physical function's, which the configuration cannot know."""
        one = [(f"ifcvf,pci={self.FIRST}", None)]
        both = [*one, (f"ifcvf,pci={self.SECOND}", None)]
        inventory = Inventory(
            [
                PoolConfig("one", "ifcvf", devices=(self.FIRST,)),
                PoolConfig("all", "ifcvf", pf="0000:06:00.0"),
            ]
        )

        def refresh() -> None:
            inventory.set_pool("one", one)
            inventory.set_pool("all", both)

        refresh()
        inventory.lend("any", "one", None, 1, A)
        assert inventory.lend("any", "all", None, 1, B).device == f"ifcvf,pci={self.SECOND}"
        for _ in range(2):
            with pytest.raises(
                InventoryError, match=f"{self.FIRST}: lent to domain 'a' .*, from another pool"
            ):
                inventory.lend("any", "all", None, 1, B)
            refresh()
        inventory.give_back(f"ifcvf,pci={self.FIRST}", A)
        assert inventory.lend("any", "all", None, 1, A).device == f"ifcvf,pci={self.FIRST}"
        with pytest.raises(InventoryError, match="from another pool"):
            inventory.lend("any", "one", None, 1, B)
        inventory.give_back(f"ifcvf,pci={self.FIRST}", A)
        assert inventory.lend("any", "one", None, 1, B).device == f"ifcvf,pci={self.FIRST}"
