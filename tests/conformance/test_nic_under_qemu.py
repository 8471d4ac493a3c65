"""An emulated VF under two foreign programs: QEMU's vfio-user client and a stock Linux guest's virtio_net.

Nothing of ours is in the guest's way but the VF: what works here works by the specifications.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.console import Console
from tests.harness.debian_packages import UnavailableError
from tests.harness.emulated_nic import EmulatedNic, ask
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import wait_for
from tests.harness.vfio_user_qemu import VARIABLE, VfioUserGuest, vfio_user_qemu

pytestmark = pytest.mark.guest

OURS, GUEST = "10.98.0.1", "10.98.0.2"
VIRTIO_NET = "/sys/bus/virtio/drivers/virtio_net"


@dataclass
class Machine:
    """A guest on a VF, and both its ends."""

    nic: EmulatedNic
    guest: VfioUserGuest
    console: Console

    def ping(self, *options: str) -> str:
        """Five echo requests to the guest, answered all."""
        answer = self.nic.namespace.run("ping", "-c5", "-i0.2", "-W5", *options, GUEST)
        assert " 0% packet loss" in answer
        return answer

    def carrier(self) -> str:
        """What the guest's kernel says of its link: 1 or 0."""
        return self.console.run("cat /sys/class/net/eth0/carrier").strip()

    def wait_running(self) -> None:
        """Wait until the guest's driver runs the VF."""
        wait_for("the guest's driver", lambda: self.nic.query(0)["state"] == "running", 60)


@contextmanager
def booted(folder: Path, *options: str) -> Iterator[Machine]:
    """A NIC with further `options` and a guest on its VF, whose shell answers."""
    try:
        qemu = vfio_user_qemu()
    except UnavailableError as error:
        pytest.skip(f"no QEMU with vfio-user-pci (10.1 or later), {VARIABLE} may name one: {error}")
    with NetworkNamespace() as namespace, EmulatedNic(folder / "nic", namespace, 1, *options) as nic:
        namespace.run("ip", "address", "add", f"{OURS}/24", "dev", "vf0")
        socket: Path = nic.folder / "vf0.sock"
        with (
            VfioUserGuest(qemu, folder, socket, f"{GUEST}/24") as guest,
            Console(guest.terminal) as console,
        ):
            yield Machine(nic, guest, console)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with booted(tmp_path_factory.mktemp("guest")) as running:
        yield running


def test_the_guests_own_driver_binds_the_vf(machine: Machine) -> None:
    device = "/sys/class/net/eth0/device"
    assert machine.console.run(f"readlink {device}/driver").strip().endswith("/virtio_net")
    names = ("vendor", "device", "subsystem_vendor", "subsystem_device", "class")
    function = machine.console.run("cat " + " ".join(f"{device}/../{name}" for name in names))
    assert function.split() == ["0x1af4", "0x1041", "0x8086", "0x001a", "0x020000"]
    assert machine.console.run("cat /sys/class/net/eth0/address").strip() == machine.nic.query(0)["mac"]
    interrupts = machine.console.run("cat /proc/interrupts")
    assert "virtio0-input.0" in interrupts
    assert "virtio0-output.0" in interrupts


def test_packets_of_all_sizes_pass_both_ways(machine: Machine) -> None:
    machine.wait_running()
    for size in (0, 56, 1000, 1472):
        machine.ping("-s", str(size))
    answer = machine.console.run(f"ping -c 3 -W 5 -s 1400 {OURS}")
    assert " 0% packet loss" in answer
    counters = machine.nic.query(0)
    assert counters["rx_packets"] >= 23
    assert counters["tx_packets"] >= 23


def test_the_link_follows_the_vf(machine: Machine) -> None:
    ask(machine.nic.control, "vf-stop", vf=0)
    wait_for("the guest to lose its carrier", lambda: machine.carrier() == "0", 10)
    ask(machine.nic.control, "vf-start", vf=0)
    wait_for("the guest to regain its carrier", lambda: machine.carrier() == "1", 10)
    machine.ping()


def test_the_driver_can_let_go_and_bind_again(machine: Machine) -> None:
    machine.console.run(f"echo virtio0 > {VIRTIO_NET}/unbind")
    assert machine.nic.query(0)["state"] != "running"
    machine.console.run(f"echo virtio0 > {VIRTIO_NET}/bind")
    machine.console.run(f"ip address add {GUEST}/24 dev eth0; ip link set eth0 up")
    machine.wait_running()
    machine.ping()


def test_a_reset_of_the_machine_resets_the_vf(machine: Machine) -> None:
    ask(machine.guest.qmp, "system_reset")
    wait_for("the reset", lambda: machine.nic.query(0)["state"] != "running", 20)
    machine.wait_running()
    wait_for("the guest's address", lambda: GUEST in machine.console.run("ip address show eth0"), 30)
    machine.ping()


def test_a_mapped_doorbell_serves_a_guest(tmp_path: Path) -> None:
    """QEMU maps the page of notifications into the guest: no message and no event tells of a kick."""
    with booted(tmp_path, "--doorbell=mapped") as machine:
        machine.wait_running()
        machine.ping()
