"""What a host says of its PCI functions in sysfs. Only reads; the control plane binds them and creates VFs.

Files and links are those of the kernel's Documentation/ABI/testing/sysfs-bus-pci and
sysfs-kernel-iommu_groups. Functions come and go while one looks: one that vanishes is not there.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from datapath.bus.pci import PciIds
from datapath.vdpa import DeviceError

#: An address in its full form: domain, bus, device and function.
ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
#: What a driver_override file says when there is none.
NO_OVERRIDE = "(null)"
#: Base class of bridges, the class's top byte.
BRIDGE_CLASS = 0x06
#: Drivers that leave DMA to whoever owns the rest of the IOMMU group (drivers/vfio/vfio_main.c; since Linux
#: 5.18 `driver_managed_dma`).
HARMLESS_DRIVERS = (None, "pci-stub", "pcieport")

SYSFS = Path("/sys")


class SysfsError(DeviceError):
    """No such function, or sysfs does not say what it says of every function."""


@dataclass(frozen=True)
class HostFunction:
    """A PCI function of a host, as sysfs had it at one moment."""

    #: Such as "0000:01:00.0".
    address: str
    ids: PciIds
    #: Base class, subclass and programming interface: 0x020000 is an Ethernet controller.
    class_code: int
    #: The driver that has it; None when none has.
    driver: str | None
    #: None when no IOMMU stands before it.
    iommu_group: int | None
    #: None when the host does not say.
    numa_node: int | None
    #: Address of the physical function, of a VF.
    physical_function: str | None
    #: Addresses of the VFs that a physical function has now, in the order of their numbers.
    virtual_functions: tuple[str, ...]
    #: How many VFs it could have; None when it has no SR-IOV.
    total_vfs: int | None
    #: Network interfaces of the host's that the function is behind.
    net_interfaces: tuple[str, ...]
    #: Where sysfs is, for what is read when it is asked for.
    root: Path = field(default=SYSFS, repr=False)

    @property
    def driver_override(self) -> str | None:
        """The only driver that may take it; None when any may that matches, or the function is gone.

        Read now, and only for who needs it: while a function is being removed or unbound, the kernel answers
        this one question when the function's user has let go, and lets nobody who waits for it be killed.
        """
        override = _text(_devices(self.root) / self.address / "driver_override")
        return None if override in (None, "", NO_OVERRIDE) else override


def functions(root: Path = SYSFS) -> list[HostFunction]:
    """Each PCI function, in the order of addresses; none on a host without PCI."""
    found = []
    for address in _names(_devices(root)):
        try:
            found.append(function(address, root))
        except SysfsError:
            continue  # gone since it was listed
    return found


def function(address: str, root: Path = SYSFS) -> HostFunction:
    """One function.

    :param address: in its full form.
    :raise SysfsError: when there is none at `address`.
    """
    if not ADDRESS.fullmatch(address):
        raise SysfsError(f"'{address}' is no PCI address; it is written like 0000:01:00.0")
    folder = _devices(root) / address
    if not folder.is_dir():
        raise SysfsError(f"{address}: no such PCI function on this host")
    node = _optional_number(folder / "numa_node")
    group = _link(folder / "iommu_group")
    return HostFunction(
        address=address,
        ids=PciIds(
            *(_number(folder / name) for name in ("vendor", "device", "subsystem_vendor", "subsystem_device"))
        ),
        class_code=_number(folder / "class"),
        driver=_link(folder / "driver"),
        iommu_group=None if group is None else int(group),
        numa_node=None if node is None or node < 0 else node,
        physical_function=_link(folder / "physfn"),
        virtual_functions=_virtual_functions(folder),
        total_vfs=_optional_number(folder / "sriov_totalvfs"),
        net_interfaces=_net_interfaces(folder),
        root=root,
    )


def group_members(group: int, root: Path = SYSFS) -> list[str]:
    """Addresses of the functions in an IOMMU group; empty when there is no such group."""
    return _names(root / "kernel/iommu_groups" / str(group) / "devices")


def is_bridge(found: HostFunction) -> bool:
    """Whether a function is a bridge: it has no DMA of its own that VFIO would mind."""
    return found.class_code >> 16 == BRIDGE_CLASS


def in_the_way(found: HostFunction) -> list[HostFunction]:
    """The other functions in its IOMMU group whose drivers use the group's DMA, so that VFIO cannot."""
    members = [] if found.iommu_group is None else group_members(found.iommu_group, found.root)
    others = []
    for address in members:
        try:
            others.append(function(address, found.root))
        except SysfsError:
            continue  # gone meanwhile, or no PCI function
    return [
        other
        for other in others
        if other.address != found.address
        and not is_bridge(other)
        and other.driver not in HARMLESS_DRIVERS
        and "vfio" not in str(other.driver)
    ]


def net_folders(folder: Path) -> list[Path]:
    """Where the network interfaces are that a function's directory is behind.

    One of a virtio function belongs to the virtio device, which is a child of the function, or of the vDPA
    device (virtio_vdpa) that is.
    """
    return sorted([*folder.glob("net"), *folder.glob("virtio*/net"), *folder.glob("vdpa*/virtio*/net")])


def _devices(root: Path) -> Path:
    return root / "bus/pci/devices"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None


def _optional_number(file: Path) -> int | None:
    """A file that only some functions have. Numbers are written like 0x1af4, or in decimal."""
    text = _text(file)
    try:
        return None if text is None else int(text, 0)
    except ValueError as error:
        raise SysfsError(f"{file}: '{text}' is no number") from error


def _number(file: Path) -> int:
    number = _optional_number(file)
    if number is None:
        raise SysfsError(f"{file.parent.name}: vanished while it was read: no {file}")
    return number


def _link(link: Path) -> str | None:
    """The last part of where a link leads: names a driver, a group, a function."""
    try:
        return link.readlink().name
    except OSError:
        return None


def _virtual_functions(folder: Path) -> tuple[str, ...]:
    links = {int(path.name.removeprefix("virtfn")): _link(path) for path in folder.glob("virtfn[0-9]*")}
    return tuple(address for _, address in sorted(links.items()) if address is not None)


def _net_interfaces(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(name for net in net_folders(folder) for name in _names(net)))
