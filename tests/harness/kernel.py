"""Debian's kernels for machines that tests boot, unpacked rather than installed, and initramfs archives.

Owns where they come from: the machine's own package sources, under whatever versioned name the metapackage
depends on today. What is kept of a package and what goes into an initramfs, the machines know.
"""

import fcntl
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.processes import HarnessError, run

BUSYBOX = Path("/bin/busybox")

#: apt's own user may not write where we do.
UNSANDBOXED = ("-o", "APT::Sandbox::User=root")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a cache folder, and be the only process that fills it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def unpacked_kernel(metapackage: str, folder: Path, keep: Callable[[Path, str], None]) -> Path:
    """The kernel `vmlinuz-RELEASE` in a folder, fetched at the first call.

    :param keep: takes what else is wanted into the folder, from the unpacked package and for the release.
    :raise HarnessError: when the package can be had neither from the cache nor from the network.
    """
    kernels = sorted(folder.glob("vmlinuz-*"))
    if kernels:
        return kernels[-1]
    with tempfile.TemporaryDirectory(prefix="kernel-", dir=folder) as scratch_name:
        scratch = Path(scratch_name)
        try:
            archive = _download(metapackage, scratch)
        except HarnessError:
            # The package lists may be older than the package sources.
            run(["apt-get", "--quiet", "update"], seconds=300)
            archive = _download(metapackage, scratch)
        run(["dpkg-deb", "--extract", archive, scratch / "tree"], seconds=300)
        kernel = next((scratch / "tree/boot").glob("vmlinuz-*"))
        keep(scratch / "tree", kernel.name.removeprefix("vmlinuz-"))
        # Last, since its presence says that the rest is there.
        return kernel.rename(folder / kernel.name)


def _versioned(metapackage: str) -> str:
    """The package that a kernel metapackage depends on; its name changes with every kernel update."""
    answer = run(["apt-cache", "depends", metapackage], check=False).stdout
    found = re.search(r"Depends: (linux-image-\S+)", answer)
    if found is None:
        raise HarnessError(f"no package {metapackage} in this machine's package lists: run 'apt-get update'")
    return found.group(1)


def _download(metapackage: str, folder: Path) -> Path:
    """The kernel's package, in `folder`.

    :raise HarnessError: when the package sources do not have it or cannot be reached.
    """
    package = _versioned(metapackage)
    run(["apt-get", "--quiet", *UNSANDBOXED, "download", package], cwd=folder, seconds=600)
    return next(folder.glob("*.deb"))


def pack_initrd(root: Path, initrd: Path) -> None:
    """Pack a folder into an initramfs (uncompressed: the machines are emulated), which appears at once."""
    names = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
    with tempfile.TemporaryDirectory(prefix="initrd-", dir=initrd.parent) as scratch:
        packed = Path(scratch) / "initrd"
        with packed.open("wb") as output:
            subprocess.run(
                [BUSYBOX, "cpio", "-o", "-H", "newc"],
                cwd=root,
                input=names.encode(),
                stdout=output,
                stderr=subprocess.DEVNULL,
                check=True,
            )
        packed.rename(initrd)
