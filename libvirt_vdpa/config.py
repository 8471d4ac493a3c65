"""virtvdpad's configuration: one TOML file, read strictly.

An unknown key or a value of the wrong type is an error that names file and key: a setting that is
silently ignored is found out when a guest has no network. Owns the keys and their defaults.
"""

import grp
import os
import pwd
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from datapath.bus.sysfs import ADDRESS
from datapath.vdpa import DRIVERS, DeviceSpec, DeviceSpecError

CONFIG_FILE = Path("/etc/libvirt-vdpa/virtvdpad.toml")
RUN_FOLDER = Path("/run/libvirt-vdpa")
LOG_FOLDER = Path("/var/log/libvirt-vdpa")
#: The control socket's name in the run folder.
SOCKET_NAME = "virtvdpad.sock"
#: Bytes of a run folder's path: below it, a socket that is being made has up to 74 more
#: (/ports/UUID/.MAC.ctl.PID), and the path of a UNIX socket at most 107 (unix(7)).
MAX_RUN_FOLDER = 33
#: What messages call the types of values.
TYPE_NAMES: dict[type, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
}
#: How many VFs one emulated NIC can have (virt-vdpa-nic's --vfs).
EMULATED_VFS = range(1, 65)
#: MTUs, in bytes, that it takes (--mtu).
EMULATED_MTUS = range(68, 9001)
#: Queue pairs that its VFs may have (--queue-pairs).
EMULATED_QUEUE_PAIRS = range(1, 9)
#: How its VFs can be notified (--doorbell): by an eventfd, or by memory that a guest can be given.
EMULATED_DOORBELLS = ("eventfd", "mapped")
#: Most VFs that a physical function can have: NumVFs has 16 bits (PCI Express Base Specification, 9.3.3.7).
MAX_VFS = 65535
#: What makes up a pool -> further keys that such a pool takes.
POOL_KINDS: dict[str, tuple[str, ...]] = {
    "emulated": ("tap", "bridge", "mtu", "queue-pairs", "doorbell"),
    "devices": ("bind", "uplink"),
    "pf": ("vfs", "bind", "uplink"),
}
#: Driver -> keys that its pools do not take, and why.
NOT_OF_DRIVER: dict[str, dict[str, str]] = {
    "mlx5": {
        "bind": "its functions stay bound to mlx5_core",
        "doorbell": "its doorbells are always mapped",
    },
}
#: What a network interface may be called (dev_valid_name of Linux's net/core/dev.c), less the comma, which
#: virt-vdpa-port's --uplink cannot say.
INTERFACE_FORM = re.compile(r"(?!\.{1,2}$)[^\s/:,]{1,15}")

T = TypeVar("T")


class ConfigError(Exception):
    """A configuration that cannot be used; the text is one line that names file and key."""


@dataclass(frozen=True)
class SocketConfig:
    """Who may connect to the vhost-user sockets: the user that QEMU runs as."""

    uid: int = 0
    gid: int = 0
    mode: int = 0o660


@dataclass(frozen=True)
class PoolConfig:
    """VFs that guests get without naming one: emulated ones, PCI functions by address, or the VFs of a
    physical function."""

    name: str
    driver: str
    #: Number of VFs that an emulated NIC of ours provides; 0: the pool has PCI functions of the host.
    emulated: int = 0
    #: Names of the emulated VFs' TAP devices, with `%d` for the VF's number; None: the NIC's default.
    tap: str | None = None
    #: Bridge that the TAP devices join.
    bridge: str | None = None
    #: MTU of the emulated VFs and their TAP devices, in bytes.
    mtu: int = 1500
    #: Queue pairs of each emulated VF.
    queue_pairs: int = 1
    #: How emulated VFs are notified.
    doorbell: str = "eventfd"
    #: Addresses of PCI functions, such as "0000:06:00.3".
    devices: tuple[str, ...] = ()
    #: Address of the physical function whose VFs make up the pool.
    pf: str | None = None
    #: Number of VFs that it is to have; None: as many as somebody else gave it.
    vfs: int | None = None
    #: Whether the daemon binds the pool's functions to vfio-pci.
    bind: bool = False
    #: Network interface on which the guests of its VFs are announced; None: the physical function's.
    uplink: str | None = None
    #: What the device strings of its VFs say beside where they are, such as "max_conf_threads=8".
    options: str = ""


def with_options(device: str, pool: PoolConfig) -> str:
    """The device string of a pool's VF with what else the pool says of it."""
    return f"{device},{pool.options}" if pool.options else device


@dataclass(frozen=True)
class Config:
    """All settings, with their defaults."""

    run_folder: Path = RUN_FOLDER
    log_folder: Path = LOG_FOLDER
    #: libvirt whose domains are looked after; empty: none, ports live by hooks alone.
    libvirt_uri: str = "qemu:///system"
    #: Seconds that a hook waits for an answer.
    hook_time_limit: float = 10.0
    socket: SocketConfig = field(default_factory=SocketConfig)
    pools: tuple[PoolConfig, ...] = ()

    @property
    def socket_path(self) -> Path:
        """The daemon's control socket."""
        return self.run_folder / SOCKET_NAME


class _Table:
    """One table of the file while it is read: hands values out, then complains about what is left."""

    def __init__(self, file: Path, name: str, content: object) -> None:
        self._file = file
        self._name = name
        if not isinstance(content, dict):
            raise ConfigError(f"{file}: {name}: must be a table, [{name}]")
        self._left = dict(content)

    def error(self, key: str, text: str) -> ConfigError:
        """A complaint about one key."""
        return ConfigError(f"{self._file}: {'.'.join(part for part in (self._name, key) if part)}: {text}")

    def take(self, key: str, kind: type[T], default: T) -> T:
        """The value of a key.

        :raise ConfigError: when it is not of that type.
        """
        value = self._left.pop(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind and value is not default:
            raise self.error(key, f"must be {TYPE_NAMES[kind]}, not {value!r}")
        # Names of files, users and devices: none of them can have it.
        if "\0" in str(value):
            raise self.error(key, "must not contain a NUL character")
        return value

    def has(self, key: str) -> bool:
        """Whether the key is given, and nobody took it yet."""
        return key in self._left

    def tables(self, key: str) -> list[tuple[str, "_Table"]]:
        """The named tables below a key: [key.NAME]."""
        content = self._left.pop(key, {})
        if not isinstance(content, dict):
            raise self.error(key, f"must be tables, [{key}.NAME]")
        return [(name, _Table(self._file, f"{key}.{name}", value)) for name, value in content.items()]

    def table(self, key: str) -> "_Table":
        """The table of that name, empty when there is none."""
        return _Table(self._file, key, self._left.pop(key, {}))

    def end(self) -> None:
        """Nothing must be left.

        :raise ConfigError: when there are keys that nobody took.
        """
        for key in self._left:
            raise self.error(key, "is not known")


def read_config(file: Path) -> Config:
    """Read a configuration file.

    :raise ConfigError: when it cannot be read or holds anything unknown or unusable.
    """
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from None
    top = _Table(file, "", content)
    config = Config(
        run_folder=_folder(top, "run-folder", RUN_FOLDER),
        log_folder=_folder(top, "log-folder", LOG_FOLDER),
        libvirt_uri=top.take("libvirt-uri", str, Config.libvirt_uri),
        hook_time_limit=top.take("hook-time-limit", float, Config.hook_time_limit),
        socket=_socket(top.table("socket")),
        pools=tuple(_pool(name, table) for name, table in top.tables("pool")),
    )
    if len(os.fsencode(config.run_folder)) > MAX_RUN_FOLDER:
        raise top.error("run-folder", f"must have at most {MAX_RUN_FOLDER} bytes, for the sockets below it")
    if not 1 <= config.hook_time_limit <= 600:
        raise top.error("hook-time-limit", "must be from 1 to 600 seconds")
    _check_apart(top, config.pools)
    top.end()
    return config


def _folder(table: _Table, key: str, default: Path) -> Path:
    path = Path(table.take(key, str, str(default)))
    if not path.is_absolute():
        raise table.error(key, f"must be an absolute path, not '{path}'")
    return path


def _socket(table: _Table) -> SocketConfig:
    user = table.take("user", str, "root")
    group = table.take("group", str, "root")
    mode = table.take("mode", str, "0660")
    try:
        uid = pwd.getpwnam(user).pw_uid
    except KeyError:
        raise table.error("user", f"there is no user '{user}'") from None
    try:
        gid = grp.getgrnam(group).gr_gid
    except KeyError:
        raise table.error("group", f"there is no group '{group}'") from None
    if not re.fullmatch("0?[0-7]{3}", mode):
        raise table.error("mode", f"must be an octal mode such as '0660', not '{mode}'")
    table.end()
    return SocketConfig(uid, gid, int(mode, 8))


def _pool(name: str, table: _Table) -> PoolConfig:
    if not re.fullmatch("[a-zA-Z0-9_-]{1,32}", name):
        raise table.error("", "a pool's name has up to 32 letters, digits, '_' and '-'")
    driver = table.take("driver", str, "")
    if driver not in DRIVERS:
        raise table.error("driver", f"must be one of {', '.join(DRIVERS)}, not '{driver}'")
    kind = _pool_kind(table)
    for key, reason in NOT_OF_DRIVER.get(driver, {}).items():
        if table.has(key):
            raise table.error(key, f"makes no sense with driver '{driver}': {reason}")
    options = _options(table, driver, kind)
    pool = replace(POOL_READERS[kind](name, driver, table), options=options)
    for other, keys in POOL_KINDS.items():
        for key in keys:
            if table.has(key):
                raise table.error(key, f"is for pools with '{other}', this one has '{kind}'")
    table.end()
    return pool


def _options(table: _Table, driver: str, kind: str) -> str:
    """What a driver is told of each VF; a ConnectX' alone takes something."""
    text = table.take("options", str, "")
    if not text:
        return ""
    if driver != "mlx5":
        raise table.error("options", f"driver '{driver}' takes none")
    # Loads what no other driver needs.
    from datapath.drivers.mlx5.options import Options

    named = "mlx5,ibdev=any,libibverbs=any,libmlx5=any" if kind == "emulated" else "mlx5,pci=0000:00:00.0"
    try:
        Options.parse(DeviceSpec.parse(f"{named},{text}"))
    except DeviceSpecError as error:
        raise table.error("options", str(error).partition(f",{text}': ")[2] or str(error)) from None
    return text


def _pool_kind(table: _Table) -> str:
    """The one key that says what the pool is made of."""
    given = [kind for kind in POOL_KINDS if table.has(kind)]
    if len(given) > 1:
        raise table.error(given[1], f"excludes '{given[0]}'; keep one")
    if not given:
        raise table.error("", f"needs one of {', '.join(POOL_KINDS)}: what the pool is made of")
    return given[0]


def _emulated_pool(name: str, driver: str, table: _Table) -> PoolConfig:
    return PoolConfig(
        name,
        driver,
        emulated=_number(table, "emulated", 0, "of VFs", EMULATED_VFS),
        tap=table.take("tap", str, "") or None,
        bridge=table.take("bridge", str, "") or None,
        mtu=_number(table, "mtu", PoolConfig.mtu, "of bytes", EMULATED_MTUS),
        queue_pairs=_number(
            table, "queue-pairs", PoolConfig.queue_pairs, "of queue pairs", EMULATED_QUEUE_PAIRS
        ),
        doorbell=_doorbell(table),
    )


def _number(table: _Table, key: str, default: int, what: str, allowed: range) -> int:
    """A number within limits.

    :param what: what it counts, for the complaint.
    """
    number = table.take(key, int, default)
    if number not in allowed:
        raise table.error(key, f"must be a number {what} from {allowed[0]} to {allowed[-1]}")
    return number


def _doorbell(table: _Table) -> str:
    doorbell = table.take("doorbell", str, PoolConfig.doorbell)
    if doorbell not in EMULATED_DOORBELLS:
        raise table.error("doorbell", f"must be one of {', '.join(EMULATED_DOORBELLS)}, not '{doorbell}'")
    return doorbell


def _devices_pool(name: str, driver: str, table: _Table) -> PoolConfig:
    devices = tuple(_address(table, "devices", item) for item in table.take("devices", list, []))
    if not devices:
        raise table.error("devices", "must have one PCI address at least")
    for address in devices:
        if devices.count(address) > 1:
            raise table.error("devices", f"{address} is given twice")
    return PoolConfig(
        name, driver, devices=devices, bind=table.take("bind", bool, False), uplink=_uplink(table)
    )


def _pf_pool(name: str, driver: str, table: _Table) -> PoolConfig:
    pf = _address(table, "pf", table.take("pf", str, ""))
    vfs = table.take("vfs", int, 0) if table.has("vfs") else None
    if vfs is not None and not 1 <= vfs <= MAX_VFS:
        raise table.error("vfs", f"must be a number of VFs from 1 to {MAX_VFS}")
    bind = table.take("bind", bool, False)
    return PoolConfig(name, driver, pf=pf, vfs=vfs, bind=bind, uplink=_uplink(table))


def _uplink(table: _Table) -> str | None:
    """The name of a network interface, there or not: interfaces come and go."""
    name = table.take("uplink", str, "") if table.has("uplink") else None
    if name is not None and (not INTERFACE_FORM.fullmatch(name) or len(os.fsencode(name)) > 15):
        raise table.error("uplink", f"must be the name of a network interface, not '{name}'")
    return name


#: What makes up a pool -> who reads it.
POOL_READERS: dict[str, Callable[[str, str, _Table], PoolConfig]] = {
    "emulated": _emulated_pool,
    "devices": _devices_pool,
    "pf": _pf_pool,
}


def _address(table: _Table, key: str, value: object) -> str:
    """A PCI address in its full form, in lower case as the kernel writes it."""
    if not isinstance(value, str) or not ADDRESS.fullmatch(value.lower()):
        raise table.error(key, f"{value!r} is no PCI address; write it like '0000:01:00.0'")
    return value.lower()


def _check_apart(top: _Table, pools: Iterable[PoolConfig]) -> None:
    """No PCI function may be in two pools.

    :raise ConfigError: when one is.
    """
    seen: dict[str, str] = {}
    for pool in pools:
        for address in (*pool.devices, *([pool.pf] if pool.pf else [])):
            if address in seen:
                key = "pf" if pool.pf else "devices"
                raise top.error(f"pool.{pool.name}.{key}", f"{address} is in pool '{seen[address]}' already")
            seen[address] = pool.name
