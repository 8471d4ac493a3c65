"""virt-vdpa features: what drivers have declared that they can, as a table, as JSON or as docs/features.md.

Asks no daemon: the declarations are part of the programs. Footnotes say why a cell has no plain "Y", and
which tests show what it has; they are numbered as they come.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from datapath.feature_table import cells, columns
from datapath.features import Cell, Mark, Row
from libvirt_vdpa.cli.query import table

#: What is in docs/features.md before the table.
PREFACE = """\
# Features

What each driver can do, as it declares it itself (`virt-vdpa features`, `--json` for programs). The rows are
those of DPDK's vDPA drivers, so that the tables can be laid side by side.

- **Y**: all of it, and each test that the footnote names shows it. `./test` fails where one has not passed.
- **P**: partly; the footnote says what is missing.
- empty: not at all; the footnote says why.

A column speaks for hardware of that family, but none was at hand: a Y means that the driver's code was
shown on the emulated device that behaves as the family's does, or on QEMU's virtio-net. What only the
emulated NIC does is in the footnotes as such. What the back-end offers to front-ends follows from the same
declarations.

"""

#: And after it.
CLOSING = """
This file is made: `virt-vdpa features --markdown >docs/features.md`.
"""


def show(options: argparse.Namespace) -> int:
    """Print the table."""
    if options.json:
        print(json.dumps(as_data(), indent=2))
    else:
        print(as_markdown() if options.markdown else as_text(), end="")
    return 0


def as_data() -> dict[str, Any]:
    """All that has been declared, for programs."""
    return {
        "rows": [row.value for row in Row],
        "drivers": [
            {
                "name": column.driver,
                "family": column.family,
                "cells": {row.value: cell_as_data(cell) for row, cell in cells(column).items()},
            }
            for column in columns()
        ],
    }


def cell_as_data(cell: Cell) -> dict[str, Any]:
    return {
        "mark": cell.mark.value,
        "reason": cell.reason,
        "proofs": list(cell.proofs),
        "emulated": cell.emulated,
    }


class Footnotes:
    """Texts below the table, each once."""

    def __init__(self, code: str = "") -> None:
        """:param code: what encloses the name of a test."""
        self._code = code
        self._numbers: dict[str, int] = {}

    def mark(self, driver: str, cell: Cell, form: str) -> str:
        """A cell with the number of what is to be said of it, which `form` dresses."""
        number = self._numbers.setdefault(self._text(driver, cell), len(self._numbers) + 1)
        return f"{cell.mark.value} {form.format(number)}".lstrip()

    def _text(self, driver: str, cell: Cell) -> str:
        """Reason, tests and what the emulated NIC does, in a line."""
        # Two drivers often have the same tests, each as a case of its own.
        tests = (proof.removesuffix(f"[{driver}]").replace(f"[{driver}-", "[", 1) for proof in cell.proofs)
        shown = ", ".join(f"{self._code}{test}{self._code}" for test in tests)
        if cell.mark is Mark.PARTLY and shown:
            shown = f"what there is: {shown}"
        emulated = cell.emulated and f"the emulated NIC: {cell.emulated}"
        return "; ".join(part for part in (cell.reason, shown, emulated) if part)

    def lines(self, form: str) -> str:
        """All of them, each in a line."""
        return "".join(form.format(number, text) for text, number in self._numbers.items())


def marks(notes: Footnotes, form: str) -> Iterator[list[str]]:
    """The lines of the table: a row's name, and its cells."""
    drivers = [(column.driver, cells(column)) for column in columns()]
    return ([row.value, *(notes.mark(name, each[row], form) for name, each in drivers)] for row in Row)


def as_text() -> str:
    """For a terminal."""
    notes = Footnotes()
    headings = ["FEATURE", *(column.driver.upper() for column in columns())]
    return table(headings, list(marks(notes, "[{}]"))) + "\n\n" + notes.lines("[{}] {}\n")


def as_markdown() -> str:
    """docs/features.md."""
    notes = Footnotes("`")
    families = "".join(f"- {column.driver}: {column.family}\n" for column in columns())
    headings = ["", *(column.driver for column in columns())]
    lines = [headings, ["---"] * len(headings), *marks(notes, "[^{}]")]
    shown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return (
        PREFACE + families + "\n" + shown + CLOSING + "\n" + notes.lines("[^{}]: {}\n\n").rstrip("\n") + "\n"
    )
