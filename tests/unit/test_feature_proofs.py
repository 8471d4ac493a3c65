"""That a "Y" without a passing test fails a session, and that nothing is said of what was not to run."""

import sys
from pathlib import Path

import pytest

from tests.feature_proofs import ONLY_WITH_FULL, Outcome, Proof, declared, doubts
from tests.harness.processes import run

PASSED, FAILED = Outcome("passed"), Outcome("failed")
SKIPPED, LEFT = Outcome("skipped", "no kernel"), Outcome("skipped", ONLY_WITH_FULL)

#: Outcomes of the cases that were to run, what is said in a session of all tests, and in another one.
SESSIONS: dict[str, tuple[dict[str, Outcome | None], str | None, str | None]] = {
    "passed": ({"t.py::test_a": PASSED}, None, None),
    "every case": ({"t.py::test_a[1]": PASSED, "t.py::test_a[2]": PASSED}, None, None),
    "another": ({"t.py::test_ab": PASSED}, "there is no test t.py::test_a", None),
    "none": ({}, "there is no test t.py::test_a", None),
    "failed": (
        {"t.py::test_a[1]": PASSED, "t.py::test_a[2]": FAILED},
        "t.py::test_a[2] has not passed",
        "t.py::test_a[2] has not passed",
    ),
    "skipped": ({"t.py::test_a": SKIPPED}, "t.py::test_a was skipped: no kernel", None),
    "did not run": ({"t.py::test_a": None}, "t.py::test_a has not run", None),
    "longer cases": ({"t.py::test_a[1]": PASSED, "t.py::test_a[2]": LEFT}, None, None),
    "left out": (
        {"t.py::test_a": LEFT},
        "t.py::test_a runs only with --full, and a default run is to show it",
        None,
    ),
}


@pytest.mark.parametrize("case", SESSIONS)
def test_doubts(case: str) -> None:
    outcomes, of_all, of_some = SESSIONS[case]
    proof = Proof("ifcvf: mac", "t.py::test_a")
    assert doubts(proof, outcomes, whole=True) == of_all
    assert doubts(proof, outcomes, whole=False) == of_some


def test_one_case_alone_may_be_meant() -> None:
    outcomes = {"t.py::test_a[1]": PASSED, "t.py::test_a[2]": FAILED}
    assert doubts(Proof("ifcvf: mac", "t.py::test_a[1]"), outcomes, whole=True) is None
    assert (
        doubts(Proof("ifcvf: mac", "t.py::test_a[3]"), outcomes, whole=True)
        == "there is no test t.py::test_a[3]"
    )


def test_what_the_drivers_have_declared() -> None:
    found = declared()
    assert (
        Proof("ifcvf: version 1", "tests/conformance/test_features.py::test_a_guest_of_virtio_1[ifcvf]")
        in found
    )
    assert (
        Proof(
            "virtio: proto mq", "tests/conformance/test_features.py::test_the_number_of_queue_pairs_is_told"
        )
        in found
    )


CONFTEST = """
import pytest
from tests.feature_proofs import FeatureProofs, Proof

def pytest_configure(config):
    names = ("good", "skips", "gone", "expected")
    proofs = [Proof("ifcvf: mac", f"tests/test_it.py::test_{name}") for name in names]
    config.pluginmanager.register(FeatureProofs(config, proofs))
"""

TESTS = """
import pytest

def test_good():
    pass

def test_skips():
    pytest.skip("no such machine")

@pytest.mark.xfail
def test_expected():
    assert False

def test_another():
    pass
"""

EXPECTED = "tests/test_it.py::test_expected has not passed"
SKIPS = "tests/test_it.py::test_skips was skipped: no such machine"
GONE = "there is no test tests/test_it.py::test_gone"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 1, [SKIPS, GONE, EXPECTED]),
        (["-k", "good or skips or another"], 0, []),
        (["tests/test_it.py::test_skips"], 0, []),
        (["tests/test_it.py"], 1, [EXPECTED]),
        (["--collect-only"], 0, []),
        (["--maxfail=1", "-k", "not expected"], 0, []),
    ],
    ids=["whole", "by name", "one", "file", "collection", "deselected"],
)
def test_sessions(tmp_path: Path, arguments: list[str], code: int, said: list[str]) -> None:
    """Of a pytest of its own."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "tests/test_it.py").write_text(TESTS)
    checkout = Path(__file__).resolve().parents[2]
    environment = ["env", f"PYTHONPATH={checkout}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1"]
    command = [
        *environment,
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--color=no",
        *arguments,
    ]
    done = run(command, cwd=tmp_path, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == code, done.stdout
    assert [line for line in lines if line.startswith("ifcvf: ")] == [f"ifcvf: mac: {text}" for text in said]
