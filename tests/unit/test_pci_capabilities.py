"""Configuration space to virtio structures: what counts, what is left out, and that nothing makes it fail."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.bus.pci import RULES, PciIds, VirtioStructure, capabilities, virtio_structures
from datapath.virtio import Common, PciCapability
from tests.harness.fake_function import config_space, virtio_capability

BAR_SIZE = 0x4000


def with_capabilities(*parts: bytes, first: int = 0x40) -> bytes:
    """Configuration space whose capabilities follow each other; their `next` bytes are set here."""
    config = bytearray(256)
    struct.pack_into("<H", config, 0x06, 0x10)
    config[0x34] = first
    at = first
    for part in parts:
        following = (at + len(part) + 3) & ~3
        config[at : at + len(part)] = part
        config[at + 1] = 0 if part is parts[-1] else following
        at = following
    return bytes(config)


def common(offset: int = 0, bar: int = 0, length: int = Common.SIZE) -> bytes:
    return virtio_capability(PciCapability.COMMON, bar, offset, length, 0)


def found(config: bytes) -> dict[PciCapability, VirtioStructure]:
    return virtio_structures(config, lambda bar: BAR_SIZE if bar < 2 else 0)


def test_structures_of_an_ifcvf() -> None:
    assert found(bytes(config_space())) == {
        PciCapability.COMMON: VirtioStructure(0, 0x000, Common.SIZE),
        PciCapability.NOTIFY: VirtioStructure(0, 0x1000, 0x1000, 4),
        PciCapability.ISR: VirtioStructure(0, 0x100, 1),
        PciCapability.DEVICE: VirtioStructure(0, 0x200, 12),
    }


def test_ids() -> None:
    ids = PciIds.of(bytes(config_space()))
    assert ids == PciIds(0x1AF4, 0x1041, 0x8086, 0x001A)
    assert str(ids) == "1af4:1041 (subsystem 8086:001a)"


def test_no_capability_list() -> None:
    config = config_space()
    config[0x06] = 0
    assert list(capabilities(bytes(config))) == []


def test_other_capabilities_are_passed_over() -> None:
    config = with_capabilities(bytes([0x11, 0, 0, 0]), bytes([0x10, 0, 0, 0]), common(0x40))
    assert [number for number, _ in capabilities(config)] == [0x11, 0x10, 0x09]
    assert found(config)[PciCapability.COMMON].offset == 0x40


def test_a_loop_ends() -> None:
    config = bytearray(with_capabilities(common(), common()))
    config[0x51] = 0x40
    assert [at for _, at in capabilities(bytes(config))] == [0x40, 0x50]


@pytest.mark.parametrize("first", [0x00, 0x04, 0x3C])
def test_a_pointer_into_the_header_ends_the_list(first: int) -> None:
    config = bytearray(config_space())
    config[0x34] = first
    assert list(capabilities(bytes(config))) == []


@pytest.mark.parametrize(
    ("unusable", "why"),
    [
        (common(bar=6), "reserved BAR"),
        (common(bar=2), "BAR that the function lacks"),
        (common(length=Common.SIZE - 1), "too short"),
        (common(offset=2), "misaligned"),
        (common(offset=BAR_SIZE - Common.SIZE + 4), "beyond the BAR"),
        (common(offset=0xFFFFFFFC, length=0xFFFFFFFF), "sum above 32 bits"),
        (virtio_capability(0x80, 0, 0, 64, 0), "reserved type"),
        (common()[:2] + b"\x0f" + common()[3:], "capability too short"),
    ],
)
def test_the_first_usable_structure_of_a_type_wins(unusable: bytes, why: str) -> None:
    config = with_capabilities(unusable, common(0x80), common(0x100))
    assert found(config) == {PciCapability.COMMON: VirtioStructure(0, 0x80, Common.SIZE)}, why


def test_a_notify_capability_without_multiplier_is_unusable() -> None:
    short = virtio_capability(PciCapability.NOTIFY, 0, 0, 0x1000, 0)
    odd = virtio_capability(PciCapability.NOTIFY, 0, 0, 0x1000, 0, 3)
    assert found(with_capabilities(short, odd)) == {}
    good = virtio_capability(PciCapability.NOTIFY, 0, 0x1000, 0x1000, 0, 4096)
    assert found(with_capabilities(short, odd, good)) == {
        PciCapability.NOTIFY: VirtioStructure(0, 0x1000, 0x1000, 4096)
    }


def test_a_capability_at_the_end_of_the_space_is_not_read_beyond() -> None:
    assert found(with_capabilities(common()[:4], first=0xFC)) == {}


# What a hostile device could show: pieces that look right, in any order and place, and plain noise.
pieces = st.one_of(
    st.binary(min_size=2, max_size=24),
    st.builds(
        virtio_capability,
        kind=st.integers(0, 6),
        bar=st.integers(0, 7),
        offset=st.integers(0, 0xFFFFFFFF) | st.integers(0, BAR_SIZE),
        length=st.integers(0, 0xFFFFFFFF) | st.integers(0, 64),
        following=st.integers(0, 255),
        multiplier=st.none() | st.integers(0, 0xFFFFFFFF),
    ),
)


@given(st.binary(min_size=256, max_size=256), st.lists(st.tuples(st.integers(0x40, 0xFF), pieces)))
def test_whatever_a_device_shows_structures_lie_in_its_bars(
    noise: bytes, placed: list[tuple[int, bytes]]
) -> None:
    config = bytearray(noise)
    config[0x06] |= 0x10
    for at, piece in placed:
        config[at : at + len(piece)] = piece
    config = config[:256]
    for kind, structure in found(bytes(config)).items():
        assert structure.bar < 2
        assert RULES[kind].size <= structure.length
        assert structure.offset + structure.length <= BAR_SIZE
