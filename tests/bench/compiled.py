"""C that a measurement needs, compiled for one run.

A unit is NAME.c with NAME.h in this folder; of the header, Python sees what stands between the marks that the
product's own headers have.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cffi import FFI, PkgConfigError, VerificationError

from datapath.native.build import HERE as NATIVE
from datapath.native.build import declarations
from tests.harness.processes import HarnessError

HERE = Path(__file__).parent
#: The product is compiled with the same, and a peer comes from its packager.
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra")


def compiled(
    name: str,
    folder: Path,
    *,
    native: Sequence[str] = (),
    libraries: Sequence[str] = (),
    defines: Sequence[str] = (),
) -> Any:
    """A unit as a Python module, with `ffi` and `lib`.

    :param folder: where it is built.
    :param native: units of the product that are linked in.
    :param libraries: names that pkg-config knows.
    :raise HarnessError: when it does not compile, such as without a library's development files.
    """
    builder = FFI()
    builder.cdef(declarations(HERE / f"{name}.h"))
    options: dict[str, Any] = {
        "sources": [str(HERE / f"{name}.c"), *(str(NATIVE / f"{unit}.c") for unit in native)],
        "include_dirs": [str(HERE), str(NATIVE)],
        "extra_compile_args": [*FLAGS, *(f"-D{define}" for define in defines)],
    }
    text = f'#include "{name}.h"\n'
    try:
        if libraries:
            builder.set_source_pkgconfig(name, list(libraries), text, **options)
        else:
            builder.set_source(name, text, **options)
        path = builder.compile(tmpdir=str(folder))
    except (PkgConfigError, VerificationError) as error:
        raise HarnessError(f"{name} cannot be compiled: {error}") from None
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
