"""A guest on a port, run by QEMU without libvirt: the machine's own, unless another is named."""

from pathlib import Path

from tests.harness.guest import KERNEL_ARGUMENTS
from tests.harness.qemu_guest import QemuGuest


class VhostUserGuest(QemuGuest):
    """A running guest whose NIC is a port's."""

    def __init__(
        self,
        folder: Path,
        socket: Path,
        address: str,
        *options: str,
        qemu: str | Path = "qemu-system-x86_64",
        reconnect: str = "reconnect=1",
        incoming: str | None = None,
    ) -> None:
        """
        :param socket: where the port listens; QEMU connects again to one that comes back.
        :param address: the guest's address on the VF, with its prefix length.
        :param options: more properties of the NIC.
        :param reconnect: how that QEMU is told to; from 10.0 on it wants `reconnect-ms=1000`.
        :param incoming: where a guest that moves here comes from.
        """
        nic = ["-chardev", f"socket,id=port,path={socket},{reconnect}"]
        nic += ["-netdev", "vhost-user,id=net,chardev=port"]
        # MSI-X with vhost-user crashes QEMU 7.2 under software emulation.
        nic += ["-device", ",".join(["virtio-net-pci,netdev=net,vectors=0", *options])]
        nic += ["-incoming", incoming] if incoming is not None else []
        super().__init__(qemu, folder, f"{KERNEL_ARGUMENTS} vdpa.ip={address}", nic)
