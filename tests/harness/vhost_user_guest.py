"""A guest on a port, run by the machine's own QEMU without libvirt."""

from pathlib import Path

from tests.harness.guest import KERNEL_ARGUMENTS
from tests.harness.qemu_guest import QemuGuest


class VhostUserGuest(QemuGuest):
    """A running guest whose NIC is a port's."""

    def __init__(self, folder: Path, socket: Path, address: str) -> None:
        """
        :param socket: where the port listens; QEMU connects again to one that comes back.
        :param address: the guest's address on the VF, with its prefix length.
        """
        nic = ["-chardev", f"socket,id=port,path={socket},reconnect=1"]
        nic += ["-netdev", "vhost-user,id=net,chardev=port"]
        # MSI-X with vhost-user crashes QEMU 7.2 under software emulation.
        nic += ["-device", "virtio-net-pci,netdev=net,vectors=0"]
        super().__init__("qemu-system-x86_64", folder, f"{KERNEL_ARGUMENTS} vdpa.ip={address}", nic)
