"""A guest run by QEMU without libvirt: what it is but for its NIC. Owns the QEMU process."""

import re
from collections.abc import Sequence
from pathlib import Path

from tests.harness.guest import guest_image
from tests.harness.processes import Process

#: Megabytes of guest memory.
MEMORY = 192


class QemuGuest(Process):
    """A running guest, its serial console on a terminal of its own."""

    def __init__(self, qemu: str | Path, folder: Path, kernel_arguments: str, nic: Sequence[str]) -> None:
        """
        :param folder: where its log and its monitor are.
        :param nic: QEMU's options for the NIC, which may be a process that shares the guest's memory.
        """
        image = guest_image()
        self.qmp = folder / "guest.qmp"
        argv: list[str | Path] = [qemu, "-accel", "tcg", "-nodefaults", "-display", "none"]
        argv += ["-machine", "q35,memory-backend=ram", "-m", str(MEMORY)]
        argv += ["-object", f"memory-backend-memfd,id=ram,size={MEMORY}M,share=on"]
        argv += ["-kernel", image.kernel, "-initrd", image.initrd, "-append", kernel_arguments]
        argv += ["-serial", "pty", "-qmp", f"unix:{self.qmp},server=on,wait=off"]
        super().__init__([*argv, *nic], folder / "guest.log")

    @property
    def terminal(self) -> Path:
        """The terminal of the serial console, as soon as QEMU has said which."""

        def said() -> re.Match[str] | None:
            return re.search(r"redirected to (/dev/pts/\d+)", self.log.read_text())

        found = self.wait_for("its terminal", said)
        assert found is not None
        return Path(found.group(1))
