"""./demo does what the README promises, and leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.demo_migrate import MODES
from tests.harness.guest import CHECKOUT
from tests.harness.leftovers import Machine
from tests.harness.processes import wait_for

pytestmark = [pytest.mark.libvirt, pytest.mark.guest]

DEMO = [sys.executable, "-m", "tests.demo"]


def test_a_report_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "no-such-folder" / "report.json"
    done = subprocess.run(
        [*DEMO, f"--report={path}"], cwd=CHECKOUT, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"argument --report: {path}: No such file or directory\n")


def test_report(tmp_path: Path) -> None:
    """A guest with a NIC of either kind."""
    report_file = tmp_path / "report.json"
    before = Machine.look()
    done = subprocess.run(
        [*DEMO, "--driver=ifcvf,mlx5", "--report", report_file],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(report_file.read_text())
    assert report["domain"] == "running"
    assert [nic["driver"] for nic in report["nics"]] == ["ifcvf", "mlx5"]
    for nic in report["nics"]:
        assert nic["ping"] == {"sent": 20, "received": 20}
        assert nic["ping_while_unplugged"]["received"] == 0
        assert "F_VERSION_1" in nic["features"]
    assert report["leftovers"] == []
    assert not before.leftovers()


@pytest.mark.parametrize(
    "driver",
    ["ifcvf", pytest.param("mlx5", marks=pytest.mark.full)],  # test_drivers_migration.py moves one
)
def test_report_of_migrations(tmp_path: Path, driver: str) -> None:
    report_file = tmp_path / "report.json"
    before = Machine.look()
    done = subprocess.run(
        [*DEMO, f"--driver={driver}", "--migrate", "--report", report_file],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(report_file.read_text())
    assert (report["migration"], report["modes"]) == ("completed", MODES[driver])
    assert (report["lost_bytes"], report["altered_bytes"], report["datagrams_doubled"]) == (0, 0, 0)
    assert [(moved["source"], moved["destination"]) for moved in report["migrations"]] == [
        ("a", "b"),
        ("b", "a"),
    ]
    assert all(moved["pages"] > 0 for moved in report["migrations"])
    assert report["leftovers"] == []
    assert not before.leftovers()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--driver=e1000"], "argument --driver: 'e1000' is not one or two of: ifcvf, mlx5"),
        (["--driver=ifcvf,mlx5", "--migrate"], "--migrate moves a guest with one NIC: name one driver"),
    ],
)
def test_what_it_does_not_show(words: list[str], said: str) -> None:
    done = subprocess.run([*DEMO, *words], cwd=CHECKOUT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"{said}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_runs_on_after_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    before = Machine.look()
    output = tmp_path / "output"
    with output.open("w") as written:
        demo = subprocess.Popen(
            DEMO,
            cwd=CHECKOUT,
            stdout=written,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        wait_for("the guest to be started", lambda: "the guest boots" in output.read_text(), 60)
        demo.send_signal(number)
        demo.wait(20)
    finally:
        demo.kill()
        demo.wait()
    wait_for("everything to end", lambda: not processes_and_mounts(before), 10)
    if number == signal.SIGKILL:
        # Nobody was left to remove the files.
        for folder in Path("/tmp").glob(f"libvirt-vdpa-{demo.pid}-*"):
            shutil.rmtree(folder)
    else:
        assert demo.returncode == 1
        assert "demo: interrupted" in output.read_text()
    assert not before.leftovers()


def processes_and_mounts(before: Machine) -> list[str]:
    """Leftovers that are not files."""
    return [found for found in before.leftovers() if not found.startswith("file ")]
