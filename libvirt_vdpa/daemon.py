"""virtvdpad, the daemon: puts the parts together and serves until it is told to end.

Ports and emulated NICs outlive it: SIGTERM ends the daemon and nothing else. One daemon serves a run
folder; a lock keeps a second one away.
"""

import argparse
import asyncio
import fcntl
import logging
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from datapath.control import Arguments, CommandError
from libvirt_vdpa.announce import Announcer
from libvirt_vdpa.api import ApiServer, Command
from libvirt_vdpa.client import ControlError
from libvirt_vdpa.config import CONFIG_FILE, Config, ConfigError, PoolConfig, read_config
from libvirt_vdpa.emulated import EmulatedNic, end_strays
from libvirt_vdpa.emulated_connectx import EmulatedConnectX
from libvirt_vdpa.events import DomainWatcher
from libvirt_vdpa.host_pools import HostPools
from libvirt_vdpa.hypervisor import Hypervisor
from libvirt_vdpa.inventory import Holder, Inventory, InventoryError, Vf
from libvirt_vdpa.kernel import Kernel
from libvirt_vdpa.lifecycle import Lifecycle, LifecycleError, holder_of
from libvirt_vdpa.links import Links
from libvirt_vdpa.migration import Migrations
from libvirt_vdpa.monitor import GuestMonitors
from libvirt_vdpa.ports import Record
from libvirt_vdpa.rx_filters import RxFilters
from libvirt_vdpa.state_keeper import StateKeeper
from libvirt_vdpa.supervisor import Port, Supervisor

logger = logging.getLogger(__name__)

VERSION = "0.1.0"
#: Share of a hook's time limit in which a port must be ready: before the hook is answered that it is not.
START_SHARE = 0.7
#: Seconds that query-ports waits for each port.
QUERY_LIMIT = 2.0


class DaemonError(Exception):
    """A daemon that cannot start; the text is one line."""


class DomainNews:
    """What libvirt tells (events.Listener), passed on to those who follow domains."""

    def __init__(self, migrations: Migrations, rx_filters: RxFilters) -> None:
        self.lifecycle_event = migrations.lifecycle_event
        self.iteration_event = migrations.iteration_event
        self.job_event = migrations.job_event
        self._migrations = migrations
        self._rx_filters = rx_filters

    def libvirt_found(self, jobs: Mapping[str, Mapping[str, object] | None]) -> None:
        self._migrations.libvirt_found(jobs)
        for uuid in jobs:
            self._rx_filters.way_found(uuid)

    def monitor_event(self, uuid: str, name: str, data: Mapping[str, object]) -> None:
        self._migrations.monitor_event(uuid, name, data)
        self._rx_filters.monitor_event(uuid, name, data)


class Daemon:
    """The parts and what connects them."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._host_pools = HostPools(config.pools, Kernel(), config.run_folder)
        self._inventory = Inventory(config.pools, self._host_pools.obstacle, self._host_pools.uplink)
        self._supervisor = Supervisor(
            config.socket,
            self._port_changed,
            self._port_forgotten,
            start_limit=config.hook_time_limit * START_SHARE,
        )
        self._hypervisor = Hypervisor()
        self._monitors = GuestMonitors(self._hypervisor, self._monitor_event, self._monitor_found)
        self._migrations = Migrations(
            self._supervisor,
            self._hypervisor,
            self._monitors,
            Announcer(self._monitors.execute),
            lambda description: self._api.event("MIGRATION", description),
        )
        self._states = StateKeeper(self._supervisor, self._hypervisor, self._migrations.migrating)
        self._links = Links(self._hypervisor.domain_xml, self._monitors.execute, self._migrations.migrating)
        self._rx_filters = RxFilters(
            self._hypervisor.domain_xml, self._monitors.execute, self._migrations.migrating
        )
        self._lifecycle = Lifecycle(config, self._inventory, self._supervisor, self._refresh_devices)
        self._lifecycle.migrations = self._migrations
        self._nics = [self._emulated(pool) for pool in config.pools if pool.emulated]
        self._api = ApiServer(self._commands())
        self._end = asyncio.Event()

    def _emulated(self, pool: PoolConfig) -> EmulatedNic | EmulatedConnectX:
        """What an emulated pool's VFs are made by."""
        if pool.driver == "mlx5":
            return EmulatedConnectX(pool, self._config.run_folder, self._inventory)
        return EmulatedNic(pool, self._config.run_folder, self._config.log_folder, self._inventory)

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or `quit`.

        :raise DaemonError: when the control socket cannot be made.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end.set)
        await self._adopt()
        await asyncio.gather(self._host_pools.start(self._inventory), *(nic.start() for nic in self._nics))
        try:
            self._api.start(self._config.socket_path)
        except OSError as error:
            raise DaemonError(
                f"control socket {self._config.socket_path}: {error.strerror or error}"
            ) from None
        self._states.start()
        watcher = self._watch_domains(loop)
        logger.info("ready on %s", self._config.socket_path)
        await self._end.wait()
        logger.info("ends; ports and emulated NICs go on")
        if watcher is not None:
            watcher.stop()
        self._migrations.stop()
        self._states.stop()
        self._links.stop()
        self._rx_filters.stop()
        self._monitors.stop()
        await self._api.stop()
        await self._host_pools.stop()
        for nic in self._nics:
            nic.disregard()
        self._supervisor.disregard()

    async def _adopt(self) -> None:
        """Take over from an earlier daemon what still runs."""
        await self._supervisor.adopt(self._config.run_folder)
        for port in self._supervisor.ports.values():
            record = port.record
            try:
                self._inventory.hold(record.device, holder_of(record))
            except InventoryError as error:
                logger.error("%s: %s", record.label, error)
        await end_strays(self._config.run_folder, self._config.pools, self._inventory)

    def _watch_domains(self, loop: asyncio.AbstractEventLoop) -> DomainWatcher | None:
        if not self._config.libvirt_uri:
            return None
        news = DomainNews(self._migrations, self._rx_filters)
        watcher = DomainWatcher(self._config.libvirt_uri, self._lifecycle, loop, self._hypervisor, news)
        watcher.start()
        return watcher

    async def _refresh_devices(self) -> None:
        await self._host_pools.refresh(self._inventory)

    def _port_changed(self, port: Port) -> None:
        self._migrations.port_changed(port)
        self._states.port_changed(port)
        self._links.port_changed(port)
        self._rx_filters.port_changed(port)
        self._api.event("PORT_STATE_CHANGE", self._describe(port))

    def _monitor_event(self, uuid: str, name: str, data: Mapping[str, object]) -> None:
        self._migrations.monitor_event(uuid, name, data)
        self._rx_filters.monitor_event(uuid, name, data)

    def _monitor_found(self, uuid: str) -> None:
        self._rx_filters.way_found(uuid)

    def _describe(self, port: Port) -> dict[str, object]:
        """A port with what its domain's migration means for it."""
        return {**describe(port), "migration": self._migrations.describe(port.record.uuid, port.record.mac)}

    def _port_forgotten(self, record: Record) -> None:
        self._inventory.give_back(record.device, holder_of(record))

    # Commands of the control socket

    def _commands(self) -> Mapping[str, Command]:
        return {
            "hook": self._hook,
            "query-devices": self._query_devices,
            "query-limits": self._query_limits,
            "query-migrations": self._query_migrations,
            "query-ports": self._query_ports,
            "query-stats": self._query_stats,
            "query-status": self._query_status,
            "quit": self._quit,
        }

    async def _hook(self, arguments: Arguments) -> object:
        for name in ("domain", "operation", "xml"):
            if not isinstance(arguments.get(name), str):
                raise CommandError(f"hook: argument '{name}' must be a string")
        xml = arguments["xml"].encode("utf-8", "replace")
        try:
            replacement = await self._lifecycle.hook(arguments["operation"], arguments["domain"], xml)
        except LifecycleError as error:
            raise CommandError(str(error)) from None
        return {} if replacement is None else {"xml": replacement}

    async def _query_limits(self, _arguments: Arguments) -> object:
        # Answered from memory: a hook waits for it, and its time runs.
        return {"hook-time-limit": self._config.hook_time_limit}

    async def _query_status(self, _arguments: Arguments) -> object:
        await self._refresh_devices()
        return {
            "version": VERSION,
            "pid": os.getpid(),
            "run-folder": str(self._config.run_folder),
            "hook-time-limit": self._config.hook_time_limit,
            "ports": len(self._supervisor.ports),
            "pools": [
                {
                    "name": pool.name,
                    "driver": pool.driver,
                    "vfs": len(pool.vfs),
                    "free": sum(
                        vf.holder is None and self._inventory.promised(vf) is None and not problem
                        for vf, problem in self._inventory.problems(pool.vfs)
                    ),
                    "problem": pool.problem or pool.warning,
                }
                for pool in self._inventory.pools.values()
            ],
        }

    async def _query_ports(self, _arguments: Arguments) -> object:
        ports = list(self._supervisor.ports.values())

        async def refresh(port: Port) -> None:
            async with asyncio.timeout(QUERY_LIMIT):
                await port.query_status()

        # Who does not answer is described by what was known before; watching it is the supervisor's.
        results = await asyncio.gather(*(refresh(port) for port in ports), return_exceptions=True)
        for result in results:
            if result is not None and not isinstance(result, ControlError | TimeoutError):
                raise result
        return {"ports": [self._describe(port) for port in ports]}

    async def _query_stats(self, _arguments: Arguments) -> object:
        return {"ports": await asyncio.gather(*map(counted, self._supervisor.ports.values()))}

    async def _query_migrations(self, _arguments: Arguments) -> object:
        return {"migrations": self._migrations.describe_all()}

    async def _query_devices(self, _arguments: Arguments) -> object:
        await self._refresh_devices()
        found = self._inventory.problems(self._inventory)
        return {"devices": [describe_vf(vf, self._inventory.promised(vf), problem) for vf, problem in found]}

    async def _quit(self, _arguments: Arguments) -> object:
        self._end.set()
        return {}


def describe_vf(vf: Vf, promised: Holder | None, problem: str) -> dict[str, object]:
    """One VF as query-devices shows it."""
    holder = vf.holder or promised
    return {
        "device": vf.device,
        "driver": vf.driver,
        "pool": vf.pool,
        "queue_pairs": vf.queue_pairs,
        "state": "lent" if vf.holder else "promised" if promised else "unusable" if problem else "free",
        "domain": holder.domain if holder else None,
        "mac": holder.mac if holder else None,
        "problem": problem,
    }


def describe(port: Port) -> dict[str, object]:
    """One port as query-ports and events show it."""
    record, status = port.record, port.status
    return {
        "domain": record.domain,
        "uuid": record.uuid,
        "mac": record.mac,
        "state": port.state.value,
        "role": record.role,
        "socket": record.socket,
        "device": record.device,
        "pool": record.pool,
        "pid": record.pid,
        "restarts": port.restarts,
        "problem": port.problem,
        "session": status.get("state"),
        "front_end": status.get("front_end", False),
        "link": status.get("link"),
        "features": status.get("feature_names", []),
        "queue_pairs": status.get("queue_pairs"),
        "rx_filter": status.get("rx_filter"),
        "rings": status.get("rings", []),
        "log": status.get("log"),
        "announce": status.get("announce"),
        "timing": status.get("timing"),
        "pauses": status.get("pauses"),
    }


async def counted(port: Port) -> dict[str, object]:
    """One port's counters as query-stats shows them; none and a problem when it does not tell."""
    counters: object = {}
    problem = ""
    try:
        async with asyncio.timeout(QUERY_LIMIT):
            counters = await port.ask("query-stats")
    except (ControlError, TimeoutError) as error:
        problem = str(error) or f"{port.record.control}: no answer within {QUERY_LIMIT:g} s"
    record = port.record
    return {
        "domain": record.domain,
        "uuid": record.uuid,
        "mac": record.mac,
        "device": record.device,
        "counters": counters,
        "problem": problem,
    }


def lock(run_folder: Path) -> int:
    """Keep other daemons away from a run folder, until this process ends.

    :return: a descriptor that holds the lock.
    :raise DaemonError: when another daemon serves the folder, or the lock cannot be had.
    """
    path = run_folder / "virtvdpad.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DaemonError(f"{path}: {error.strerror or error}; it must be a file") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(descriptor, 32).decode("ascii", "replace").strip()
        raise DaemonError(
            f"{run_folder}: another virtvdpad (pid {pid}) serves it; stop that one first"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def make_folders(config: Config) -> None:
    """Make run and log folder.

    :raise DaemonError: when that is not possible.
    """
    try:
        config.run_folder.mkdir(parents=True, exist_ok=True)
        # QEMU's user passes through to its sockets.
        config.run_folder.chmod(0o711)
        config.log_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DaemonError(f"{error.filename}: {error.strerror or error}") from None


def raise_descriptor_limit() -> None:
    """Allow ourselves all that we may have: each port takes two descriptors of the daemon."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="virtvdpad", description="Serves vDPA ports to libvirt's guests.")
    parser.add_argument(
        "--config", type=Path, help=f"configuration file (default: {CONFIG_FILE}, if it exists)"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the daemon; the exit code."""
    options = parse_arguments(arguments)
    logging.basicConfig(
        level=options.log_level.upper(),
        format="%(asctime)s virtvdpad: %(levelname)s: %(message)s",
        stream=sys.stderr,
    )
    # Whatever is made is for root alone, by us and by the programs we start, unless it is opened on purpose.
    os.umask(0o077)
    try:
        file = options.config or (CONFIG_FILE if CONFIG_FILE.exists() else None)
        config = read_config(file) if file else Config()
        make_folders(config)
        raise_descriptor_limit()
        held = lock(config.run_folder)
        asyncio.run(serve(config))
        os.close(held)
    except (ConfigError, DaemonError) as error:
        print(f"virtvdpad: {error}", file=sys.stderr)
        return 1
    return 0


async def serve(config: Config) -> None:
    """Run one daemon in this event loop."""
    await Daemon(config).run()
