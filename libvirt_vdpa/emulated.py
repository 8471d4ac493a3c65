"""The emulated NIC of a pool: its virt-vdpa-nic process, started, found again and kept running.

One process serves all VFs of a pool and outlives the daemon as ports do. When it dies, its VFs are gone
until it is back; the ports on them are the supervisor's to restart.
"""

import asyncio
import contextlib
import json
import logging
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path

from datapath.vdpa import DeviceSpec
from libvirt_vdpa.client import ControlClient, ControlError
from libvirt_vdpa.config import PoolConfig
from libvirt_vdpa.inventory import Inventory, plain_path
from libvirt_vdpa.ports import write_atomically
from libvirt_vdpa.process import Process, ProgramError, find_program, log_size

logger = logging.getLogger(__name__)

PROGRAM = "virt-vdpa-nic"
#: Seconds until a started NIC must answer, and between looks whether it does.
START_LIMIT = 8.0
READY_INTERVAL = 0.02
#: Seconds until the first and the last of many tries to start it again.
RETRY_FIRST = 0.1
RETRY_LAST = 5.0
#: Seconds that a NIC has to end itself before it is killed.
END_LIMIT = 3.0
#: Layout of the record; another number is not understood.
RECORD_VERSION = 1


def nic_folder(run_folder: Path, pool: str) -> Path:
    """Where a pool's NIC has its sockets and its record."""
    return run_folder / "nics" / pool


class EmulatedNic:
    """The NIC of one pool."""

    def __init__(self, pool: PoolConfig, run_folder: Path, log_folder: Path, inventory: Inventory) -> None:
        self.pool = pool
        self.folder = nic_folder(run_folder, pool.name)
        self._log = log_folder / f"nic-{pool.name}.log"
        self._inventory = inventory
        self._process: Process | None = None
        self._tried = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to keep the NIC running; returns when it is, or when the first try has failed."""
        self._keeper = asyncio.create_task(self._keep(), name=f"pool {self.pool.name}")
        await self._tried.wait()

    def disregard(self) -> None:
        """Stop watching; the process goes on."""
        if self._keeper is not None:
            self._keeper.cancel()
        if self._process is not None:
            self._process.close()

    def _arguments(self) -> list[str]:
        pool = self.pool
        arguments = [f"--folder={self.folder}", f"--vfs={pool.emulated}"]
        arguments += [f"--tap={pool.tap}"] if pool.tap else []
        arguments += [f"--bridge={pool.bridge}"] if pool.bridge else []
        arguments += [f"--mtu={pool.mtu}", f"--queue-pairs={pool.queue_pairs}"]
        # Only where it is another: a NIC that a daemon of before started has the same settings otherwise.
        arguments += [f"--doorbell={pool.doorbell}"] if pool.doorbell != PoolConfig.doorbell else []
        return arguments

    async def _keep(self) -> None:
        """For ever: have a process, tell the inventory what it has, wait until it ends."""
        delay = RETRY_FIRST
        while True:
            mark = log_size(self._log)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._process = await self._adopt() or self._spawn()
                ended = asyncio.Event()
                self._process.watch(ended.set)
                if await self._announce(ended):
                    delay = RETRY_FIRST
                    self._tried.set()
                    await ended.wait()
                problem = self._process.obituary(PROGRAM, self._log, mark)
            except (ProgramError, OSError) as error:
                problem = str(error)
            self._inventory.pools[self.pool.name].problem = problem
            logger.error("pool '%s': %s; trying again", self.pool.name, problem)
            self._tried.set()
            await asyncio.sleep(delay)
            delay = min(2 * delay, RETRY_LAST)

    async def _announce(self, ended: asyncio.Event) -> bool:
        """Wait for the process to answer and tell the inventory its VFs; False when it ends instead."""
        asking = asyncio.create_task(self._query_vfs())
        ending = asyncio.create_task(ended.wait())
        try:
            await asyncio.wait({asking, ending}, timeout=START_LIMIT, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                if not ending.done() and self._process is not None:
                    logger.error("pool '%s': %s not ready within %g s", self.pool.name, PROGRAM, START_LIMIT)
                    self._process.send(signal.SIGKILL)
                    await ending
                return False
            vfs = asking.result()
            self._inventory.set_pool(self.pool.name, [self._vf(vf) for vf in vfs], self._uplinks(vfs))
            self._inventory.pools[self.pool.name].problem = ""
            logger.info("pool '%s': %d VFs", self.pool.name, len(vfs))
            return True
        finally:
            asking.cancel()
            ending.cancel()

    async def _query_vfs(self) -> list[dict[str, object]]:
        """The VFs, as soon as the NIC answers."""
        while True:
            with contextlib.suppress(ControlError):
                async with ControlClient(self._control) as client:
                    return vfs_of(await client.query("query-devices"))
            await asyncio.sleep(READY_INTERVAL)

    @property
    def _control(self) -> Path:
        return self.folder / "control"

    def _device(self, vf: dict[str, object]) -> str:
        return f"{self.pool.driver},vfio-user={vf.get('socket')}"

    def _vf(self, vf: dict[str, object]) -> tuple[str, int | None]:
        queue_pairs = vf.get("queue_pairs")
        return self._device(vf), queue_pairs if isinstance(queue_pairs, int) else None

    def _uplinks(self, vfs: Iterable[dict[str, object]]) -> dict[str, str]:
        """Device string -> uplink: frames for the network go out where the VF's own do."""
        return {self._device(vf): f"nic={self._control},vf={vf.get('index')}" for vf in vfs}

    def _spawn(self) -> Process:
        process = Process.spawn([find_program(PROGRAM), *self._arguments()], self._log)
        record = {
            "version": RECORD_VERSION,
            "pid": process.pid,
            "start_time": process.start_time,
            "arguments": self._arguments(),
        }
        write_atomically(self.folder / "nic.json", json.dumps(record) + "\n")
        return process

    async def _adopt(self) -> Process | None:
        """The process of an earlier daemon, unless it is free to go and has other settings than ours."""
        found = recorded_process(self.folder)
        if found is None:
            return None
        process, arguments = found
        if arguments != self._arguments():
            if not in_use(self.folder, self._inventory):
                await end(process)
                return None
            logger.warning(
                "pool '%s': in use, so its NIC keeps the old settings %s", self.pool.name, arguments
            )
        logger.info("pool '%s': adopts process %d", self.pool.name, process.pid)
        return process


async def end_strays(run_folder: Path, pools: Iterable[PoolConfig], inventory: Inventory) -> None:
    """End the NICs of pools that the configuration no longer has, unless a port still uses them."""
    wanted = {pool.name for pool in pools}
    for folder in sorted((run_folder / "nics").glob("*")):
        if folder.name in wanted or in_use(folder, inventory):
            continue
        if (found := recorded_process(folder)) is not None:
            logger.info("pool '%s': no longer configured; its NIC is ended", folder.name)
            await end(found[0])
        shutil.rmtree(folder, ignore_errors=True)


def vfs_of(answer: dict[str, object]) -> list[dict[str, object]]:
    """The VFs in a NIC's answer to query-devices."""
    vfs = answer.get("vfs")
    return [vf for vf in vfs if isinstance(vf, dict)] if isinstance(vfs, list) else []


def in_use(folder: Path, inventory: Inventory) -> bool:
    """Whether a port holds a VF of the NIC in that folder: its device string names something there."""
    below = f"{plain_path(str(folder))}/"
    held = [DeviceSpec.parse(vf.device) for vf in inventory if vf.holder is not None]
    return any(plain_path(value).startswith(below) for spec in held for value in spec.options.values())


def recorded_process(folder: Path) -> tuple[Process, list[str]] | None:
    """The running process that a NIC's record names, and its arguments."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        record = json.loads((folder / "nic.json").read_text())
        if record["version"] == RECORD_VERSION:
            process = Process.find(int(record["pid"]), int(record["start_time"]))
            if process is not None:
                return process, list(record["arguments"])
    return None


async def end(process: Process) -> None:
    """End a process and wait until it has."""
    ended = asyncio.Event()
    process.watch(ended.set)
    process.send(signal.SIGTERM)
    try:
        async with asyncio.timeout(END_LIMIT):
            await ended.wait()
    except TimeoutError:
        process.send(signal.SIGKILL)
        await ended.wait()
