"""What `./bench migration` calls too slow."""

import pytest

from tests.bench.migration import HANDLERS_LIMIT, RARP_LIMIT, Run, past_limits


def runs(*, stop: float = 1.0, start: float = 2.0, rarp: float = 3.0, count: int = 10) -> list[Run]:
    return [Run(900.0, 90.0, 0.0, 1.0, stop=stop, start=start, rarp=rarp)] * count


@pytest.mark.parametrize(
    ("found", "past"),
    [
        (runs(), []),
        (runs(stop=HANDLERS_LIMIT - 2.0, rarp=RARP_LIMIT), []),
        (runs(stop=HANDLERS_LIMIT), ["median of our handlers is 17.0 ms, more than 15 ms"]),
        # One slow run in ten is noise, two are not, nor is one of fewer.
        (runs(count=9) + runs(start=99.0, rarp=99.0, count=1), []),
        (
            runs(count=8) + runs(rarp=21.0, count=2),
            ["90th percentile of the first RARP is 21.0 ms, more than 20 ms"],
        ),
        (
            runs(count=8) + runs(rarp=21.0, count=1),
            ["90th percentile of the first RARP is 21.0 ms, more than 20 ms"],
        ),
    ],
)
def test_past_limits(found: list[Run], past: list[str]) -> None:
    assert past_limits({"software": found}) == [f"software: {text}" for text in past]
