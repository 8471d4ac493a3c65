"""The look for leftovers sees each kind of thing that could be left, and not what others do meanwhile."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.harness.leftovers import Machine
from tests.harness.processes import run, wait_for


@contextmanager
def orphan(folder: Path) -> Iterator[str]:
    """A daemon that hangs on init: a program under the name of one of ours."""
    program = folder / "virtlogd"
    shutil.copy("/bin/sleep", program)
    pid = int(run(["sh", "-c", f"setsid {program} 600 >/dev/null 2>&1 & echo $!"]).stdout)
    wait_for("the daemon", lambda: Path(f"/proc/{pid}/exe").resolve() == program, 5)
    try:
        yield f"process {pid}: {program} 600"
    finally:
        os.kill(pid, signal.SIGKILL)


@contextmanager
def child_in_a_namespace(_folder: Path) -> Iterator[str]:
    """A child of ours, with a namespace that is seen besides."""
    child = subprocess.Popen(["unshare", "--uts", "sleep", "600"])
    ours = Path("/proc/self/ns/uts").readlink()
    theirs = Path(f"/proc/{child.pid}/ns/uts")
    wait_for("a namespace", lambda: theirs.readlink() != ours, 5)
    try:
        yield f"namespace {theirs.readlink()}"
    finally:
        child.kill()
        child.wait()


@contextmanager
def link(_folder: Path) -> Iterator[str]:
    """A TAP."""
    name = f"left{os.getpid() % 100000}"
    run(["ip", "tuntap", "add", "name", name, "mode", "tap"])
    try:
        yield f"link {name}"
    finally:
        run(["ip", "link", "delete", name])


@contextmanager
def mount(folder: Path) -> Iterator[str]:
    """A mount."""
    run(["mount", "-t", "tmpfs", "left", folder])
    try:
        yield f"mount {folder}"
    finally:
        run(["umount", folder])


@contextmanager
def host_folder(_folder: Path) -> Iterator[str]:
    """The folder of a private host whose maker is no more."""
    maker = subprocess.Popen(["true"])
    maker.wait()
    path = Path(f"/tmp/libvirt-vdpa-{maker.pid}-left")
    path.mkdir()
    try:
        yield f"file {path}"
    finally:
        path.rmdir()


@pytest.mark.parametrize("kind", [orphan, child_in_a_namespace, link, mount, host_folder])
def test_leftover_is_seen(kind: Callable[[Path], AbstractContextManager[str]], tmp_path: Path) -> None:
    before = Machine.look()
    with kind(tmp_path) as expected:
        assert expected in before.leftovers()
    wait_for("the machine to be as before", lambda: not before.leftovers(), 5)


def test_what_others_start_is_not_ours(tmp_path: Path) -> None:
    """A program of ours whose parent is somebody else, who was there before."""
    with subprocess.Popen(["sh"], stdin=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        before = Machine.look()
        mark = tmp_path / "started"
        other.stdin.write(f"unshare --uts sleep 600 & echo $! >{mark}.new; mv {mark}.new {mark}\n")
        other.stdin.flush()
        wait_for("the other's process", mark.exists, 5)
        assert not before.leftovers()
        os.kill(int(mark.read_text()), signal.SIGKILL)
        other.stdin.close()
