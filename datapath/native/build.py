"""Builds `datapath.native._native` with cffi in API mode.

Each C unit has a header whose part between the two `cffi` marks is what Python sees, so that a
declaration stands once. Set NATIVE_CFLAGS (such as "-Werror") for more compiler flags.
"""

import os
import shlex
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
#: The C units that make up the module; each is UNIT.c with UNIT.h.
UNITS = (
    "heap",
    "guard",
    "thread",
    "interrupt",
    "dma",
    "log",
    "device_log",
    "written",
    "shadow",
    "relay",
    "forwarder",
    "completion_queue",
    "completions",
    "ring",
    "packed",
    "offload",
    "filter",
    "worker",
    "packets",
    "echo",
    "engine",
)
#: Headers without a unit.
HEADERS = ("barrier.h", "eventfd.h", "split.h")
EXTRA_FLAGS = shlex.split(os.environ.get("NATIVE_CFLAGS", ""))


def declarations(header: Path) -> str:
    """The part of a header that cffi reads.

    :raise ValueError: when the header lacks the marks.
    """
    _, found, rest = header.read_text().partition("/* cffi: begin */")
    body, closed, _ = rest.partition("/* cffi: end */")
    if not found or not closed:
        raise ValueError(f"{header}: no part between '/* cffi: begin */' and '/* cffi: end */'")
    return body


def relative(name: str) -> str:
    """A source's path as setuptools wants it: relative to the project's folder, where the build runs."""
    return os.path.relpath(HERE / name)


ffibuilder = FFI()
for unit in UNITS:
    ffibuilder.cdef(declarations(HERE / f"{unit}.h"))
ffibuilder.set_source(
    "datapath.native._native",
    "".join(f'#include "{unit}.h"\n' for unit in UNITS),
    sources=[relative(f"{unit}.c") for unit in UNITS],
    depends=[relative(name) for name in (*HEADERS, *(f"{unit}.h" for unit in UNITS))],
    include_dirs=[str(HERE)],
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-pthread", *EXTRA_FLAGS],
    extra_link_args=["-pthread"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
