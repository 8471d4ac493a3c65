"""Domain XML for tests and the demo: an example from xml/, made bootable here by a few edits.

The examples are valid domains as they stand; this module only says which kernel to boot and, for tests,
what should be wrong about them. It builds no XML of its own.
"""

from typing import Self

from lxml import etree

from tests.harness.guest import CHECKOUT, KERNEL_ARGUMENTS
from tests.harness.kernel import BootImage

QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
EXAMPLES = CHECKOUT / "xml"
METADATA = "urn:libvirt-vdpa:domain:1.0"
#: Of what the daemon writes down of a running guest there.
STATE = "urn:libvirt-vdpa:state:1.0"


class DomainXml:
    """A domain's XML, edited in place."""

    def __init__(self, text: str) -> None:
        self.root = etree.fromstring(text.encode(), etree.XMLParser(remove_blank_text=True))

    @classmethod
    def example(cls, name: str = "vdpa-demo.xml") -> Self:
        """One of the example domains."""
        return cls((EXAMPLES / name).read_text())

    def __str__(self) -> str:
        return etree.tostring(self.root, pretty_print=True, encoding="unicode")

    def element(self, path: str) -> etree._Element:
        """The one element at a path."""
        found = self.root.find(path)
        assert found is not None, f"{self.name} has no {path}"
        return found

    @property
    def interface(self) -> etree._Element:
        """The first interface."""
        return self.element("devices/interface")

    @property
    def request(self) -> etree._Element:
        """The first interface of our metadata."""
        return self.element(f"metadata/{{{METADATA}}}domain/{{{METADATA}}}interface")

    @property
    def metadata(self) -> str:
        """Our metadata as `virsh metadata` takes it: without its namespace."""
        element = etree.fromstring(etree.tostring(self.element(f"metadata/{{{METADATA}}}domain")))
        for one in element.iter():
            one.tag = etree.QName(one).localname
        etree.cleanup_namespaces(element)
        return etree.tostring(element, encoding="unicode")

    @property
    def is_ours(self) -> bool:
        """Whether it has our metadata."""
        return self.root.find(f"metadata/{{{METADATA}}}domain") is not None

    def _set_text(self, parent: str, name: str, text: str) -> None:
        element = self.element(parent)
        child = element.find(name)
        if child is None:
            child = etree.SubElement(element, name)
        child.text = text

    @property
    def name(self) -> str:
        return self.root.findtext("name", "")

    @property
    def uuid(self) -> str:
        return self.root.findtext("uuid", "")

    @property
    def mac(self) -> str:
        """MAC address of the first interface."""
        return str(self.element("devices/interface/mac").get("address"))

    @property
    def socket(self) -> str:
        """Path of the first interface's vhost-user socket."""
        return str(self.element("devices/interface/source").get("path"))

    def boot(self, image: BootImage, address: str, *more: str) -> Self:
        """Boot the test guest, with `address` (ADDRESS/LENGTH) on its first NIC, others on its next ones."""
        others = [f"vdpa.ip{number}={one}" for number, one in enumerate(more, 1)]
        self._set_text("os", "kernel", str(image.kernel))
        self._set_text("os", "initrd", str(image.initrd))
        self._set_text("os", "cmdline", " ".join([KERNEL_ARGUMENTS, f"vdpa.ip={address}", *others]))
        return self

    def without_vdpa(self) -> Self:
        """Make it a domain that is none of our business: no metadata, no vhost-user interface."""
        self.root.remove(self.element("metadata"))
        self.element("devices").remove(self.interface)
        return self

    def migrating(self, mode: str, announce: str = "auto") -> Self:
        """Say how all its interfaces are migrated, and how they are announced then."""
        for request in self.root.iter(f"{{{METADATA}}}interface"):
            request.set("migration", mode)
            request.set("announce", announce)
        return self

    def add_nic(self) -> str:
        """Give it one more interface like the first; its MAC."""
        interfaces = self.root.findall("devices/interface")
        mac = f"{self.mac[:-2]}{int(self.mac[-2:], 16) + 0x10 * len(interfaces):02x}"
        for original in (self.interface, self.request):
            text = etree.tostring(original, encoding="unicode").replace(self.mac, mac)
            original.addnext(etree.fromstring(text))
        return mac

    def use_pool(self, number: int, driver: str, pool: str) -> None:
        """Have the interface of this number get its VF from a pool."""
        request = list(self.root.iter(f"{{{METADATA}}}interface"))[number]
        request.set("driver", driver)
        request.set("pool", pool)

    def override(self, name: str, kind: str, value: str) -> Self:
        """Set a property of the first NIC that libvirt does not know, which taints the domain."""
        place = f"{{{QEMU}}}override/{{{QEMU}}}device/{{{QEMU}}}frontend"
        if self.root.find(place) is None:
            device = "<q:device alias='net0'><q:frontend/></q:device>"
            self.root.append(etree.fromstring(f"<q:override xmlns:q='{QEMU}'>{device}</q:override>"))
        etree.SubElement(self.element(place), f"{{{QEMU}}}property", name=name, type=kind, value=value)
        return self

    def with_monitor(self, path: str) -> Self:
        """Give it a monitor for the daemon, which taints the domain (custom-argv)."""
        socket = f"socket,id=vdpamon,path={path},server=on,wait=off"
        words = ("-chardev", socket, "-mon", "chardev=vdpamon,mode=control")
        arguments = "".join(f"<q:arg value='{word}'/>" for word in words)
        self.root.append(etree.fromstring(f"<q:commandline xmlns:q='{QEMU}'>{arguments}</q:commandline>"))
        return self

    def with_tap(self, bridge: str) -> Self:
        """Give it an ordinary virtio NIC, served by QEMU itself, instead of the vDPA one, with its MAC."""
        text = f"""<interface type='bridge'><mac address='{self.mac}'/><source bridge='{bridge}'/>
            <model type='virtio'/><driver name='qemu'/></interface>"""
        where = list(self.element("devices")).index(self.interface)
        self.without_vdpa().element("devices").insert(where, etree.fromstring(text))
        return self

    def add_tap(self, link: str) -> str:
        """Give it one more NIC, an ordinary one that QEMU serves itself on a TAP that it makes; its MAC."""
        mac = f"{self.mac[:-2]}{int(self.mac[-2:], 16) + 0x80:02x}"
        text = f"""<interface type='ethernet'><mac address='{mac}'/><target dev='{link}'/>
            <model type='virtio'/><driver name='qemu'/></interface>"""
        self.root.findall("devices/interface")[-1].addnext(etree.fromstring(text))
        return mac

    def rename(self, number: int) -> Self:
        """Make it another domain: name, UUID, MAC and socket path of its own."""
        old_uuid, old_mac = self.uuid, self.mac
        new = {
            self.name: f"{self.name}-{number}",
            old_uuid: f"{old_uuid[:-4]}{number:04x}",
            old_mac: f"{old_mac[:-2]}{number:02x}",
        }
        text = str(self)
        for before, after in new.items():
            text = text.replace(before, after)
        self.root = etree.fromstring(text.encode())
        return self
