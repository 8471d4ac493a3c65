"""The inventory: a VF is lent once, whichever way it is asked for."""

from pathlib import Path

import pytest

from datapath.vdpa import DRIVERS
from libvirt_vdpa.config import PoolConfig
from libvirt_vdpa.emulated import in_use
from libvirt_vdpa.inventory import PROMISE_LIMIT, Holder, Inventory, InventoryError, Vf

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
        ("ifcvf", None, "vf=1", 1, "device 'ifcvf,vf=1': names no VF; it needs one of vfio-user, pci, ibdev"),
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


class TestPromises:
    """VFs that are kept for guests that are about to come."""

    class Clock:
        now = 1000.0

        def __call__(self) -> float:
            return self.now

    @pytest.fixture
    def clock(self) -> Clock:
        return self.Clock()

    @pytest.fixture
    def host(self, clock: Clock) -> Inventory:
        inventory = Inventory([PoolConfig("default", "ifcvf", 2)], clock=clock)
        inventory.set_pool("default", [(VF0, 1), (VF1, 1)])
        return inventory

    def promise(self, host: Inventory, holder: Holder, device: str | None = None) -> Vf:
        pool = "default" if device is None else None
        vf = next(host.candidates("ifcvf", pool, device, 1, holder))
        host.promise(vf, holder)
        return vf

    def test_nobody_else_is_lent_what_is_promised(self, host: Inventory) -> None:
        assert self.promise(host, A).device == VF0
        assert host.lend("any", "default", None, 1, B).device == VF1
        with pytest.raises(InventoryError) as refused:
            host.lend("any", "default", None, 1, Holder("c", "uuid-c", "mac"))
        assert str(refused.value) == (
            "pool 'default' has no free VF: 1 of 2 lent to domain 'b' (52:54:00:00:00:02); "
            "1 of 2 promised to domain 'a' (52:54:00:00:00:01)"
        )
        with pytest.raises(InventoryError, match=r"is promised to domain 'a' \(52:54:00:00:00:01\)"):
            host.lend("ifcvf", None, "vfio-user=/vf0.sock", 1, B)

    def test_who_it_is_promised_to_is_lent_it_and_the_promise_is_done_with(self, host: Inventory) -> None:
        host.lend("any", "default", None, 1, B)
        promised = self.promise(host, A)
        host.give_back(VF0, B)
        # Not the first free one, under whatever name the domain goes now.
        renamed = Holder("a2", A.uuid, A.mac)
        assert host.lend("any", "default", None, 1, renamed) is promised
        host.give_back(promised.device, renamed)
        assert [host.promised(vf) for vf in host] == [None, None]

    def test_a_promise_expires(self, host: Inventory, clock: Clock) -> None:
        vf = self.promise(host, A)
        clock.now += PROMISE_LIMIT - 0.1
        assert host.promised(vf) == A
        clock.now += 0.1
        assert host.promised(vf) is None
        assert host.lend("any", "default", None, 1, B) is vf

    def test_two_ports_of_one_domain_are_promised_two(self, host: Inventory) -> None:
        other = Holder(A.domain, A.uuid, B.mac)
        assert [self.promise(host, port).device for port in (A, other)] == [VF0, VF1]
        host.retract(A.uuid, A.mac)
        assert [host.promised(vf) for vf in host] == [None, other]
        host.retract(A.uuid)
        assert [host.promised(vf) for vf in host] == [None, None]

    def test_one_that_is_named_is_forgotten_when_nobody_comes(self, host: Inventory, clock: Clock) -> None:
        self.promise(host, A, "vfio-user=/x.sock")
        assert [vf.device for vf in host] == [VF0, VF1, "ifcvf,vfio-user=/x.sock"]
        with pytest.raises(InventoryError, match="is promised to domain 'a'"):
            host.lend("ifcvf", None, "vfio-user=/x.sock", 1, B)
        clock.now += PROMISE_LIMIT
        assert [vf.device for vf in host] == [VF0, VF1]
        assert host.lend("ifcvf", None, "vfio-user=/x.sock", 1, B).holder == B

    def test_a_promise_survives_that_the_pool_is_gone_through_again(self, host: Inventory) -> None:
        self.promise(host, A)
        host.set_pool("default", [(VF1, 1), (VF0, 1)])
        assert [host.promised(vf) for vf in host] == [None, A]

    def test_one_that_is_in_two_pools_is_promised_once(self, clock: Clock) -> None:
        host = Inventory([PoolConfig(name, "ifcvf", devices=()) for name in ("one", "all")], clock=clock)
        for name in ("one", "all"):
            host.set_pool(name, [("ifcvf,pci=0000:06:00.1", None)])
        host.promise(next(host.candidates("any", "one", None, 1, A)), A)
        with pytest.raises(InventoryError, match="1 of 1 promised to domain 'a'"):
            host.lend("any", "all", None, 1, B)
        assert host.lend("any", "all", None, 1, A).holder == A
        assert [host.promised(vf) for vf in host] == [None, None]


class TestUplinks:
    """Where a guest is announced."""

    def test_of_an_emulated_vf_its_nic_knows(self, inventory: Inventory) -> None:
        inventory.set_pool("default", [(VF0, 1), (VF1, 1)], {VF1: "nic=/run/nic,vf=1"})
        assert [inventory.lend("any", "default", None, 1, port).uplink for port in (A, B)] == [
            None,
            "nic=/run/nic,vf=1",
        ]

    @pytest.mark.parametrize(
        ("configured", "found", "uplink"),
        [("eth1", "eth0", "interface=eth1"), (None, "eth0", "interface=eth0"), (None, None, None)],
    )
    def test_of_a_pci_function(self, configured: str | None, found: str | None, uplink: str | None) -> None:
        pool = PoolConfig("cards", "ifcvf", devices=("0000:06:00.1",), uplink=configured)
        inventory = Inventory([pool], uplink_of=lambda where: found if where == "0000:06:00.1" else "?")
        inventory.set_pool("cards", [("ifcvf,pci=0000:06:00.1", None)])
        assert inventory.lend("ifcvf", None, "pci=0000:06:00.1", 1, A).uplink == uplink

    def test_of_a_pci_function_in_no_pool(self) -> None:
        inventory = Inventory([], uplink_of=lambda where: f"of-{where}")
        assert inventory.lend("ifcvf", None, "pci=0000:06:00.1", 1, A).uplink == "interface=of-0000:06:00.1"
