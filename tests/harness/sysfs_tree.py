"""Made-up sysfs trees: PCI functions as the kernel shows them, for tests without hardware."""

from pathlib import Path

#: What every function has; those of an IFCVF.
NUMBERS = {
    "vendor": "0x1af4",
    "device": "0x1041",
    "subsystem_vendor": "0x8086",
    "subsystem_device": "0x001a",
    "class": "0x020000",
}


def add_function(root: Path, address: str, **files: str) -> Path:
    """Add a function, with more files or other contents: its directory is elsewhere, on the bus is a link."""
    folder = root / "devices/pci0000:00" / address
    folder.mkdir(parents=True)
    for name, content in (NUMBERS | files).items():
        (folder / name).write_text(content + "\n")
    bus = root / "bus/pci/devices"
    bus.mkdir(parents=True, exist_ok=True)
    (bus / address).symlink_to(folder)
    return folder


def link(folder: Path, name: str, target: Path) -> None:
    """Make a link in a function's directory; what it leads to comes into being too."""
    target.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(target)


def bind(root: Path, folder: Path, driver: str) -> None:
    """Give a function a driver."""
    link(folder, "driver", root / "bus/pci/drivers" / driver)


def join_group(root: Path, folder: Path, group: int) -> None:
    """Put a function into an IOMMU group."""
    link(folder, "iommu_group", root / "kernel/iommu_groups" / str(group))
    members = root / "kernel/iommu_groups" / str(group) / "devices"
    members.mkdir(exist_ok=True)
    (members / folder.name).symlink_to(folder)
