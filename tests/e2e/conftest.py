"""A private host for each module, or two; and the example domain for each test on one."""

from collections.abc import Iterator

import pytest

from tests.harness.domain_xml import DomainXml
from tests.harness.guest import guest_image
from tests.harness.leftovers import Machine
from tests.harness.two_hosts import TwoHosts
from tests.harness.vdpa_host import GUEST_ADDRESS, VdpaHost


@pytest.fixture(scope="session", autouse=True)
def machine_as_it_was() -> Iterator[None]:
    """Whatever the tests did, nothing is left of it on this machine."""
    before = Machine.look()
    yield
    assert not before.leftovers()


@pytest.fixture(scope="module")
def host() -> Iterator[VdpaHost]:
    with VdpaHost("e2e") as made:
        made.set_address()
        yield made


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as made:
        yield made


@pytest.fixture
def domain(host: VdpaHost) -> Iterator[DomainXml]:
    """The example domain, ready to be edited and defined; gone, with its port, after the test."""
    made = DomainXml.example().boot(guest_image(), GUEST_ADDRESS)
    yield made
    host.remove(made)
    assert not host.lent()
    assert not host.running("virt-vdpa-port", "qemu-system-x86_64")
