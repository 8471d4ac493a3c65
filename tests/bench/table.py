"""How rows are shown: a table for people, a document for programs."""

import json
from collections.abc import Iterable, Mapping
from typing import TextIO

from tests.bench.rows import Row

NAME, SPREAD, UNIT = 48, 32, 10


def heading() -> str:
    """The line above a topic's rows."""
    columns = f"{'ours: median (least … most)':<{SPREAD}}{'peer':<{SPREAD}}{'unit':<{UNIT}}"
    return f"{'':<{NAME}}{columns}ratio"


def line(row: Row) -> str:
    """A row; without a peer its columns stay empty."""
    peer = "" if row.peer is None else str(row.peer)
    ratio = "" if row.ratio is None else f"{row.ratio:5.2f}"
    return f"{row.name:<{NAME}}{row.ours!s:<{SPREAD}}{peer:<{SPREAD}}{row.unit:<{UNIT}}{ratio}".rstrip()


def write_json(
    file: TextIO, machine: Mapping[str, object], rows: Iterable[tuple[str, Row]], failed: Mapping[str, str]
) -> None:
    """Write all rows with their topics, what they were measured on, and why a topic was given up."""
    document = {
        "machine": dict(machine),
        "rows": [{"topic": topic, **row.as_json()} for topic, row in rows],
        "failed": dict(failed),
    }
    json.dump(document, file, indent=2, ensure_ascii=False)
    file.write("\n")
