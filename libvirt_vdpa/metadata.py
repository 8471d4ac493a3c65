"""Our element in a domain's metadata: where it is, what it says, and why it is refused.

xml/domain.rng is the authority on its shape; this module reads the element with it and puts what it
refuses into words, taking attribute names, values and patterns from the schema itself. What the rest of
the domain must look like is domain.py's.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lxml import etree

NAMESPACE = "urn:libvirt-vdpa:domain:1.0"
RELAX_NG = "http://relaxng.org/ns/structure/1.0"
#: Pool of an interface that names none.
DEFAULT_POOL = "default"
#: Driver of an interface that leaves the choice to the pool.
ANY_DRIVER = "any"

#: Attribute -> what its value should be, for messages.
FORMS = {
    "mac": "like '52:54:00:76:64:01'",
    "alias": "like 'ua-net0'",
    "pool": "like 'default'",
    "device": "like 'vfio-user=/run/vf0.sock'",
    "announce-rounds": "a number from 0 to 20",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a domain, or that could be better."""

    #: Line of the XML, from 1.
    line: int
    #: The interface it is about, as messages call it; empty when it is about the domain.
    interface: str
    #: What is wrong and what to do, naming element or attribute.
    text: str
    #: False for a recommendation: the domain would start.
    fatal: bool = True

    def __str__(self) -> str:
        text = f"interface {self.interface}: {self.text}" if self.interface else self.text
        # One line, though a value that is quoted in it may have more.
        return " ".join(text.split())


@dataclass(frozen=True)
class InterfaceRequest:
    """One `<interface>` of our element: which interface, which device, how."""

    #: Exactly one of these two is set; the MAC in lower case.
    mac: str | None
    alias: str | None
    driver: str
    #: Exactly one of these two is set.
    pool: str | None
    device: str | None
    migration: str
    announce: str
    announce_rounds: int
    line: int

    @property
    def label(self) -> str:
        """What messages call the interface."""
        return self.mac or self.alias or "?"

    @classmethod
    def read(cls, element: etree._Element) -> "InterfaceRequest":
        """Take over an element that the schema accepts."""
        mac = element.get("mac")
        device = element.get("device")
        return cls(
            mac=mac.lower() if mac else None,
            alias=element.get("alias"),
            driver=element.get("driver", ANY_DRIVER),
            pool=None if device else element.get("pool", DEFAULT_POOL),
            device=device,
            migration=element.get("migration", "auto"),
            announce=element.get("announce", "auto"),
            announce_rounds=int(element.get("announce-rounds", "0")),
            line=line_of(element),
        )


def line_of(element: etree._Element) -> int:
    """Line of an element's start tag."""
    line = element.sourceline
    return line if isinstance(line, int) else 1


def xml_folder() -> Path:
    """The folder of schema and examples: beside the checkout, else where the package installs it."""
    beside = Path(__file__).resolve().parent.parent / "xml"
    return beside if (beside / "domain.rng").is_file() else Path(sys.prefix) / "share/libvirt-vdpa/xml"


@cache
def schema() -> etree._ElementTree:
    """The schema as a document, to look up what it allows."""
    return etree.parse(xml_folder() / "domain.rng")


@cache
def validator() -> etree.RelaxNG:
    """The schema as a judge."""
    return etree.RelaxNG(schema())


def allowed(path: str) -> list[str]:
    """What an XPath finds in the schema, without doubles; `rng` is RELAX NG's prefix there."""
    found = schema().xpath(path, namespaces={"rng": RELAX_NG})
    assert isinstance(found, list)
    return list(dict.fromkeys(str(item) for item in found))


def read_metadata(root: etree._Element) -> tuple[list[InterfaceRequest], list[Problem]]:
    """All that the domain says to us; an element that is refused is left out and leaves a problem."""
    found = root.findall(f"metadata/{{{NAMESPACE}}}domain")
    requests: list[InterfaceRequest] = []
    problems: list[Problem] = []
    for extra in found[1:]:
        text = f"more than one <domain> element of {NAMESPACE}; merge them into one"
        problems.append(Problem(line_of(extra), "", text))
    for element in found[:1]:
        refused = [] if validator().validate(element) else list(explain(element))
        problems += refused
        if not refused:
            requests = [InterfaceRequest.read(child) for child in element.iterchildren(f"{{{NAMESPACE}}}*")]
    return requests, problems


def explain(element: etree._Element) -> Iterator[Problem]:
    """Why the schema refuses an element of ours, in words of ours where we have them."""
    log = list(validator().error_log)
    explained = False
    for child in element.iterchildren(f"{{{NAMESPACE}}}interface"):
        label = child.get("mac") or child.get("alias") or ""
        for text in explain_interface(child):
            explained = True
            yield Problem(line_of(child), label, text)
    if not explained:
        yield Problem(log[0].line, "", f"metadata of {NAMESPACE}: {log[0].message}")


def explain_interface(element: etree._Element) -> Iterator[str]:
    """What is wrong with the attributes of one `<interface>` of ours."""
    for name, value in sorted((str(name), str(value)) for name, value in element.attrib.items()):
        attribute = f"//rng:attribute[@name='{name}']"
        known = allowed("//rng:attribute/@name")
        if name not in known:
            yield f"metadata attribute {name}='{value}' is not known; known are: {', '.join(known)}"
            continue
        values = allowed(f"{attribute}//rng:value/text()")
        if values and value not in values:
            yield f"metadata attribute {name}='{value}': use one of {', '.join(values)}"
        patterns = allowed(f"{attribute}//rng:param[@name='pattern']/text()")
        if patterns and not any(re.fullmatch(pattern, value) for pattern in patterns):
            yield f"metadata attribute {name}='{value}': wrong form, should be {FORMS[name]}"
    given = set(element.attrib)
    if not given & {"mac", "alias"}:
        yield "metadata attribute mac or alias is missing: it says which interface is meant"
    for first, second in (("mac", "alias"), ("pool", "device")):
        if {first, second} <= given:
            yield f"metadata attributes {first} and {second} exclude each other; keep one"
    if "device" in given and element.get("driver", ANY_DRIVER) == ANY_DRIVER:
        yield "metadata attribute driver must name the driver of the VF that device names"
