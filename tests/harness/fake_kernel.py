"""A kernel that moves made-up PCI functions between drivers, and creates VFs, when attributes are written."""

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from libvirt_vdpa.kernel import DEVICES, DRIVERS, DRIVERS_PROBE, Kernel, KernelError
from tests.harness.sysfs_tree import add_function, bind, join_group, link

NO_FILES: Mapping[str, str] = {}


class FakeKernel(Kernel):
    """Answers writes to a made-up sysfs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "sys", folder / "proc")
        #: What was written, in order.
        self.writes: list[tuple[str, str]] = []
        #: Attribute -> errno with which the kernel refuses the next write to it.
        self.refuses: dict[str, int] = {}
        #: Drivers that take nothing.
        self.stubborn: set[str] = set()
        #: Which driver takes whatever has no override.
        self.default_driver = "virtio-pci"
        #: Interfaces that have an IPv4 address.
        self.addressed: set[str] = set()
        self.modules: list[str] = []
        for name in ("virtio-pci", "vfio-pci"):
            (self.sysfs / DRIVERS / name).mkdir(parents=True)
        (self.sysfs / DEVICES).mkdir()
        self.procfs.mkdir()

    def add(
        self,
        address: str,
        *,
        group: int | None = None,
        driver: str | None = None,
        files: Mapping[str, str] = NO_FILES,
    ) -> Path:
        """Add a function."""
        folder = add_function(
            self.sysfs, address, **{"driver_override": "(null)", "numa_node": "-1", **files}
        )
        if group is not None:
            join_group(self.sysfs, folder, group)
        if driver is not None:
            bind(self.sysfs, folder, driver)
        return folder

    def remove(self, address: str) -> None:
        """Take a function away, as hot-unplug does."""
        path = self.sysfs / DEVICES / address
        folder = path.resolve()
        for member in (self.sysfs / "kernel/iommu_groups").glob(f"*/devices/{address}"):
            member.unlink()
        path.unlink()
        shutil.rmtree(folder)

    def add_interface(
        self, address: str, name: str, flags: int = 0, above: str = "", place: str = "net"
    ) -> None:
        """Give a function a network interface, in this folder of its directory."""
        (self.sysfs / DEVICES / address / place / name).mkdir(parents=True)
        folder = self.sysfs / "class/net" / name
        folder.mkdir(parents=True)
        (folder / "flags").write_text(f"{flags:#x}\n")
        if above:
            link(folder, f"upper_{above}", self.sysfs / "class/net" / above)

    def open_by(self, pid: int, name: str, node: str) -> None:
        """Have a process hold a file open."""
        folder = self.procfs / str(pid) / "fd"
        folder.mkdir(parents=True)
        (folder.parent / "comm").write_text(f"{name}\n")
        (folder / "7").symlink_to(node)

    def driver_of(self, address: str) -> str | None:
        path = self.sysfs / DEVICES / address / "driver"
        return path.readlink().name if path.is_symlink() else None

    # What the real one does

    def write(self, name: str, text: str) -> None:
        self.writes.append((name, text))
        if (number := self.refuses.pop(name, None)) is not None:
            raise KernelError(f"{self.sysfs / name}: '{text.strip()}': {os.strerror(number)}", number)
        match name.rsplit("/", 2):
            case [_, _, "driver_override"]:
                super().write(name, "")  # it must be there
                (self.sysfs / name).write_text(f"{text.strip() or '(null)'}\n")
            case [_, driver, "unbind"]:
                self._let_go(text, driver)
            case [_, driver, "bind"]:
                self._take(text, driver, name)
            case _ if name == DRIVERS_PROBE:
                self._probe(text)
            case [_, address, "sriov_numvfs"]:
                self._create_vfs(address, int(text))
            case _:
                (self.sysfs / name).write_text(text)

    def load_module(self, name: str) -> None:
        self.modules.append(name)
        if name in self.stubborn:
            raise KernelError(f"module {name} cannot be loaded: not found")
        (self.sysfs / DRIVERS / name).mkdir(parents=True)

    def has_ipv4_address(self, interface: str) -> bool:
        return interface in self.addressed

    def _let_go(self, address: str, driver: str) -> None:
        assert self.driver_of(address) == driver
        (self.sysfs / DEVICES / address / "driver").unlink()
        shutil.rmtree(self.sysfs / DEVICES / address / "net", ignore_errors=True)

    def _take(self, address: str, driver: str, name: str) -> None:
        if driver in self.stubborn or self.driver_of(address) is not None:
            raise KernelError(f"{self.sysfs / name}: '{address}': {os.strerror(errno.ENODEV)}", errno.ENODEV)
        bind(self.sysfs, (self.sysfs / DEVICES / address).resolve(), driver)

    def _probe(self, address: str) -> None:
        if not (self.sysfs / DEVICES / address).exists():
            raise KernelError(f"{DRIVERS_PROBE}: '{address}': {os.strerror(errno.EINVAL)}", errno.EINVAL)
        override = self.read(f"{DEVICES}/{address}/driver_override")
        driver = self.default_driver if override == "(null)" else override
        if self.driver_of(address) is None and driver not in self.stubborn:
            bind(self.sysfs, (self.sysfs / DEVICES / address).resolve(), driver)

    def _create_vfs(self, pf: str, number: int) -> None:
        folder = (self.sysfs / DEVICES / pf).resolve()
        autoprobe = self.read(f"{DEVICES}/{pf}/sriov_drivers_autoprobe") == "1"
        for vf in range(number):
            address = f"{pf[:-1]}{vf + 1}"
            made = self.add(address, group=100 + vf, driver=self.default_driver if autoprobe else None)
            link(made, "physfn", folder)
            link(folder, f"virtfn{vf}", made)
