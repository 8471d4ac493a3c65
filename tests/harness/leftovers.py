"""What a run leaves on the machine, found by looking at the machine before and after.

    before = Machine.look()
    ...
    for line in before.leftovers(): print(line)

Looks at processes, namespaces, mounts, network links and files (sockets among them). Other people's work
goes on meanwhile: a new process counts only when it hangs on this one or on nobody (its parent is init)
and is a program that we start; a folder in /tmp counts unless the process in its name lives.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.harness.processes import run
from tests.harness.procfs import Running, all_running

#: Programs that may stay behind on their own; their children count with them.
PROGRAMS = frozenset(
    {
        "dpdk-testpmd",
        "host_init.sh",
        "libvirtd",
        "nsenter",
        "qemu-system-x86_64",
        "unshare",
        "virt-vdpa-nic",
        "virt-vdpa-port",
        "virtlogd",
        "virtvdpad",
    }
)
#: Where files of ours, libvirt's, QEMU's or DPDK's could stay.
FOLDERS = (
    "/dev/hugepages",
    "/dev/shm",
    "/etc/libvirt",
    "/etc/libvirt-vdpa",
    "/run",
    "/var/cache/libvirt",
    "/var/lib/libvirt",
    "/var/log/libvirt",
    "/var/log/libvirt-vdpa",
)
#: A private host's folder; its name says which process made it.
HOST_FOLDER = re.compile(r"libvirt-vdpa-(\d+)-")


@dataclass(frozen=True)
class Machine:
    """The machine at one moment: each thing by a text that says what it is."""

    processes: dict[tuple[int, int], Running]
    namespaces: frozenset[str]
    mounts: frozenset[str]
    links: frozenset[str]
    files: frozenset[str]

    @classmethod
    def look(cls) -> Self:
        """The machine now."""
        processes = {(found.pid, found.start_time): found for found in all_running()}
        return cls(
            processes=processes,
            namespaces=frozenset(name for found in processes.values() for name in found.namespaces.values()),
            mounts=frozenset(_mounts()),
            links=frozenset(link["ifname"] for link in json.loads(run(["ip", "-json", "link"]).stdout)),
            files=frozenset(_files()),
        )

    def leftovers(self) -> list[str]:
        """What is on the machine now and was not at this moment, and is ours to answer for."""
        now = self.look()
        processes = [
            found
            for key, found in now.processes.items()
            if key not in self.processes and now._is_ours(found, self)
        ]
        namespaces = {name for found in processes for name in found.namespaces.values()} - self.namespaces
        return [
            *(f"process {found.pid}: {' '.join(found.argv)}" for found in processes),
            *(f"namespace {name}" for name in sorted(namespaces)),
            *(f"mount {name}" for name in sorted(now.mounts - self.mounts)),
            *(f"link {name}" for name in sorted(now.links - self.links)),
            *(f"file {name}" for name in sorted(now.files - self.files)),
        ]

    def _is_ours(self, found: Running, before: "Machine") -> bool:
        """Follow the parents up: to us, to a program of ours that hangs on init, or to somebody else."""
        parents = {running.pid: running for running in self.processes.values()}
        while found.parent not in (os.getpid(), 1):
            parent = parents.get(found.parent)
            if parent is None or (parent.pid, parent.start_time) in before.processes:
                return False
            found = parent
        return found.parent == os.getpid() or found.name in PROGRAMS


def _mounts() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        yield line.split()[4]


def _files() -> Iterator[str]:
    yield from _below(Path(folder) for folder in FOLDERS)
    for path in Path("/tmp").iterdir():
        maker = HOST_FOLDER.match(path.name)
        if maker and (int(maker[1]) == os.getpid() or not Path("/proc", maker[1]).exists()):
            yield str(path)


def _below(folders: Iterable[Path]) -> Iterator[str]:
    for top in folders:
        for folder, names, files in os.walk(top):
            yield from (f"{folder}/{name}" for name in (*names, *files))
