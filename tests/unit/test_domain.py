"""Domain XML: what the examples ask for, and what is refused, with words and line."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libvirt_vdpa.domain import (
    DomainError,
    PortSpec,
    check_domain,
    domain_identity,
    parse_domain,
    with_local_paths,
)
from libvirt_vdpa.metadata import xml_folder
from libvirt_vdpa.monitor import find_monitor
from libvirt_vdpa.state import InterfaceState, render_state

RUN = Path("/run/libvirt-vdpa")
DEMO = (xml_folder() / "vdpa-demo.xml").read_text()
KVM = (xml_folder() / "vdpa-kvm.xml").read_text()
SERVER = (xml_folder() / "vdpa-server.xml").read_text()

MAC = "52:54:00:76:64:01"
UUID = "7664d0a0-0001-4000-8000-000000000001"
METADATA = f"<vdpa:interface mac='{MAC}' driver='ifcvf' pool='default'/>"
SHARED = "<access mode='shared'/>"
BACKING = """<memoryBacking>
    <source type='memfd'/>
    <access mode='shared'/>
  </memoryBacking>"""


def line_with(xml: str, part: str) -> int:
    """Number of the first line that has a text in it."""
    return next(number for number, line in enumerate(xml.splitlines(), 1) if part in line)


def edited(xml: str, before: str, after: str) -> str:
    """XML with one change, which must be possible."""
    assert before in xml
    return xml.replace(before, after)


def fatal(xml: str) -> list[str]:
    """All that is wrong with a domain, as messages."""
    return [str(problem) for problem in check_domain(xml.encode(), RUN)[1] if problem.fatal]


def test_demo() -> None:
    spec = parse_domain(DEMO.encode(), RUN)
    assert (spec.name, spec.uuid) == ("vdpa-demo", UUID)
    assert spec.ports == (
        PortSpec(
            mac=MAC,
            alias=None,
            driver="ifcvf",
            pool="default",
            device=None,
            migration="auto",
            announce="auto",
            announce_rounds=0,
            role="listen",
            socket_path=RUN / UUID / f"{MAC}.sock",
            queue_pairs=1,
            queue_size=0,
            mtu=0,
            reconnect=1,
        ),
    )


@pytest.mark.parametrize("model", ["virtio-transitional", "virtio-non-transitional"])
def test_models_of_virtio(model: str) -> None:
    assert fatal(edited(DEMO, "<model type='virtio'/>", f"<model type='{model}'/>")) == []


OVERRIDE = """<qemu:override xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
    <qemu:device alias='net0'><qemu:frontend>
    <qemu:property name='host_mtu' type='unsigned' value='9001'/></qemu:frontend></qemu:device>
    <qemu:device alias='ua-net'><qemu:frontend><qemu:property name='rss' type='bool' value='1'/>
    <qemu:property name='host_mtu' type='unsigned' value='4000'/></qemu:frontend></qemu:device>
    </qemu:override>"""


@pytest.mark.parametrize(
    ("elements", "mtu"),
    [
        ("<mtu size='2000'/><alias name='ua-other'/>", 2000),
        ("<mtu size='2000'/><alias name='ua-net'/>", 4000),
        ("<alias name='ua-other'/>", 0),
        ("", 9001),
    ],
)
def test_mtu(elements: str, mtu: int) -> None:
    xml = edited(DEMO, "<model type='virtio'/>", f"<model type='virtio'/>{elements}")
    xml = xml.replace("</devices>", f"</devices>{OVERRIDE}")
    (port,) = parse_domain(xml.encode(), RUN).ports
    assert port.mtu == mtu


def test_two_interfaces_by_mac_and_by_alias() -> None:
    xml = edited(KVM, "alias='ua-storage'", "alias='ua-storage' migration='software' announce='rarp'")
    first, second = parse_domain(xml.encode(), RUN).ports
    assert (first.mac, first.alias, first.driver) == ("52:54:00:76:64:02", None, "any")
    assert (second.mac, second.alias) == ("52:54:00:76:65:02", "ua-storage")
    assert (second.migration, second.announce) == ("software", "rarp")


def test_server_mode_makes_us_connect() -> None:
    assert [port.role for port in parse_domain(SERVER.encode(), RUN).ports] == ["connect"]


def test_named_device_and_queues() -> None:
    xml = edited(DEMO, "pool='default'", "device='vfio-user=/run/vf0.sock'")
    xml = edited(
        xml, "<model type='virtio'/>", "<model type='virtio'/><driver queues='4' rx_queue_size='1024'/>"
    )
    (port,) = parse_domain(xml.encode(), RUN).ports
    assert (port.pool, port.device) == (None, "vfio-user=/run/vf0.sock")
    assert (port.queue_pairs, port.queue_size) == (4, 1024)


def test_mac_in_capitals_is_the_same_mac() -> None:
    xml = DEMO.replace(f"mac='{MAC}'", "mac='52:54:00:76:64:0A'").replace(
        f"{MAC}.sock", "52:54:00:76:64:0a.sock"
    )
    xml = edited(xml, f"<mac address='{MAC}'", "<mac address='52:54:00:76:64:0a'")
    assert [port.mac for port in parse_domain(xml.encode(), RUN).ports] == ["52:54:00:76:64:0a"]


def test_foreign_domain_has_no_ports() -> None:
    spec = parse_domain(
        b"<domain><name>a</name><devices><interface type='vhostuser'/></devices></domain>", RUN
    )
    assert spec.ports == ()


def test_vhostuser_interface_without_metadata_is_left_alone() -> None:
    other = "<interface type='vhostuser'><mac address='52:54:00:00:00:01'/><source path='/o'/></interface>"
    xml = edited(DEMO, "<devices>", f"<devices>{other}")
    assert [port.mac for port in parse_domain(xml.encode(), RUN).ports] == [MAC]


@pytest.mark.parametrize("example", sorted(xml_folder().glob("*.xml")), ids=lambda path: path.name)
def test_examples_have_no_problem_at_all(example: Path) -> None:
    spec, problems = check_domain(example.read_bytes(), RUN)
    assert (problems, spec is not None and bool(spec.ports)) == ([], True)


def test_the_example_with_a_monitor_has_one() -> None:
    path = "/var/lib/libvirt/qemu/vdpa-migrating.monitor"
    assert find_monitor((xml_folder() / "vdpa-migrating.xml").read_text()) == path


#: Text to replace in the demo domain, what to put there, the message.
WRONG = {
    "unknown-metadata-attribute": (
        METADATA,
        METADATA.replace("driver=", "drivr="),
        f"interface {MAC}: metadata attribute drivr='ifcvf' is not known; "
        "known are: migration, announce, announce-rounds, mac, alias, driver, pool, device",
    ),
    "unknown-driver-name": (
        "driver='ifcvf'",
        "driver='e1000'",
        f"interface {MAC}: metadata attribute driver='e1000': use one of ifcvf, mlx5, virtio, any",
    ),
    "no-address": (
        "pool='default'",
        "device='pci=06:00.3'",
        f"interface {MAC}: metadata attribute device: device 'ifcvf,pci=06:00.3': '06:00.3' is no PCI"
        " address; write it like 0000:01:00.0",
    ),
    "no-vf": (
        "pool='default'",
        "device='vf=3'",
        f"interface {MAC}: metadata attribute device: device 'ifcvf,vf=3': names no VF; it needs one of"
        " vfio-user, pci, ibdev",
    ),
    "announce": (
        "pool='default'",
        "announce='loud'",
        f"interface {MAC}: metadata attribute announce='loud': use one of auto, guest, rarp, off",
    ),
    "announce-rounds": (
        "pool='default'",
        "announce-rounds='21'",
        f"interface {MAC}: metadata attribute announce-rounds='21': wrong form, should be a number"
        " from 0 to 20",
    ),
    "rounds-of-nobody": (
        "pool='default'",
        "announce='off' announce-rounds='3'",
        f"interface {MAC}: metadata attribute announce-rounds='3': excludes announce='off', nobody announces"
        " the guest then; remove one",
    ),
    "rounds-of-the-port": (
        "pool='default'",
        "announce='rarp' announce-rounds='1'",
        f"interface {MAC}: metadata attribute announce-rounds='1': excludes announce='rarp', the port"
        " announces the guest then, not QEMU; remove one",
    ),
    "mac-form": (
        METADATA,
        METADATA.replace(MAC, "5254"),
        "interface 5254: metadata attribute mac='5254': wrong form, should be like '52:54:00:76:64:01'",
    ),
    "alias-not-ours": (
        METADATA,
        "<vdpa:interface alias='net0'/>",
        "interface net0: metadata attribute alias='net0': wrong form, should be like 'ua-net0'",
    ),
    "no-mac-no-alias": (
        METADATA,
        "<vdpa:interface pool='default'/>",
        "metadata attribute mac or alias is missing: it says which interface is meant",
    ),
    "mac-and-alias": (
        METADATA,
        f"<vdpa:interface mac='{MAC}' alias='ua-net0'/>",
        f"interface {MAC}: metadata attributes mac and alias exclude each other; keep one",
    ),
    "pool-and-device": (
        "pool='default'",
        "pool='default' device='vfio-user=/vf0'",
        f"interface {MAC}: metadata attributes pool and device exclude each other; keep one",
    ),
    "device-without-driver": (
        "driver='ifcvf' pool='default'",
        "device='vfio-user=/vf0'",
        f"interface {MAC}: metadata attribute driver must name the driver of the VF that device names",
    ),
    "other-metadata-element": (
        METADATA,
        "<vdpa:port/>",
        "metadata of urn:libvirt-vdpa:domain:1.0: Did not expect element port there",
    ),
    "mac-of-no-interface": (
        METADATA,
        METADATA.replace(MAC, "52:54:00:76:64:99"),
        "interface 52:54:00:76:64:99: metadata attribute mac='52:54:00:76:64:99': "
        "no interface of the domain has this MAC",
    ),
    "alias-of-no-interface": (
        METADATA,
        "<vdpa:interface alias='ua-net0'/>",
        "interface ua-net0: metadata attribute alias='ua-net0': no interface of the domain has this alias",
    ),
    "named-twice": (
        METADATA,
        METADATA + METADATA,
        f"interface {MAC}: metadata attribute mac='{MAC}': the interface is named twice, already as {MAC}",
    ),
    "one-mac-two-interfaces": (
        "<devices>",
        f"<devices><interface type='network'><mac address='{MAC}'/></interface>",
        f"interface {MAC}: metadata attribute mac='{MAC}': "
        "more than one interface of the domain has this MAC",
    ),
    "type": (
        "<interface type='vhostuser'>",
        "<interface type='network'>",
        f"interface {MAC}: <interface type='network'>: must be type='vhostuser'",
    ),
    "model": (
        "<model type='virtio'/>",
        "<model type='e1000'/>",
        f"interface {MAC}: <model type='e1000'/>: must be <model type='virtio'/>",
    ),
    "path": (
        f"path='/run/libvirt-vdpa/{UUID}/{MAC}.sock'",
        "path='/tmp/vm.sock'",
        f"interface {MAC}: <source path='/tmp/vm.sock'>: the path must be "
        f"'/run/libvirt-vdpa/{UUID}/{MAC}.sock'",
    ),
    "mode": (
        "mode='client'",
        "mode='peer'",
        f"interface {MAC}: <source mode='peer'>: must be mode='client' or mode='server'",
    ),
    "reconnecting-server": (
        "mode='client'",
        "mode='server'",
        f"interface {MAC}: <reconnect enabled='yes'>: only mode='client' reconnects; "
        "remove <reconnect> or change the mode",
    ),
    "iommu": (
        "<model type='virtio'/>",
        "<model type='virtio'/><driver iommu='on'/>",
        f"interface {MAC}: <driver iommu='on'>: vDPA ports do not serve it; remove it",
    ),
    "packed": (
        "<model type='virtio'/>",
        "<model type='virtio'/><driver packed='on'/>",
        f"interface {MAC}: <driver packed='on'>: vDPA ports do not serve it; remove it",
    ),
    "queues": (
        "<model type='virtio'/>",
        "<model type='virtio'/><driver queues='-1'/>",
        f"interface {MAC}: <driver queues='-1'>: must be a number of queue pairs from 1",
    ),
    "private-memory": (
        SHARED,
        "<access mode='private'/>",
        "guest memory is not shared with the port; add <memoryBacking><source type='memfd'/>"
        "<access mode='shared'/></memoryBacking>",
    ),
    "no-memory-backing": (
        BACKING,
        "",
        "guest memory is not shared with the port; add <memoryBacking><source type='memfd'/>"
        "<access mode='shared'/></memoryBacking>",
    ),
    "private-hugepages": (
        BACKING,
        "<memoryBacking><hugepages/></memoryBacking>",
        "guest memory is not shared with the port; add <access mode='shared'/> to <memoryBacking>",
    ),
    "one-private-cell": (
        "<os>",
        "<cpu><numa><cell id='0' memAccess='private'/><cell id='1'/></numa></cpu><os>",
        "<cell id='0' memAccess='private'>: must be memAccess='shared'",
    ),
    "no-uuid": (
        f"<uuid>{UUID}</uuid>",
        "",
        "no <uuid> as libvirt writes it: give the domain one, socket paths contain it",
    ),
    "uuid-is-a-path": (
        f"<uuid>{UUID}</uuid>",
        "<uuid>../../etc</uuid>",
        "no <uuid> as libvirt writes it: give the domain one, socket paths contain it",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name: str) -> None:
    before, after, message = WRONG[name]
    xml = edited(DEMO, before, after)
    assert fatal(xml)[0] == message
    with pytest.raises(DomainError) as refused:
        parse_domain(xml.encode(), RUN)
    assert str(refused.value) == f"domain 'vdpa-demo': {message}"
    assert "\n" not in message


def test_memory_shared_cell_by_cell_will_do() -> None:
    cells = "<cpu><numa><cell id='0' memAccess='shared'/><cell id='1' memAccess='shared'/></numa></cpu><os>"
    assert fatal(edited(edited(DEMO, BACKING, ""), "<os>", cells)) == []


def test_an_mtu_that_libvirt_has_no_interface_for_is_pointed_out() -> None:
    model = "<model type='virtio'/>"
    xml = edited(DEMO, model, f"{model}<mtu size='1400'/>")
    _, (problem,) = check_domain(xml.encode(), RUN)
    assert not problem.fatal
    assert "<mtu> without <target dev='NAME'/>" in problem.text
    xml = edited(xml, model, f"{model}<target dev='spare'/>")
    assert check_domain(xml.encode(), RUN)[1] == []


def test_no_reconnect_is_only_advised_against() -> None:
    xml = edited(DEMO, "<reconnect enabled='yes' timeout='1'/>", "")
    spec, (problem,) = check_domain(xml.encode(), RUN)
    assert spec is not None
    assert len(spec.ports) == 1
    assert not problem.fatal
    assert "<reconnect enabled='yes' timeout='1'/>" in problem.text
    parse_domain(xml.encode(), RUN)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("", ("auto", "auto", 0)),
        ("migration='hardware' announce='guest' announce-rounds='20'", ("hardware", "guest", 20)),
        ("migration='software' announce='off' announce-rounds='0'", ("software", "off", 0)),
    ],
)
def test_how_a_guest_is_to_migrate(said: str, read: tuple[str, str, int]) -> None:
    xml = edited(DEMO, METADATA, METADATA.replace("/>", f" {said}/>"))
    spec, problems = check_domain(xml.encode(), RUN)
    assert problems == []
    assert spec is not None
    (port,) = spec.ports
    assert (port.migration, port.announce, port.announce_rounds) == read


def test_what_the_guest_uses_comes_with_the_domain() -> None:
    state = InterfaceState(MAC, 0x30, 0x20, 1, 256)
    xml = edited(DEMO, "</metadata>", f"{render_state([state])}</metadata>")
    assert parse_domain(xml.encode(), RUN).states == {MAC: state}
    assert parse_domain(DEMO.encode(), RUN).states == {}


class TestLocalPaths:
    """A domain that comes from a host with another run folder."""

    OTHER = Path("/srv/vdpa")

    def localized(self, xml: str, run: Path = RUN) -> str | None:
        text = with_local_paths(xml.encode(), run)
        return None if text is None else text.decode()

    @pytest.mark.parametrize("xml", [DEMO, KVM, SERVER])
    def test_what_is_at_home_is_left(self, xml: str) -> None:
        assert self.localized(xml) is None

    @pytest.mark.parametrize("xml", [DEMO, KVM, SERVER])
    def test_paths_change_and_nothing_else(self, xml: str) -> None:
        """But quotes; the examples hold comments, namespaces and, here, what else XML has."""
        xml = xml[xml.index("<domain") :]
        xml = edited(xml, "</metadata>", "<a:b xmlns:a='urn:a'>&lt;<![CDATA[<&]]>é<?p i?></a:b></metadata>")
        changed = self.localized(xml, self.OTHER)
        assert changed is not None
        expected = xml.replace(str(RUN), str(self.OTHER))
        # Within tags only: an apostrophe in a comment is none that quotes.
        plain = re.sub(r"<[^!>]*>", lambda tag: tag[0].replace('"', "'"), changed)
        assert plain.strip() == expected.strip()
        assert check_domain(changed.encode(), self.OTHER)[1] == []
        assert self.localized(changed, self.OTHER) is None

    @pytest.mark.parametrize(
        "path", [f"{UUID}/{MAC}.sock", f"/x/{UUID}/net0.sock", f"/x/{MAC}.sock", "", f"/{UUID}/x/{MAC}.sock"]
    )
    def test_what_is_wrong_everywhere_is_left_to_be_refused(self, path: str) -> None:
        xml = edited(DEMO, f"path='{RUN}/{UUID}/{MAC}.sock'", f"path='{path}'")
        assert self.localized(xml) is None
        assert "the path must be" in fatal(xml)[0]

    @pytest.mark.parametrize("xml", ["", "<domain", "<domain/>"])
    def test_what_is_no_domain_of_ours_is_left(self, xml: str) -> None:
        assert self.localized(xml) is None


def test_an_interface_without_metadata_in_our_folder_is_pointed_out() -> None:
    _, (problem,) = check_domain(edited(DEMO, METADATA, "").encode(), RUN)
    assert not problem.fatal
    assert str(problem).startswith(
        f"interface {MAC}: <source path='{RUN}/{UUID}/{MAC}.sock'>: nobody makes this"
    )


def test_a_problem_names_the_line_of_its_element() -> None:
    for before, after in (
        ("<model type='virtio'/>", "<model type='e1000'/>"),
        ("driver='ifcvf'", "driver='e1000'"),
        ("<access mode='shared'/>", "<access mode='private'/>"),
    ):
        xml = edited(DEMO, before, after)
        assert check_domain(xml.encode(), RUN)[1][0].line == line_with(xml, after)


def test_two_interfaces_of_one_mac_that_are_named_by_alias() -> None:
    xml = edited(KVM, "mac='52:54:00:76:64:02' pool='default'", "alias='ua-first' pool='default'")
    xml = edited(
        xml,
        "<mac address='52:54:00:76:64:02'/>",
        "<mac address='52:54:00:76:65:02'/><alias name='ua-first'/>",
    )
    xml = edited(xml, "52:54:00:76:64:02.sock", "52:54:00:76:65:02.sock")
    (message,) = fatal(xml)
    assert message.startswith("interface 52:54:00:76:65:02: another interface with a port has the same MAC")


def test_all_problems_are_told_at_once() -> None:
    xml = edited(edited(DEMO, SHARED, ""), "mode='client'", "mode='peer'")
    assert len(fatal(xml)) == 2


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("", "domain XML: Document is empty, line 1, column 1"),
        (
            "<domain>\n<name>",
            "domain XML: Premature end of data in tag name line 2, line 2, column 7",
        ),
        ("<network/>", "domain XML begins with <network>, not <domain>"),
    ],
)
def test_not_a_domain(xml: str, message: str) -> None:
    with pytest.raises(DomainError) as refused:
        parse_domain(xml.encode(), RUN)
    assert str(refused.value) == message


@given(
    source=st.sampled_from([DEMO, KVM, SERVER]),
    cuts=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=4)), min_size=1, max_size=4
    ),
)
def test_whatever_is_broken_is_told_in_one_line(source: str, cuts: list[tuple[float, int, bytes]]) -> None:
    xml = bytearray(source.encode())
    for where, length, instead in cuts:
        start = int(where * len(xml))
        xml[start : start + length] = instead
    message = ""
    try:
        parse_domain(bytes(xml), RUN)
    except DomainError as error:
        message = str(error)
    assert "\n" not in message
    domain_identity(bytes(xml))


def test_entities_are_not_expanded() -> None:
    bomb = f'<!DOCTYPE domain [<!ENTITY e SYSTEM "file:///etc/passwd">]>{DEMO[DEMO.index("<domain") :]}'
    bomb = edited(bomb, "<name>vdpa-demo</name>", "<name>&e;</name>")
    spec, _ = check_domain(bomb.encode(), RUN)
    assert spec is None or "root" not in spec.name


def test_identity_survives_what_else_is_wrong() -> None:
    assert domain_identity(DEMO.encode()) == ("vdpa-demo", UUID)
    assert domain_identity(DEMO.replace("</devices>", "").encode()) == ("vdpa-demo", UUID)
    assert domain_identity(b"no XML") == ("", "")
