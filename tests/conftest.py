"""What all tests share: `--full`, `--nested`, the proofs of the feature table, clean beginnings, and a
private host's logs in the report of a failure."""

import gc
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.feature_proofs import ONLY_WITH_FULL, FeatureProofs
from tests.harness import nested_inner

#: Characters of each log that a failed test shows.
LOG_TAIL = 3000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the long tests")
    parser.addoption("--nested", action="store_true", help="run only the tests of the nested machine")


def pytest_configure(config: pytest.Config) -> None:
    # Inside the machine they are ordinary tests, and importing what nobody needs takes a second.
    if not config.pluginmanager.hasplugin(nested_inner.__name__):
        from tests.harness.nested_tier import NestedTier

        config.pluginmanager.register(NestedTier(config))
        config.pluginmanager.register(FeatureProofs(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason=ONLY_WITH_FULL))


@pytest.fixture(scope="module", autouse=True)
def garbage_of_other_modules() -> Iterator[None]:
    """Collect what earlier tests left in cycles, event loops among it, and keep the rest out of collections:
    descriptors that they close at some moment would be missed by tests that count theirs."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        # Whatever fixtures are called so and keep logs; importing the classes would load libvirt each time.
        fixtures = getattr(item, "funcargs", {})
        places = {"": getattr(fixtures.get("host"), "logs", None)}
        places |= getattr(fixtures.get("hosts"), "logs", {})
        for name, logs in places.items():
            if isinstance(logs, Path) and logs.exists():
                report.sections += [(name + title, text) for title, text in tails(logs)]
    return report


def tails(logs: Path) -> Iterator[tuple[str, str]]:
    """The ends of the logs below a folder, by their names."""
    for log in sorted(logs.rglob("*.*")):
        if log.is_file() and (text := log.read_text(errors="replace")[-LOG_TAIL:].strip()):
            yield str(log.relative_to(logs)), text
