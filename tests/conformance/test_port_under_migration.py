"""A real QEMU that migrates its guest while the guest's VF dies: in the exchange in which QEMU before 10.1
aborts when anything fails. The guest goes on, without its NIC."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import doomed_port
from tests.harness.console import Console
from tests.harness.emulated_nic import EmulatedNic, PortProcess, ask
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import wait_for
from tests.harness.vhost_user_guest import VhostUserGuest

pytestmark = pytest.mark.guest

GUEST = "10.98.0.2"


@contextmanager
def doomed(
    folder: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[VhostUserGuest, PortProcess]]:
    """A guest on a port whose VF dies in a call; its shell answers before and after."""
    program = folder / "virt-vdpa-port"
    program.write_text(doomed_port.PROGRAM)
    program.chmod(0o700)
    with NetworkNamespace() as namespace, EmulatedNic(folder / "nic", namespace, 1) as nic:
        monkeypatch.setattr("tests.harness.emulated_nic.BIN", folder)
        monkeypatch.setenv(doomed_port.CALL, call)
        monkeypatch.setenv(doomed_port.NIC, str(nic.pid))
        with (
            PortProcess(folder, nic.device(0)) as port,
            VhostUserGuest(folder, port.socket, f"{GUEST}/24") as guest,
            Console(guest.terminal) as console,
        ):
            port.wait_state("running")
            yield guest, port
            console.run("echo still here")
            assert guest.running
            assert ask(guest.qmp, "query-status")["running"]


def migrate(guest: VhostUserGuest) -> None:
    """Begin to migrate, so slowly that it does not come to an end."""
    ask(guest.qmp, "migrate-set-parameters", **{"max-bandwidth": 4096})
    ask(guest.qmp, "migrate", uri="exec:cat >/dev/null")


def wait_failed(port: PortProcess) -> None:
    """Wait for the port's end, which its VF's is, and for what it said of it."""
    assert wait_for("its end", lambda: not port.running, 20)
    lines = port.log.read_text()
    assert "is answered all the same: " in lines
    assert "Traceback" not in lines


def test_a_vf_that_dies_as_logging_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with doomed(tmp_path, "start_logging", monkeypatch) as (guest, port):
        migrate(guest)
        wait_failed(port)


def test_a_vf_that_dies_as_logging_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with doomed(tmp_path, "stop_logging", monkeypatch) as (guest, port):
        migrate(guest)
        wait_for("the log", lambda: port.status()["log"]["mode"], 20)
        ask(guest.qmp, "migrate_cancel")
        wait_failed(port)
