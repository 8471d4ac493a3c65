"""A NIC of a running domain as its QEMU is asked about it: by which name, and how.

Ground of links.py and rx_filters.py.
"""

from collections.abc import Awaitable, Mapping
from typing import Protocol

from lxml import etree

from libvirt_vdpa.domain import attribute_of, domain_parser, mac_of
from libvirt_vdpa.hypervisor import HypervisorError

#: A port's domain UUID and MAC.
Key = tuple[str, str]


class Execute(Protocol):
    """Has a domain's QEMU execute a command; raises HypervisorError."""

    def __call__(
        self, uuid: str, command: str, arguments: Mapping[str, object], may_taint: bool
    ) -> Awaitable[object]: ...


def find_interface(xml: str, mac: str) -> tuple[str, etree._Element]:
    """QEMU's name of a running domain's NIC, and its `<interface>`.

    :raise HypervisorError: when the domain has no such NIC.
    """
    try:
        root = etree.fromstring(xml.encode(), domain_parser())
    except etree.XMLSyntaxError as error:
        raise HypervisorError(f"the domain's XML: {error.msg}") from None
    for element in root.iterfind("devices/interface"):
        alias = attribute_of(element, "alias", "name")
        if mac_of(element) == mac and alias:
            return alias, element
    raise HypervisorError(f"the domain has no NIC {mac}")
