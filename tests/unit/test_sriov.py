"""VFs of a physical function: created only where there are none, and every refusal says what to do."""

import errno
from pathlib import Path

import pytest

from libvirt_vdpa.sriov import SriovError, create_vfs, no_autoprobe
from tests.harness.fake_kernel import FakeKernel

PF = "0000:04:00.0"
ATTRIBUTES = f"bus/pci/devices/{PF}"
FILES = {"sriov_totalvfs": "4", "sriov_numvfs": "0", "sriov_drivers_autoprobe": "1"}


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    return FakeKernel(tmp_path)


def refused(kernel: FakeKernel, wanted: int = 2) -> str:
    with pytest.raises(SriovError) as error:
        create_vfs(kernel, PF, wanted)
    return str(error.value)


def test_created_once(kernel: FakeKernel) -> None:
    kernel.add(PF, group=1, driver="nvme", files=FILES)
    assert create_vfs(kernel, PF, 2)
    assert not create_vfs(kernel, PF, 2)
    assert kernel.writes == [(f"{ATTRIBUTES}/sriov_numvfs", "2")]
    assert kernel.driver_of("0000:04:00.1") == "virtio-pci"


def test_another_number_is_left_alone(kernel: FakeKernel) -> None:
    kernel.add(PF, group=1, driver="nvme", files=FILES)
    create_vfs(kernel, PF, 2)
    kernel.writes.clear()
    assert refused(kernel, 3) == (
        f"{PF}: has 2 VFs, not 3, and nothing is changed; set vfs = 2, or while none is in use remove them"
        f" (echo 0 > {kernel.sysfs}/{ATTRIBUTES}/sriov_numvfs), then restart virtvdpad"
    )
    assert kernel.writes == []


def test_none_there(kernel: FakeKernel) -> None:
    assert refused(kernel) == f"{PF}: no such PCI function on this host"


def test_no_sriov(kernel: FakeKernel) -> None:
    kernel.add(PF, group=1, driver="nvme")
    assert refused(kernel) == f"{PF}: is no physical function with SR-IOV, or SR-IOV is off in the firmware"


def test_more_than_it_can_have(kernel: FakeKernel) -> None:
    kernel.add(PF, group=1, driver="nvme", files=FILES)
    assert refused(kernel, 5) == f"{PF}: is to have 5 VFs, and can have at most 4"


def test_no_driver(kernel: FakeKernel) -> None:
    kernel.add(PF, group=1, files=FILES)
    assert refused(kernel) == f"{PF}: has no driver, which is to create its VFs; bind it to its own"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOENT, "its driver does not create VFs"),
        (
            errno.ENOMEM,
            "it has no memory space for VFs; enable SR-IOV in the firmware, or boot with pci=realloc",
        ),
        (errno.EIO, "'2': Input/output error"),
    ],
)
def test_refused_by_the_kernel(kernel: FakeKernel, number: int, words: str) -> None:
    kernel.add(PF, group=1, driver="nvme", files=FILES)
    kernel.refuses[f"{ATTRIBUTES}/sriov_numvfs"] = number
    said = refused(kernel)
    assert said.startswith(f"{PF}: 2 VFs cannot be created: ")
    assert said.endswith(words)


def test_drivers_are_kept_away_only_meanwhile(kernel: FakeKernel) -> None:
    kernel.add(PF, group=1, driver="nvme", files=FILES)
    with no_autoprobe(kernel, PF):
        create_vfs(kernel, PF, 2)
    assert kernel.driver_of("0000:04:00.1") is None
    assert kernel.read(f"{ATTRIBUTES}/sriov_drivers_autoprobe") == "1"


def test_drivers_are_let_in_again_when_nothing_is_created(kernel: FakeKernel) -> None:
    kernel.add(PF, group=1, driver="nvme", files=FILES)
    with pytest.raises(SriovError, match="at most 4"), no_autoprobe(kernel, PF):
        create_vfs(kernel, PF, 5)
    assert kernel.read(f"{ATTRIBUTES}/sriov_drivers_autoprobe") == "1"


@pytest.mark.parametrize("files", [{}, {"sriov_drivers_autoprobe": "0"}])
def test_drivers_that_are_kept_away_already(kernel: FakeKernel, files: dict[str, str]) -> None:
    kernel.add(PF, group=1, driver="nvme", files=files)
    with no_autoprobe(kernel, PF):
        pass
    assert kernel.writes == []
