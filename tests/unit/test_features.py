"""The feature table: that it is whole, that its proofs exist, and that what is made of it is up to date."""

import re
import sys
from functools import cache
from pathlib import Path

import pytest

from datapath.drivers.ifcvf import FEATURES as IFCVF
from datapath.feature_table import cells, columns
from datapath.features import Cell, Column, Mark, Row, Way, no, partly, yes
from datapath.port_options import parse_arguments
from datapath.vdpa import DRIVERS, DeviceSpec
from datapath.vhost_user.protocol_features import AT_TIMES, FEATURE_OF, PROTOCOL_CELLS, PROTOCOL_FEATURES
from datapath.virtio import Feature, bit
from libvirt_vdpa.cli.features import as_data, as_markdown, as_text
from tests.feature_proofs import Proof, declared
from tests.harness.processes import run

ROOT = Path(__file__).resolve().parents[2]

COLUMNS = {column.driver: column for column in columns()}
CELLS = [(name, row) for name in COLUMNS for row in Row]


def cell(name: str, row: Row) -> Cell:
    return cells(COLUMNS[name])[row]


def test_every_driver_has_a_column() -> None:
    assert list(COLUMNS) == list(DRIVERS)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_has_a_cell_for_each_row_and_no_other(name: str) -> None:
    assert set(COLUMNS[name].cells).isdisjoint(PROTOCOL_CELLS)
    assert COLUMNS[name].cells.keys() | PROTOCOL_CELLS.keys() == set(Row)


@pytest.mark.parametrize(("name", "row"), CELLS)
def test_a_cell_says_why(name: str, row: Row) -> None:
    found = cell(name, row)
    if found.mark is Mark.YES:
        assert found.proofs, "nothing shows it"
    else:
        assert found.reason, "and why?"
    if found.mark is Mark.NO:
        assert found.way is Way.KEPT_BACK
        assert not found.proofs
    if row.features and found.mark is not Mark.NO:
        assert found.way is not Way.KEPT_BACK, "what is not offered is not there"


def test_no_feature_goes_two_ways() -> None:
    for column in COLUMNS.values():
        in_rows = [feature for row in column.cells for feature in row.features]
        assert len(in_rows) == len(set(in_rows))
        assert not set(in_rows) & column.beside.keys()


@cache
def found_in_every_run() -> list[str]:
    """The node ids that a pytest finds in the files of all proofs, less what is left to --full."""
    files = {proof.test.partition("::")[0] for proof in declared()}
    pytest_itself = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not full"]
    listed = run([*pytest_itself, *sorted(files)], cwd=ROOT).stdout
    return [line for line in listed.splitlines() if "::" in line]


@pytest.mark.parametrize("test", sorted({proof.test for proof in declared()}))
def test_a_proof_is_a_test_of_every_run(test: str) -> None:
    proof = Proof("", test)
    assert any(proof.meant(nodeid) for nodeid in found_in_every_run())


# What follows from it


def test_masks_follow_from_cells() -> None:
    column = Column(
        "made-up",
        "none",
        {
            Row.CSUM: yes("a test"),
            Row.ECN: partly("why"),
            Row.CTRL_VQ: yes("a test", way=Way.PROMISED),
            Row.IOMMU_PLATFORM: partly("why", way=Way.AGREED),
            Row.PACKED: no("why"),
            Row.USAGE_DOC: yes("a test"),
        },
        {Feature.NET_F_STATUS: Way.PROMISED},
    )
    assert column.mask(Way.CARRIED) == bit(0) | bit(9) | bit(13)
    assert column.mask(Way.PROMISED) == bit(17) | bit(16)
    assert column.mask(Way.AGREED) == bit(33)
    assert column.mask(Way.KEPT_BACK) == bit(34)


def test_what_the_back_end_offers_follows() -> None:
    for row, feature in FEATURE_OF.items():
        always = PROTOCOL_CELLS[row].mark is not Mark.NO and row not in AT_TIMES
        assert bool(PROTOCOL_FEATURES & bit(feature)) is always, row


def test_a_guest_is_offered_nothing_that_a_shadow_ring_cannot_carry() -> None:
    for column in COLUMNS.values():
        offered = column.mask(Way.CARRIED) | column.mask(Way.PROMISED)
        assert not offered & bit(Feature.F_NOTIFICATION_DATA)


def test_packed_rings_or_a_log_are_offered_and_never_both() -> None:
    """The relay, which logs, carries split rings only."""
    given = ["--device=virtio,vfio-user=/nowhere", "--probe"]
    log, packed = bit(Feature.VHOST_F_LOG_ALL), bit(Feature.F_RING_PACKED)
    assert parse_arguments(given).features & (log | packed) == log
    assert parse_arguments([*given, "--packed"]).features & (log | packed) == packed
    assert not COLUMNS["ifcvf"].mask(Way.CARRIED) & (packed | bit(Feature.F_IN_ORDER))


# What is printed


def test_the_document_is_up_to_date() -> None:
    told = "docs/features.md is outdated: virt-vdpa features --markdown >docs/features.md"
    assert (ROOT / "docs/features.md").read_text() == as_markdown(), told


def test_the_table_has_every_cell_and_footnote() -> None:
    table, _, notes = as_text().partition("\n\n")
    heading, *lines = table.splitlines()
    assert heading.split() == ["FEATURE", *(name.upper() for name in COLUMNS)]
    assert [re.split(" {2,}", line)[0] for line in lines] == [row.value for row in Row]
    numbers = [int(number) for number in re.findall(r"^\[(\d+)\] .", notes, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert {int(number) for number in re.findall(r"\[(\d+)\]", table)} == set(numbers)


def test_programs_get_the_same() -> None:
    data = as_data()
    assert data["rows"] == [row.value for row in Row]
    ifcvf = data["drivers"][0]
    assert (ifcvf["name"], ifcvf["family"]) == ("ifcvf", IFCVF.family)
    assert list(ifcvf["cells"]) == data["rows"]
    assert ifcvf["cells"]["Linux VFIO"] == {
        "mark": "P",
        "reason": IFCVF.cells[Row.LINUX_VFIO].reason,
        "proofs": list(IFCVF.cells[Row.LINUX_VFIO].proofs),
        "emulated": "it is reached by vfio-user",
    }


# Documents: proofs of their rows


@pytest.mark.parametrize("driver", DRIVERS)
def test_its_use_is_described(driver: str) -> None:
    """With its device strings, for which the document's blocks are looked through."""
    text = (ROOT / f"docs/drivers/{driver}.md").read_text()
    (section,) = re.findall(r"^## Device string\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    strings = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    specs = [DeviceSpec.parse(line) for line in strings]
    assert {spec.driver for spec in specs} == {driver}
    ways = {"pci", "ibdev"} if driver == "mlx5" else {"pci", "vfio-user"}
    assert {key for spec in specs for key in spec.options} >= ways


@pytest.mark.parametrize("driver", DRIVERS)
def test_its_design_is_described(driver: str) -> None:
    """By a document that the one on the architecture's house can be read beside, of code that is there."""
    text = (ROOT / f"docs/drivers/{driver}.md").read_text()
    named = re.findall(r"`(datapath/[a-z0-9_/]+\.py)`", text)
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []
    assert "architecture.md" in text or driver in (ROOT / "docs/architecture.md").read_text()
