"""virtvdpad's configuration: one TOML file, read strictly.

An unknown key or a value of the wrong type is an error that names file and key: a setting that is
silently ignored is found out when a guest has no network. Owns the keys and their defaults.
"""

import grp
import os
import pwd
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from datapath.vdpa import DRIVERS

CONFIG_FILE = Path("/etc/libvirt-vdpa/virtvdpad.toml")
RUN_FOLDER = Path("/run/libvirt-vdpa")
LOG_FOLDER = Path("/var/log/libvirt-vdpa")
#: The control socket's name in the run folder.
SOCKET_NAME = "virtvdpad.sock"
#: Bytes of a run folder's path: below it, a socket that is being made has up to 74 more
#: (/ports/UUID/.MAC.ctl.PID), and the path of a UNIX socket at most 107 (unix(7)).
MAX_RUN_FOLDER = 33
#: What messages call the types of values.
TYPE_NAMES: dict[type, str] = {str: "a string", int: "a whole number", float: "a number"}
#: Most VFs that one emulated NIC serves.
MAX_EMULATED = 64

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
    """VFs that guests get without naming one."""

    name: str
    driver: str
    #: Number of VFs that an emulated NIC of ours provides.
    emulated: int
    #: Names of the emulated VFs' TAP devices, with `%d` for the VF's number; None: the NIC's default.
    tap: str | None = None
    #: Bridge that the TAP devices join.
    bridge: str | None = None


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
    emulated = table.take("emulated", int, 0)
    if not 1 <= emulated <= MAX_EMULATED:
        raise table.error("emulated", f"must be a number of VFs from 1 to {MAX_EMULATED}")
    pool = PoolConfig(
        name=name,
        driver=driver,
        emulated=emulated,
        tap=table.take("tap", str, "") or None,
        bridge=table.take("bridge", str, "") or None,
    )
    table.end()
    return pool
