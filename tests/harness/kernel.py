"""Debian's kernels for machines that tests boot, unpacked rather than installed, and initramfs archives.

Owns where they come from: the machine's own package sources, under whatever versioned name the metapackage
depends on today. What is kept of a package and what goes into an initramfs, the machines know.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.harness.cached import made_once
from tests.harness.debian_packages import UnavailableError
from tests.harness.processes import HarnessError, run

BUSYBOX = Path("/bin/busybox")

#: apt's own user may not write where we do.
UNSANDBOXED = ("-o", "APT::Sandbox::User=root")


def kernel(metapackage: str, folder: Path, keep: Callable[[Path, str, Path], None]) -> Path:
    """The kernel `vmlinuz-RELEASE` in a folder of the cache, fetched at the first call.

    :param keep: is given the unpacked package, the release, and a folder for what else is wanted of it.
    :raise UnavailableError: when the package can be had neither from the cache nor from the network.
    """

    def fetch(partial: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="kernel-", dir=partial) as scratch_name:
            scratch = Path(scratch_name)
            try:
                archive = _download(metapackage, scratch)
            except HarnessError:
                # The package lists may be older than the package sources.
                run(["apt-get", "--quiet", "update"], check=False, seconds=300)
                archive = _download(metapackage, scratch)
            tree = scratch / "tree"
            run(["dpkg-deb", "--extract", archive, tree], seconds=300)
            image = next((tree / "boot").glob("vmlinuz-*"))
            keep(tree, image.name.removeprefix("vmlinuz-"), partial)
            image.rename(partial / image.name)

    return next(made_once(folder, fetch).glob("vmlinuz-*"))


@dataclass(frozen=True)
class BootImage:
    """What a machine boots from."""

    kernel: Path
    initrd: Path
    #: The folder of what was kept of the kernel's modules.
    modules: Path

    @property
    def release(self) -> str:
        """Release of the kernel, such as 6.1.0-9-cloud-amd64."""
        return self.kernel.name.removeprefix("vmlinuz-")


def boot_image(
    metapackage: str,
    folder: Path,
    keep_modules: Callable[[Path, str, Path], None],
    make_initrd: Callable[[Path, Path], None],
    recipes: Sequence[Path],
) -> BootImage:
    """A kernel with its modules in `folder`/modules-RELEASE and an initramfs, each made at the first need.

    :param keep_modules: as `keep` of `kernel`; makes that folder.
    :param make_initrd: makes an initramfs of that folder.
    :param recipes: files that decide what the initramfs has: it is made again when one has changed.
    :raise UnavailableError: when the package can be had neither from the cache nor from the network.
    """
    vmlinuz = kernel(metapackage, folder, keep_modules)
    release = vmlinuz.name.removeprefix("vmlinuz-")
    image = BootImage(vmlinuz, folder / f"initrd-{release}", folder / f"modules-{release}")
    made = image.initrd.stat().st_mtime if image.initrd.exists() else 0
    if any(made < recipe.stat().st_mtime for recipe in recipes):
        make_initrd(image.modules, image.initrd)
    return image


def _versioned(metapackage: str) -> str:
    """The package that a kernel metapackage depends on; its name changes with every kernel update.

    :raise UnavailableError: when the package lists do not have it.
    """
    answer = run(["apt-cache", "depends", metapackage], check=False).stdout
    found = re.search(r"Depends: (linux-image-\S+)", answer)
    if found is None:
        raise UnavailableError(
            f"no package {metapackage} in this machine's package lists: run 'apt-get update'"
        )
    return found.group(1)


def _download(metapackage: str, folder: Path) -> Path:
    """The kernel's package, in `folder`.

    :raise UnavailableError: when the package sources do not have it or cannot be reached.
    """
    package = _versioned(metapackage)
    try:
        run(["apt-get", "--quiet", *UNSANDBOXED, "download", package], cwd=folder, seconds=600)
    except HarnessError as error:
        raise UnavailableError(f"no package {package}: {error}") from None
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
