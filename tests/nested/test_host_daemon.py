"""virtvdpad with pools of real PCI functions: created, bound, lent to a port, gone and back."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datapath.bus.sysfs import function
from libvirt_vdpa import cli
from libvirt_vdpa.host_pools import UNDER_WAY
from tests.harness.host_pci import give_back, remove, rescan
from tests.harness.nested_hardware import FUNCTIONS, PHYSICAL_FUNCTION
from tests.harness.pci_host import PciHost
from tests.harness.processes import wait_for

FIRST, SECOND = FUNCTIONS
PF = Path("/sys/bus/pci/devices") / PHYSICAL_FUNCTION
VFS = [f"virtio,pci={PHYSICAL_FUNCTION[:-1]}{number}" for number in range(1, 3)]


CARDS = f"""
[pool.cards]
driver = "virtio"
devices = ["{FIRST}"]
bind = true
[pool.vfs]
driver = "virtio"
pf = "{PHYSICAL_FUNCTION}"
bind = true
vfs = """
DEVICE = f"virtio,pci={FIRST}"
#: Seconds in which the functions of all pools are created and bound.
DEADLINE = 60
#: An NVMe controller stands for a physical function: its VFs are not for us, which is told.
NOT_OURS = ("unusable", "not a virtio-net function: 1b36:0010 (subsystem 1af4:1100)")


@pytest.fixture(scope="module")
def host() -> Iterator[PciHost]:
    """One daemon for all tests: Python takes seconds to start here. Functions are as before afterwards."""
    host = PciHost()
    start_with_vfs(host, 2)
    yield host
    host.close()
    for address in FUNCTIONS:
        if function(address).driver != "virtio-pci":
            give_back(address)
    (PF / "sriov_numvfs").write_text("0")


def start_with_vfs(host: PciHost, number: int) -> None:
    """A daemon that has gone through its pools: it serves before, and this machine is slow."""
    host.start_with(CARDS + str(number))
    wait_for(
        "the pools", lambda: all(problem != UNDER_WAY for _, _, problem in pools(host).values()), DEADLINE
    )


@pytest.fixture
def virt_vdpa(host: PciHost, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """virt-vdpa in this process: exit code, and what it says."""

    def run(*words: str) -> tuple[int, str]:
        code = cli.main([f"--socket={host.socket}", *words])
        output, said = capsys.readouterr()
        return code, output or said

    return run


def pools(host: PciHost) -> dict[str, tuple[int, int, str]]:
    """Pool -> VFs, free ones, problem."""
    found = host.ask("query-status")["pools"]
    return {pool["name"]: (pool["vfs"], pool["free"], pool["problem"]) for pool in found}


def test_vfs_are_created_where_configured(host: PciHost) -> None:
    vfs = function(PHYSICAL_FUNCTION).virtual_functions
    assert {device: host.devices[device] for device in VFS} == dict.fromkeys(VFS, NOT_OURS)
    assert [f"virtio,pci={vf}" for vf in vfs] == VFS
    assert pools(host) == {"cards": (1, 1, ""), "vfs": (2, 0, "")}
    # Kept from their driver while they came, for ours to bind; refused then.
    assert {function(vf).driver for vf in vfs} == {None}
    assert (PF / "sriov_drivers_autoprobe").read_text() == "1\n"
    assert f"{PHYSICAL_FUNCTION}: 2 VFs created" in host.log.read_text()
    said = host.veto(host.domain_with("pool='vfs'"), "prepare")
    assert f"pool 'vfs' has no usable VF: {vfs[0]}: not a virtio-net function" in said


def test_from_the_pool_to_a_port_and_back(host: PciHost, virt_vdpa: Callable[..., tuple[int, str]]) -> None:
    assert host.devices[DEVICE] == ("free", "")
    domain = host.domain_with("driver='virtio' pool='cards'")
    host.hook(domain, "prepare")
    (port,) = host.ports
    assert (port["device"], port["state"]) == (DEVICE, "serving")
    assert host.devices[DEVICE] == ("lent", "")
    other = host.domain_with("driver='virtio' pool='cards'", number=2)
    assert "pool 'cards' has no free VF: 1 of 1 lent to domain 'vdpa-demo'" in host.veto(other, "prepare")

    code, said = virt_vdpa("unbind", FIRST)
    assert code == 1
    assert said.startswith(
        f"virt-vdpa: {FIRST}: is held by domain 'vdpa-demo' (52:54:00:76:64:01); shut that"
    )
    code, output = virt_vdpa("devices", "--json")
    shown = {entry["where"]: entry for entry in json.loads(output)["devices"]}
    assert (shown[FIRST]["state"], shown[FIRST]["holder"]) == ("lent", "vdpa-demo/52:54:00:76:64:01")
    assert (shown[FIRST]["pool"], shown[FIRST]["kernel_driver"]) == ("cards", "vfio-pci")
    assert shown[SECOND]["state"] == "unusable"

    host.hook(domain, "stopped", "release")
    assert host.is_clean()
    assert host.devices[DEVICE] == ("free", "")


def test_one_that_the_domain_names(host: PciHost, virt_vdpa: Callable[..., tuple[int, str]]) -> None:
    domain = host.domain_with(f"driver='virtio' device='pci={SECOND}'")
    said = host.veto(domain, "prepare")
    assert f"device 'virtio,pci={SECOND}': bound to virtio-pci" in said
    assert said.endswith(f": virt-vdpa bind {SECOND}")
    assert virt_vdpa("bind", SECOND)[0] == 0
    host.hook(domain, "prepare")
    assert [port["device"] for port in host.ports] == [f"virtio,pci={SECOND}"]
    host.hook(domain, "stopped", "release")
    assert f"virtio,pci={SECOND}" not in host.devices


def test_one_that_is_unplugged_and_plugged_in_again(host: PciHost) -> None:
    """Under a guest's port, and nobody asks: the kernel's word is enough."""
    domain = host.domain_with("driver='virtio' pool='cards'")
    host.hook(domain, "prepare")
    remove(FIRST)
    assert host.devices[DEVICE] == ("lent", "no such PCI function on this host")
    rescan(FIRST)
    wait_for("the function to be bound", lambda: function(FIRST).driver == "vfio-pci", 20)
    wait_for("the port", lambda: host.ports[0]["state"] == "serving", 60)
    assert host.devices[DEVICE] == ("lent", "")
    host.hook(domain, "stopped", "release")


def test_one_that_is_given_back_stays_so(host: PciHost, virt_vdpa: Callable[..., tuple[int, str]]) -> None:
    assert virt_vdpa("unbind", FIRST) == (0, f"{FIRST}: given back, bound to virtio-pci\n")
    state, problem = host.devices[DEVICE]
    assert (state, problem.partition(" (")[0]) == ("unusable", "bound to virtio-pci")
    assert virt_vdpa("bind", FIRST)[0] == 0
    assert host.devices[DEVICE] == ("free", "")


def test_a_physical_function_that_comes_back_gets_its_vfs_again(host: PciHost) -> None:
    """By the kernel's word alone, too. That it has gone is noticed before: the daemon says so."""
    (PF / "sriov_numvfs").write_text("0")
    remove(PHYSICAL_FUNCTION)
    said = f"{PHYSICAL_FUNCTION}: no such PCI function on this host"
    wait_for("the loss to be noticed", lambda: said in host.log.read_text(), DEADLINE)
    rescan(PHYSICAL_FUNCTION)
    wait_for("its VFs", lambda: len(function(PHYSICAL_FUNCTION).virtual_functions) == 2, DEADLINE)
    wait_for("the pool", lambda: pools(host)["vfs"] == (2, 0, ""), DEADLINE)


def test_another_number_of_vfs_is_told_and_left_alone(host: PciHost) -> None:
    start_with_vfs(host, 3)
    vfs, free, problem = pools(host)["vfs"]
    assert (vfs, free) == (2, 0)
    assert problem.startswith(f"{PHYSICAL_FUNCTION}: has 2 VFs, not 3, and nothing is changed")
    assert problem in host.log.read_text()
