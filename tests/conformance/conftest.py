"""Fixtures that several conformance tests use."""

from collections.abc import Iterator

import pytest

from tests.harness.daemon_host import DaemonHost
from tests.harness.netns import NetworkNamespace


@pytest.fixture(scope="module")
def network() -> Iterator[NetworkNamespace]:
    with NetworkNamespace() as network:
        yield network


@pytest.fixture
def idle(network: NetworkNamespace) -> Iterator[DaemonHost]:
    """A host whose daemon has not been started."""
    host = DaemonHost(network)
    yield host
    host.close()


@pytest.fixture
def host(idle: DaemonHost) -> DaemonHost:
    idle.start()
    return idle
