"""virt-vdpa devices on made-up hosts: what is shown, with a daemon's answer and without."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from libvirt_vdpa.cli.devices import COLUMNS, NOT_ROOT, devices, holders_of, recorded, show
from libvirt_vdpa.ports import Record
from tests.harness.fake_kernel import FakeKernel

ONE, TWO, DISK = "0000:01:00.0", "0000:02:00.0", "0000:04:00.0"
NVME = {"vendor": "0x1b36", "device": "0x0010", "class": "0x010802"}
EMULATED = "ifcvf,vfio-user=/run/libvirt-vdpa/nics/default/vf0.sock"


def answer(device: str, state: str = "free", domain: str | None = None, problem: str = "") -> dict[str, Any]:
    """A VF as the daemon tells of it."""
    return {
        "device": device,
        "driver": device.partition(",")[0],
        "pool": "p",
        "queue_pairs": None,
        "state": state,
        "domain": domain,
        "mac": "52:54:00:00:00:01" if domain else None,
        "problem": problem,
    }


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    kernel = FakeKernel(tmp_path)
    kernel.add(ONE, group=7, driver="vfio-pci", files={"numa_node": "1"})
    kernel.add(TWO, group=8, driver="virtio-pci")
    kernel.add(DISK, group=9, driver="nvme", files=NVME)
    return kernel


def shown(
    kernel: FakeKernel, *known: dict[str, Any], everything: bool = False
) -> list[tuple[str, str, str | None, str]]:
    return [
        (device["where"], device["state"], device["holder"], device["problem"])
        for device in devices(kernel, list(known), everything)
    ]


def test_what_the_host_has(kernel: FakeKernel) -> None:
    first, second = devices(kernel, [], False)
    assert first == {
        "device": f"ifcvf,pci={ONE}",
        "where": ONE,
        "driver": "ifcvf",
        "pool": None,
        "queue_pairs": None,
        "state": "free",
        "domain": None,
        "mac": None,
        "holder": None,
        "problem": "",
        "ids": "1af4:1041 (subsystem 8086:001a)",
        "kernel_driver": "vfio-pci",
        "iommu_group": 7,
        "numa_node": 1,
        "physical_function": None,
        "net_interfaces": [],
    }
    assert set(COLUMNS.values()) <= set(first)
    assert (second["where"], second["state"], second["problem"]) == (
        TWO,
        "unusable",
        f"bound to virtio-pci: virt-vdpa bind {TWO}",
    )


def test_all(kernel: FakeKernel) -> None:
    *_, last = shown(kernel, everything=True)
    assert last == (
        DISK,
        "unusable",
        None,
        "not a virtio-net function: 1b36:0010 (subsystem 8086:001a)",
    )


def test_what_the_daemon_knows_comes_first_and_once(kernel: FakeKernel) -> None:
    disk = answer(f"virtio,pci={DISK}", "unusable", problem="not a virtio-net function")
    lent = answer(f"virtio,pci={ONE}", "lent", "a")
    assert shown(kernel, answer(EMULATED), disk, lent) == [
        ("vfio-user=/run/libvirt-vdpa/nics/default/vf0.sock", "free", None, ""),
        (DISK, "unusable", None, "not a virtio-net function"),
        (ONE, "lent", "a/52:54:00:00:00:01", ""),
        (TWO, "unusable", None, f"bound to virtio-pci: virt-vdpa bind {TWO}"),
    ]


def test_a_lent_one_that_is_gone_is_shown(kernel: FakeKernel) -> None:
    gone = answer("virtio,pci=0000:05:00.0", "lent", "a", "no such PCI function on this host")
    assert shown(kernel, gone)[0] == (
        "0000:05:00.0",
        "lent",
        "a/52:54:00:00:00:01",
        "no such PCI function on this host",
    )


def test_a_neighbour_of_a_lent_one_is_not_free(kernel: FakeKernel) -> None:
    kernel.add("0000:01:00.1", group=7, driver="vfio-pci")
    lent = answer(f"virtio,pci={ONE}", "lent", "a")
    assert shown(kernel, lent)[1] == (
        "0000:01:00.1",
        "unusable",
        None,
        f"IOMMU group 7 is held by domain 'a' (52:54:00:00:00:01), with {ONE}",
    )


@pytest.mark.parametrize("known", [[], [answer(f"virtio,pci={ONE}")]])
def test_one_that_another_program_has_is_not_free(kernel: FakeKernel, known: list[dict[str, Any]]) -> None:
    kernel.open_by(30, "testpmd", "/dev/vfio/7")
    assert shown(kernel, *known)[0] == (ONE, "unusable", None, "in use by testpmd (pid 30)")


@pytest.mark.parametrize(("user", "told"), [(0, False), (1000, True)])
def test_what_only_root_sees_is_told(
    user: int, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = FakeKernel(tmp_path)
    monkeypatch.setattr("libvirt_vdpa.cli.devices.Kernel", lambda: kernel)
    monkeypatch.setattr("os.geteuid", lambda: user)
    assert show(argparse.Namespace(socket=tmp_path / "none.sock", all=False, json=False)) == 0
    assert (NOT_ROOT in capsys.readouterr().err) is told


@pytest.mark.parametrize("reason", ["cannot load libmlx5.so.1 (no such file): install it", None])
def test_why_mlx5_is_off_is_told(
    reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside what else there is, which goes on without; what the reasons are, test_mlx5_glue.py shows."""
    kernel = FakeKernel(tmp_path)
    kernel.add(ONE, group=7, driver="vfio-pci")
    monkeypatch.setattr("libvirt_vdpa.cli.devices.Kernel", lambda: kernel)
    monkeypatch.setattr("datapath.drivers.mlx5.glue.why_off", lambda: reason)
    assert show(argparse.Namespace(socket=tmp_path / "none.sock", all=False, json=True)) == 0
    out, err = capsys.readouterr()
    assert [device["where"] for device in json.loads(out)["devices"]] == [ONE]
    told = [line for line in err.splitlines() if "is off" in line]
    assert told == ([f"virt-vdpa: mlx5 is off: {reason}"] if reason else [])


def test_without_a_daemon_records_say_who_holds_what(kernel: FakeKernel, tmp_path: Path) -> None:
    control = tmp_path / "ports/uuid/52:54:00:00:00:01.ctl"
    control.parent.mkdir(parents=True)
    Record(
        domain="a",
        uuid="uuid",
        mac="52:54:00:00:00:01",
        device=f"virtio,pci={ONE}",
        pool="p",
        role="listen",
        socket="",
        control=str(control),
        log="",
    ).save()
    (control.parent / "other.json").write_text(json.dumps([]))
    known = list(recorded(tmp_path))
    assert holders_of(known) == {ONE: "domain 'a' (52:54:00:00:00:01)"}
    assert shown(kernel, *known)[0] == (ONE, "lent", "a/52:54:00:00:00:01", "")
    assert holders_of([{**known[0], "device": "nonsense"}]) == {}
