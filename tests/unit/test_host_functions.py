"""Why a PCI function cannot carry a guest, in which words: on made-up sysfs trees."""

from pathlib import Path

import pytest

from datapath.bus.sysfs import function
from libvirt_vdpa.host_functions import SERVED, HostFunctions, drivers_for, wrong_ids
from tests.harness.fake_kernel import FakeKernel

ONE, OTHER = "0000:01:00.0", "0000:01:00.1"
#: QEMU's virtio-net-pci, modern and transitional, and its NVMe controller.
MODERN = {"subsystem_vendor": "0x1af4", "subsystem_device": "0x1100"}
TRANSITIONAL = {"device": "0x1000", "subsystem_vendor": "0x1af4", "subsystem_device": "0x0001"}
NVME = {"vendor": "0x1b36", "device": "0x0010", "class": "0x010802", **MODERN}


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    return FakeKernel(tmp_path)


def obstacle(kernel: FakeKernel, driver: str = "virtio", holders: dict[str, str] | None = None) -> str:
    return HostFunctions(kernel).obstacle(ONE, driver, holders or {})


def test_one_that_can_be_used(kernel: FakeKernel) -> None:
    kernel.add(ONE, group=7, driver="vfio-pci")
    assert obstacle(kernel) == ""
    assert obstacle(kernel, "ifcvf") == ""


def test_none_there(kernel: FakeKernel) -> None:
    assert obstacle(kernel) == "no such PCI function on this host"


def test_one_that_the_driver_does_not_serve(kernel: FakeKernel) -> None:
    kernel.add(ONE, group=7, driver="vfio-pci", files=MODERN)
    ids = "1af4:1041 (subsystem 1af4:1100)"
    assert obstacle(kernel) == ""
    assert obstacle(kernel, "ifcvf") == f"not an IFCVF network function: {ids}"
    kernel.add(OTHER, files=NVME)
    found = function(OTHER, kernel.sysfs)
    assert wrong_ids(found.ids, None) == "not a virtio-net function: 1b36:0010 (subsystem 1af4:1100)"


@pytest.mark.parametrize(
    ("files", "drivers"),
    [({}, ("ifcvf", "virtio")), (MODERN, ("virtio",)), (TRANSITIONAL, ("virtio",)), (NVME, ())],
)
def test_which_drivers_serve_one(kernel: FakeKernel, files: dict[str, str], drivers: tuple[str, ...]) -> None:
    kernel.add(ONE, files=files)
    assert drivers_for(function(ONE, kernel.sysfs).ids) == drivers


def test_each_driver_says_what_it_serves() -> None:
    from datapath.vdpa import DRIVERS

    assert set(DRIVERS) <= set(SERVED)


@pytest.mark.parametrize(
    ("processor", "remedy"),
    [
        ("GenuineIntel", "enable VT-d in the firmware and boot with intel_iommu=on"),
        ("AuthenticAMD", "enable the IOMMU (AMD-Vi) in the firmware and boot without amd_iommu=off"),
        ("", "enable the IOMMU in the firmware and boot without iommu=off"),
    ],
)
def test_without_an_iommu(kernel: FakeKernel, processor: str, remedy: str) -> None:
    (kernel.procfs / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {processor}\nflags\t: fpu\n")
    kernel.add(ONE, driver="virtio-pci")
    assert obstacle(kernel) == f"no IOMMU group, the IOMMU is off: {remedy}"
    (kernel.sysfs / "class/iommu/dmar0").mkdir(parents=True)
    assert obstacle(kernel).startswith("no IOMMU group: this host's IOMMU does not stand before it")


def test_bound_elsewhere(kernel: FakeKernel) -> None:
    kernel.add(ONE, group=7)
    assert obstacle(kernel) == f"bound to no driver: virt-vdpa bind {ONE}"
    kernel.write("bus/pci/drivers/virtio-pci/bind", ONE)
    kernel.add_interface(ONE, "ens1")
    assert obstacle(kernel) == f"bound to virtio-pci (interface ens1): virt-vdpa bind {ONE}"
    kernel.add(OTHER, group=7, driver="virtio-pci")
    assert obstacle(kernel) == f"bound to virtio-pci (interface ens1): virt-vdpa bind {ONE} {OTHER}"


@pytest.mark.parametrize(
    ("interface", "words"),
    [
        ({"flags": 0x1003}, "its interface ens1 is up: ip link set ens1 down"),
        ({"above": "br0"}, "its interface ens1 is part of br0: take it out first"),
    ],
)
def test_used_by_the_host(kernel: FakeKernel, interface: dict[str, int], words: str) -> None:
    kernel.add(ONE, group=7, driver="virtio-pci")
    kernel.add_interface(ONE, "ens1", **interface)  # type: ignore[arg-type]
    assert obstacle(kernel) == f"bound to virtio-pci (interface ens1): {words}"


@pytest.mark.parametrize("place", ["net", "virtio3/net"])
def test_used_in_another_network_namespace(kernel: FakeKernel, place: str) -> None:
    (kernel.add(ONE, group=7, driver="virtio-pci") / place).mkdir(parents=True)
    words = "its interface is in another network namespace: end what uses it there"
    assert obstacle(kernel) == f"bound to virtio-pci: {words}"


@pytest.mark.parametrize("driver", [None, "vfio-pci", "mlx5_vfio_pci", "pci-stub", "pcieport"])
def test_neighbours_in_the_group_that_do_no_harm(kernel: FakeKernel, driver: str | None) -> None:
    kernel.add(ONE, group=7, driver="vfio-pci")
    kernel.add(OTHER, group=7, driver=driver)
    assert obstacle(kernel) == ""


def test_a_bridge_in_the_group_does_no_harm(kernel: FakeKernel) -> None:
    kernel.add(ONE, group=7, driver="vfio-pci")
    kernel.add("0000:00:1e.0", group=7, driver="shpchp", files={"class": "0x060400"})
    assert obstacle(kernel) == ""


def test_a_neighbour_in_use_is_named(kernel: FakeKernel) -> None:
    kernel.add(ONE, group=7, driver="vfio-pci")
    kernel.add(OTHER, group=7, driver="nvme")
    assert obstacle(kernel) == (
        f"IOMMU group 7 is shared with {OTHER}, which is bound to nvme:"
        " bind both (virt-vdpa bind takes several), or use another slot"
    )


def test_a_group_serves_one_port_at_a_time(kernel: FakeKernel) -> None:
    kernel.add(ONE, group=7, driver="vfio-pci")
    kernel.add(OTHER, group=7, driver="vfio-pci")
    assert obstacle(kernel, holders={OTHER: "domain 'a' (mac)"}) == (
        f"IOMMU group 7 is held by domain 'a' (mac), with {OTHER}"
    )
    assert obstacle(kernel, holders={"0000:09:00.0": "domain 'a' (mac)"}) == ""


def test_who_has_it_open(kernel: FakeKernel) -> None:
    folder = kernel.add(ONE, group=7, driver="vfio-pci")
    (folder / "vfio-dev/vfio3").mkdir(parents=True)
    kernel.open_by(30, "qemu-system-x86", "/dev/vfio/7")
    kernel.open_by(4, "other", "/dev/vfio/8")
    kernel.open_by(5, "crosvm", "/dev/vfio/devices/vfio3")
    (kernel.procfs / "99").mkdir()  # has ended
    host = HostFunctions(kernel)
    assert host.users(host.look(ONE), host.openers()) == ["qemu-system-x86 (pid 30)", "crosvm (pid 5)"]


def test_a_vf_is_announced_on_the_interface_of_its_physical_function(kernel: FakeKernel) -> None:
    pf, vf = "0000:02:00.0", "0000:02:00.1"
    kernel.add(pf, files={"sriov_totalvfs": "1", "sriov_numvfs": "0"})
    kernel.add(vf)
    uplink = HostFunctions(kernel).uplink
    assert uplink(vf) is None
    (kernel.sysfs / "bus/pci/devices" / vf / "physfn").symlink_to(f"../{pf}")
    assert uplink(vf) is None
    for name, port in (("a_rep", "pf0vf0"), ("b_sf", "c1pf0sf3"), ("c_pf", "p0"), ("d", None)):
        kernel.add_interface(pf, name)
        if port is not None:
            (kernel.sysfs / "class/net" / name / "phys_port_name").write_text(f"{port}\n")
    assert uplink(vf) == "c_pf"
    assert uplink("0000:03:00.0") is None


CONNECTX = {
    "vendor": "0x15b3",
    "device": "0x101e",
    "subsystem_vendor": "0x15b3",
    "subsystem_device": "0x0009",
}


@pytest.mark.parametrize(
    ("driver", "flags", "expected"),
    [
        ("mlx5_core", 0, ""),
        (
            "mlx5_core",
            1,
            "its interface ens1v0 is up: ip link set ens1v0 down",
        ),
        (
            "vfio-pci",
            None,
            f"bound to vfio-pci: mlx5 needs mlx5_core, the kernel's own driver; virt-vdpa unbind {ONE}",
        ),
        (
            None,
            None,
            "bound to no driver: mlx5 needs mlx5_core, the kernel's own driver; modprobe mlx5_core",
        ),
    ],
)
def test_a_connectx_stays_with_its_own_driver(
    kernel: FakeKernel, driver: str | None, flags: int | None, expected: str
) -> None:
    """And needs no IOMMU group."""
    kernel.add(ONE, driver=driver, files=CONNECTX)
    if flags is not None:
        kernel.add_interface(ONE, "ens1v0", flags)
    assert drivers_for(function(ONE, kernel.sysfs).ids) == ("mlx5",)
    assert obstacle(kernel, "mlx5") == expected


def test_a_card_of_before_is_no_connectx(kernel: FakeKernel) -> None:
    kernel.add(ONE, driver="mlx5_core", files={**CONNECTX, "device": "0x1018"})
    assert obstacle(kernel, "mlx5") == "not a ConnectX that has virtqueues: 15b3:1018 (subsystem 15b3:0009)"
