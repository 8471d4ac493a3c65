"""Configuration space of a PCI function: its ids, its capabilities, where its virtio structures are.

Pure functions of the 256 bytes that `PciFunction.config_space` returns, so any bus can use them and no
device can make them fail: what is malformed is left out.

Sections "4.1.x" are those of "Virtual I/O Device (VIRTIO) Version 1.3".
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from datapath.pci import (
    CAPABILITIES,
    CAPABILITY_VENDOR,
    HEADER_END,
    STATUS,
    STATUS_CAPABILITY_LIST,
    SUBSYSTEM_VENDOR,
    VENDOR,
)
from datapath.virtio import (
    DEVICE_NET,
    PCI_MODERN_DEVICE_BASE,
    PCI_TRANSITIONAL_NET,
    PCI_VENDOR,
    Common,
    PciCapability,
)

#: Device id of a modern network card.
MODERN_NET = PCI_MODERN_DEVICE_BASE + DEVICE_NET
#: struct virtio_pci_cap (4.1.4): vndr, next, len, cfg_type, bar, id, padding, offset, length.
VIRTIO_CAPABILITY = struct.Struct("<BBBBBB2xII")
#: le32 notify_off_multiplier, which follows in a notify capability (4.1.4.4).
NOTIFY_MULTIPLIER = struct.Struct("<I")
#: Highest BAR number; greater ones are reserved and to be ignored (4.1.4.1).
LAST_BAR = 5


class StructureRule(NamedTuple):
    """What makes a structure of a type usable."""

    #: Fewest bytes.
    size: int
    #: Alignment of its offset in bytes.
    alignment: int


#: 4.1.4.3 to 4.1.4.6. PCI_ACCESS is a window into BARs, for firmware: not a structure of a BAR.
RULES = {
    PciCapability.COMMON: StructureRule(Common.SIZE, 4),
    PciCapability.NOTIFY: StructureRule(2, 2),
    PciCapability.ISR: StructureRule(1, 1),
    PciCapability.DEVICE: StructureRule(1, 4),
}


@dataclass(frozen=True, order=True)
class PciIds:
    """The four ids that tell what a function is."""

    vendor: int
    device: int
    subsystem_vendor: int
    subsystem_device: int

    @classmethod
    def of(cls, config: bytes) -> Self:
        vendor, device = struct.unpack_from("<HH", config, VENDOR)
        subsystem_vendor, subsystem_device = struct.unpack_from("<HH", config, SUBSYSTEM_VENDOR)
        return cls(vendor, device, subsystem_vendor, subsystem_device)

    @property
    def is_virtio_net(self) -> bool:
        """Whether they are a virtio network card's, whoever made it (4.1.2). A transitional one may be
        without the capabilities of a modern one, which is found out when it is opened."""
        return self.vendor == PCI_VENDOR and self.device in (MODERN_NET, PCI_TRANSITIONAL_NET)

    def __str__(self) -> str:
        return (
            f"{self.vendor:04x}:{self.device:04x}"
            f" (subsystem {self.subsystem_vendor:04x}:{self.subsystem_device:04x})"
        )


class VirtioStructure(NamedTuple):
    """Where a virtio register structure is."""

    bar: int
    offset: int
    length: int
    #: Bytes between two queues' notify registers (4.1.4.4); 0 in other structures.
    notify_multiplier: int = 0


def capabilities(config: bytes) -> Iterator[tuple[int, int]]:
    """(id, offset) of each PCI capability, in the order of the list."""
    (status,) = struct.unpack_from("<H", config, STATUS)
    if not status & STATUS_CAPABILITY_LIST:
        return
    seen: set[int] = set()
    at = config[CAPABILITIES] & ~3
    while HEADER_END <= at < len(config) and at not in seen:
        seen.add(at)
        yield config[at], at
        at = config[at + 1] & ~3


def virtio_structures(config: bytes, bar_size: Callable[[int], int]) -> dict[PciCapability, VirtioStructure]:
    """Where a function's virtio structures are; the first usable one of each type (4.1.4).

    :param bar_size: bytes of a BAR, 0 for one that the function lacks.
    """
    found: dict[PciCapability, VirtioStructure] = {}
    for number, at in capabilities(config):
        if number != CAPABILITY_VENDOR:
            continue
        parsed = _virtio_structure(config, at)
        if parsed is None:
            continue
        kind, structure = parsed
        if kind not in found and _usable(kind, structure, bar_size):
            found[kind] = structure
    return found


def _virtio_structure(config: bytes, at: int) -> tuple[PciCapability, VirtioStructure] | None:
    if at + VIRTIO_CAPABILITY.size > len(config):
        return None
    _, _, size, kind, bar, _, offset, length = VIRTIO_CAPABILITY.unpack_from(config, at)
    multiplier = 0
    needed = VIRTIO_CAPABILITY.size
    if kind == PciCapability.NOTIFY:
        needed += NOTIFY_MULTIPLIER.size
    if kind not in RULES or size < needed or at + needed > len(config):
        return None
    if kind == PciCapability.NOTIFY:
        (multiplier,) = NOTIFY_MULTIPLIER.unpack_from(config, at + VIRTIO_CAPABILITY.size)
    return PciCapability(kind), VirtioStructure(bar, offset, length, multiplier)


def _usable(kind: PciCapability, structure: VirtioStructure, bar_size: Callable[[int], int]) -> bool:
    rule = RULES[kind]
    return (
        structure.bar <= LAST_BAR
        and structure.length >= rule.size
        and structure.offset % rule.alignment == 0
        and structure.offset + structure.length <= bar_size(structure.bar)
        # An odd stride would misalign every other register; it is 0 or an even power of two (4.1.4.4.1).
        and structure.notify_multiplier % 2 == 0
    )
