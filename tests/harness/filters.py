"""Receive filters that tests set, and the frames that they tell apart."""

from datapath.rx_filter import RxFilter, Scope

OWN, OTHER = bytes.fromhex("525400766401"), bytes.fromhex("525400766402")
GROUP, OTHER_GROUP = bytes.fromhex("01005e000005"), bytes.fromhex("01005e000006")
BROADCAST = b"\xff" * 6
VLAN, OTHER_VLAN = 5, 4094

#: What a guest wants that has joined one group and one VLAN.
WANTED = RxFilter(
    promiscuous=False,
    broadcast=True,
    unicast=Scope.LISTED,
    multicast=Scope.LISTED,
    vlan=Scope.LISTED,
    macs=(OWN, GROUP),
    vlans=(VLAN,),
)


def frame(to: bytes, vlan: int | None = None, priority: int = 0) -> bytes:
    """A frame of an EtherType for experiments."""
    tag = b"" if vlan is None else bytes.fromhex("8100") + (priority << 13 | vlan).to_bytes(2, "big")
    return (to + bytes.fromhex("020000000009") + tag + bytes.fromhex("88b5")).ljust(60, b"\x5a")


#: Something of every kind.
FRAMES = {
    "own": frame(OWN),
    "other": frame(OTHER),
    "group": frame(GROUP),
    "other group": frame(OTHER_GROUP),
    "broadcast": frame(BROADCAST),
    "vlan": frame(OWN, VLAN, priority=7),
    "other vlan": frame(OWN, OTHER_VLAN),
    "no vlan": frame(OWN, 0, priority=3),
    "other on vlan": frame(OTHER, VLAN),
    "broadcast on other vlan": frame(BROADCAST, OTHER_VLAN),
}
