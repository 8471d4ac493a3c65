"""What is in the nested machine: the addresses by which those inside find it, and QEMU's arguments for it.

Those inside learn from tests/nested/conftest.py what all this is for.
"""

from pathlib import Path

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

#: A virtio NIC as a VF is one: modern, all its DMA through the IOMMU.
MODERN = "disable-legacy=on,iommu_platform=on"


def root_port(number: int, *options: str) -> list[str]:
    """A root port `rp{number}`, to whose other side firmware gives the same number."""
    words = ["pcie-root-port", f"id=rp{number}", f"chassis={number}", f"addr=0x{number + 1:x}", *options]
    return ["-device", ",".join(words)]


def cabled_function(number: int, folder: Path) -> list[str]:
    """The function `vf{number}` behind a root port of its own, and the NIC at the other end of its cable.

    The cable has a third end, which throws everything away: so a cable whose other end is not plugged in
    takes frames as a real one does, rather than holding them for ever.
    """
    nowhere = (
        f"local.type=unix,local.path={folder}/cable{number},remote.type=unix,remote.path={folder}/nowhere"
    )
    wire = f"addr={WIRES[f'w{number}'].removeprefix('0000:00:').removesuffix('.0')}"
    return [
        *root_port(number),
        *("-netdev", f"hubport,hubid={number},id=vf{number}"),
        *("-netdev", f"hubport,hubid={number},id=w{number}"),
        *("-netdev", f"dgram,id=nowhere{number},{nowhere}"),
        *("-netdev", f"hubport,hubid={number},id=open{number},netdev=nowhere{number}"),
        *("-device", f"virtio-net-pci,netdev=w{number},mac=52:54:00:00:01:0{number},{wire}"),
        *(
            "-device",
            f"virtio-net-pci,id=vf{number},bus=rp{number},netdev=vf{number},{MODERN},ats=on"
            f",mac=52:54:00:00:00:0{number}",
        ),
    ]


def hardware(folder: Path) -> list[str]:
    """QEMU's arguments for the machine.

    :param folder: for the sockets that QEMU makes.
    """
    monitor = f"path={folder}/monitor"
    flexible = 2 * TOTAL_VFS
    return [
        *("-machine", "q35,kernel-irqchip=split", "-accel", "tcg", "-cpu", "max", "-smp", "2"),
        *("-m", str(MEMORY), "-no-user-config", "-nodefaults", "-display", "none"),
        *("-device", "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on"),
        *(word for number in (1, 2) for word in cabled_function(number, folder)),
        # Without ACS neither the root port nor the two functions are kept apart.
        *root_port(3, "disable-acs=on"),
        *("-device", f"virtio-net-pci,id=shared0,bus=rp3,addr=0.0,multifunction=on,{MODERN}"),
        *("-device", f"virtio-net-pci,id=shared1,bus=rp3,addr=0.1,multifunction=on,{MODERN}"),
        *root_port(4),
        *("-device", "nvme-subsys,id=subsystem"),
        *(
            "-device",
            f"nvme,id=pf,bus=rp4,serial=pf,subsys=subsystem,sriov_max_vfs={TOTAL_VFS}"
            # Queues and vectors for the VFs, and more of them than those.
            f",sriov_vq_flexible={flexible},max_ioqpairs={flexible + 2}"
            f",sriov_vi_flexible={flexible},msix_qsize={flexible + 3}",
        ),
        # The monitor's only client is the port, at the other end of the same socket.
        *(
            "-chardev",
            f"socket,id=monitor,{monitor},server=on,wait=off",
            "-mon",
            "chardev=monitor,mode=control",
        ),
        *("-chardev", f"socket,id=port,{monitor}"),
        *("-device", "virtio-serial-pci,addr=0x1c", "-device", f"virtserialport,chardev=port,name={MONITOR}"),
    ]
