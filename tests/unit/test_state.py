"""What a guest uses of its ports: written, carried in a domain's metadata, read back; never trusted."""

import logging

import pytest
from lxml import etree

from libvirt_vdpa.state import NAMESPACE, InterfaceState, read_state, render_state

RUNNING = InterfaceState("52:54:00:76:64:01", 0x1_3000_8000, 0x1_0000_8000, 2, 256)
NO_DRIVER = InterfaceState("52:54:00:76:64:02", 0xFFFF_FFFF_FFFF_FFFF, None, 0, 0)
GOOD = {
    "mac": "52:54:00:76:64:01",
    "offered": "0x130008000",
    "negotiated": "0x100008000",
    "queue-pairs": "2",
    "ring-size": "256",
}


def domain(*states: str) -> etree._Element:
    return etree.fromstring(f"<domain><name>a</name><metadata>{''.join(states)}</metadata></domain>")


def element(**changes: str | None) -> str:
    attributes = {**GOOD, **{name.replace("_", "-"): value for name, value in changes.items()}}
    text = " ".join(f"{name}='{value}'" for name, value in attributes.items() if value is not None)
    return f"<s:state xmlns:s='{NAMESPACE}'><s:interface {text}/></s:state>"


def test_what_is_written_is_read_back() -> None:
    text = render_state([RUNNING, NO_DRIVER])
    assert read_state(domain(text)) == {state.mac: state for state in (RUNNING, NO_DRIVER)}


def test_the_element_is_as_documented() -> None:
    assert render_state([RUNNING]) == (
        f'<state xmlns="{NAMESPACE}"><interface mac="52:54:00:76:64:01" offered="0x130008000" '
        'negotiated="0x100008000" queue-pairs="2" ring-size="256"/></state>'
    )
    assert "negotiated" not in render_state([NO_DRIVER])


def test_any_prefix_is_understood_and_a_mac_in_capitals() -> None:
    assert read_state(domain(element())) == {RUNNING.mac: RUNNING}
    upper = element(mac="52:54:00:AB:CD:EF")
    assert list(read_state(domain(upper))) == ["52:54:00:ab:cd:ef"]


def test_a_domain_without_state_has_none() -> None:
    assert read_state(domain()) == {}
    assert read_state(etree.fromstring("<domain/>")) == {}
    assert read_state(domain(f"<state xmlns='{NAMESPACE}'/>")) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"mac": "../../etc"},
        {"mac": None},
        {"offered": None},
        {"offered": "0x1ffffffffffffffff"},
        {"offered": "12"},
        {"negotiated": ""},
        {"negotiated": "-0x1"},
        {"queue_pairs": "many"},
        {"queue_pairs": "40000"},
        {"queue_pairs": None},
        {"ring_size": "65536"},
        {"ring_size": "٣"},
    ],
)
def test_what_is_malformed_is_logged_and_as_absent(
    changes: dict[str, str | None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_state(domain(element(**changes))) == {}
    (name,) = changes
    assert f"<interface> is not used: {name.replace('_', '-')}=" in caplog.text


def test_one_bad_interface_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    text = render_state([RUNNING, NO_DRIVER]).replace('ring-size="256"', 'ring-size="x"')
    assert read_state(domain(text)) == {NO_DRIVER.mac: NO_DRIVER}


def test_what_is_said_twice_is_not_believed_twice(caplog: pytest.LogCaptureFixture) -> None:
    assert read_state(domain(element(), element())) == {}
    twice = render_state([RUNNING, RUNNING])
    assert read_state(domain(twice)) == {RUNNING.mac: RUNNING}
    assert "is there twice" in caplog.text
