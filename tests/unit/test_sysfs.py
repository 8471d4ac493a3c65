"""Reading a host's PCI functions, on made-up trees."""

from pathlib import Path

import pytest

from datapath.bus.pci import PciIds
from datapath.bus.sysfs import SysfsError, function, functions, group_members, in_the_way
from tests.harness.sysfs_tree import add_function, bind, join_group, link

NIC, VF0, VF10, BARE = "0000:01:00.0", "0000:01:00.1", "0000:01:01.2", "10000:e1:00.0"


def test_a_function_with_everything(tmp_path: Path) -> None:
    folder = add_function(
        tmp_path, NIC, driver_override="vfio-pci", numa_node="1", sriov_totalvfs="64", sriov_numvfs="2"
    )
    add_function(tmp_path, VF0)
    add_function(tmp_path, VF10)
    bind(tmp_path, folder, "vfio-pci")
    join_group(tmp_path, folder, 7)
    for number, address in ((10, VF10), (9, VF0)):
        link(folder, f"virtfn{number}", tmp_path / "devices/pci0000:00" / address)
    (folder / "net/ens1").mkdir(parents=True)
    (folder / "virtio0/net/eth9").mkdir(parents=True)

    found = function(NIC, tmp_path)

    assert found.address == NIC
    assert found.ids == PciIds(0x1AF4, 0x1041, 0x8086, 0x001A)
    assert found.class_code == 0x020000
    assert (found.driver, found.driver_override) == ("vfio-pci", "vfio-pci")
    assert (found.iommu_group, found.numa_node) == (7, 1)
    assert found.physical_function is None
    assert found.virtual_functions == (VF0, VF10)  # by number: 9 before 10
    assert found.total_vfs == 64
    assert found.net_interfaces == ("ens1", "eth9")


def test_a_function_with_nothing(tmp_path: Path) -> None:
    add_function(tmp_path, BARE, driver_override="(null)", numa_node="-1")
    found = function(BARE, tmp_path)
    assert (found.driver, found.driver_override, found.iommu_group, found.numa_node) == (None,) * 4
    assert (found.physical_function, found.total_vfs) == (None, None)
    assert (found.virtual_functions, found.net_interfaces) == ((), ())


def test_a_vf_knows_its_physical_function(tmp_path: Path) -> None:
    physical = add_function(tmp_path, NIC)
    link(add_function(tmp_path, VF0), "physfn", physical)
    assert function(VF0, tmp_path).physical_function == NIC


def test_functions_are_listed_in_order(tmp_path: Path) -> None:
    for address in (VF10, NIC, VF0):
        add_function(tmp_path, address)
    assert [found.address for found in functions(tmp_path)] == [NIC, VF0, VF10]


def test_one_that_vanishes_meanwhile_is_not_listed(tmp_path: Path) -> None:
    add_function(tmp_path, NIC)
    (add_function(tmp_path, VF0) / "vendor").unlink()
    (tmp_path / "bus/pci/devices" / VF10).symlink_to(tmp_path / "nowhere")
    assert [found.address for found in functions(tmp_path)] == [NIC]
    with pytest.raises(SysfsError, match=f"{VF0}: vanished while it was read: no .*/vendor"):
        function(VF0, tmp_path)


def test_a_host_without_pci(tmp_path: Path) -> None:
    assert functions(tmp_path) == []
    assert group_members(3, tmp_path) == []


def test_group_members(tmp_path: Path) -> None:
    for address in (VF0, NIC):
        join_group(tmp_path, add_function(tmp_path, address), 7)
    assert group_members(7, tmp_path) == [NIC, VF0]


@pytest.mark.parametrize("address", ["01:00.0", "0000:01:00.8", "../0000:01:00.0", "", "0000:01:20.0"])
def test_what_is_no_address(tmp_path: Path, address: str) -> None:
    with pytest.raises(SysfsError, match=r"no PCI address; it is written like 0000:01:00\.0$"):
        function(address, tmp_path)


def test_no_such_function(tmp_path: Path) -> None:
    with pytest.raises(SysfsError, match=f"^{NIC}: no such PCI function on this host$"):
        function(NIC, tmp_path)


def test_a_file_without_a_number(tmp_path: Path) -> None:
    add_function(tmp_path, NIC, vendor="what?")
    with pytest.raises(SysfsError, match=r"/vendor: 'what\?' is no number"):
        function(NIC, tmp_path)


def test_who_is_in_the_way_in_a_group(tmp_path: Path) -> None:
    """Neither bridges nor drivers without DMA of their own, nor who goes to VFIO too."""
    others = {
        "0000:00:01.0": ("shpchp", "0x060400"),
        "0000:01:00.1": ("pci-stub", "0x020000"),
        "0000:01:00.2": ("mlx5_vfio_pci", "0x020000"),
        "0000:01:00.3": (None, "0x020000"),
        "0000:01:00.4": ("nvme", "0x010802"),
    }
    join_group(tmp_path, add_function(tmp_path, NIC), 7)
    for address, (driver, code) in others.items():
        folder = add_function(tmp_path, address, **{"class": code})
        join_group(tmp_path, folder, 7)
        if driver is not None:
            bind(tmp_path, folder, driver)
    (tmp_path / "kernel/iommu_groups/7/devices/0000:01:00.5").symlink_to(tmp_path)  # has gone
    assert [other.address for other in in_the_way(function(NIC, tmp_path))] == ["0000:01:00.4"]
