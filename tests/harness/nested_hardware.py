"""What is in the nested machine: the addresses by which those inside find it, and QEMU's arguments for it.

Those inside learn from tests/nested/conftest.py what all this is for.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Where the functions are that stand for VFs. Each of the first two is alone in its IOMMU group; the last two
#: share one with the bridge above them.
FUNCTIONS = ("0000:01:00.0", "0000:02:00.0")
SHARED_GROUP = ("0000:03:00.0", "0000:03:00.1")
#: The NIC whose cable ends at each of `FUNCTIONS`, and what its interface is called.
WIRES = {"w1": "0000:00:11.0", "w2": "0000:00:12.0"}
#: An NVMe controller with SR-IOV, of no use but as a physical function with `TOTAL_VFS` VFs.
PHYSICAL_FUNCTION = "0000:04:00.0"
TOTAL_VFS = 4
#: QEMU's names of `FUNCTIONS` and of what they are plugged into.
DEVICES = ("vf1", "vf2")
ROOT_PORTS = ("rp1", "rp2")
#: The virtio serial port that is QEMU's own monitor.
MONITOR = "qemu.monitor"

#: Megabytes of memory, of which the overlay gets half.
MEMORY = 2048

#: Without firmware of its own, which would look for something to boot from.
NIC = {"driver": "virtio-net-pci", "romfile": ""}
#: As a VF is one: modern, all its DMA through the IOMMU.
MODERN = {**NIC, "disable-legacy": "on", "iommu_platform": True}


def cabled_function(number: int) -> dict[str, Any]:
    """QEMU's properties of the function `vf{number}`, for its command line and for device_add."""
    place = {"id": f"vf{number}", "bus": f"rp{number}", "netdev": f"vf{number}"}
    return {**MODERN, **place, "ats": True, "mac": f"52:54:00:00:00:0{number}"}


def hardware(folder: Path) -> list[str]:
    """QEMU's arguments for the machine.

    :param folder: for the sockets that QEMU makes.
    """
    shared = {**MODERN, "bus": "rp3", "multifunction": True}
    return [
        *("-machine", "q35,kernel-irqchip=split", "-accel", "tcg", "-cpu", "max", "-smp", "2"),
        *("-m", str(MEMORY), "-no-user-config", "-nodefaults", "-display", "none"),
        *device({"driver": "intel-iommu", "intremap": "on", "caching-mode": True, "device-iotlb": True}),
        *(word for number in (1, 2) for word in (*root_port(number), *cable(number, folder))),
        *(word for number in (1, 2) for word in device(cabled_function(number))),
        # Without ACS neither the root port nor the two functions are kept apart.
        *root_port(3, {"disable-acs": True}),
        *("-netdev", "hubport,hubid=3,id=shared0", "-netdev", "hubport,hubid=3,id=shared1"),
        *device({**shared, "id": "shared0", "netdev": "shared0", "addr": "0.0"}),
        *device({**shared, "id": "shared1", "netdev": "shared1", "addr": "0.1"}),
        *root_port(4),
        *physical_function(),
        *monitor(folder),
    ]


def device(properties: Mapping[str, Any]) -> list[str]:
    return ["-device", json.dumps(properties)]


def root_port(number: int, properties: Mapping[str, Any] | None = None) -> list[str]:
    """A root port `rp{number}`, to whose other side firmware gives the same number."""
    place = {"id": f"rp{number}", "chassis": number, "addr": f"0x{number + 1:x}"}
    return device({"driver": "pcie-root-port", **place, **(properties or {})})


def cable(number: int, folder: Path) -> list[str]:
    """The cable of the function `vf{number}`, and the NIC at its other end.

    The cable has a third end, which throws everything away: so a cable whose other end is not plugged in
    takes frames as a real one does, rather than holding them for ever.
    """
    name = f"w{number}"
    nowhere = f"local.type=unix,local.path={folder}/{name},remote.type=unix,remote.path={folder}/nowhere"
    nic = {**NIC, "netdev": name, "mac": f"52:54:00:00:01:0{number}"}
    return [
        *("-netdev", f"hubport,hubid={number},id=vf{number}"),
        *("-netdev", f"hubport,hubid={number},id={name}"),
        *("-netdev", f"dgram,id=nowhere{number},{nowhere}"),
        *("-netdev", f"hubport,hubid={number},id=open{number},netdev=nowhere{number}"),
        *device({**nic, "addr": WIRES[name].partition("0000:00:")[2]}),
    ]


def physical_function() -> list[str]:
    # Queues and vectors for the VFs, and more of them than those.
    flexible = 2 * TOTAL_VFS
    queues = {"sriov_vq_flexible": flexible, "max_ioqpairs": flexible + 2}
    vectors = {"sriov_vi_flexible": flexible, "msix_qsize": flexible + 3}
    place = {"driver": "nvme", "id": "pf", "bus": "rp4", "serial": "pf", "subsys": "subsystem"}
    return [
        *device({"driver": "nvme-subsys", "id": "subsystem"}),
        *device({**place, "sriov_max_vfs": TOTAL_VFS, **queues, **vectors}),
    ]


def monitor(folder: Path) -> list[str]:
    """QEMU's own monitor: its only client is a serial port of the same machine."""
    path = f"path={folder}/monitor"
    return [
        *("-chardev", f"socket,id=monitor,{path},server=on,wait=off", "-mon", "chardev=monitor,mode=control"),
        *("-chardev", f"socket,id=port,{path}"),
        *device({"driver": "virtio-serial-pci", "addr": "0x1c"}),
        *device({"driver": "virtserialport", "chardev": "port", "name": MONITOR}),
    ]
