"""Tests of C once more, with it built for AddressSanitizer and UndefinedBehaviorSanitizer.

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
#: DPDK's driver on the emulated ConnectX, whose library is preloaded behind the sanitizers'.
DPDK_TESTS = (
    "tests/conformance/test_mlx5_dpdk_failures.py",
    "tests/conformance/test_mlx5_dpdk_migration.py",
)
FLAGS = "-Werror -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
LIBRARIES = ("libasan.so", "libubsan.so")
TIME_LIMIT = 300.0
#: For each command of a driver's life a process or two.
SWEEP_TIME_LIMIT = 1200.0


def copy_tree(to: Path) -> None:
    for name in (*NEEDED, *TESTS, *DPDK_TESTS):
        source, target = ROOT / name, to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif source.exists():
            shutil.copy(source, target)


def run(where: Path, *command: str, limit: float = TIME_LIMIT, **environment: str) -> str:
    """Run in the copy; returns the output of both streams, fails with it."""
    ended = subprocess.run(
        command,
        cwd=where,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
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


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with the C built."""
    where = tmp_path_factory.mktemp("sanitized")
    copy_tree(where)
    run(where, sys.executable, "setup.py", "-q", "build_ext", "--inplace", NATIVE_CFLAGS=FLAGS)
    return where


def run_tests(tree: Path, *arguments: str, limit: float = TIME_LIMIT) -> str:
    """Run pytest in the copy; what it prints."""
    return run(
        tree,
        sys.executable,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments),
        limit=limit,
        LD_PRELOAD=" ".join(map(library, LIBRARIES)),
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONPATH=str(tree),
    )


def test_engine_and_relay_under_sanitizers(tree: Path) -> None:
    # Two tests want to die of SIGBUS, which the sanitizer would report as an error of its own.
    assert "passed" in run_tests(tree, "-k", "not as_deadly_as_ever", *TESTS)


@pytest.mark.full
@pytest.mark.dpdk
def test_every_failure_under_dpdk_under_sanitizers(tree: Path) -> None:
    # So does DPDK's driver, of SIGSEGV, where it cannot register memory.
    assert "passed" in run_tests(tree, "-k", "not kills_the_driver", *DPDK_TESTS, limit=SWEEP_TIME_LIMIT)
