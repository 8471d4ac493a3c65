"""Pools of PCI functions of this host: which functions they have now, created and bound where configured.

Functions come and go (hot-plug, a PF that is reset), so the pools are gone through again when the kernel
says so, before a VF is lent and whenever they are shown. VFs are created once for each physical function
that appears, and each function that appears in a pool with `bind = true` is taken once; an operator who
gives it back meanwhile is not fought. One that is refused is tried again, because what stands against it
may be gone then.

The kernel may keep whoever moves a function for as long as it likes: nobody waits for a pool without a
limit, nor one pool for another.
"""

import asyncio
import contextlib
import logging
from collections.abc import Collection, Iterable
from pathlib import Path

from datapath.bus.sysfs import SysfsError
from libvirt_vdpa.background import in_background
from libvirt_vdpa.binding import Binder, BindingError, MoveError
from libvirt_vdpa.config import PoolConfig, with_options
from libvirt_vdpa.host_functions import Holders, HostFunctions
from libvirt_vdpa.inventory import Inventory
from libvirt_vdpa.kernel import Kernel
from libvirt_vdpa.sriov import SriovError, create_vfs, no_autoprobe, without_autoprobe
from libvirt_vdpa.uevents import PciEvents

logger = logging.getLogger(__name__)

#: Seconds that somebody who wants a VF, or the daemon to start or end, waits for the pools to be gone
#: through: a driver that does not let go of its function must not hold up those who want another.
REFRESH_LIMIT = 3.0
#: What a pool says that takes longer.
UNDER_WAY = "the kernel has not yet created or bound its functions, see its log if that takes long"


class HostPools:
    """The pools of the configuration that are made of PCI functions."""

    def __init__(
        self, pools: Iterable[PoolConfig], kernel: Kernel, run_folder: Path, limit: float = REFRESH_LIMIT
    ) -> None:
        """Nothing is looked at yet.

        :param limit: seconds after which the inventory is used as it is.
        """
        self._limit = limit
        self._pools = [pool for pool in pools if not pool.emulated]
        self._kernel = kernel
        self._functions = HostFunctions(kernel)
        self._binder = Binder(kernel, run_folder)
        #: Pool -> its physical function, whose VFs have been created, or could not be: not tried again.
        self._created: dict[str, int] = {}
        #: Pool -> why its VFs are not there as configured.
        self._uncreated: dict[str, str] = {}
        #: Address -> the function there that has been bound, or could not be: it is not touched again.
        self._settled: dict[str, int] = {}
        #: Addresses that go together -> why they must not be bound, as it was told last.
        self._refused: dict[tuple[str, ...], str] = {}
        #: Address -> why it could not be bound.
        self._failed: dict[str, str] = {}
        #: Pool -> what goes through it.
        self._tasks: dict[str, asyncio.Task[None]] = {}
        #: Pools that have changed since they began to be gone through.
        self._changed: set[str] = set()
        self._events: PciEvents | None = None

    def obstacle(self, address: str, driver: str, holders: Holders) -> str:
        """Why a function cannot be lent now; empty when it can. As `HostFunctions.obstacle`."""
        obstacle = self._functions.obstacle(address, driver, holders)
        return self._failed.get(address, obstacle) if obstacle else ""

    def uplink(self, address: str) -> str | None:
        """Where a VF's guest can be announced. As `HostFunctions.uplink`."""
        return self._functions.uplink(address)

    async def start(self, inventory: Inventory) -> None:
        """Create the VFs that the configuration asks for and bind what it wants bound.

        What cannot be done is logged and told with the pool: the others are served. What takes longer than
        the limit goes on after this returns.
        """
        if self._pools:
            # First, so that nothing that comes meanwhile is missed.
            self._events = PciEvents(lambda: self._follow(inventory))
            self._events.start()
        await self.refresh(inventory)

    async def stop(self) -> None:
        """Let the functions be as they are. What is being moved is waited for, but not long."""
        if self._events is not None:
            self._events.stop()
        self._changed.clear()
        for name in await self._overdue():
            logger.error("pool '%s': left as it is: %s", name, UNDER_WAY)
            self._tasks[name].cancel()

    def _follow(self, inventory: Inventory) -> None:
        """A function has come or gone: what is under way may have missed it, so go through once more."""
        self._changed |= {pool.name for pool in self._pools}
        self._begin(inventory)

    async def refresh(self, inventory: Inventory) -> None:
        """Go through the pools again, create and bind what has appeared; return by the limit, done or not."""
        self._begin(inventory)
        for name in await self._overdue():
            inventory.pools[name].warning = UNDER_WAY

    def _begin(self, inventory: Inventory) -> None:
        for pool in self._pools:
            task = self._tasks.get(pool.name)
            if task is None or task.done():
                self._tasks[pool.name] = asyncio.create_task(
                    self._keep_current(pool, inventory), name=f"pool {pool.name}"
                )

    async def _overdue(self) -> list[str]:
        """Wait for the pools to be gone through; which ones have not been by the limit."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=self._limit)
        return [name for name, task in self._tasks.items() if not task.done()]

    async def _keep_current(self, pool: PoolConfig, inventory: Inventory) -> None:
        """Go through one pool, until nothing has changed meanwhile."""
        while True:
            self._changed.discard(pool.name)
            try:
                await self._refresh(pool, inventory)
            except Exception:
                # Whatever is wrong with one pool, the others' guests need us.
                logger.exception("pool '%s': cannot be gone through", pool.name)
            if pool.name not in self._changed:
                return

    async def _refresh(self, pool: PoolConfig, inventory: Inventory) -> None:
        self._show(pool, inventory)
        if pool.bind or pool.vfs is not None:
            await in_background(f"pool {pool.name}", lambda: self._provide(pool))
            self._show(pool, inventory)
        inventory.pools[pool.name].warning = self._uncreated.get(pool.name, "")

    def _show(self, pool: PoolConfig, inventory: Inventory) -> None:
        """Tell the inventory what the pool has now."""
        addresses, problem = self._members(pool)
        inventory.pools[pool.name].problem = problem
        inventory.set_pool(
            pool.name, [(with_options(f"{pool.driver},pci={address}", pool), None) for address in addresses]
        )

    def _members(self, pool: PoolConfig) -> tuple[tuple[str, ...], str]:
        """The addresses of a pool's functions, and why it can have none."""
        if pool.pf is None:
            return pool.devices, ""
        try:
            found = self._functions.look(pool.pf)
        except SysfsError as error:
            return (), str(error)
        return found.virtual_functions, "" if found.virtual_functions else f"{pool.pf} has no VFs"

    def _provide(self, pool: PoolConfig) -> None:
        """Create and bind what the configuration wants of a pool and is not there."""
        if pool.pf is not None and pool.vfs is not None:
            self._create(pool, pool.pf, pool.vfs)
        if pool.bind:
            self._bind(pool.name, self._members(pool)[0])

    def _create(self, pool: PoolConfig, pf: str, vfs: int) -> None:
        """Create a pool's VFs, once for each physical function that appears."""
        appearance = self._kernel.identity(pf)
        if appearance is not None and self._created.get(pool.name) == appearance:
            return
        problem = ""
        try:
            if pool.name not in self._uncreated and (warning := without_autoprobe(self._kernel, pf)):
                logger.warning("pool '%s': %s", pool.name, warning)
            # So that a VF that is to be bound to vfio-pci does not come up as a network interface first.
            with no_autoprobe(self._kernel, pf) if pool.bind else contextlib.nullcontext():
                if create_vfs(self._kernel, pf, vfs):
                    logger.info("pool '%s': %s: %d VFs created", pool.name, pf, vfs)
                if pool.bind:
                    self._bind(pool.name, self._members(pool)[0])
        except SriovError as error:
            problem = str(error)
            if error.for_now:
                appearance = None
            if problem != self._uncreated.get(pool.name):
                logger.error("pool '%s': %s", pool.name, problem)
        self._uncreated[pool.name] = problem
        if appearance is None:
            self._created.pop(pool.name, None)
        else:
            self._created[pool.name] = appearance

    def _bind(self, pool: str, addresses: Collection[str]) -> None:
        """Bind what has appeared in a pool."""
        for address in [*self._settled]:
            if self._kernel.identity(address) is None:
                self._settled.pop(address, None)
        appeared: dict[str, int] = {}
        for address in addresses:
            appearance = self._kernel.identity(address)
            if appearance is not None and self._settled.get(address) != appearance:
                appeared[address] = appearance
        for together in self._by_group(appeared):
            if self._bind_together(pool, together):
                self._settled.update((address, appeared[address]) for address in together)

    def _by_group(self, addresses: Iterable[str]) -> list[tuple[str, ...]]:
        """The functions that VFIO gets together or not at all: those of one IOMMU group."""
        groups: dict[int | str, list[str]] = {}
        for address in addresses:
            try:
                group = self._functions.look(address).iommu_group
            except SysfsError:
                continue  # gone again
            groups.setdefault(address if group is None else group, []).append(address)
        return [tuple(members) for members in groups.values()]

    def _bind_together(self, pool: str, addresses: tuple[str, ...]) -> bool:
        """Bind functions, all of them or none; False when they are to be tried again."""
        for address in addresses:
            self._failed.pop(address, None)
        try:
            for line in self._binder.bind(addresses):
                logger.info("pool '%s': %s", pool, line)
        except MoveError as error:
            logger.error("pool '%s': %s", pool, error)
            for address in addresses:
                self._failed[address] = str(error).removeprefix(f"{address}: ")
        except BindingError as error:
            if self._refused.get(addresses) != str(error):
                logger.error("pool '%s': %s", pool, error)
            self._refused[addresses] = str(error)
            return False
        self._refused.pop(addresses, None)
        return True
