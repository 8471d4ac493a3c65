"""Descriptors that came with messages: giving them back, whatever they are."""

import contextlib
import os
from collections.abc import Iterable


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors, each though closing another failed: a peer's file may report an error of its own."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
