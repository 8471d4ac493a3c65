"""What ./bench makes of figures and of its command line."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import __main__ as bench
from tests.bench import machine, table
from tests.bench.interleaved import interleaved
from tests.bench.rows import Row, Spread, less_is_better, more_is_better, percentile
from tests.harness.processes import HarnessError


class TestRows:
    @pytest.mark.parametrize(
        ("row", "ratio"),
        [
            (less_is_better("time", "ms", [2.0], [6.0]), 3.0),
            (less_is_better("time", "ms", [6.0], [2.0]), 1 / 3),
            (more_is_better("rate", "packets/s", [6.0], [2.0]), 3.0),
            (more_is_better("rate", "packets/s", [2.0], [6.0]), 1 / 3),
            (less_is_better("without a peer", "ms", [2.0]), None),
            (more_is_better("a peer at rest", "packets/s", [2.0], [0.0]), None),
            (less_is_better("nothing at all", "ms", [0.0], [2.0]), None),
        ],
    )
    def test_a_ratio_above_1_means_that_ours_is_better(self, row: Row, ratio: float | None) -> None:
        assert row.ratio == pytest.approx(ratio)

    def test_a_spread_is_the_median_between_least_and_most(self) -> None:
        assert Spread.of([9.0, 1.0, 2.0]) == Spread(median=2.0, least=1.0, most=9.0, runs=3)
        assert Spread.of([1.0, 2.0]).median == 1.5
        with pytest.raises(ValueError, match="no runs"):
            Spread.of([])

    @pytest.mark.parametrize(("rank", "value"), [(1, 1.0), (50, 50.0), (99, 99.0), (100, 100.0)])
    def test_a_percentile_is_one_of_the_values(self, rank: int, value: float) -> None:
        assert percentile([float(number) for number in range(100, 0, -1)], rank) == value


def test_neither_of_two_always_comes_after_the_other() -> None:
    order: list[str] = []

    def call(name: str) -> str:
        order.append(name)
        return f"{name}{len(order)}"

    found = interleaved(2, lambda: call("ours"), lambda: call("peer"), warm_up=1)
    assert order == ["peer", "ours", "ours", "peer", "peer", "ours"]
    assert found == (["ours3", "ours6"], ["peer4", "peer5"])


def test_a_line_without_a_peer_has_no_ratio() -> None:
    row = less_is_better("start", "ms", [1500.0, 12.34], [3.0])
    assert " ".join(table.line(row).split()) == "start 756.2 (12.3 … 1,500) 3.00 (3.00 … 3.00) ms 0.00"
    row = less_is_better("start", "ms", [1.0])
    assert " ".join(table.line(row).split()) == "start 1.00 (1.00 … 1.00) ms"


def test_json_has_every_row_with_its_topic() -> None:
    file = io.StringIO()
    rows = [
        ("setup", less_is_better("start", "ms", [1.0, 3.0], [4.0])),
        ("scale", less_is_better("fds", "", [7])),
    ]
    table.write_json(file, {"processors": 2}, rows, {"hooks": "no libvirt"})
    document = json.loads(file.getvalue())
    assert (document["machine"], document["failed"]) == ({"processors": 2}, {"hooks": "no libvirt"})
    start, fds = document["rows"]
    assert start == {
        "topic": "setup",
        "name": "start",
        "ours": 2.0,
        "peer": 4.0,
        "unit": "ms",
        "ratio": 2.0,
        "better": "less",
        "runs": 2,
        "ours_least": 1.0,
        "ours_most": 3.0,
        "peer_least": 4.0,
        "peer_most": 4.0,
    }
    assert (fds["peer"], fds["ratio"], fds["peer_least"]) == (None, None, None)


def test_the_machine_is_described() -> None:
    facts = machine.describe()
    assert facts["cpu"]
    assert facts["kernel"]
    json.dumps(facts)


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _topics(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def good(runs: int) -> Iterator[Row | str]:
            yield "beside nobody"
            yield more_is_better("runs", "", [runs])

        def bad(runs: int) -> Iterator[Row | str]:
            yield less_is_better("seen", "ms", [runs])
            raise HarnessError("the peer has gone")

        topics = {"bad": bench.Topic("fails", bad), "good": bench.Topic("works", good, runs=3)}
        monkeypatch.setattr(bench, "TOPICS", topics)
        monkeypatch.setattr(machine, "describe", lambda: {"processors": 2})

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["good", "best"], "'best' is not a topic; there are bad, good"),
            (["good", "--runs", "0"], "argument --runs: '0' is not a number of runs"),
            (["--jason"], "unrecognized arguments: --jason"),
        ],
    )
    def test_what_is_wrong_is_told_in_a_line(
        self, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as error:
            bench.main(arguments)
        assert (error.value.code, capsys.readouterr()) == (2, ("", f"bench: {complaint}\n"))

    def test_one_topic(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert bench.main(["good"]) == 0
        out, err = capsys.readouterr()
        assert (out.splitlines()[-2:], err) == (
            ["beside nobody", table.line(more_is_better("runs", "", [3]))],
            "",
        )

    def test_a_topic_that_fails_keeps_no_other_from_being_measured(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert bench.main(["--runs", "5", "--json", str(tmp_path / "rows")]) == 1
        assert capsys.readouterr().err == "bench: bad: the peer has gone\n"
        document = json.loads((tmp_path / "rows").read_text())
        assert [(row["topic"], row["ours"]) for row in document["rows"]] == [("bad", 5), ("good", 5)]
        assert document["failed"] == {"bad": "the peer has gone"}

    def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "none" / "rows"
        assert bench.main(["good", "--json", str(file)]) == 1
        assert capsys.readouterr() == ("", f"bench: {file}: No such file or directory\n")
