"""virtvdpad with pools of real PCI functions: created, bound, lent to a port, gone and back."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath.bus.sysfs import function
from libvirt_vdpa import cli
from tests.harness.host_pci import give_back, remove, rescan
from tests.harness.nested_hardware import FUNCTIONS, PHYSICAL_FUNCTION, TOTAL_VFS
from tests.harness.pci_host import PciHost
from tests.harness.processes import wait_for

FIRST, SECOND = FUNCTIONS
PF = Path("/sys/bus/pci/devices") / PHYSICAL_FUNCTION
VFS = [f"virtio,pci={PHYSICAL_FUNCTION[:-1]}{number}" for number in range(1, 3)]


@pytest.fixture
def host() -> Iterator[PciHost]:
    """A host whose daemon has not been started; its functions are as before afterwards."""
    host = PciHost()
    yield host
    host.close()
    for address in FUNCTIONS:
        if function(address).driver != "virtio-pci":
            give_back(address)
    (PF / "sriov_numvfs").write_text("0")


def pool(contents: str) -> str:
    return f'[pool.cards]\ndriver = "virtio"\n{contents}\n'


class TestVirtualFunctions:
    """An NVMe controller stands for a physical function: its VFs are not for us, which is told."""

    NOT_OURS = ("unusable", "not a virtio-net function: 1b36:0010 (subsystem 1af4:1100)")

    def test_created_where_configured_and_left_alone_otherwise(self, host: PciHost) -> None:
        host.start_with(pool(f'pf = "{PHYSICAL_FUNCTION}"'))
        assert host.devices == {}
        (status,) = host.ask("query-status")["pools"]
        assert status["problem"] == f"{PHYSICAL_FUNCTION} has no VFs"

        host.start_with(pool(f'pf = "{PHYSICAL_FUNCTION}"\nvfs = 2\nbind = true'))
        assert len(function(PHYSICAL_FUNCTION).virtual_functions) == 2
        assert host.devices == dict.fromkeys(VFS, self.NOT_OURS)
        (status,) = host.ask("query-status")["pools"]
        assert (status["vfs"], status["free"], status["problem"]) == (2, 0, "")
        # Kept from their driver while they came, for ours to bind; refused then.
        assert {function(vf).driver for vf in function(PHYSICAL_FUNCTION).virtual_functions} == {None}
        assert (PF / "sriov_drivers_autoprobe").read_text() == "1\n"
        assert f"{PHYSICAL_FUNCTION}: 2 VFs created" in host.log.read_text()

        host.start_with(pool(f'pf = "{PHYSICAL_FUNCTION}"\nvfs = 3'))
        (status,) = host.ask("query-status")["pools"]
        assert status["problem"].startswith(f"{PHYSICAL_FUNCTION}: has 2 VFs, not 3, and nothing is changed")
        assert host.devices == dict.fromkeys(VFS, self.NOT_OURS)
        said = host.veto(host.domain_with("pool='cards'"), "prepare")
        assert f"pool 'cards' has no usable VF: {VFS[0].partition('=')[2]}: not a virtio-net" in said

    def test_more_than_there_can_be(self, host: PciHost) -> None:
        host.start_with(pool(f'pf = "{PHYSICAL_FUNCTION}"\nvfs = {TOTAL_VFS + 1}'))
        (status,) = host.ask("query-status")["pools"]
        assert status["problem"] == f"{PHYSICAL_FUNCTION} has no VFs"
        assert f"is to have {TOTAL_VFS + 1} VFs, and can have at most {TOTAL_VFS}" in host.log.read_text()


class TestFunctions:
    """Virtio-net functions behind an IOMMU, from configuration or command to a port and back."""

    def test_from_the_pool_to_a_port_and_back(
        self, host: PciHost, capsys: pytest.CaptureFixture[str]
    ) -> None:
        host.start_with(pool(f'devices = ["{FIRST}"]\nbind = true'))
        device = f"virtio,pci={FIRST}"
        assert host.devices == {device: ("free", "")}
        domain = host.domain_with("driver='virtio' pool='cards'")
        host.hook(domain, "prepare")
        (port,) = host.ports
        assert (port["device"], port["state"]) == (device, "serving")
        assert host.devices == {device: ("lent", "")}
        other = host.domain_with("driver='virtio' pool='cards'", number=2)
        assert "pool 'cards' has no free VF: 1 of 1 lent to domain 'vdpa-demo'" in host.veto(other, "prepare")

        command = [f"--socket={host.socket}"]
        assert cli.main([*command, "unbind", FIRST]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"virt-vdpa: {FIRST}: is held by domain 'vdpa-demo' (52:54:00:76:64:01); shut")
        assert cli.main([*command, "devices", "--json"]) == 0
        shown = {entry["where"]: entry for entry in json.loads(capsys.readouterr().out)["devices"]}
        assert (shown[FIRST]["state"], shown[FIRST]["holder"]) == ("lent", "vdpa-demo/52:54:00:76:64:01")
        assert (shown[FIRST]["pool"], shown[FIRST]["kernel_driver"]) == ("cards", "vfio-pci")
        assert shown[SECOND]["state"] == "unusable"

        host.hook(domain, "stopped", "release")
        assert host.is_clean()
        assert host.devices == {device: ("free", "")}
        assert cli.main([*command, "unbind", FIRST]) == 0
        ((_, (state, problem)),) = host.devices.items()
        assert (state, problem.partition(" (")[0]) == ("unusable", "bound to virtio-pci")

    def test_one_that_the_domain_names(self, host: PciHost, capsys: pytest.CaptureFixture[str]) -> None:
        host.start_with("")
        domain = host.domain_with(f"driver='virtio' device='pci={FIRST}'")
        said = host.veto(domain, "prepare")
        assert f"device 'virtio,pci={FIRST}': bound to virtio-pci" in said
        assert said.endswith(f": virt-vdpa bind {FIRST}")
        assert cli.main([f"--socket={host.socket}", "bind", FIRST]) == 0
        host.hook(domain, "prepare")
        assert [port["device"] for port in host.ports] == [f"virtio,pci={FIRST}"]
        host.hook(domain, "stopped", "release")
        assert host.devices == {}

    def test_one_that_is_unplugged_and_plugged_in_again(self, host: PciHost) -> None:
        """Under a guest's port, and nobody asks: the kernel's word is enough."""
        host.start_with(pool(f'devices = ["{FIRST}"]\nbind = true'))
        device = f"virtio,pci={FIRST}"
        host.hook(host.domain_with("driver='virtio' pool='cards'"), "prepare")
        remove(FIRST)
        assert host.devices == {device: ("lent", "no such PCI function on this host")}
        rescan(FIRST)
        wait_for("the function to be bound", lambda: function(FIRST).driver == "vfio-pci", 20)
        wait_for("the port", lambda: host.ports[0]["state"] == "serving", 60)
        assert host.devices == {device: ("lent", "")}
