"""What runs on this machine, read from /proc: for looking, not for bookkeeping."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


@dataclass(frozen=True)
class Running:
    """One process."""

    pid: int
    #: Its pid in its own PID namespace.
    inner_pid: int
    parent: int
    #: Clock ticks after boot; with the pid it tells a process from a later one.
    start_time: int
    state: str
    argv: tuple[str, ...]
    #: Namespace kind -> identity, such as "net" -> "net:[4026531840]".
    namespaces: dict[str, str]

    @property
    def name(self) -> str:
        """The program's name; of an interpreter's script, the script's."""
        words = [Path(word).name for word in self.argv if not word.startswith("-")]
        if len(words) > 1 and words[0].startswith(("python", "bash", "sh")):
            return words[1]
        return words[0] if words else ""


def running(pid: int) -> Running | None:
    """One process, or None when it has gone; zombies and kernel threads count as gone."""
    folder = Path(f"/proc/{pid}")
    try:
        argv = tuple((folder / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0"))
        # Fields after the parenthesised name, which may hold anything (proc(5)).
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        status = (folder / "status").read_text()
        namespaces = {kind: str((folder / "ns" / kind).readlink()) for kind in NAMESPACES}
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    if argv == ("",) or fields[0] in "ZX":
        return None
    inner = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1]
    return Running(pid, int(inner), int(fields[1]), int(fields[19]), fields[0], argv, namespaces)


def all_running() -> Iterator[Running]:
    """Every process that this one can see, those of inner PID namespaces included."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (found := running(int(entry.name))) is not None:
            yield found


def thread_times(pid: int) -> dict[int, float]:
    """Seconds of CPU time that each thread of a process has used, by thread id."""
    times = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        times[int(task.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return times
