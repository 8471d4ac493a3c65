"""What a guest uses of its ports, as it travels in the domain's metadata to another host.

The daemon writes the element, in a namespace of its own apart from the operator's, while the guest runs;
libvirt carries it along in the XML of a migration or a saved guest, and the destination's hook compares it
with the VF it would use. Owns the element's shape:

    <state xmlns='urn:libvirt-vdpa:state:1.0'>
      <interface mac='52:54:00:76:64:01' offered='0x130008000' negotiated='0x130008000'
                 queue-pairs='1' ring-size='256'/>
    </state>

It is advice, never an authority: where it is missing or makes no sense, less is compared.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

from lxml import etree

from datapath.virtio import MAX_QUEUE_SIZE, Feature, bit

logger = logging.getLogger(__name__)

NAMESPACE = "urn:libvirt-vdpa:state:1.0"
#: Prefix of the element, virDomainSetMetadata's key.
PREFIX = "vdpastate"

#: Bits of a feature word that QEMU and port agree on between themselves: no guest has them.
NOT_THE_GUESTS = bit(Feature.VHOST_F_LOG_ALL) | bit(Feature.VHOST_USER_F_PROTOCOL_FEATURES)

MAC_FORM = re.compile("[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
#: A virtio feature word, 64 bits.
FEATURES_FORM = re.compile("0x[0-9a-fA-F]{1,16}")
NUMBER_FORM = re.compile("[0-9]{1,5}")
#: Most queue pairs that a virtio network device can have (virtio 1.3 section 5.1.5.6.5).
MAX_QUEUE_PAIRS = 0x8000


class StateError(ValueError):
    """An `<interface>` that says nothing usable; the text names the attribute."""


@dataclass(frozen=True)
class InterfaceState:
    """What the guest uses of one interface's port."""

    #: In lower case.
    mac: str
    #: Virtio feature word that the port offered.
    offered: int
    #: The feature word that the guest's driver acknowledged; None when no driver is up.
    negotiated: int | None
    #: Queue pairs that the guest uses, and descriptors of its largest ring; 0 when it uses none.
    queue_pairs: int
    ring_size: int


def render_state(states: Iterable[InterfaceState]) -> str:
    """The element, as virDomainSetMetadata takes it."""
    root = etree.fromstring(f"<state xmlns='{NAMESPACE}'/>")
    for state in states:
        attributes = {"mac": state.mac, "offered": f"{state.offered:#x}"}
        if state.negotiated is not None:
            attributes["negotiated"] = f"{state.negotiated:#x}"
        attributes["queue-pairs"] = str(state.queue_pairs)
        attributes["ring-size"] = str(state.ring_size)
        etree.SubElement(root, f"{{{NAMESPACE}}}interface", attributes)
    return etree.tostring(root, encoding="unicode")


def read_state(root: etree._Element) -> dict[str, InterfaceState]:
    """The states in a domain's XML, by MAC. What is malformed is logged, and as if it were not there.

    :param root: the `<domain>`.
    """
    found = root.findall(f"metadata/{{{NAMESPACE}}}state")
    if len(found) > 1:
        logger.warning("metadata of %s: more than one <state>; none is used", NAMESPACE)
        return {}
    states: dict[str, InterfaceState] = {}
    for element in found[0].iterchildren(f"{{{NAMESPACE}}}interface") if found else ():
        try:
            state = _interface(element)
            if state.mac in states:
                raise StateError(f"mac='{state.mac}' is there twice")
        except StateError as error:
            logger.warning("metadata of %s: <interface> is not used: %s", NAMESPACE, error)
            continue
        states[state.mac] = state
    return states


def _interface(element: etree._Element) -> InterfaceState:
    has_driver = "negotiated" in element.attrib
    return InterfaceState(
        mac=_text(element, "mac", MAC_FORM).lower(),
        offered=_features(element, "offered"),
        negotiated=_features(element, "negotiated") if has_driver else None,
        queue_pairs=_number(element, "queue-pairs", MAX_QUEUE_PAIRS),
        ring_size=_number(element, "ring-size", MAX_QUEUE_SIZE),
    )


def _features(element: etree._Element, name: str) -> int:
    return int(_text(element, name, FEATURES_FORM), 16)


def _number(element: etree._Element, name: str, most: int) -> int:
    number = int(_text(element, name, NUMBER_FORM))
    if number > most:
        raise StateError(f"{name}='{number}' is more than {most}")
    return number


def _text(element: etree._Element, name: str, form: re.Pattern[str]) -> str:
    value = element.get(name, "")
    if not form.fullmatch(value):
        raise StateError(f"{name}='{value}' is not of the form {form.pattern}")
    return value
