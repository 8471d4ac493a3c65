"""QEMU as a vfio-user client: a guest whose NIC is an emulated VF itself, with no vhost-user between.

QEMU has `vfio-user-pci` from 10.1 on. Where the machine's own is older, one of Debian's backports is fetched
once into the checkout's cache and runs with its own loader and libraries (38 MB to fetch, 110 MB unpacked;
seconds on a fast line). Owns that copy.
"""

import functools
import json
import os
import shutil
from pathlib import Path

from tests.harness.cached import made_once
from tests.harness.debian_packages import unpack
from tests.harness.guest import CACHE, KERNEL_ARGUMENTS
from tests.harness.processes import HarnessError, run
from tests.harness.qemu_guest import QemuGuest

#: Environment variable that names a QEMU binary, or a script that runs one.
VARIABLE = "VFIO_USER_QEMU"
CACHED = CACHE / "qemu-vfio-user"
BINARY = "qemu-system-x86_64"
PACKAGE = "qemu-system-x86"
SUITES = ("trixie", "trixie-backports")
LIBRARIES = "usr/lib/x86_64-linux-gnu"
#: What of the packages is kept.
KEPT = (f"usr/bin/{BINARY}", LIBRARIES, "usr/share/qemu", "usr/share/seabios")
#: Nothing of the machine's own libraries may get in: they are older.
WRAPPER = f"""#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
export QEMU_MODULE_DIR="$here/{LIBRARIES}/qemu"
exec "$here/{LIBRARIES}/ld-linux-x86-64.so.2" --inhibit-cache --library-path "$here/{LIBRARIES}" \\
    "$here/usr/bin/{BINARY}" -L "$here/usr/share/qemu" -L "$here/usr/share/seabios" "$@"
"""


@functools.cache
def vfio_user_qemu() -> Path:
    """A QEMU that can be a vfio-user client: from the environment, the search path or Debian's backports.

    :raise UnavailableError: when the machine has none and its package source has none either.
    """
    named = os.environ.get(VARIABLE)
    if named:
        check_vfio_user(named)
        return Path(named)
    own = shutil.which(BINARY)
    if own and knows_vfio_user(own):
        return Path(own)
    return made_once(CACHED, fetch) / BINARY


def fetch(folder: Path) -> None:
    """Make a QEMU of Debian's backports that runs from `folder`, wherever that is moved.

    :raise UnavailableError: when it cannot be had.
    """
    tree = folder / "packages"
    tree.mkdir()
    unpack(tree, PACKAGE, SUITES)
    for name in KEPT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).rename(folder / name)
    shutil.rmtree(tree)
    wrapper = folder / BINARY
    wrapper.write_text(WRAPPER)
    wrapper.chmod(0o755)
    check_vfio_user(wrapper)


def knows_vfio_user(qemu: str | Path) -> bool:
    """Whether a QEMU has the device."""
    # One that does not know it says so, and exits 0 all the same.
    return "socket=" in run([qemu, "-device", "vfio-user-pci,help"], check=False).stdout


def check_vfio_user(qemu: str | Path) -> None:
    """:raise HarnessError: when a QEMU does not have the device."""
    if not knows_vfio_user(qemu):
        said = run([qemu, "-device", "vfio-user-pci,help"], check=False)
        raise HarnessError(f"{qemu} has no vfio-user-pci: {(said.stderr or said.stdout).strip()}")


class VfioUserGuest(QemuGuest):
    """A running guest with a VF for its NIC."""

    def __init__(self, qemu: Path, folder: Path, socket: Path, address: str) -> None:
        """
        :param socket: where the VF is served.
        :param address: the guest's address on the VF, with its prefix length.
        """
        # Unlike vhost-user under QEMU 7.2, MSI-X works here; the VF has no other interrupt.
        arguments = KERNEL_ARGUMENTS.replace("pci=nomsi ", "")
        device = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(socket)}}
        nic = ["-device", json.dumps(device)]
        super().__init__(qemu, folder, f"{arguments} vdpa.ip={address}", nic)
