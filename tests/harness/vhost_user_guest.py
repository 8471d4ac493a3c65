"""A guest on a port, run by the machine's own QEMU without libvirt. Owns the QEMU process."""

import re
from pathlib import Path

from tests.harness.guest import KERNEL_ARGUMENTS, guest_image
from tests.harness.processes import Process

#: Megabytes of guest memory.
MEMORY = 192


class VhostUserGuest(Process):
    """A running guest whose NIC is a port's, its serial console on a terminal of its own."""

    def __init__(self, folder: Path, socket: Path, address: str) -> None:
        """
        :param socket: where the port listens; QEMU connects again to one that comes back.
        :param address: the guest's address on the VF, with its prefix length.
        """
        image = guest_image()
        self.qmp = folder / "guest.qmp"
        argv: list[str | Path] = ["qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-display", "none"]
        argv += ["-machine", "q35,memory-backend=ram", "-m", str(MEMORY)]
        argv += ["-object", f"memory-backend-memfd,id=ram,size={MEMORY}M,share=on"]
        argv += ["-kernel", image.kernel, "-initrd", image.initrd]
        argv += ["-append", f"{KERNEL_ARGUMENTS} vdpa.ip={address}"]
        argv += ["-serial", "pty", "-qmp", f"unix:{self.qmp},server=on,wait=off"]
        argv += ["-chardev", f"socket,id=port,path={socket},reconnect=1"]
        argv += ["-netdev", "vhost-user,id=net,chardev=port"]
        # MSI-X with vhost-user crashes QEMU 7.2 under software emulation.
        argv += ["-device", "virtio-net-pci,netdev=net,vectors=0"]
        super().__init__(argv, folder / "guest.log")

    @property
    def terminal(self) -> Path:
        """The terminal of the serial console, as soon as QEMU has said which."""

        def said() -> re.Match[str] | None:
            return re.search(r"redirected to (/dev/pts/\d+)", self.log.read_text())

        found = self.wait_for("its terminal", said)
        assert found is not None
        return Path(found.group(1))
