"""Fixtures that several conformance tests use."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness.daemon_host import DaemonHost
from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.front_end import SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.wire import Wire


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


@pytest.fixture(scope="module")
def nic(network: NetworkNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedNic]:
    """A NIC with one VF that loses no frame while it is reset; modules that need another have their own."""
    with EmulatedNic(tmp_path_factory.mktemp("nic"), network, 1, "--keep") as running:
        yield running


@pytest.fixture
def wire(nic: EmulatedNic) -> Iterator[Wire]:
    """The other end of the first VF's cable."""
    with closing(Wire(nic.namespace, "vf0")) as made:
        yield made


@pytest.fixture
def port(nic: EmulatedNic, tmp_path: Path) -> Iterator[PortProcess]:
    """A port on the first VF."""
    with PortProcess(tmp_path, nic.device(0)) as running:
        yield running


@pytest.fixture
def front_end(port: PortProcess) -> Iterator[SocketFrontEnd]:
    """A front-end of the port's, connected, its rings not started."""
    with closing(SocketFrontEnd.dial(port.socket)) as peer:
        peer.connect()
        yield peer


@pytest.fixture(params=["software", "hardware"])
def log_mode(request: pytest.FixtureRequest) -> str:
    """Who marks what the VF writes."""
    mode: str = request.param
    return mode
