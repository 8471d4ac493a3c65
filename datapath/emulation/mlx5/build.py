"""Builds the emulated ConnectX: a shared object that no Python imports.

It holds its own copy of the packet engine of `datapath/native`, of which it shows nothing. NATIVE_CFLAGS are
more compiler flags.
"""

import os
import shlex
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from datapath.emulation.mlx5 import LIBRARY
from datapath.emulation.mlx5.prm_header import header

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "native"
#: The extension's name for setuptools.
NAME = f"datapath.emulation.mlx5.{LIBRARY.stem}"
#: The C units of the device, and those of the engine that it is made with.
UNITS = (
    "prm",
    "options",
    "affinity",
    "tap",
    "device",
    "commands",
    "capabilities",
    "memory",
    "receivers",
    "steering",
    "event_queues",
    "channels",
    "queue_paths",
    "queues",
    "bell",
    "verbs",
    "devx",
)
ENGINE = (
    "guard",
    "interrupt",
    "dma",
    "log",
    "ring",
    "packed",
    "offload",
    "filter",
    "worker",
    "packets",
    "echo",
    "engine",
)


def _relative(path: Path) -> str:
    return os.path.relpath(path)


def extension() -> Extension:
    """What setuptools is to build."""
    sources = [HERE / f"{unit}.c" for unit in UNITS] + [NATIVE / f"{unit}.c" for unit in ENGINE]
    headers = [*HERE.glob("*.h"), *NATIVE.glob("*.h"), *(HERE.parents[1]).glob("mlx5_*.py")]
    warnings = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-pthread", "-fvisibility=hidden"]
    return Extension(
        NAME,
        sources=[_relative(source) for source in sources],
        depends=[_relative(header) for header in headers],
        include_dirs=[_relative(HERE), _relative(NATIVE)],
        extra_compile_args=[*warnings, *shlex.split(os.environ.get("NATIVE_CFLAGS", ""))],
        # Who has closed it may meet SIGBUS later, for which its engine has a handler.
        extra_link_args=["-pthread", "-Wl,-z,nodelete"],
    )


class BuildWithLibrary(build_ext):
    """Builds extensions, of which the library keeps its own name and has a header made for it."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname in (NAME, NAME.rpartition(".")[2]):
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return str(super().get_ext_filename(fullname))  # type: ignore[no-untyped-call]

    def build_extension(self, ext: Extension) -> None:
        if ext.name == NAME:
            made = Path(self.build_temp) / "mlx5"
            made.mkdir(parents=True, exist_ok=True)
            table = made / "prm_table.h"
            if not table.exists() or table.read_text() != header():
                table.write_text(header())
            ext.include_dirs.append(str(made))
        super().build_extension(ext)
