"""Whether a PCI function of this host can carry a guest's interface, and if not, why and what to do.

Looks at sysfs and /proc and changes nothing: binding.py and sriov.py do. Every answer is about this
moment: functions come, go and change their driver while one looks.
"""

import re
from collections.abc import Callable, Collection, Mapping

from datapath.bus.pci import PciIds
from datapath.bus.sysfs import HostFunction, SysfsError, function, group_members, in_the_way, net_folders
from libvirt_vdpa.kernel import DEVICES, Kernel, entries

VFIO_PCI = "vfio-pci"
#: The kernel's driver of ConnectX.
MLX5_CORE = "mlx5_core"
VFIO_FOLDER = "/dev/vfio/"
#: What the files of the kernel's own vDPA begin with (drivers/vhost/vdpa.c), and their names in sysfs.
VHOST_VDPA = "vhost-vdpa-"
VHOST_VDPA_NODES = f"/dev/{VHOST_VDPA}"
#: IFF_UP of linux/if.h, in an interface's flags.
INTERFACE_UP = 0x1
#: Processor -> how its IOMMU is switched on.
IOMMU_REMEDIES = {
    "GenuineIntel": "enable VT-d in the firmware and boot with intel_iommu=on",
    "AuthenticAMD": "enable the IOMMU (AMD-Vi) in the firmware and boot without amd_iommu=off",
}
IOMMU_REMEDY = "enable the IOMMU in the firmware and boot without iommu=off"
#: phys_port_name of what stands for a VF or a subfunction (Linux Documentation/networking/switchdev.rst).
REPRESENTOR = re.compile(r"(c\d+)?pf\d+(vf|sf)\d+")

#: Address of a PCI function -> who holds it.
Holders = Mapping[str, str]
#: File of VFIO -> the processes that have it open.
Openers = Mapping[str, list[str]]


def is_ifcvf(ids: PciIds) -> bool:
    # Loads the C module, which none of the other commands needs.
    from datapath.drivers.ifcvf import IDS

    return ids in IDS


def is_connectx(ids: PciIds) -> bool:
    from datapath.drivers.mlx5.glue import NVIDIA, SERVED

    return ids.vendor == NVIDIA and ids.device in SERVED


#: Driver of ours -> which functions it serves, and what messages call those; the most general one last.
SERVED: dict[str, tuple[Callable[[PciIds], bool], str]] = {
    "ifcvf": (is_ifcvf, "an IFCVF network function"),
    "mlx5": (is_connectx, "a ConnectX that has virtqueues"),
    "virtio": (lambda ids: ids.is_virtio_net, "a virtio-net function"),
}


def drivers_for(ids: PciIds) -> tuple[str, ...]:
    """The drivers of ours that serve a function with these ids."""
    return tuple(driver for driver, (serves, _) in SERVED.items() if serves(ids))


def wrong_ids(ids: PciIds, driver: str | None) -> str:
    """Why a driver of ours, or any of them, does not serve a function; empty when it does."""
    asked = SERVED if driver is None else {driver: SERVED[driver]}
    if any(serves(ids) for serves, _ in asked.values()):
        return ""
    *_, (_, what) = asked.values()
    return f"not {what}: {ids}"


def stays_bound(found: HostFunction) -> str:
    """Why a function is not to be given to vfio-pci; empty when it may be."""
    if drivers_for(found.ids) == ("mlx5",):
        return f"mlx5 drives it through {MLX5_CORE}, the kernel's own driver: nothing is to be bound"
    return ""


class HostFunctions:
    """The PCI functions of a host, looked at anew each time."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._root = kernel.sysfs

    def look(self, address: str) -> HostFunction:
        """One function.

        :raise SysfsError: when there is none at `address`.
        """
        return function(address, self._root)

    def uplink(self, address: str) -> str | None:
        """The network interface of a VF's physical function; None when there is none."""
        try:
            parent = self.look(address).physical_function
            names = self.look(parent).net_interfaces if parent is not None else ()
        except SysfsError:
            return None
        return next((name for name in names if not self._is_representor(name)), None)

    def _is_representor(self, interface: str) -> bool:
        """Whether an interface of a physical function stands for one of its VFs, as behind an eSwitch."""
        try:
            port = (self._root / "class/net" / interface / "phys_port_name").read_text()
        except OSError:
            return False
        return REPRESENTOR.fullmatch(port.strip()) is not None

    def obstacle(self, address: str, driver: str, holders: Holders) -> str:
        """Why a function cannot be given to a port now, and what to do; empty when it can.

        :param driver: the driver of ours that is to serve it.
        :param holders: what ports hold.
        """
        try:
            found = self.look(address)
        except SysfsError as error:
            return str(error).removeprefix(f"{address}: ")
        if driver == "mlx5":
            return wrong_ids(found.ids, driver) or self._not_with_its_own(found)
        return (
            wrong_ids(found.ids, driver)
            or self.without_iommu(found)
            or self._bound_elsewhere(found)
            or self.unviable(found)
            or self.group_held(found, holders)
        )

    def without_iommu(self, found: HostFunction) -> str:
        """Why a function has no IOMMU group; empty when it has one."""
        if found.iommu_group is not None:
            return ""
        if entries(self._root / "class/iommu"):
            return "no IOMMU group: this host's IOMMU does not stand before it; use another slot"
        remedy = IOMMU_REMEDIES.get(self.kernel.processor_vendor(), IOMMU_REMEDY)
        return f"no IOMMU group, the IOMMU is off: {remedy}"

    def _not_with_its_own(self, found: HostFunction) -> str:
        """Why a ConnectX, driven through the kernel's own driver, cannot be had; empty when it can."""
        if found.driver == MLX5_CORE:
            return self.host_use(found)
        state = f"bound to {found.driver}" if found.driver else "bound to no driver"
        undo = f"virt-vdpa unbind {found.address}" if found.driver == VFIO_PCI else f"modprobe {MLX5_CORE}"
        return f"{state}: mlx5 needs {MLX5_CORE}, the kernel's own driver; {undo}"

    def _bound_elsewhere(self, found: HostFunction) -> str:
        if found.driver == VFIO_PCI:
            return ""
        behind = f" (interface {', '.join(found.net_interfaces)})" if found.net_interfaces else ""
        state = f"bound to {found.driver}{behind}" if found.driver else "bound to no driver"
        if use := self.host_use(found):
            return f"{state}: {use}"
        together = [found.address, *(member.address for member in in_the_way(found))]
        return f"{state}: virt-vdpa bind {' '.join(sorted(together))}"

    def unviable(self, found: HostFunction, also: Collection[str] = ()) -> str:
        """Which other function in the IOMMU group keeps VFIO from it; empty when none does.

        :param also: addresses that will be bound to vfio-pci together with it.
        """
        for member in in_the_way(found):
            if member.address not in also:
                return (
                    f"IOMMU group {found.iommu_group} is shared with {member.address}, which is bound to"
                    f" {member.driver}: bind both (virt-vdpa bind takes several), or use another slot"
                )
        return ""

    def group_held(self, found: HostFunction, holders: Holders) -> str:
        """A group is opened by one process: only one port can have a function of it."""
        members = [] if found.iommu_group is None else group_members(found.iommu_group, self._root)
        for member in members:
            if member != found.address and (holder := holders.get(member)):
                return f"IOMMU group {found.iommu_group} is held by {holder}, with {member}"
        return ""

    def host_use(self, found: HostFunction) -> str:
        """How the host itself uses a function, as an interface or by vDPA of its own; empty when not."""
        return self._network_use(found) or self._vdpa_use(found)

    def _vdpa_use(self, found: HostFunction) -> str:
        """Who has the kernel's vDPA device of a function open: its driver would wait for them."""
        folder = self._root / DEVICES / found.address
        offered = sorted(folder.glob(f"vdpa*/{VHOST_VDPA}*"))
        openers = self.kernel.openers(VHOST_VDPA_NODES) if offered else {}
        for path in offered:
            if users := openers.get(f"/dev/{path.name}"):
                return (
                    f"its vDPA device {path.parent.name} (/dev/{path.name}) is open in {', '.join(users)};"
                    " the kernel would wait for it to end, so end it first"
                )
        return ""

    def _network_use(self, found: HostFunction) -> str:
        folder = self._root / DEVICES / found.address
        # The folder is there for every namespace, the interface in it for its own.
        if any(net.is_dir() and not entries(net) for net in net_folders(folder)):
            return "its interface is in another network namespace: end what uses it there"
        for interface in found.net_interfaces:
            folder = self._root / "class/net" / interface
            flags = self.kernel.read(f"class/net/{interface}/flags")
            above = [
                path.name.removeprefix("upper_") for path in entries(folder) if path.name.startswith("upper_")
            ]
            if above:
                return f"its interface {interface} is part of {', '.join(above)}: take it out first"
            if flags and int(flags, 0) & INTERFACE_UP:
                return f"its interface {interface} is up: ip link set {interface} down"
            if self.kernel.has_ipv4_address(interface):
                return f"its interface {interface} has an address: ip address flush dev {interface}"
        return ""

    def openers(self) -> Openers:
        """Who has which file of VFIO open."""
        return self.kernel.openers(VFIO_FOLDER)

    def users(self, found: HostFunction, openers: Openers) -> list[str]:
        """Processes that have the function's IOMMU group, or itself, open: name and pid.

        :param openers: what `openers` has found.
        """
        own = entries(self._root / DEVICES / found.address / "vfio-dev")
        nodes = [f"{VFIO_FOLDER}{found.iommu_group}", *(f"{VFIO_FOLDER}devices/{path.name}" for path in own)]
        return [process for node in nodes for process in openers.get(node, [])]
