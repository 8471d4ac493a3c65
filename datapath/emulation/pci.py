"""The configuration space of an emulated PCI function (PCI Local Bus 3.0 chapter 6).

`ConfigSpace` is 256 bytes with a mask of what a driver may write; `capability` chains a capability in.
Knows BARs, the virtio vendor capability and MSI-X; what the BARs hold belongs to the function.
"""

import struct
from dataclasses import dataclass

from datapath.pci import (
    BAR_64BIT,
    BARS,
    CAPABILITIES,
    CAPABILITY_MSIX,
    CAPABILITY_VENDOR,
    COMMAND,
    CONFIG_SIZE,
    HEADER_END,
    STATUS,
    STATUS_CAPABILITY_LIST,
    PciCommand,
)
from datapath.virtio import PciCapability

MSIX_ENABLE_AND_MASK = 0xC000
#: As plain numbers: an enumeration's operators are slower than the rest of an access together.
MEMORY = int(PciCommand.MEMORY)


@dataclass(frozen=True)
class Identity:
    """What a function says it is."""

    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    #: Base class, subclass and programming interface: 0x020000 is an Ethernet controller.
    class_code: int
    revision: int = 1


@dataclass(frozen=True)
class Structure:
    """A range of a BAR that a capability names."""

    bar: int
    offset: int
    size: int


class ConfigSpace:
    """Type 0 header and capabilities. All BARs are 64-bit memory, in two registers each; no INTx pin."""

    def __init__(self, identity: Identity, bars: dict[int, int]) -> None:
        """Lay the header out; `bars` gives sizes in bytes, powers of two, by number (0, 2 or 4)."""
        self._data = bytearray(CONFIG_SIZE)
        self._writable = bytearray(CONFIG_SIZE)
        self._end = HEADER_END
        self._link = CAPABILITIES
        struct.pack_into("<HH", self._data, 0x00, identity.vendor, identity.device)
        struct.pack_into("<H", self._data, STATUS, STATUS_CAPABILITY_LIST)
        struct.pack_into("<I", self._data, 0x08, identity.class_code << 8 | identity.revision)
        struct.pack_into("<HH", self._data, 0x2C, identity.subsystem_vendor, identity.subsystem)
        for number, size in bars.items():
            self._put(BARS + 4 * number, struct.pack("<Q", BAR_64BIT))
            self._allow(BARS + 4 * number, struct.pack("<Q", ~(size - 1) & (1 << 64) - 1))
        command = PciCommand.MEMORY | PciCommand.MASTER | PciCommand.INTX_DISABLE
        self._allow(COMMAND, struct.pack("<H", command))
        self._allow(0x0C, b"\xff\xff")  # cache line size, latency timer
        self._allow(0x3C, b"\xff")  # interrupt line
        self._initial = bytes(self._data)

    def capability(self, number: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability: its id, the link to the next, and `body`. Returns where it is."""
        at = self._end
        self._put(self._link, bytes([at]))
        self._put(at, bytes([number, 0]) + body)
        self._allow(at + 2, writable)
        self._link = at + 1
        self._end = (at + 2 + len(body) + 3) & ~3
        self._initial = bytes(self._data)
        return at

    def virtio_capability(
        self, kind: PciCapability, where: Structure, extra: bytes = b"", writable: bytes = b""
    ) -> int:
        """Append a virtio structure's place (virtio 1.3 section 4.1.4). Returns where it is."""
        body = struct.pack("<BBBxxxII", 16 + len(extra), kind, where.bar, where.offset, where.size)
        return self.capability(CAPABILITY_VENDOR, body + extra, writable)

    def msix_capability(self, vectors: int, table: Structure, pending: Structure) -> None:
        """Append MSI-X (PCI Local Bus 3.0 section 6.8.2)."""
        body = struct.pack("<HII", vectors - 1, table.offset | table.bar, pending.offset | pending.bar)
        self.capability(CAPABILITY_MSIX, body, struct.pack("<H", MSIX_ENABLE_AND_MASK))

    @property
    def command(self) -> PciCommand:
        return PciCommand(struct.unpack_from("<H", self._data, COMMAND)[0])

    @property
    def decodes_memory(self) -> bool:
        """Whether BARs are reached; asked at each access to one."""
        return bool(self._data[COMMAND] & MEMORY)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes, of any range within the space."""
        return bytes(self._data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """Change the bits that may be changed."""
        for at, byte in enumerate(data, offset):
            mask = self._writable[at]
            self._data[at] = self._data[at] & ~mask | byte & mask

    def reset(self) -> None:
        """Everything as at power-on."""
        self._data[:] = self._initial

    def _put(self, at: int, data: bytes) -> None:
        self._data[at : at + len(data)] = data

    def _allow(self, at: int, mask: bytes) -> None:
        self._writable[at : at + len(mask)] = mask
