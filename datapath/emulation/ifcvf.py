"""An emulated IFCVF: the PCI function around the virtio network device, with Intel's registers in BAR 4.

Owns where everything lies in configuration space and BARs, and what sets an IFCVF apart from any virtio
function: its ids, a page of doorbell for each queue, and the "LM" registers for live migration (ring
state, dirty log). Offsets and rules are those of DPDK's drivers/vdpa/ifc/base/ifcvf.[hc].
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from datapath.emulation.engine import MAX_PAIRS, Engine
from datapath.emulation.msix import MsixVectors
from datapath.emulation.pci import ConfigSpace, Identity, Structure
from datapath.emulation.virtio_net import NetSpec, VirtioNet
from datapath.pci import CONFIG_SIZE, PciCommand
from datapath.vdpa import RingState
from datapath.vfio import Region
from datapath.virtio import (
    DEVICE_NET,
    PCI_MODERN_DEVICE_BASE,
    PCI_VENDOR,
    Common,
    Feature,
    NetConfig,
    PciCapability,
    Status,
    bit,
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
COMMON = Structure(0, 0, Common.SIZE)
ISR = Structure(0, PAGE, 1)
DEVICE = Structure(0, 2 * PAGE, NetConfig.SIZE)
MSIX_PENDING = Structure(0, 3 * PAGE + PAGE // 2, 8)
NOTIFY_BAR = 2


@dataclass(frozen=True)
class Layout:
    """What of a function depends on how many queue pairs it has."""

    pairs: int

    @property
    def queues(self) -> int:
        """Queues that are served; one more stands for the control queue."""
        return 2 * self.pairs

    @property
    def vectors(self) -> int:
        """One for the configuration and one for each queue, the control queue included."""
        return 1 + self.queues + 1

    @property
    def msix_table(self) -> Structure:
        return Structure(0, 3 * PAGE, 16 * self.vectors)

    @property
    def notify(self) -> Structure:
        """A page for each queue."""
        return Structure(NOTIFY_BAR, 0, (self.queues + 1) * PAGE)

    @property
    def bars(self) -> dict[int, int]:
        """BAR sizes in bytes, powers of two."""
        return {0: 4 * PAGE, NOTIFY_BAR: 1 << (self.notify.size - 1).bit_length(), 4: PAGE}

    @property
    def region_sizes(self) -> dict[Region, int]:
        """Bytes of each region; what is not here is empty."""
        return {Region.CONFIG: CONFIG_SIZE} | {Region(number): size for number, size in self.bars.items()}


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
        + [ring_state_offset(index) for index in range(2 * MAX_PAIRS)]
    )

    def __init__(self) -> None:
        self._data = bytearray(PAGE)

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

    def pairs(self) -> int:
        """Queue pairs in use."""
        return int.from_bytes(self.read(MQ, 4), "little")

    def log(self) -> tuple[bool, int, int]:
        """Whether to log, and the DMA addresses where the bitmap begins and ends."""
        control, _, _, _, base, end = struct.unpack_from("<IIIIQQ", self._data, LOGGING_CONTROL)
        return bool(control & LOGGING_ON), base, end


class IfcvfNet(VirtioNet):
    """The virtio device of an IFCVF, whose queues begin and end at the state in BAR 4."""

    #: The card is said to serve guests of virtio 0.95 (DPDK doc/guides/vdpadevs/ifc.rst).
    TAKES_LEGACY = True

    def __init__(self, engine: Engine, vectors: MsixVectors, spec: NetSpec) -> None:
        self.migration = LiveMigration()
        super().__init__(engine, vectors, spec)

    def reset(self) -> None:
        self.migration.reset()
        super().reset()

    def write_migration(self, offset: int, data: bytes) -> None:
        """Write a register of BAR 4."""
        before, pairs = self.migration.log(), self.migration.pairs()
        self.migration.write(offset, data)
        if self.migration.pairs() != pairs and self.status & Status.DRIVER_OK:
            self._engine.use_pairs(self._receiving_pairs())
        if (log := self.migration.log()) != before:
            self._engine.set_log(*log)

    def _receiving_pairs(self) -> int:
        if not self._driver_features & bit(Feature.NET_F_MQ):
            return 1
        return min(max(self.migration.pairs(), 1), self._engine.pairs)

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

    def __init__(self, engine: Engine, spec: NetSpec) -> None:
        self._engine = engine
        self.layout = layout = Layout(engine.pairs)
        self.vectors = MsixVectors(layout.vectors)
        self.net = IfcvfNet(engine, self.vectors, spec)
        self._config = ConfigSpace(IDENTITY, layout.bars)
        self._config.msix_capability(layout.vectors, layout.msix_table, MSIX_PENDING)
        self._config.virtio_capability(PciCapability.COMMON, COMMON)
        self._config.virtio_capability(PciCapability.ISR, ISR)
        self._config.virtio_capability(PciCapability.DEVICE, DEVICE)
        self._config.virtio_capability(PciCapability.NOTIFY, layout.notify, struct.pack("<I", PAGE))
        nowhere = Structure(0, 0, 0)
        self._window_at = self._config.virtio_capability(
            PciCapability.PCI_ACCESS, nowhere, bytes(WINDOW_SIZE), WINDOW_WRITABLE
        )
        net = self.net
        self._registers = (
            _Registers(COMMON, net.read_common, net.write_common),
            _Registers(ISR, lambda _offset, _size: net.read_isr(), _nothing),
            _Registers(DEVICE, net.read_device, _nothing),
            _Registers(layout.notify, lambda _offset, size: bytes(size), self._notify),
            _Registers(Structure(4, 0, layout.bars[4]), net.migration.read, net.write_migration),
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
        if not self._config.decodes_memory:
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
        elif self._config.decodes_memory:
            self._write_bar(region, offset, data)

    def doorbell_offsets(self) -> list[int]:
        """Where in BAR 2 each served queue is notified."""
        return [index * PAGE for index in range(self.layout.queues)]

    def _window(self, offset: int, size: int) -> tuple[Region, int] | None:
        """Where an access to the window of configuration space leads (virtio 1.3 section 4.1.4.9).

        Only one that has the width which the driver has set: a dump of the space reads no registers.
        """
        capability = self._config.read(self._window_at, 16 + WINDOW_SIZE)
        bar, at, length = struct.unpack_from("<4xB3xII", capability)
        if offset != self._window_at + 16 or size != length or size not in (1, 2, 4):
            return None
        inside = at + size <= self.layout.bars.get(bar, 0)
        return (Region(bar), at) if inside and at % size == 0 else None

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
        if len(data) == 2 and offset == index * PAGE and index < self.layout.queues:
            self._engine.kick(index)
