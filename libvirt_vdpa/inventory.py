"""Which VFs this host has, in which pools, and who holds which.

A VF is lent to one port at a time, whether it was taken from a pool or named by the domain. Owns nothing
but this bookkeeping; that a VF really works is found out by the port that opens it.
"""

import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from datapath.vdpa import DeviceSpec, DeviceSpecError
from libvirt_vdpa.config import PoolConfig
from libvirt_vdpa.metadata import ANY_DRIVER


def plain_path(path: str) -> str:
    """The one spelling of a path. A port's working folder is the root; two slashes at the front are no other
    root here, as POSIX would have it, so that there are three."""
    return posixpath.normpath(f"///{path}")


#: Device options that say where a VF is -> what makes one of their many spellings; the other options say how
#: to use it.
ADDRESS_OPTIONS: dict[str, Callable[[str], str]] = {"vfio-user": plain_path, "pci": str.lower}


class InventoryError(Exception):
    """A VF that cannot be lent; the text says what was asked for and why not."""


@dataclass(frozen=True)
class Holder:
    """The port that a VF is lent to."""

    domain: str
    uuid: str
    mac: str

    def __str__(self) -> str:
        return f"domain '{self.domain}' ({self.mac})"


@dataclass
class Vf:
    """One VF of this host."""

    #: Device string for virt-vdpa-port.
    device: str
    driver: str
    #: Name of the pool it belongs to; None when only domains name it.
    pool: str | None
    #: Receive/transmit queue pairs; None when it is not known before a port has opened it.
    queue_pairs: int | None = None
    holder: Holder | None = None


@dataclass
class Pool:
    """VFs that are lent without being named."""

    name: str
    driver: str
    vfs: list[Vf] = field(default_factory=list)
    #: Why its VFs cannot be used now; empty when they can.
    problem: str = ""


def address(device: str) -> str:
    """The part of a device string that tells one VF from another.

    :raise InventoryError: when the device string is not one.
    """
    try:
        spec = DeviceSpec.parse(device)
    except DeviceSpecError as error:
        raise InventoryError(str(error)) from None
    for option, spelling in ADDRESS_OPTIONS.items():
        if option in spec.options:
            return f"{option}={spelling(spec.options[option])}"
    raise InventoryError(f"device '{device}': names no VF; it needs one of {', '.join(ADDRESS_OPTIONS)}")


class Inventory:
    """The VFs of this host."""

    def __init__(self, pools: Iterable[PoolConfig]) -> None:
        self.pools = {pool.name: Pool(pool.name, pool.driver) for pool in pools}
        #: VFs of no pool, as long as they are lent.
        self._named: list[Vf] = []

    def __iter__(self) -> Iterator[Vf]:
        for pool in self.pools.values():
            yield from pool.vfs
        yield from self._named

    def set_pool(self, name: str, devices: Iterable[tuple[str, int | None]]) -> None:
        """Say what VFs a pool has: device strings and queue pairs. Those that are lent stay so."""
        pool = self.pools[name]
        known = {address(vf.device): vf for vf in self}
        vfs = []
        for device, queue_pairs in devices:
            vf = known.get(address(device))
            vfs.append(Vf(device, pool.driver, name, queue_pairs, vf.holder if vf else None))
        self._named = [vf for vf in self._named if address(vf.device) not in {address(v.device) for v in vfs}]
        pool.vfs = vfs

    def lend(self, driver: str, pool: str | None, device: str | None, queue_pairs: int, holder: Holder) -> Vf:
        """Take a VF for a port: the one that is named, or a free one of the pool.

        :raise InventoryError: when there is none that fits.
        """
        vf = self._of_pool(driver, pool) if pool is not None else self._by_name(f"{driver},{device}", driver)
        if vf.queue_pairs is not None and queue_pairs > vf.queue_pairs:
            raise InventoryError(too_many_queues(queue_pairs, vf.queue_pairs))
        vf.holder = holder
        if vf.pool is None:
            self._named.append(vf)
        return vf

    def hold(self, device: str, holder: Holder) -> None:
        """Note that a running port has a VF.

        :raise InventoryError: when another port holds it, or the device string is not one.
        """
        vf = self._find(device) or Vf(device, DeviceSpec.parse(device).driver, None)
        if vf.holder not in (None, holder):
            raise InventoryError(f"device '{device}' is held by {vf.holder}")
        vf.holder = holder
        if vf.pool is None and vf not in self._named:
            self._named.append(vf)

    def give_back(self, device: str, holder: Holder) -> None:
        """A port has let go of its VF; nothing happens when it did not hold it."""
        vf = self._find(device)
        if vf is not None and vf.holder == holder:
            vf.holder = None
            self._named = [other for other in self._named if other is not vf]

    def _find(self, device: str) -> Vf | None:
        wanted = address(device)
        return next((vf for vf in self if address(vf.device) == wanted), None)

    def _by_name(self, device: str, driver: str) -> Vf:
        vf = self._find(device)
        if vf is None:
            return Vf(device, driver, None)
        if vf.holder is not None:
            raise InventoryError(f"metadata attribute device: '{device}' is in use by {vf.holder}")
        if vf.driver != driver:
            raise InventoryError(
                f"metadata attribute driver='{driver}': device '{device}' needs '{vf.driver}'"
            )
        return vf

    def _of_pool(self, driver: str, name: str) -> Vf:
        pool = self.pools.get(name)
        if pool is None:
            there = ", ".join(self.pools) or "none"
            raise InventoryError(f"metadata attribute pool='{name}': not configured; configured: {there}")
        if driver not in (ANY_DRIVER, pool.driver):
            raise InventoryError(
                f"metadata attribute driver='{driver}': pool '{name}' has '{pool.driver}' VFs"
            )
        if pool.problem:
            raise InventoryError(f"pool '{name}' has no usable VF: {pool.problem}")
        free = next((vf for vf in pool.vfs if vf.holder is None), None)
        if free is None:
            holders = ", ".join(dict.fromkeys(str(vf.holder) for vf in pool.vfs))
            raise InventoryError(
                f"pool '{name}' has no free VF: {len(pool.vfs)} of {len(pool.vfs)} lent to {holders}"
            )
        return free


def too_many_queues(asked: int, has: int) -> str:
    """Refusal of an interface that wants more queue pairs than its VF has."""
    return f"<driver queues='{asked}'>: the VF has {has} queue pair{'s' if has != 1 else ''}; lower queues"
