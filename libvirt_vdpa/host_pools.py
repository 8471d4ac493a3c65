"""Pools of PCI functions of this host: which functions they have now, created and bound where configured.

Functions come and go (hot-plug, a PF that is reset), so the pools are gone through again when the kernel
says so, before a VF is lent and whenever they are shown. Each function that appears in a pool with
`bind = true` is taken once; an operator who gives it back meanwhile is not fought. One that is refused is
tried again, because what stands against it may be gone then.
"""

import asyncio
import contextlib
import logging
from collections.abc import Collection, Iterable
from pathlib import Path

from datapath.bus.sysfs import SysfsError
from libvirt_vdpa.binding import Binder, BindingError, MoveError
from libvirt_vdpa.config import PoolConfig
from libvirt_vdpa.host_functions import Holders, HostFunctions
from libvirt_vdpa.inventory import Inventory
from libvirt_vdpa.kernel import Kernel
from libvirt_vdpa.sriov import SriovError, create_vfs, no_autoprobe
from libvirt_vdpa.uevents import PciEvents

logger = logging.getLogger(__name__)

#: Seconds that somebody who wants a VF waits for the pools to be gone through: a driver that does not let
#: go of its function must not hold up those who want another.
REFRESH_LIMIT = 3.0


class HostPools:
    """The pools of the configuration that are made of PCI functions."""

    def __init__(self, pools: Iterable[PoolConfig], kernel: Kernel, run_folder: Path) -> None:
        self._pools = [pool for pool in pools if not pool.emulated]
        self._kernel = kernel
        self._functions = HostFunctions(kernel)
        self._binder = Binder(kernel, run_folder)
        #: Address -> the function there that has been bound, or could not be: it is not touched again.
        self._settled: dict[str, int] = {}
        #: Address -> why it must not be bound, as it was told last.
        self._refused: dict[str, str] = {}
        #: Address -> why it could not be bound.
        self._failed: dict[str, str] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._events: PciEvents | None = None
        #: Goes through the pools as long as events come.
        self._following: asyncio.Task[None] | None = None
        self._changed = False

    def obstacle(self, address: str, driver: str, holders: Holders) -> str:
        """Why a function cannot be lent now; empty when it can. As `HostFunctions.obstacle`."""
        obstacle = self._functions.obstacle(address, driver, holders)
        return self._failed.get(address, obstacle) if obstacle else ""

    async def start(self, inventory: Inventory) -> None:
        """Create the VFs that the configuration asks for and bind what it wants bound.

        What cannot be done is logged and told with the pool: the others are served.
        """
        for pool in self._pools:
            inventory.pools[pool.name].warning = await asyncio.to_thread(self._create, pool)
        await self.refresh(inventory, limit=None)
        if self._pools:
            self._events = PciEvents(lambda: self._follow(inventory))
            self._events.start()

    def stop(self) -> None:
        """Let the functions be as they are."""
        if self._events is not None:
            self._events.stop()
        for task in (self._following, self._refreshing):
            if task is not None:
                task.cancel()

    def _follow(self, inventory: Inventory) -> None:
        """A function has come or gone: what is under way may have missed it, so go through once more."""

        async def follow() -> None:
            while self._changed:
                if self._refreshing is not None:
                    await asyncio.wait({self._refreshing})
                self._changed = False
                await self.refresh(inventory, limit=None)

        self._changed = True
        if self._following is None or self._following.done():
            self._following = asyncio.create_task(follow(), name="host pools, after an event")

    async def refresh(self, inventory: Inventory, limit: float | None = REFRESH_LIMIT) -> None:
        """Go through the pools again, and bind what has appeared.

        :param limit: seconds after which the inventory is used as it is.
        """
        if not self._pools:
            return
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh_all(inventory), name="host pools")
        await asyncio.wait({self._refreshing}, timeout=limit)

    async def _refresh_all(self, inventory: Inventory) -> None:
        for pool in self._pools:
            try:
                await self._refresh(pool, inventory)
            except Exception:
                # Whatever is wrong with one pool, the others' guests need us.
                logger.exception("pool '%s': cannot be gone through", pool.name)

    async def _refresh(self, pool: PoolConfig, inventory: Inventory) -> None:
        addresses, problem = self._members(pool)
        if pool.bind:
            await asyncio.to_thread(self._bind, pool.name, addresses)
        inventory.pools[pool.name].problem = problem
        inventory.set_pool(pool.name, [(f"{pool.driver},pci={address}", None) for address in addresses])

    def _members(self, pool: PoolConfig) -> tuple[tuple[str, ...], str]:
        """The addresses of a pool's functions, and why it can have none."""
        if pool.pf is None:
            return pool.devices, ""
        try:
            found = self._functions.look(pool.pf)
        except SysfsError as error:
            return (), str(error)
        return found.virtual_functions, "" if found.virtual_functions else f"{pool.pf} has no VFs"

    def _create(self, pool: PoolConfig) -> str:
        """Create a pool's VFs; why that is not possible."""
        if pool.pf is None or pool.vfs is None:
            return ""
        try:
            # So that a VF that is to be bound to vfio-pci does not come up as a network interface first.
            with no_autoprobe(self._kernel, pool.pf) if pool.bind else contextlib.nullcontext():
                if create_vfs(self._kernel, pool.pf, pool.vfs):
                    logger.info("pool '%s': %s: %d VFs created", pool.name, pool.pf, pool.vfs)
                if pool.bind:
                    self._bind(pool.name, self._members(pool)[0])
        except SriovError as error:
            logger.error("pool '%s': %s", pool.name, error)
            return str(error)
        return ""

    def _bind(self, pool: str, addresses: Collection[str]) -> None:
        """Bind what has appeared in a pool."""
        for address in addresses:
            appearance = self._kernel.identity(address)
            if appearance is None:
                self._settled.pop(address, None)
                continue
            if self._settled.get(address) == appearance:
                continue
            self._failed.pop(address, None)
            try:
                for line in self._binder.bind([address], also=addresses):
                    logger.info("pool '%s': %s", pool, line)
            except MoveError as error:
                logger.error("pool '%s': %s", pool, error)
                self._failed[address] = str(error).removeprefix(f"{address}: ")
            except BindingError as error:
                if self._refused.get(address) != str(error):
                    logger.error("pool '%s': %s", pool, error)
                self._refused[address] = str(error)
                continue
            self._refused.pop(address, None)
            self._settled[address] = appearance
