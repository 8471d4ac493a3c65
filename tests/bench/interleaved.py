"""Ours and the peer's in turn, so that both meet the same machine."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def interleaved(
    runs: int, ours: Callable[[], T], peer: Callable[[], T], *, warm_up: int = 0
) -> tuple[list[T], list[T]]:
    """Call both so many times and return what they gave, ours first.

    Who is first changes from run to run: neither always comes after the other.

    :param warm_up: runs before those that count.
    """
    found: tuple[list[T], list[T]] = ([], [])
    calls = (ours, peer)
    for run in range(-warm_up, runs):
        order = (0, 1) if run % 2 == 0 else (1, 0)
        for which in order:
            value = calls[which]()
            if run >= 0:
                found[which].append(value)
    return found
