"""Domain XML -> the ports it asks for, and every reason to refuse it.

Reads what libvirt hands to a hook or what an operator has in a file. Checks whatever can be known from
the XML alone, since libvirt does not (its vhostuser interfaces take any path, role and memory); what
depends on the host's VFs is inventory.py's.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lxml import etree

from datapath.vdpa import DRIVERS
from libvirt_vdpa.inventory import InventoryError, address
from libvirt_vdpa.metadata import NAMESPACE, InterfaceRequest, Problem, line_of, read_metadata
from libvirt_vdpa.state import InterfaceState, read_state

#: `mode=` of an interface's source (QEMU's part) -> our role on the vhost-user socket.
ROLES = {"client": "listen", "server": "connect"}
#: What to add to a domain whose memory a port could not map.
SHARED_MEMORY = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
#: Attributes of an interface's <driver> that a vDPA port does not serve yet, when they say 'on'.
UNSERVED = ("iommu", "packed")
#: Attributes of an interface's <driver> that size its rings; libvirt sees to powers of two.
QUEUE_SIZES = ("rx_queue_size", "tx_queue_size")
#: Policy of announcing -> why QEMU's further rounds do not go with it.
WITHOUT_ROUNDS = {
    "off": "nobody announces the guest then",
    "rarp": "the port announces the guest then, not QEMU",
}
#: Both become names of files, so they must have exactly this form.
UUID_FORM = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
MAC_FORM = re.compile("[0-9a-f]{2}(:[0-9a-f]{2}){5}")
#: Numbers of queues and descriptors, from 1.
NUMBER_FORM = re.compile("[1-9][0-9]{0,4}")
#: libvirt docs/drvqemu.rst, "Pass-through of arbitrary QEMU commands".
QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"


class DomainError(Exception):
    """A domain that cannot be served; the text is one line that names domain, interface and remedy."""


@dataclass(frozen=True)
class PortSpec:
    """One interface of a domain that wants a port."""

    mac: str
    alias: str | None
    driver: str
    pool: str | None
    device: str | None
    migration: str
    announce: str
    announce_rounds: int
    #: Our role on the socket: "listen" or "connect".
    role: str
    socket_path: Path
    queue_pairs: int
    #: Largest ring in descriptors, as far as the XML says.
    queue_size: int
    #: Bytes of a packet, as far as the XML says; 0 when it does not.
    mtu: int
    #: Whether the guest has a page for each queue's doorbell, which can be the VF's own.
    page_per_vq: bool = False
    #: Whether the guest may say itself which frames it receives.
    trusted: bool = False
    #: Whether the guest is to see a link.
    link_up: bool = True
    #: Seconds after which QEMU looks for a port that has gone; 0: it does not.
    reconnect: int = 0


@dataclass(frozen=True)
class DomainSpec:
    """A domain and what it wants of us; no ports when it is not ours."""

    name: str
    uuid: str
    ports: tuple[PortSpec, ...]
    #: What its guest uses of each port, by MAC, as far as the daemon of its last host has said.
    states: Mapping[str, InterfaceState] = field(default_factory=dict)


def socket_path(run_folder: Path, uuid: str, mac: str) -> Path:
    """Where the vhost-user socket of an interface is, the same on every host."""
    return run_folder / uuid / f"{mac}.sock"


def parse_domain(xml: bytes, run_folder: Path) -> DomainSpec:
    """Read a domain that is about to start.

    :raise DomainError: for the first thing in it that cannot work.
    """
    spec, problems = check_domain(xml, run_folder)
    for problem in problems:
        if problem.fatal:
            raise DomainError(f"domain '{spec.name}': {problem}" if spec else str(problem))
    assert spec is not None
    return spec


def with_local_paths(xml: bytes, run_folder: Path) -> bytes | None:
    """A domain of another host with the socket paths of this one; None when it has them already.

    Only the run folder may differ: a path that is wrong on every host is left as it is. So is all else, but
    for the kind of quotes.
    """
    try:
        root = etree.fromstring(xml, domain_parser())
    except etree.XMLSyntaxError:
        return None
    uuid = uuid_of(root)
    changed = False
    for request in read_metadata(root)[0]:
        element = find_interface(root, request, {}, [])
        source = element.find("source") if element is not None else None
        if element is None or source is None:
            continue
        local, path = socket_path(run_folder, uuid, mac_of(element)), Path(source.get("path", ""))
        if path != local and path.is_absolute() and path.parts[-2:] == local.parts[-2:]:
            source.set("path", str(local))
            changed = True
    return etree.tostring(root.getroottree(), encoding="utf-8") if changed else None


def domain_parser() -> etree.XMLParser:
    """A parser for XML of others: nothing is fetched or expanded, nothing is lost that is written again."""
    return etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False, strip_cdata=False)


def uuid_of(root: etree._Element) -> str:
    """A domain's UUID; empty when it has none."""
    return (root.findtext("uuid") or "").strip().lower()


def check_domain(xml: bytes, run_folder: Path) -> tuple[DomainSpec | None, list[Problem]]:
    """Read a domain and list all that is wrong with it; no domain when it cannot be read at all."""
    try:
        root = etree.fromstring(xml, domain_parser())
    except etree.XMLSyntaxError as error:
        return None, [Problem(error.lineno or 1, "", f"domain XML: {error.msg}")]
    if root.tag != "domain":
        return None, [Problem(line_of(root), "", f"domain XML begins with <{root.tag}>, not <domain>")]
    name = " ".join((root.findtext("name") or "").split())
    uuid = uuid_of(root)
    requests, problems = read_metadata(root)
    ports: list[PortSpec] = []
    if requests and not UUID_FORM.fullmatch(uuid):
        text = "no <uuid> as libvirt writes it: give the domain one, socket paths contain it"
        problems.append(Problem(line_of(root), "", text))
    claimed: dict[etree._Element, str] = {}
    for request in requests:
        element = find_interface(root, request, claimed, problems)
        if element is not None:
            check = InterfaceCheck(element, request, uuid, run_folder)
            problems += check.problems()
            if check.mac and check.mac in {port.mac for port in ports}:
                text = (
                    "another interface with a port has the same MAC; ports are told apart by it, change one"
                )
                problems.append(Problem(check.line("mac"), check.mac, text))
            ports.append(check.port())
    if requests:
        problems += memory_problems(root)
    problems += forgotten_interfaces(root, claimed, run_folder)
    return DomainSpec(name, uuid, tuple(ports), read_state(root)), problems


def find_interface(
    root: etree._Element,
    request: InterfaceRequest,
    claimed: dict[etree._Element, str],
    problems: list[Problem],
) -> etree._Element | None:
    """The `<interface>` that our metadata means; None, and a problem, when there is not exactly one."""
    attribute = f"mac='{request.mac}'" if request.mac else f"alias='{request.alias}'"
    found = [
        element
        for element in root.iterfind("devices/interface")
        if (
            mac_of(element) == request.mac
            if request.mac
            else attribute_of(element, "alias", "name") == request.alias
        )
    ]
    if len(found) != 1:
        count = "no interface of the domain has" if not found else "more than one interface of the domain has"
        it = "this MAC" if request.mac else "this alias"
        problems.append(Problem(request.line, request.label, f"metadata attribute {attribute}: {count} {it}"))
        return None
    if found[0] in claimed:
        text = f"metadata attribute {attribute}: the interface is named twice, already as {claimed[found[0]]}"
        problems.append(Problem(request.line, request.label, text))
        return None
    claimed[found[0]] = request.label
    return found[0]


def forgotten_interfaces(
    root: etree._Element, claimed: Collection[etree._Element], run_folder: Path
) -> Iterator[Problem]:
    """Interfaces whose socket is in our folder, though no metadata has us make it."""
    for element in root.iterfind("devices/interface[@type='vhostuser']"):
        path = attribute_of(element, "source", "path")
        if element not in claimed and Path(path).is_relative_to(run_folder):
            text = f"<source path='{path}'>: nobody makes this socket, no metadata names the interface"
            yield Problem(line_of(element), mac_of(element), text, fatal=False)


def mac_of(element: etree._Element) -> str:
    """An interface's MAC in lower case; empty when libvirt is to invent one."""
    return attribute_of(element, "mac", "address").lower()


def attribute_of(element: etree._Element, path: str, attribute: str) -> str:
    """An attribute of a child element; empty when either is missing."""
    child = element.find(path)
    return child.get(attribute, "") if child is not None else ""


class InterfaceCheck:
    """One interface beside what our metadata says of it."""

    def __init__(
        self,
        element: etree._Element,
        request: InterfaceRequest,
        uuid: str,
        run_folder: Path,
    ) -> None:
        self.element = element
        self.request = request
        self.mac = mac_of(element)
        self.path = socket_path(run_folder, uuid or "UUID", self.mac or "MAC")
        self.mode = attribute_of(element, "source", "mode")

    def port(self) -> PortSpec:
        """The port; of use only when there are no fatal problems."""
        request = self.request
        return PortSpec(
            mac=self.mac,
            alias=request.alias,
            driver=request.driver,
            pool=request.pool,
            device=request.device,
            migration=request.migration,
            announce=request.announce,
            announce_rounds=request.announce_rounds,
            role=ROLES.get(self.mode, ""),
            socket_path=self.path,
            queue_pairs=self.number("queues", 1),
            queue_size=max(self.number(name, 0) for name in QUEUE_SIZES),
            mtu=max(self.number("size", 0, "mtu"), self.host_mtu()),
            trusted=self.element.get("trustGuestRxFilters") == "yes",
            page_per_vq=attribute_of(self.element, "driver", "page_per_vq") == "on",
            link_up=attribute_of(self.element, "link", "state") != "down",
            reconnect=self.number("timeout", 0, "source/reconnect"),
        )

    def number(self, attribute: str, default: int, child: str = "driver") -> int:
        """A number of <driver>, or of another element below; the default when it is missing or none."""
        text = attribute_of(self.element, child, attribute)
        return int(text) if NUMBER_FORM.fullmatch(text) else default

    def host_mtu(self) -> int:
        """QEMU's property, as `<qemu:override>` has it; 0 without."""
        path = "/".join(f"{{{QEMU_NAMESPACE}}}{name}" for name in ("override", "device"))
        for device in self.element.iterfind(f"../../{path}"):
            for given in device.iter(f"{{{QEMU_NAMESPACE}}}property"):
                value = given.get("value", "")
                if device.get("alias") == self.alias() and given.get("name") == "host_mtu":
                    return int(value) if NUMBER_FORM.fullmatch(value) else 0
        return 0

    def alias(self) -> str:
        """The interface's name, also before libvirt gives it one: it counts those without their own."""
        own = attribute_of(self.element, "alias", "name")
        before = self.element.itersiblings("interface", preceding=True)
        return own or f"net{sum(not attribute_of(one, 'alias', 'name') for one in before)}"

    def problems(self) -> list[Problem]:
        """All that is wrong with the interface, in the order of CHECKS."""
        return [
            Problem(line, self.mac or self.request.label, text, fatal)
            for check in CHECKS
            for line, text, fatal in check(self)
        ]

    def line(self, path: str = ".") -> int:
        """Line of the child element that a message is about, or the interface's when it is missing."""
        child = self.element.find(path)
        return line_of(child if child is not None else self.element)


#: Line, text, fatal.
Finding = tuple[int, str, bool]


def check_device(check: InterfaceCheck) -> Iterator[Finding]:
    """A VF that is named must be named in a form that can be found; whether it is there, its host knows."""
    if check.request.device is None or check.request.driver not in DRIVERS:
        return
    try:
        address(f"{check.request.driver},{check.request.device}")
    except InventoryError as error:
        yield check.request.line, f"metadata attribute device: {error}", True


def check_announce(check: InterfaceCheck) -> Iterator[Finding]:
    """QEMU's further rounds need somebody who answers to them."""
    rounds, policy = check.request.announce_rounds, check.request.announce
    if rounds and policy in WITHOUT_ROUNDS:
        text = f"metadata attribute announce-rounds='{rounds}': excludes announce='{policy}'"
        yield check.request.line, f"{text}, {WITHOUT_ROUNDS[policy]}; remove one", True


#: Models of virtio; the others say whether the device is for guests of virtio 0.95, too (libvirt 5.2).
MODELS = ("virtio", "virtio-transitional", "virtio-non-transitional")


def check_type(check: InterfaceCheck) -> Iterator[Finding]:
    """Only a vhostuser interface with a virtio model can be carried."""
    kind = check.element.get("type", "")
    if kind != "vhostuser":
        yield check.line(), f"<interface type='{kind}'>: must be type='vhostuser'", True
    model = attribute_of(check.element, "model", "type")
    if model not in MODELS:
        yield check.line("model"), f"<model type='{model}'/>: must be <model type='virtio'/>", True
    if not MAC_FORM.fullmatch(check.mac):
        text = f"<mac address='{check.mac}'/>: give the interface a MAC, the socket path contains it"
        yield check.line("mac"), text, True


def check_source(check: InterfaceCheck) -> Iterator[Finding]:
    """The socket must be the one we serve, in one of the two roles."""
    if check.element.get("type") != "vhostuser":
        return
    line = check.line("source")
    kind = attribute_of(check.element, "source", "type")
    if kind != "unix":
        yield line, f"<source type='{kind}'>: must be type='unix'", True
    path = attribute_of(check.element, "source", "path")
    if path != str(check.path):
        yield line, f"<source path='{path}'>: the path must be '{check.path}'", True
    if check.mode not in ROLES:
        yield line, f"<source mode='{check.mode}'>: must be mode='client' or mode='server'", True


def check_reconnect(check: InterfaceCheck) -> Iterator[Finding]:
    """Only a client can come back, and one that does not loses its network when a port restarts."""
    if check.element.get("type") != "vhostuser":
        return
    enabled = attribute_of(check.element, "source/reconnect", "enabled") == "yes"
    if enabled and check.mode == "server":
        text = (
            "<reconnect enabled='yes'>: only mode='client' reconnects; remove <reconnect> or change the mode"
        )
        yield check.line("source/reconnect"), text, True
    if not enabled and check.mode == "client":
        text = (
            "no <reconnect enabled='yes' timeout='1'/> in <source>: a restarted port would not be found again"
        )
        yield check.line("source"), text, False


def check_queues(check: InterfaceCheck) -> Iterator[Finding]:
    """What <driver> asks for must be something that a port serves."""
    queues = attribute_of(check.element, "driver", "queues")
    if queues and not NUMBER_FORM.fullmatch(queues):
        yield (
            check.line("driver"),
            f"<driver queues='{queues}'>: must be a number of queue pairs from 1",
            True,
        )
    for attribute in UNSERVED:
        if attribute_of(check.element, "driver", attribute) == "on":
            text = f"<driver {attribute}='on'>: vDPA ports do not serve it; remove it"
            yield check.line("driver"), text, True


def check_mtu(check: InterfaceCheck) -> Iterator[Finding]:
    """libvirt 9.0 gives the MTU to a host interface too, and does not start a domain that names none."""
    if check.element.find("mtu") is not None and not attribute_of(check.element, "target", "dev"):
        text = (
            "<mtu> without <target dev='NAME'/>: libvirt 9.0 sets the MTU of that host interface and fails"
            " without one; name one that nobody uses"
        )
        yield check.line("mtu"), text, False


#: The order in which an interface's problems are told.
CHECKS: tuple[Callable[[InterfaceCheck], Iterator[Finding]], ...] = (
    check_type,
    check_device,
    check_announce,
    check_source,
    check_reconnect,
    check_queues,
    check_mtu,
)


def memory_problems(root: etree._Element) -> Iterator[Problem]:
    """Guest memory must be mapped shared, in every NUMA cell, or the device reads a copy."""
    access = root.find("memoryBacking/access")
    default = access.get("mode", "") if access is not None else ""
    cells = root.findall("cpu/numa/cell")
    for cell in cells:
        own = cell.get("memAccess", "shared")
        if own != "shared":
            yield Problem(
                line_of(cell),
                "",
                f"<cell id='{cell.get('id')}' memAccess='{own}'>: must be memAccess='shared'",
            )
    if default == "shared" or (cells and all(cell.get("memAccess") for cell in cells)):
        return
    backing = root.find("memoryBacking")
    hugepages = backing is not None and backing.find("hugepages") is not None
    remedy = "<access mode='shared'/> to <memoryBacking>" if hugepages else SHARED_MEMORY
    at = access if access is not None else backing if backing is not None else root
    yield Problem(line_of(at), "", f"guest memory is not shared with the port; add {remedy}")


def is_ours(xml: bytes) -> bool:
    """Whether a domain's XML can hold metadata of ours at all."""
    return NAMESPACE.encode() in xml


def domain_identity(xml: bytes) -> tuple[str, str]:
    """Name and UUID of a domain whatever else is wrong with it; empty where not to be found."""
    try:
        root = etree.fromstring(xml, etree.XMLParser(resolve_entities=False, no_network=True, recover=True))
    except etree.XMLSyntaxError:
        return "", ""
    if root is None:
        return "", ""
    return (root.findtext("name") or "").strip(), uuid_of(root)
