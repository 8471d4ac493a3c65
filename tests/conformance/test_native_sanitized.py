"""Tests of engine and relay once more, with the C built for AddressSanitizer and UndefinedBehaviorSanitizer.

The module is built in a copy of the tree and the tests run there, in a Python that has the sanitizers'
libraries loaded first. A report of theirs ends that Python. Leaks are not looked for: Python itself has
too many. By hand: `NATIVE_CFLAGS="-fsanitize=address,undefined" python setup.py build_ext --inplace`, then
`LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" python -m pytest …`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ("datapath", "tests/__init__.py", "tests/harness", "setup.py", "setup.cfg", "pyproject.toml")
TESTS = (
    "tests/conformance/test_engine.py",
    "tests/conformance/test_engine_filter.py",
    "tests/conformance/test_engine_hostile.py",
    "tests/conformance/test_engine_offloads.py",
    "tests/conformance/test_engine_packed.py",
    "tests/conformance/test_mlx5_emulation.py",
    "tests/unit/conftest.py",
    "tests/unit/test_completions.py",
    "tests/unit/test_notify_relay.py",
    "tests/unit/test_shadow_ring.py",
    "tests/unit/test_shadow_ring_broken.py",
    "tests/unit/test_shadow_log.py",
    "tests/unit/test_hardware_log.py",
)
FLAGS = "-Werror -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
LIBRARIES = ("libasan.so", "libubsan.so")
TIME_LIMIT = 300.0


def copy_tree(to: Path) -> None:
    for name in (*NEEDED, *TESTS):
        source, target = ROOT / name, to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif source.exists():
            shutil.copy(source, target)


def run(where: Path, *command: str, **environment: str) -> str:
    """Run in the copy; returns the output of both streams, fails with it."""
    ended = subprocess.run(
        command,
        cwd=where,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    if ended.returncode != 0:
        pytest.fail(f"{' '.join(command)}: exit code {ended.returncode}\n{ended.stdout}")
    return ended.stdout


def library(name: str) -> str:
    """Where the compiler keeps a sanitizer's library."""
    return subprocess.run(
        ["gcc", f"-print-file-name={name}"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def test_engine_and_relay_under_sanitizers(tmp_path: Path) -> None:
    copy_tree(tmp_path)
    run(tmp_path, sys.executable, "setup.py", "-q", "build_ext", "--inplace", NATIVE_CFLAGS=FLAGS)
    output = run(
        tmp_path,
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        # These two want to die of SIGBUS, which the sanitizer would report as an error of its own.
        "-k",
        "not as_deadly_as_ever",
        *TESTS,
        LD_PRELOAD=" ".join(map(library, LIBRARIES)),
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONPATH=str(tmp_path),
    )
    assert "passed" in output
