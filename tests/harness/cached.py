"""Folders of the checkout's cache: made at the first need, whole or not at all, by one process at a time."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = CHECKOUT / ".cache"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, which `make` fills unless it is there; who else wants it meanwhile waits.

    :param make: fills a folder that it is given, which then gets the name; what it raises goes on, and
        leaves nothing.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial")
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        # One that was killed has left it.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            make(partial)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return folder
