"""C that tests need, compiled once for each content of its source and kept in the cache."""

import hashlib
from pathlib import Path

from tests.harness.cached import CACHE
from tests.harness.processes import run

NATIVE = Path(__file__).parent / "native"
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")


def compiled(name: str, *flags: str) -> Path:
    """The program, or with `-shared` the library, that native/NAME.c makes.

    :raise HarnessError: when it does not compile.
    """
    source = NATIVE / f"{name}.c"
    digest = hashlib.sha256(source.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    built = CACHE / f"{name}-{digest}"
    if not built.exists():
        CACHE.mkdir(exist_ok=True)
        scratch = built.with_suffix(".new")
        run(["gcc", *FLAGS, *flags, source, "-o", scratch])
        scratch.rename(built)
    return built
