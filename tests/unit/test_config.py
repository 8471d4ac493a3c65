"""The daemon's configuration: what it says, its defaults, and the words for every mistake."""

from pathlib import Path

import pytest

from datapath.emulation.engine import MAX_PAIRS
from datapath.emulation.nic import MAX_VFS, MTU_RANGE
from datapath.vdpa import DRIVERS
from libvirt_vdpa import config
from libvirt_vdpa.config import Config, ConfigError, PoolConfig, SocketConfig, read_config

WHOLE = """
run-folder = "/run/other"
log-folder = "/var/log/other"
libvirt-uri = ""
hook-time-limit = 4
[socket]
user = "root"
group = "root"
mode = "0666"
[pool.fast]
driver = "ifcvf"
emulated = 3
tap = "fast%d"
bridge = "br0"
mtu = 9000
queue-pairs = 8
doorbell = "mapped"
[pool.cards]
driver = "ifcvf"
devices = ["0000:06:0A.3", "10000:07:00.0"]
bind = true
[pool.card]
driver = "ifcvf"
pf = "0000:08:00.0"
vfs = 4
"""


def test_emulated_pools_may_be_what_the_nic_can_be() -> None:
    """The daemon is not to load the NIC's engine only to know its limits."""
    assert range(1, MAX_VFS + 1) == config.EMULATED_VFS
    assert range(1, MAX_PAIRS + 1) == config.EMULATED_QUEUE_PAIRS
    assert config.EMULATED_MTUS == MTU_RANGE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "c.toml"


def test_everything(file: Path) -> None:
    file.write_text(WHOLE)
    assert read_config(file) == Config(
        run_folder=Path("/run/other"),
        log_folder=Path("/var/log/other"),
        libvirt_uri="",
        hook_time_limit=4.0,
        socket=SocketConfig(0, 0, 0o666),
        pools=(
            PoolConfig("fast", "ifcvf", 3, "fast%d", "br0", mtu=9000, queue_pairs=8, doorbell="mapped"),
            PoolConfig("cards", "ifcvf", devices=("0000:06:0a.3", "10000:07:00.0"), bind=True),
            PoolConfig("card", "ifcvf", pf="0000:08:00.0", vfs=4),
        ),
    )


def test_nothing_means_defaults(file: Path) -> None:
    file.write_text("")
    assert read_config(file) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "x: is not known"),
        ("[socket]\nowner = 'x'", "socket.owner: is not known"),
        ("[pool.a]\ndriver = 'ifcvf'\nemulated = 1\nvf = 1", "pool.a.vf: is not known"),
        ("run-folder = 1", "run-folder: must be a string, not 1"),
        ("run-folder = 'run'", "run-folder: must be an absolute path, not 'run'"),
        (f"run-folder = '/{33 * 'x'}'", "run-folder: must have at most 33 bytes, for the sockets below it"),
        ('run-folder = "/run/a\\u0000b"', "run-folder: must not contain a NUL character"),
        (
            "[pool.a]\ndriver = 'ifcvf'\nemulated = 1\ntap = \"a\\u0000\"",
            "pool.a.tap: must not contain a NUL character",
        ),
        ("hook-time-limit = '10'", "hook-time-limit: must be a number, not '10'"),
        ("hook-time-limit = true", "hook-time-limit: must be a number, not True"),
        ("hook-time-limit = 0", "hook-time-limit: must be from 1 to 600 seconds"),
        ("socket = 1", "socket: must be a table, [socket]"),
        ("[socket]\nuser = 'nobody-like-this'", "socket.user: there is no user 'nobody-like-this'"),
        ("[socket]\ngroup = 'no-such'", "socket.group: there is no group 'no-such'"),
        ("[socket]\nmode = '0999'", "socket.mode: must be an octal mode such as '0660', not '0999'"),
        ("[socket]\nmode = 432", "socket.mode: must be a string, not 432"),
        ("pool = 1", "pool: must be tables, [pool.NAME]"),
        ("[pool]\na = 1", "pool.a: must be a table, [pool.a]"),
        ("[pool.'a/b']", "pool.a/b: a pool's name has up to 32 letters, digits, '_' and '-'"),
        ("[pool.a]", f"pool.a.driver: must be one of {', '.join(DRIVERS)}, not ''"),
        (
            "[pool.a]\ndriver = 'ifcvf'\nemulated = 65",
            "pool.a.emulated: must be a number of VFs from 1 to 64",
        ),
        (
            "[pool.a]\ndriver = 'mlx5'\nemulated = 1\ndoorbell = 'mapped'",
            "pool.a.doorbell: makes no sense with driver 'mlx5': its doorbells are always mapped",
        ),
        (
            "[pool.a]\ndriver = 'mlx5'\ndevices = ['0000:01:00.2']\nbind = true",
            "pool.a.bind: makes no sense with driver 'mlx5': its functions stay bound to mlx5_core",
        ),
        (
            "[pool.a]\ndriver = 'ifcvf'\nemulated = 1\noptions = 'event_mode=2'",
            "pool.a.options: driver 'ifcvf' takes none",
        ),
        (
            "[pool.a]\ndriver = 'mlx5'\nemulated = 1\noptions = 'event_mode=3'",
            "pool.a.options: event_mode=3 is not from 0 to 2",
        ),
        (
            "[pool.a]\ndriver = 'mlx5'\nemulated = 1\noptions = 'libmlx5=/lib'",
            "pool.a.options: 'libmlx5' is given twice",
        ),
        (
            "[pool.a]\ndriver = 'mlx5'\ndevices = ['0000:01:00.2']\noptions = 'fast'",
            "pool.a.options: 'fast' is not key=value",
        ),
        ("x = ", "Invalid value (at end of document)"),
    ],
)
def test_mistakes_name_file_and_key(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_config(file)
    assert str(refused.value) == f"{file}: {message}"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "pool.a: needs one of emulated, devices, pf: what the pool is made of"),
        ("emulated = 1\npf = '0000:01:00.0'", "pool.a.pf: excludes 'emulated'; keep one"),
        ("emulated = 1\nvfs = 1", "pool.a.vfs: is for pools with 'pf', this one has 'emulated'"),
        *(
            (f"emulated = 1\nmtu = {mtu}", "pool.a.mtu: must be a number of bytes from 68 to 9000")
            for mtu in (0, 67, 9001)
        ),
        *(
            (
                f"emulated = 1\nqueue-pairs = {n}",
                "pool.a.queue-pairs: must be a number of queue pairs from 1 to 8",
            )
            for n in (0, 9)
        ),
        (
            "emulated = 1\ndoorbell = 'page'",
            "pool.a.doorbell: must be one of eventfd, mapped, not 'page'",
        ),
        ("emulated = 1\nmtu = '1500'", "pool.a.mtu: must be a whole number, not '1500'"),
        ("emulated = 1\nbind = true", "pool.a.bind: is for pools with 'devices', this one has 'emulated'"),
        (
            "pf = '0000:01:00.0'\ntap = 'x%d'",
            "pool.a.tap: is for pools with 'emulated', this one has 'pf'",
        ),
        (
            "devices = ['0000:01:00.0']\nvfs = 1",
            "pool.a.vfs: is for pools with 'pf', this one has 'devices'",
        ),
        ("devices = '0000:01:00.0'", "pool.a.devices: must be a list, not '0000:01:00.0'"),
        ("devices = []", "pool.a.devices: must have one PCI address at least"),
        ("devices = [1]", "pool.a.devices: 1 is no PCI address; write it like '0000:01:00.0'"),
        (
            "devices = ['01:00.0']",
            "pool.a.devices: '01:00.0' is no PCI address; write it like '0000:01:00.0'",
        ),
        (
            "devices = ['0000:0a:00.0', '0000:0A:00.0']",
            "pool.a.devices: 0000:0a:00.0 is given twice",
        ),
        ("pf = 'eth0'", "pool.a.pf: 'eth0' is no PCI address; write it like '0000:01:00.0'"),
        ("pf = '0000:01:00.0'\nvfs = 0", "pool.a.vfs: must be a number of VFs from 1 to 65535"),
        ("pf = '0000:01:00.0'\nvfs = true", "pool.a.vfs: must be a whole number, not True"),
        ("pf = '0000:01:00.0'\nbind = 1", "pool.a.bind: must be true or false, not 1"),
        ("emulated = 1\nuplink = 'a'", "pool.a.uplink: is for pools with 'devices', this one has 'emulated'"),
        *(
            (
                f"pf = '0000:01:00.0'\nuplink = '{name}'",
                f"pool.a.uplink: must be the name of a network interface, not '{name}'",
            )
            for name in ("", "a,vf=1", "a/b", "..", "a b", 16 * "x", 8 * "é")
        ),
        (
            "pf = '0000:01:00.0'\n[pool.b]\ndriver = 'ifcvf'\ndevices = ['0000:01:00.0']",
            "pool.b.devices: 0000:01:00.0 is in pool 'a' already",
        ),
    ],
)
def test_mistakes_of_pools(file: Path, lines: str, message: str) -> None:
    file.write_text(f"[pool.a]\ndriver = 'ifcvf'\n{lines}")
    with pytest.raises(ConfigError) as refused:
        read_config(file)
    assert str(refused.value) == f"{file}: {message}"


def test_not_to_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml: No such file or directory"):
        read_config(tmp_path / "no.toml")
    (tmp_path / "x.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"x\.toml: 'utf-8' codec"):
        read_config(tmp_path / "x.toml")
