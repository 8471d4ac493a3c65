"""Which VFs this host has, in which pools, and who holds which.

A VF is lent to one port at a time, whether it was taken from a pool or named by the domain. One that is
promised, to a guest that is about to come, is lent to nobody else until the promise expires. Owns nothing
but this bookkeeping: what stands against a PCI function is asked for when it is to be lent, and that a VF
really works is found out by the port that opens it.
"""

import posixpath
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from datapath.bus.sysfs import ADDRESS
from datapath.vdpa import DeviceSpec, DeviceSpecError
from libvirt_vdpa.config import PoolConfig
from libvirt_vdpa.metadata import ANY_DRIVER


def plain_path(path: str) -> str:
    """The one spelling of a path. A port's working folder is the root; two slashes at the front are no other
    root here, as POSIX would have it, so that there are three."""
    return posixpath.normpath(f"///{path}")


#: Device options that say where a VF is -> what makes one of their many spellings; the other options say how
#: to use it.
ADDRESS_OPTIONS: dict[str, Callable[[str], str]] = {"vfio-user": plain_path, "pci": str.lower, "ibdev": str}
#: Why the PCI function at an address cannot be given to a port by a driver of ours, while ports hold others
#: and maybe this one (address -> holder); empty when it can.
Obstacle = Callable[[str, str, Mapping[str, str]], str]
#: The network interface on which the guest of the PCI function at an address can be announced; None: none.
UplinkOf = Callable[[str], str | None]
#: Seconds that a promise lasts: libvirt's `prepare` follows its `migrate` within one or two, if at all.
PROMISE_LIMIT = 30.0


class InventoryError(Exception):
    """A VF that cannot be lent; the text says what was asked for and why not."""


@dataclass(frozen=True)
class Holder:
    """The port that a VF is lent or promised to."""

    domain: str
    uuid: str
    mac: str

    def __str__(self) -> str:
        return f"domain '{self.domain}' ({self.mac})"


@dataclass(frozen=True)
class Promise:
    """A VF is kept for a port that does not exist yet."""

    holder: Holder
    #: When it is void, by the inventory's clock.
    expires: float


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
    #: May be void; see `Inventory.promised`.
    promise: Promise | None = None
    #: Where its port sends what announces the guest, as virt-vdpa-port's --uplink has it; None: nowhere.
    #: Of a PCI function it is looked up when the VF is lent.
    uplink: str | None = None


@dataclass
class Pool:
    """VFs that are lent without being named."""

    name: str
    driver: str
    #: Network interface of the configuration, for announcing the guests of its VFs.
    uplink: str | None = None
    vfs: list[Vf] = field(default_factory=list)
    #: Why its VFs cannot be used now; empty when they can.
    problem: str = ""
    #: What is not as configured, though there may be VFs that can be used.
    warning: str = ""


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
            where = spelling(spec.options[option])
            if option == "pci" and not ADDRESS.fullmatch(where):
                raise InventoryError(
                    f"device '{device}': '{where}' is no PCI address; write it like 0000:01:00.0"
                )
            return f"{option}={where}"
    raise InventoryError(f"device '{device}': names no VF; it needs one of {', '.join(ADDRESS_OPTIONS)}")


def pci_address(device: str) -> str | None:
    """Address of the PCI function that a device string names; None when the VF is none of this host's.

    :raise InventoryError: when the device string is not one.
    """
    option, _, where = address(device).partition("=")
    return where if option == "pci" else None


class Inventory:
    """The VFs of this host."""

    def __init__(
        self,
        pools: Iterable[PoolConfig],
        obstacle: Obstacle = lambda *_: "",
        uplink_of: UplinkOf = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """No VFs yet, but the pools.

        :param obstacle: asked each time that a PCI function is to be lent or shown.
        :param uplink_of: asked when a PCI function is lent whose pool has no uplink in the configuration.
        :param clock: seconds, for promises.
        """
        self._obstacle = obstacle
        self._uplink_of = uplink_of
        self._clock = clock
        self.pools = {pool.name: Pool(pool.name, pool.driver, pool.uplink) for pool in pools}
        #: VFs of no pool, as long as they are lent or promised.
        self._named: list[Vf] = []

    def __iter__(self) -> Iterator[Vf]:
        for pool in self.pools.values():
            yield from pool.vfs
        yield from (vf for vf in self._named if vf.holder is not None or self._holds(vf.promise))

    def set_pool(
        self, name: str, devices: Iterable[tuple[str, int | None]], uplinks: Mapping[str, str] | None = None
    ) -> None:
        """Say what VFs a pool has: device strings and queue pairs. Those that are lent or promised stay so.

        :param uplinks: device string -> its uplink, of those that have one of their own.
        """
        pool = self.pools[name]
        known = {address(vf.device): vf for vf in (*self._named, *pool.vfs)}
        vfs = []
        for device, queue_pairs in devices:
            vf = Vf(device, pool.driver, name, queue_pairs, uplink=(uplinks or {}).get(device))
            if (before := known.get(address(device))) is not None:
                vf.holder, vf.promise = before.holder, before.promise
            vfs.append(vf)
        there = {address(vf.device) for vf in vfs}
        # A VF that has gone from the pool stays held by the port that has it.
        left = [vf for vf in pool.vfs if vf.holder is not None and address(vf.device) not in there]
        self._named = [vf for vf in [*self._named, *left] if address(vf.device) not in there]
        for vf in left:
            vf.pool = None
        pool.vfs = vfs

    @property
    def holders(self) -> dict[str, str]:
        """Address -> holder, of the PCI functions that are lent."""
        lent = [(pci_address(vf.device), str(vf.holder)) for vf in self if vf.holder is not None]
        return {where: holder for where, holder in lent if where is not None}

    def problems(self, vfs: Iterable[Vf]) -> Iterator[tuple[Vf, str]]:
        """Each VF, and why it cannot be used now, whoever holds it; empty when it can."""
        holders = self.holders
        for vf in vfs:
            yield vf, self._problem(vf, holders)

    def problem(self, vf: Vf) -> str:
        """Why one VF cannot be used now, as `problems` has it."""
        return self._problem(vf, self.holders)

    def _problem(self, vf: Vf, holders: Mapping[str, str]) -> str:
        where = pci_address(vf.device)
        if where is None:
            return self.pools[vf.pool].problem if vf.pool is not None else ""
        holder = holders.get(where)
        if vf.holder is None and holder is not None:
            return f"lent to {holder}, from another pool"
        return self._obstacle(where, vf.driver, holders)

    def candidates(
        self, driver: str, pool: str | None, device: str | None, queue_pairs: int, holder: Holder
    ) -> Iterator[Vf]:
        """VFs that a port could be lent now, one at least: the one that is promised to it, the one that is
        named, or each free one of the pool.

        :raise InventoryError: when there is none that fits.
        """
        usable = (
            self._of_pool(driver, pool, holder)
            if pool is not None
            else self._by_name(f"{driver},{device}", driver, holder)
        )
        for vf in usable:
            if vf.queue_pairs is not None and queue_pairs > vf.queue_pairs:
                raise InventoryError(too_many_queues(queue_pairs, vf.queue_pairs))
            yield vf

    def lend(self, driver: str, pool: str | None, device: str | None, queue_pairs: int, holder: Holder) -> Vf:
        """Take a VF for a port; what was promised to the port is void then.

        :raise InventoryError: when there is none that fits.
        """
        vf = next(self.candidates(driver, pool, device, queue_pairs, holder))
        self.retract(holder.uuid, holder.mac)
        vf.holder = holder
        vf.uplink = self._uplink(vf)
        self._keep(vf)
        return vf

    def promise(self, vf: Vf, holder: Holder) -> None:
        """Lend a VF, one of the `candidates`, to nobody but a port that is to come, for PROMISE_LIMIT."""
        vf.promise = Promise(holder, self._clock() + PROMISE_LIMIT)
        self._keep(vf)

    def retract(self, uuid: str, mac: str | None = None) -> None:
        """Promise nothing to a port, or to a whole domain."""
        for vf in self:
            port = vf.promise.holder if vf.promise is not None else None
            if port is not None and port.uuid == uuid and mac in (None, port.mac):
                vf.promise = None

    def promised(self, vf: Vf) -> Holder | None:
        """Whom a VF that nobody holds is promised to now, if only as a VF of another pool."""
        if vf.holder is not None:
            return None
        there = [other for other in self if self._holds(other.promise)]
        wanted = address(vf.device) if there else ""
        found = [other.promise for other in there if address(other.device) == wanted]
        return found[0].holder if found and found[0] is not None else None

    def _holds(self, promise: Promise | None) -> bool:
        return promise is not None and self._clock() < promise.expires

    def _free_for(self, vf: Vf, holder: Holder) -> bool:
        promised = self.promised(vf)
        return vf.holder is None and (
            promised is None or (promised.uuid, promised.mac) == (holder.uuid, holder.mac)
        )

    def _uplink(self, vf: Vf) -> str | None:
        configured = self.pools[vf.pool].uplink if vf.pool is not None else None
        where = pci_address(vf.device)
        interface = configured or (self._uplink_of(where) if where is not None else None)
        return f"interface={interface}" if interface else vf.uplink

    def _keep(self, vf: Vf) -> None:
        """Remember a VF that is in no pool, and none that nobody has."""
        if vf.pool is None and all(vf is not other for other in self._named):
            self._named = [*(other for other in self if other.pool is None), vf]

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
            vf.holder = vf.promise = None
            self._named = [other for other in self._named if other is not vf]

    def _find(self, device: str) -> Vf | None:
        wanted = address(device)
        found = [vf for vf in self if address(vf.device) == wanted]
        # A VF may be in two pools, and is lent from one of them.
        return next((vf for vf in found if vf.holder is not None), found[0] if found else None)

    def _by_name(self, device: str, driver: str, holder: Holder) -> Iterator[Vf]:
        vf = self._find(device)
        if vf is None:
            where = pci_address(device)
            vf = Vf(f"{driver},pci={where}" if where else device, driver, None)
        if not self._free_for(vf, holder):
            raise InventoryError(f"metadata attribute device: '{device}' is {self._taken(vf)}")
        if vf.driver != driver:
            raise InventoryError(
                f"metadata attribute driver='{driver}': device '{device}' needs '{vf.driver}'"
            )
        if problem := self.problem(vf):
            raise InventoryError(f"device '{vf.device}': {problem}")
        yield vf

    def _taken(self, vf: Vf) -> str:
        """Who has a VF that cannot be lent."""
        return f"in use by {vf.holder}" if vf.holder is not None else f"promised to {self.promised(vf)}"

    def _of_pool(self, driver: str, name: str, holder: Holder) -> Iterator[Vf]:
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
        free = [vf for vf in pool.vfs if self._free_for(vf, holder)]
        # What is promised to this port comes first.
        free.sort(key=lambda vf: self.promised(vf) is None)
        problems = []
        for vf, problem in self.problems(free):
            if not problem:
                yield vf
            else:
                problems.append(f"{pci_address(vf.device) or vf.device}: {problem}")
        if len(problems) < len(free):
            return
        reasons = "; ".join(filter(None, [*self._others(pool, free), *problems, pool.warning]))
        raise InventoryError(f"pool '{name}' has no {'usable' if free else 'free'} VF: {reasons}")

    def _others(self, pool: Pool, free: Collection[Vf]) -> Iterator[str]:
        """Who has the VFs of a pool that are not free."""
        taken = [vf for vf in pool.vfs if vf not in free]
        for what, holders in (
            ("lent", [vf.holder for vf in taken if vf.holder is not None]),
            ("promised", [self.promised(vf) for vf in taken if vf.holder is None]),
        ):
            if holders:
                names = ", ".join(dict.fromkeys(str(holder) for holder in holders))
                yield f"{len(holders)} of {len(pool.vfs)} {what} to {names}"


def too_many_queues(asked: int, has: int) -> str:
    """Refusal of an interface that wants more queue pairs than its VF has."""
    return f"<driver queues='{asked}'>: the VF has {has} queue pair{'s' if has != 1 else ''}; lower queues"
