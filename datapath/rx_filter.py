"""A receive filter: which of the frames on the wire a guest wants, by destination address and VLAN.

It is what a driver sets by VIRTIO_NET_CTRL_RX, _MAC and _VLAN (virtio 1.3 sections 5.1.6.5.1 to 5.1.6.5.3),
and what a front-end knows of it. Owns the value and its form on control sockets:

    {"promiscuous": false, "broadcast": true, "unicast": "listed", "multicast": "listed", "vlan": "listed",
     "macs": ["52:54:00:76:64:01"], "vlans": [5]}

`promiscuous` admits everything, whatever the others say. A tag of VLAN 0 is none.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

#: Addresses that a filter lists at most, and VLANs that there are.
MAX_MACS = 256
VLANS = range(4096)


class RxFilterError(ValueError):
    """Something that is no filter; the text says why."""


class Scope(Enum):
    """What passes of a kind of frames."""

    NONE = "none"
    LISTED = "listed"
    ALL = "all"


@dataclass(frozen=True)
class RxFilter:
    """One filter, as a whole."""

    promiscuous: bool
    broadcast: bool
    #: Which frames to single addresses, to groups, and of VLANs.
    unicast: Scope
    multicast: Scope
    vlan: Scope
    #: Those that are listed, of single addresses and groups alike.
    macs: Collection[bytes]
    vlans: Collection[int]

    @classmethod
    def parse(cls, given: object) -> "RxFilter":
        """A filter of its form on control sockets.

        :raise RxFilterError: when it is not of that form.
        """
        if not isinstance(given, dict) or set(given) != set(cls.__dataclass_fields__):
            raise RxFilterError(f"a filter has just these members: {', '.join(cls.__dataclass_fields__)}")
        for name in ("promiscuous", "broadcast"):
            if not isinstance(given[name], bool):
                raise RxFilterError(f"{name}: {given[name]!r} is neither true nor false")
        return cls(
            given["promiscuous"],
            given["broadcast"],
            _scope("unicast", given["unicast"]),
            _scope("multicast", given["multicast"]),
            _scope("vlan", given["vlan"]),
            _macs(given["macs"]),
            _vlans(given["vlans"]),
        )

    def describe(self) -> dict[str, object]:
        """Its form on control sockets."""
        return {
            "promiscuous": self.promiscuous,
            "broadcast": self.broadcast,
            "unicast": self.unicast.value,
            "multicast": self.multicast.value,
            "vlan": self.vlan.value,
            "macs": [mac.hex(":") for mac in self.macs],
            "vlans": list(self.vlans),
        }


def _scope(name: str, given: object) -> Scope:
    try:
        return Scope(given)
    except ValueError:
        raise RxFilterError(
            f"{name}: {given!r} is none of {', '.join(scope.value for scope in Scope)}"
        ) from None


def _macs(given: object) -> tuple[bytes, ...]:
    if not isinstance(given, list) or len(given) > MAX_MACS:
        raise RxFilterError(f"macs: not a list of at most {MAX_MACS}")
    for mac in given:
        if not isinstance(mac, str) or not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", mac):
            raise RxFilterError(f"macs: {mac!r} is not a MAC address like 52:54:00:12:34:56")
    return tuple(bytes.fromhex(mac.replace(":", "")) for mac in given)


def _vlans(given: object) -> tuple[int, ...]:
    if not isinstance(given, list) or len(given) > len(VLANS):
        raise RxFilterError(f"vlans: not a list of at most {len(VLANS)}")
    for vlan in given:
        if type(vlan) is not int or vlan not in VLANS:
            raise RxFilterError(f"vlans: {vlan!r} is not a number from {VLANS[0]} to {VLANS[-1]}")
    return tuple(given)
