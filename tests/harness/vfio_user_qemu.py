"""QEMU as a vfio-user client: a guest whose NIC is an emulated VF itself, with no vhost-user between.

QEMU has `vfio-user-pci` from 10.1 on, which is newer than Debian 12's. A binary that has it is looked for,
never fetched: see `find_qemu`. Owns the QEMU process of one guest.
"""

import json
import os
import re
import shutil
from pathlib import Path

from tests.harness.guest import CACHE, KERNEL_ARGUMENTS, guest_image
from tests.harness.processes import Process, run

#: Environment variable that names a QEMU binary, or a script that runs one.
VARIABLE = "VFIO_USER_QEMU"
CACHED = CACHE / "qemu-vfio-user/qemu-system-x86_64"
#: Megabytes of guest memory.
MEMORY = 192


def find_qemu() -> Path | None:
    """A QEMU that can be a vfio-user client: from the environment, the cache or the search path."""
    for name in (os.environ.get(VARIABLE), str(CACHED), "qemu-system-x86_64"):
        found = shutil.which(name) if name else None
        if found and _knows_vfio_user(found):
            return Path(found)
    return None


def _knows_vfio_user(qemu: str) -> bool:
    # One that does not know the device says so, and exits 0 all the same.
    help_text = run([qemu, "-device", "vfio-user-pci,help"], check=False).stdout
    return "socket=" in help_text


class VfioUserGuest(Process):
    """A running guest with a VF for its NIC, its serial console on a terminal of its own."""

    def __init__(self, qemu: Path, folder: Path, socket: Path, address: str) -> None:
        """
        :param socket: where the VF is served.
        :param address: the guest's address on the VF, with its prefix length.
        """
        image = guest_image()
        # Unlike vhost-user under QEMU 7.2, MSI-X works here; the VF has no other interrupt.
        arguments = KERNEL_ARGUMENTS.replace("pci=nomsi ", "")
        device = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(socket)}}
        self.qmp = folder / "guest.qmp"
        argv: list[str | Path] = [qemu, "-accel", "tcg", "-nodefaults", "-display", "none"]
        argv += ["-machine", "q35,memory-backend=ram", "-m", str(MEMORY)]
        argv += ["-object", f"memory-backend-memfd,id=ram,size={MEMORY}M,share=on"]
        argv += ["-kernel", image.kernel, "-initrd", image.initrd]
        argv += ["-append", f"{arguments} vdpa.ip={address}"]
        argv += ["-serial", "pty", "-qmp", f"unix:{self.qmp},server=on,wait=off"]
        argv += ["-device", json.dumps(device)]
        super().__init__(argv, folder / "guest.log")

    @property
    def terminal(self) -> Path:
        """The terminal of the serial console, as soon as QEMU has said which."""

        def said() -> re.Match[str] | None:
            return re.search(r"redirected to (/dev/pts/\d+)", self.log.read_text())

        found = self.wait_for("its terminal", said)
        assert found is not None
        return Path(found.group(1))
