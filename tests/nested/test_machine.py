"""The nested machine is what tests/nested/conftest.py says of it."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from datapath.bus.sysfs import function, group_members
from tests.harness.nested_hardware import (
    FUNCTIONS,
    PHYSICAL_FUNCTION,
    SHARED_GROUP,
    TOTAL_VFS,
    WIRES,
)
from tests.harness.nested_monitor import NestedMonitor
from tests.harness.processes import run, wait_for
from tests.harness.wire import frame

#: All protocols (linux/if_ether.h).
ETH_P_ALL = 3
SECONDS = 10.0


def packet_socket(interface: str) -> socket.socket:
    """A socket that hears one interface, or every one where its name is empty."""
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    opened.settimeout(SECONDS)
    if interface:
        opened.bind((interface, 0))
    return opened


def received(end: socket.socket, interface: str = "") -> bytes:
    """The next frame that comes in, on this interface if one is named."""
    while True:
        data, address = end.recvfrom(2048)
        if address[2] != socket.PACKET_OUTGOING and interface in ("", address[0]):
            return data


def interface_of(address: str) -> str:
    """The interface that virtio_net has made of a function, up."""
    device = Path("/sys/bus/pci/devices") / address
    (interface,) = wait_for("the function's interface", lambda: list(device.glob("virtio*/net/*")), SECONDS)
    run(["ip", "link", "set", interface.name, "up"])
    return interface.name


@pytest.fixture(params=[0, 1])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a cable: at the function, and at the interface."""
    number: int = request.param
    name = interface_of(FUNCTIONS[number])
    with packet_socket(name) as near, packet_socket(list(WIRES)[number]) as far:
        yield near, far
    run(["ip", "link", "set", name, "down"])


def test_frames_go_both_ways(ends: tuple[socket.socket, socket.socket]) -> None:
    for number, (sender, receiver) in enumerate([ends, ends[::-1]] * 20):
        sender.send(frame(number))
        assert received(receiver) == frame(number)


def test_groups() -> None:
    for address in FUNCTIONS:
        group = function(address).iommu_group
        assert group is not None
        assert group_members(group) == [address]
    shared = function(SHARED_GROUP[0]).iommu_group
    assert shared is not None
    assert [member for member in group_members(shared) if member.startswith("0000:03:")] == list(SHARED_GROUP)
    # And the root port.
    assert len(group_members(shared)) == 3


def test_functions_are_like_vfs() -> None:
    for address in (*FUNCTIONS, *SHARED_GROUP):
        found = function(address)
        assert (found.ids.vendor, found.ids.device, found.driver) == (0x1AF4, 0x1041, "virtio-pci")


def test_physical_function() -> None:
    number = Path(f"/sys/bus/pci/devices/{PHYSICAL_FUNCTION}/sriov_numvfs")
    assert function(PHYSICAL_FUNCTION).total_vfs == TOTAL_VFS
    # Its driver would try the VFs, for seconds.
    number.with_name("sriov_drivers_autoprobe").write_text("0")
    number.write_text(str(TOTAL_VFS))
    try:
        virtual = function(PHYSICAL_FUNCTION).virtual_functions
        assert len(virtual) == TOTAL_VFS
        assert {function(address).physical_function for address in virtual} == {PHYSICAL_FUNCTION}
    finally:
        number.write_text("0")
        number.with_name("sriov_drivers_autoprobe").write_text("1")


@contextmanager
def frames_into_the_void() -> Iterator[None]:
    """Send the second function frames while it can take none; once it is back, it gets only a later one."""
    with packet_socket("w2") as far:
        # More than the sender could hold.
        for _ in range(2000):
            far.send(frame(1))
        # The receiver hears every interface, since the function's does not exist yet.
        with packet_socket("") as near:
            yield
            name = interface_of(FUNCTIONS[1])
            far.send(frame(2))
            assert received(near, name) == frame(2)


def test_unplug_and_plug_in(monitor: NestedMonitor) -> None:
    monitor.unplug(2)
    monitor.wait_for("DEVICE_DELETED", device="vf2")
    assert not Path(f"/sys/bus/pci/devices/{FUNCTIONS[1]}").exists()
    with frames_into_the_void():
        monitor.plug(2)


def test_function_without_a_driver() -> None:
    driver = Path("/sys/bus/pci/drivers/virtio-pci")
    (driver / "unbind").write_text(FUNCTIONS[1])
    with frames_into_the_void():
        (driver / "bind").write_text(FUNCTIONS[1])


def test_modules_can_be_loaded() -> None:
    run(["modprobe", "dummy"])
    assert Path("/sys/module/dummy").exists()
    run(["modprobe", "--remove", "dummy"])


def test_what_is_written_stays_inside(tmp_path: Path) -> None:
    assert tmp_path.is_relative_to("/run/tmp")
    assert " / overlay " in Path("/proc/self/mounts").read_text()
