"""The whole feature table: the column of each driver with the rows that are the back-end's.

A driver that is in `vdpa.DRIVERS` and has a `FEATURES` of its own has a column; nothing else is to be told.
"""

import importlib
from collections.abc import Mapping

from datapath.features import Cell, Column, Row
from datapath.vdpa import DRIVERS
from datapath.vhost_user.protocol_features import PROTOCOL_CELLS


def columns() -> list[Column]:
    """What the drivers have declared, in the order of the drivers."""
    found = [importlib.import_module(module).FEATURES for module in DRIVERS.values()]
    assert all(isinstance(column, Column) for column in found)
    return found


def cells(column: Column) -> Mapping[Row, Cell]:
    """All cells of a driver, in the table's order."""
    declared = {**PROTOCOL_CELLS, **column.cells}
    return {row: declared[row] for row in Row}
