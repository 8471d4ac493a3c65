"""virt-vdpa devices, bind and unbind on functions, an IOMMU and a kernel that are not ours."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from datapath.bus.sysfs import function
from libvirt_vdpa import cli
from libvirt_vdpa.inventory import Holder
from libvirt_vdpa.ports import Record
from tests.harness.daemon_host import PROGRAMS
from tests.harness.host_pci import exists, give_back, remove, rescan
from tests.harness.nested_hardware import FUNCTIONS, PHYSICAL_FUNCTION, SHARED_GROUP, WIRES
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import wait_for

FIRST, SECOND = FUNCTIONS
#: The root port above the first.
BRIDGE = "0000:00:02.0"
#: One that is up in the machine.
WIRE = WIRES["w1"]

#: Runs virt-vdpa with these words: exit code, output, errors.
VirtVdpa = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Whatever a test leaves bound goes back."""
    yield
    for address in (*FUNCTIONS, *SHARED_GROUP):
        if function(address).driver != "virtio-pci":
            give_back(address)


@pytest.fixture
def virt_vdpa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> VirtVdpa:
    """virt-vdpa in this process: a Python takes seconds to start here. No daemon serves the folder."""

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main([f"--socket={tmp_path}/virtvdpad.sock", *words])
        return code, *capsys.readouterr()

    return run


def refused(virt_vdpa: VirtVdpa, *words: str) -> str:
    """What a command that must be refused says, without the program's name."""
    code, output, said = virt_vdpa(*words)
    assert (code, output) == (1, ""), said
    assert said.count("\n") == 1
    return said.removeprefix("virt-vdpa: ").strip()


def problems(virt_vdpa: VirtVdpa, *words: str) -> dict[str, str]:
    """Address -> why the function cannot be used."""
    code, output, _ = virt_vdpa("devices", "--json", *words)
    assert code == 0
    return {device["where"]: device["problem"] for device in json.loads(output)["devices"]}


def interface(address: str) -> str:
    """The function's network interface, once there is one: the kernel takes a moment."""
    wait_for(f"an interface of {address}", lambda: function(address).net_interfaces, 10)
    return function(address).net_interfaces[0]


@contextmanager
def open_elsewhere(file: Path) -> Iterator[int]:
    """Another process, `sleep`, that has a file open; its pid."""
    with file.open("r+b", buffering=0) as opened:
        holder = subprocess.Popen(["sleep", "infinity"], stdin=opened)
    try:
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def test_before_and_after(virt_vdpa: VirtVdpa) -> None:
    name = interface(FIRST)
    said = problems(virt_vdpa)
    assert said[FIRST] == f"bound to virtio-pci (interface {name}): virt-vdpa bind {FIRST}"
    assert said[WIRE] == "bound to virtio-pci (interface w1): its interface w1 is up: ip link set w1 down"
    assert said[SHARED_GROUP[0]].endswith(f": virt-vdpa bind {' '.join(SHARED_GROUP)}")
    assert PHYSICAL_FUNCTION not in said

    assert virt_vdpa("bind", FIRST) == (0, f"{FIRST}: bound to vfio-pci; before: virtio-pci\n", "")
    code, output, said_too = virt_vdpa("devices")
    assert code == 0
    assert said_too.startswith("virt-vdpa: virtvdpad does not answer, its pools are not shown: ")
    lines = {line.split()[0]: line for line in output.splitlines()}
    group = function(FIRST).iommu_group
    assert lines["DEVICE"].split()[:5] == ["DEVICE", "POOL", "DRIVER", "BOUND-TO", "GROUP"]
    assert lines[FIRST].split() == [FIRST, "-", "virtio", "vfio-pci", str(group), *"---", "free", *"--"]
    assert Path(f"/dev/vfio/{group}").exists()

    assert virt_vdpa("unbind", FIRST) == (0, f"{FIRST}: given back, bound to virtio-pci\n", "")
    interface(FIRST)
    assert function(FIRST).driver_override is None


def test_all(virt_vdpa: VirtVdpa) -> None:
    said = problems(virt_vdpa, "--all")
    assert said[PHYSICAL_FUNCTION].startswith("not a virtio-net function: 1b36:0010")
    assert BRIDGE in said


def test_twice(virt_vdpa: VirtVdpa) -> None:
    virt_vdpa("bind", FIRST)
    assert virt_vdpa("bind", FIRST) == (0, f"{FIRST}: is bound to vfio-pci already\n", "")
    virt_vdpa("unbind", FIRST)
    assert virt_vdpa("unbind", FIRST) == (0, f"{FIRST}: is not bound to vfio-pci; bound to virtio-pci\n", "")


def test_the_program_itself(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(PROGRAMS / "virt-vdpa"), f"--socket={tmp_path}/virtvdpad.sock", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    done = run("bind", FIRST, SECOND)
    assert (done.returncode, done.stderr) == (0, "")
    assert {function(address).driver for address in FUNCTIONS} == {"vfio-pci"}


def test_a_group_is_bound_whole_or_not(virt_vdpa: VirtVdpa) -> None:
    ours, others = SHARED_GROUP
    group = function(ours).iommu_group
    assert refused(virt_vdpa, "bind", ours) == (
        f"{ours}: IOMMU group {group} is shared with {others}, which is bound to virtio-pci:"
        " bind both (virt-vdpa bind takes several), or use another slot"
    )
    assert function(ours).driver == "virtio-pci"
    assert virt_vdpa("bind", *SHARED_GROUP)[0] == 0
    assert {problems(virt_vdpa)[address] for address in SHARED_GROUP} == {""}
    assert virt_vdpa("unbind", *SHARED_GROUP)[0] == 0
    assert {function(address).driver for address in SHARED_GROUP} == {"virtio-pci"}


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("0000:0f:00.0", "no such PCI function on this host"),
        (BRIDGE, "is a bridge; name a network function behind it"),
        (PHYSICAL_FUNCTION, "not a virtio-net function: 1b36:0010 (subsystem 1af4:1100)"),
        (WIRE, "its interface w1 is up: ip link set w1 down"),
    ],
)
def test_what_is_not_bound(virt_vdpa: VirtVdpa, address: str, words: str) -> None:
    before = function(address) if exists(address) else None
    assert refused(virt_vdpa, "bind", address) == f"{address}: {words}"
    assert before is None or function(address) == before


def test_an_interface_in_use_without_being_up(virt_vdpa: VirtVdpa) -> None:
    name = interface(FIRST)
    subprocess.run(["ip", "address", "add", "192.0.2.1/24", "dev", name], check=True)
    assert refused(virt_vdpa, "bind", FIRST) == (
        f"{FIRST}: its interface {name} has an address: ip address flush dev {name}"
    )
    subprocess.run(["ip", "address", "flush", "dev", name], check=True)
    assert virt_vdpa("bind", FIRST)[0] == 0


def test_an_interface_in_another_network_namespace(virt_vdpa: VirtVdpa) -> None:
    name = interface(FIRST)
    with NetworkNamespace() as elsewhere:
        subprocess.run(["ip", "link", "set", name, "netns", elsewhere.path.parts[2]], check=True)
        assert function(FIRST).net_interfaces == ()
        words = "its interface is in another network namespace: end what uses it there"
        assert refused(virt_vdpa, "bind", FIRST) == f"{FIRST}: {words}"
    interface(FIRST)  # the kernel brings it back when the namespace ends
    assert virt_vdpa("bind", FIRST)[0] == 0


def test_one_that_is_open_is_not_given_back(virt_vdpa: VirtVdpa) -> None:
    virt_vdpa("bind", FIRST)
    group = function(FIRST).iommu_group
    with open_elsewhere(Path(f"/dev/vfio/{group}")) as pid:
        assert refused(virt_vdpa, "unbind", FIRST) == (
            f"{FIRST}: IOMMU group {group} is open in sleep (pid {pid});"
            " the kernel would wait for it to end, so end it first"
        )
        assert problems(virt_vdpa)[FIRST] == f"in use by sleep (pid {pid})"
    assert function(FIRST).driver == "vfio-pci"
    assert virt_vdpa("unbind", FIRST)[0] == 0


def test_one_that_a_port_holds_is_not_given_back(virt_vdpa: VirtVdpa, tmp_path: Path) -> None:
    virt_vdpa("bind", FIRST)
    holder = Holder("a", "uuid", "52:54:00:00:00:01")
    control = tmp_path / f"ports/{holder.uuid}/{holder.mac}.ctl"
    control.parent.mkdir(parents=True)
    record = Record(
        domain=holder.domain,
        uuid=holder.uuid,
        mac=holder.mac,
        device=f"virtio,pci={FIRST}",
        pool=None,
        role="listen",
        socket="",
        control=str(control),
        log="",
    )
    record.save()
    assert refused(virt_vdpa, "unbind", FIRST) == f"{FIRST}: is held by {holder}; shut that domain down first"
    record.path.unlink()
    assert virt_vdpa("unbind", FIRST)[0] == 0


def test_one_that_has_been_replaced_meanwhile(virt_vdpa: VirtVdpa) -> None:
    """Removed and found again it has its first driver, and no override."""
    virt_vdpa("bind", FIRST)
    remove(FIRST)
    assert FIRST not in problems(virt_vdpa)
    assert refused(virt_vdpa, "unbind", FIRST) == f"{FIRST}: no such PCI function on this host"
    rescan(FIRST)
    wait_for("the driver", lambda: function(FIRST).driver == "virtio-pci", 10)
    assert virt_vdpa("unbind", FIRST)[1] == f"{FIRST}: is not bound to vfio-pci; bound to virtio-pci\n"
    assert virt_vdpa("bind", FIRST)[0] == 0


def test_the_module_is_loaded(virt_vdpa: VirtVdpa) -> None:
    subprocess.run(["rmmod", "vfio-pci"], check=True)
    assert not Path("/sys/bus/pci/drivers/vfio-pci").exists()
    assert virt_vdpa("bind", FIRST)[0] == 0
    assert function(FIRST).driver == "vfio-pci"
