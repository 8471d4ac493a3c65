"""An emulated IFCVF: the PCI function around the virtio network device, with Intel's registers in BAR 4.

Owns where everything lies in configuration space and BARs, and what sets an IFCVF apart from any virtio
function: its ids, a page of doorbell for each queue, and the "LM" registers for live migration (ring
state, dirty log). Offsets and rules are those of DPDK's drivers/vdpa/ifc/base/ifcvf.[hc].
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from datapath.emulation.engine import QUEUES, Engine
from datapath.emulation.msix import MsixVectors
from datapath.emulation.pci import ConfigSpace, Identity, Structure
from datapath.emulation.virtio_net import FEATURES, VirtioNet
from datapath.pci import CONFIG_SIZE, PciCommand
from datapath.vdpa import RingState
from datapath.vfio import Region
from datapath.virtio import (
    DEVICE_NET,
    PCI_MODERN_DEVICE_BASE,
    PCI_VENDOR,
    Common,
    NetConfig,
    PciCapability,
)

#: The N3000 (DPDK drivers/vdpa/ifc/ifcvf_vdpa.c): only the subsystem sets it apart from any virtio card.
IDENTITY = Identity(
    vendor=PCI_VENDOR,
    device=PCI_MODERN_DEVICE_BASE + DEVICE_NET,
    subsystem_vendor=0x8086,
    subsystem=0x001A,
    class_code=0x020000,
)
PAGE = 4096
#: One for the configuration and one for each queue, the control queue included.
VECTORS = 1 + QUEUES + 1
#: BAR sizes in bytes.
BARS = {0: 4 * PAGE, 2: 4 * PAGE, 4: PAGE}
#: Bytes of each region; what is not here is empty.
REGION_SIZES = {Region.CONFIG: CONFIG_SIZE, **{Region(number): size for number, size in BARS.items()}}
COMMON = Structure(0, 0, Common.SIZE)
ISR = Structure(0, PAGE, 1)
DEVICE = Structure(0, 2 * PAGE, NetConfig.SIZE)
MSIX_TABLE = Structure(0, 3 * PAGE, 16 * VECTORS)
MSIX_PENDING = Structure(0, 3 * PAGE + PAGE // 2, 8)
NOTIFY = Structure(2, 0, (QUEUES + 1) * PAGE)

#: Bytes of the window into BARs that configuration space has, and what of its capability can be written
#: after id and link: BAR number, offset and length.
WINDOW_SIZE = 4
WINDOW_WRITABLE = struct.pack("<xxB3xII", 0xFF, 0xFFFFFFFF, 0xFFFFFFFF)

#: Registers in BAR 4, 32 bits each.
LOGGING_CONTROL, LOG_BASE, LOG_END, MQ = 0x00, 0x10, 0x18, 0x28
LOGGING_ON = 1


def ring_state_offset(index: int) -> int:
    """Where the state of a queue stands: available index below, used index above 16 bits."""
    return 0x20 + index // 2 * 0x40 + index % 2 * 4


class LiveMigration:
    """The registers in BAR 4: plain storage of 32-bit words."""

    WORDS = frozenset(
        [LOGGING_CONTROL, LOG_BASE, LOG_BASE + 4, LOG_END, LOG_END + 4, MQ]
        + [ring_state_offset(index) for index in range(QUEUES)]
    )

    def __init__(self) -> None:
        self._data = bytearray(BARS[4])

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """Store within one word: Linux writes halves of the ring state."""
        if offset & ~3 in self.WORDS and offset % 4 + len(data) <= 4:
            self._data[offset : offset + len(data)] = data

    def reset(self) -> None:
        self._data[:] = bytes(len(self._data))

    def ring_state(self, index: int) -> RingState:
        return RingState(*struct.unpack_from("<HH", self._data, ring_state_offset(index)))

    def set_ring_state(self, index: int, state: RingState) -> None:
        struct.pack_into("<HH", self._data, ring_state_offset(index), state.avail, state.used)

    def log(self) -> tuple[bool, int, int]:
        """Whether to log, and the DMA addresses where the bitmap begins and ends."""
        control, _, _, _, base, end = struct.unpack_from("<IIIIQQ", self._data, LOGGING_CONTROL)
        return bool(control & LOGGING_ON), base, end


class IfcvfNet(VirtioNet):
    """The virtio device of an IFCVF, whose queues begin and end at the state in BAR 4."""

    def __init__(self, engine: Engine, vectors: MsixVectors, mac: bytes, mtu: int, features: int) -> None:
        self.migration = LiveMigration()
        super().__init__(engine, vectors, mac, mtu, features)

    def reset(self) -> None:
        self.migration.reset()
        super().reset()

    def write_migration(self, offset: int, data: bytes) -> None:
        """Write a register of BAR 4."""
        before = self.migration.log()
        self.migration.write(offset, data)
        if (log := self.migration.log()) != before:
            self._engine.set_log(*log)

    def _initial_state(self, index: int) -> RingState:
        return self.migration.ring_state(index)

    def _publish_state(self, index: int, state: RingState) -> None:
        self.migration.set_ring_state(index, state)


@dataclass(frozen=True)
class _Registers:
    """A structure and what answers in it, by offset from its begin."""

    where: Structure
    read: Callable[[int, int], bytes]
    write: Callable[[int, bytes], None]


def _nothing(_offset: int, _data: bytes) -> None:
    """A write without effect."""


class Ifcvf:
    """One IFCVF as PCI sees it: configuration space, BARs, MSI-X, reset."""

    def __init__(self, engine: Engine, mac: bytes, mtu: int, features: int = FEATURES) -> None:
        self._engine = engine
        self.vectors = MsixVectors(VECTORS)
        self.net = IfcvfNet(engine, self.vectors, mac, mtu, features)
        self._config = ConfigSpace(IDENTITY, BARS)
        self._config.msix_capability(VECTORS, MSIX_TABLE, MSIX_PENDING)
        self._config.virtio_capability(PciCapability.COMMON, COMMON)
        self._config.virtio_capability(PciCapability.ISR, ISR)
        self._config.virtio_capability(PciCapability.DEVICE, DEVICE)
        self._config.virtio_capability(PciCapability.NOTIFY, NOTIFY, struct.pack("<I", PAGE))
        nowhere = Structure(0, 0, 0)
        self._window_at = self._config.virtio_capability(
            PciCapability.PCI_ACCESS, nowhere, bytes(WINDOW_SIZE), WINDOW_WRITABLE
        )
        net = self.net
        self._registers = (
            _Registers(COMMON, net.read_common, net.write_common),
            _Registers(ISR, lambda _offset, _size: net.read_isr(), _nothing),
            _Registers(DEVICE, net.read_device, _nothing),
            _Registers(NOTIFY, lambda _offset, size: bytes(size), self._notify),
            _Registers(Structure(4, 0, BARS[4]), net.migration.read, net.write_migration),
        )

    def reset(self) -> None:
        """Function-level reset. Eventfds of interrupts stay, as they do with kernel VFIO."""
        self._config.reset()
        self.net.reset()
        self.net.set_bus_master(False)

    def read(self, region: Region, offset: int, size: int) -> bytes:
        """Read a range that lies within the region; memory that is not decoded reads as ones."""
        if region is Region.CONFIG:
            window = self._window(offset, size)
            return self._config.read(offset, size) if window is None else self._read_bar(*window, size)
        if not self._config.command & PciCommand.MEMORY:
            return b"\xff" * size
        return self._read_bar(region, offset, size)

    def write(self, region: Region, offset: int, data: bytes) -> None:
        """Write a range that lies within the region."""
        if region is Region.CONFIG:
            self._config.write(offset, data)
            self.net.set_bus_master(bool(self._config.command & PciCommand.MASTER))
            window = self._window(offset, len(data))
            if window is not None:
                self._write_bar(*window, data)
        elif self._config.command & PciCommand.MEMORY:
            self._write_bar(region, offset, data)

    def doorbell_offsets(self) -> list[int]:
        """Where in BAR 2 each served queue is notified."""
        return [index * PAGE for index in range(QUEUES)]

    def _window(self, offset: int, size: int) -> tuple[Region, int] | None:
        """Where an access to the window of configuration space leads (virtio 1.3 section 4.1.4.9).

        Only one that has the width which the driver has set: a dump of the space reads no registers.
        """
        capability = self._config.read(self._window_at, 16 + WINDOW_SIZE)
        bar, at, length = struct.unpack_from("<4xB3xII", capability)
        if offset != self._window_at + 16 or size != length or size not in (1, 2, 4):
            return None
        return (Region(bar), at) if bar in BARS and at % size == 0 and at + size <= BARS[bar] else None

    def _read_bar(self, region: Region, offset: int, size: int) -> bytes:
        found = self._find(region, offset, size)
        return bytes(size) if found is None else found.read(offset - found.where.offset, size)

    def _write_bar(self, region: Region, offset: int, data: bytes) -> None:
        found = self._find(region, offset, len(data))
        if found is not None:
            found.write(offset - found.where.offset, data)

    def _find(self, region: Region, offset: int, size: int) -> _Registers | None:
        for registers in self._registers:
            where = registers.where
            if where.bar == region and where.offset <= offset and offset + size <= where.offset + where.size:
                return registers
        return None

    def _notify(self, offset: int, data: bytes) -> None:
        """A queue's number, written to its own page (virtio 1.3 section 4.1.5.2)."""
        index = int.from_bytes(data, "little")
        if len(data) == 2 and offset == index * PAGE and index < QUEUES:
            self._engine.kick(index)
