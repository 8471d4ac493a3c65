"""What a measurement was made on: told with its rows, since figures of two machines do not compare."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from tests.harness.processes import HarnessError, run

#: Who tells its version in the first line of its output.
VERSIONS = {
    "qemu": ("qemu-system-x86_64", "--version"),
    "libvirt": ("virsh", "--version"),
    "dpdk": ("pkg-config", "--modversion", "libdpdk"),
}


def describe() -> dict[str, object]:
    """Processor, kernel and versions, and how busy the machine is just now (load average of a minute)."""
    facts: dict[str, object] = {
        "cpu": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "libvirt-vdpa": version("libvirt-vdpa"),
    }
    for name, command in VERSIONS.items():
        facts[name] = _first_line(command)
    return facts


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _first_line(command: tuple[str, ...]) -> str | None:
    try:
        return run(command, seconds=10).stdout.partition("\n")[0].strip()
    except HarnessError:
        return None
