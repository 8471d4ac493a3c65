"""Which frames are led to a guest, by where they go, as a ConnectX' flows match them."""

import pytest

from datapath.drivers.mlx5.receivers import ANYBODY, KINDS, destinations

GUEST = bytes.fromhex("525400abcdef")


def is_led(mac: bytes | None, to: str) -> bool:
    """Whether a frame to an address meets one of the rules for a guest."""
    address = int(to.replace(":", ""), 16)
    return any(address & rule.mask == rule.value for rule in destinations(mac))


@pytest.mark.parametrize(
    ("to", "led"),
    [
        ("52:54:00:ab:cd:ef", True),
        ("52:54:00:ab:cd:ee", False),
        ("ff:ff:ff:ff:ff:ff", True),
        ("01:00:5e:00:00:01", True),
        ("33:33:00:00:00:01", True),
        ("01:80:c2:00:00:0e", True),
        ("52:54:01:ab:cd:ef", False),
        ("00:00:00:00:00:00", False),
    ],
)
def test_frames_to_the_guest_and_to_groups(to: str, led: bool) -> None:
    assert is_led(GUEST, to) is led
    assert is_led(None, to), "one whose address is not known gets all"


def test_rules_match_no_bit_that_they_do_not_look_at() -> None:
    for rule in (*destinations(GUEST), *destinations(None)):
        assert rule.value & ~rule.mask == 0


def test_no_guest_is_found_by_two_rules() -> None:
    assert len(destinations(GUEST)) == 2
    assert destinations(None) == (ANYBODY,)


def test_what_is_matched_more_closely_is_looked_at_first() -> None:
    """Priorities fall, the lower the earlier, with what a kind wants of a frame."""
    wanted = [(kind.priority, -bool(kind.ip_version) - bool(kind.protocol)) for kind in KINDS]
    assert sorted(wanted) == [
        *[(5, -2)] * 4,
        *[(6, -1)] * 2,
        (7, 0),
    ]
    assert len(set(KINDS)) == 7
