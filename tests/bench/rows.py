"""What a measurement has found: rows, each a figure of ours and where there is one the peer's.

A row knows whether less or more of its unit is better, so that its ratio always means the same.
"""

import enum
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any


class Better(enum.Enum):
    """Which of two figures is the better one."""

    LESS = "less"
    MORE = "more"


@dataclass(frozen=True)
class Spread:
    """What several runs have given."""

    median: float
    least: float
    most: float
    runs: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """:raise ValueError: when there are no values."""
        found = list(values)
        if not found:
            raise ValueError("a row has no runs")
        return cls(statistics.median(found), min(found), max(found), len(found))

    def __str__(self) -> str:
        return f"{figure(self.median)} ({figure(self.least)} … {figure(self.most)})"


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    unit: str
    better: Better
    ours: Spread
    peer: Spread | None = None

    @property
    def ratio(self) -> float | None:
        """How many times better our median is than the peer's; None without a peer, or if there is none
        because a figure is 0."""
        if self.peer is None or self.ours.median == 0 or self.peer.median == 0:
            return None
        ratio = self.peer.median / self.ours.median
        return ratio if self.better is Better.LESS else 1 / ratio

    def as_json(self) -> dict[str, Any]:
        """The row as ./bench --json writes it."""
        peer = self.peer
        return {
            "name": self.name,
            "ours": self.ours.median,
            "peer": peer and peer.median,
            "unit": self.unit,
            "ratio": self.ratio,
            "better": self.better.value,
            "runs": self.ours.runs,
            "ours_least": self.ours.least,
            "ours_most": self.ours.most,
            "peer_least": peer and peer.least,
            "peer_most": peer and peer.most,
        }


#: A topic's function takes the number of runs and gives rows, and lines that explain them.
Measure = Callable[[int], Iterator[Row | str]]


def less_is_better(name: str, unit: str, ours: Iterable[float], peer: Iterable[float] | None = None) -> Row:
    """A row of times or sizes; the values of all runs."""
    return _row(name, unit, Better.LESS, ours, peer)


def more_is_better(name: str, unit: str, ours: Iterable[float], peer: Iterable[float] | None = None) -> Row:
    """A row of rates; the values of all runs."""
    return _row(name, unit, Better.MORE, ours, peer)


def _row(name: str, unit: str, better: Better, ours: Iterable[float], peer: Iterable[float] | None) -> Row:
    return Row(name, unit, better, Spread.of(ours), None if peer is None else Spread.of(peer))


def percentile(values: Iterable[float], rank: int) -> float:
    """The least of the values that `rank` percent of them do not exceed."""
    found = sorted(values)
    return found[math.ceil(len(found) * rank / 100) - 1]


def figure(value: float) -> str:
    """A number with as many places as one reads."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
