"""A PCI function in memory with the registers of an IFCVF: for unit tests of the order of accesses.

It moves no packet and has no ring; what it records is each write by the register's name, and what a
device would have on its books after them. Faults are set as attributes, or raised at the n-th access.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from datapath.bus.function import PciFunction, RegionDescription
from datapath.native.relay import Doorbell
from datapath.vdpa import DeviceError, DeviceLostError, HostNotifier, MemoryRegion
from datapath.vfio import Irq, Region
from datapath.virtio import NO_VECTOR, Common, Feature, NetConfig, PciCapability, Status, bit

COMMON_AT, ISR_AT, DEVICE_AT, NOTIFY_AT = 0x000, 0x100, 0x200, 0x1000
NOTIFY_STRIDE = 4
BAR_SIZES = {Region.BAR0: 0x2000, Region.BAR4: 0x1000, Region.CONFIG: 256}
NET_CONFIG = bytes.fromhex("525400766401") + struct.pack("<HHH", 1, 2, 1500)
FEATURES = sum(
    bit(feature)
    for feature in (
        Feature.NET_F_MAC,
        Feature.NET_F_MTU,
        Feature.NET_F_MRG_RXBUF,
        Feature.NET_F_MQ,
        Feature.F_EVENT_IDX,
        Feature.F_VERSION_1,
        Feature.F_ACCESS_PLATFORM,
        Feature.F_RING_PACKED,
        Feature.F_NOTIFICATION_DATA,
        Feature.F_RING_RESET,
        Feature.NET_F_CTRL_RX,
        Feature.NET_F_CTRL_MAC_ADDR,
    )
)

#: Offset -> name and width, of the registers whose accesses are checked.
COMMON_REGISTERS = {
    Common.DEVICE_FEATURE_SELECT: ("device_feature_select", 4),
    Common.DEVICE_FEATURE: ("device_feature", 4),
    Common.DRIVER_FEATURE_SELECT: ("driver_feature_select", 4),
    Common.DRIVER_FEATURE: ("driver_feature", 4),
    Common.CONFIG_MSIX_VECTOR: ("config_vector", 2),
    Common.NUM_QUEUES: ("num_queues", 2),
    Common.DEVICE_STATUS: ("status", 1),
    Common.QUEUE_SELECT: ("queue_select", 2),
    Common.QUEUE_SIZE: ("queue_size", 2),
    Common.QUEUE_MSIX_VECTOR: ("queue_vector", 2),
    Common.QUEUE_ENABLE: ("queue_enable", 2),
    Common.QUEUE_NOTIFY_OFF: ("queue_notify_off", 2),
    Common.QUEUE_DESC: ("queue_desc_low", 4),
    Common.QUEUE_DESC + 4: ("queue_desc_high", 4),
    Common.QUEUE_DRIVER: ("queue_avail_low", 4),
    Common.QUEUE_DRIVER + 4: ("queue_avail_high", 4),
    Common.QUEUE_DEVICE: ("queue_used_low", 4),
    Common.QUEUE_DEVICE + 4: ("queue_used_high", 4),
}
PER_QUEUE = {name for name, _ in COMMON_REGISTERS.values() if name.startswith("queue_")} - {"queue_select"}


def virtio_capability(
    kind: int, bar: int, offset: int, length: int, following: int, multiplier: int | None = None
) -> bytes:
    """A virtio vendor capability as it stands in configuration space."""
    tail = b"" if multiplier is None else struct.pack("<I", multiplier)
    return struct.pack("<BBBBB3xII", 0x09, following, 16 + len(tail), kind, bar, offset, length) + tail


def config_space(ids: tuple[int, int, int, int] = (0x1AF4, 0x1041, 0x8086, 0x001A)) -> bytearray:
    """Configuration space of an IFCVF network function."""
    config = bytearray(256)
    struct.pack_into("<HH", config, 0x00, *ids[:2])
    struct.pack_into("<H", config, 0x06, 0x10)
    struct.pack_into("<HH", config, 0x2C, *ids[2:])
    config[0x34] = 0x40
    for at, capability in (
        (0x40, virtio_capability(PciCapability.COMMON, 0, COMMON_AT, Common.SIZE, 0x50)),
        (0x50, virtio_capability(PciCapability.NOTIFY, 0, NOTIFY_AT, 0x1000, 0x64, NOTIFY_STRIDE)),
        (0x64, virtio_capability(PciCapability.ISR, 0, ISR_AT, 1, 0x74)),
        (0x74, virtio_capability(PciCapability.DEVICE, 0, DEVICE_AT, NetConfig.SIZE, 0)),
    ):
        config[at : at + len(capability)] = capability
    return config


@dataclass
class FakeFunction(PciFunction):
    """An IFCVF with `pairs` queue pairs and a control queue."""

    pairs: int = 2
    vectors: int = 16
    features: int = FEATURES
    config: bytearray = field(default_factory=config_space)
    bar_sizes: dict[Region, int] = field(default_factory=lambda: dict(BAR_SIZES))
    #: Faults.
    refuse_features: bool = False
    until_reset: bool = False
    no_vectors: bool = False
    queues_never_stop: bool = False
    never_reset: bool = False
    #: Access (counted from 1) that fails, and whether all that follow do.
    fail_at: int | None = None
    fail_for_ever: bool = False
    fault: type[DeviceError] = DeviceError

    name: str = "fake"
    accesses: int = 0
    log: list[str] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)
    queues: list[dict[str, int]] = field(default_factory=list)
    migration: dict[int, int] = field(default_factory=dict)
    eventfds: dict[int, int] = field(default_factory=dict)
    mapped: list[MemoryRegion] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self._doorbells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2 * self.pairs)]
        self._lost_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._reset_registers()

    # What a test looks at or does

    @property
    def status(self) -> int:
        return self.registers["status"]

    def rung(self, queue: int) -> int:
        """How often a doorbell was rung since the last look."""
        try:
            return os.eventfd_read(self._doorbells[queue])
        except BlockingIOError:
            return 0

    def lose(self) -> None:
        """Go away."""
        os.eventfd_write(self._lost_fd, 1)
        self.fail_at, self.fail_for_ever, self.fault = self.accesses + 1, True, DeviceLostError

    # PciFunction

    def region(self, index: Region) -> RegionDescription:
        return RegionDescription(self.bar_sizes.get(index, 0))

    def read(self, index: Region, offset: int, width: int) -> int:
        self._count()
        if index == Region.CONFIG:
            return int.from_bytes(self.config[offset : offset + width], "little")
        if index == Region.BAR4:
            return self.migration.get(offset, 0)
        if offset >= DEVICE_AT:
            at = offset - DEVICE_AT
            return int.from_bytes(NET_CONFIG[at : at + width], "little")
        return self._read_common(self._register(offset, width))

    def write(self, index: Region, offset: int, width: int, value: int) -> None:
        self._count()
        if index == Region.CONFIG:
            self.log.append(f"config+{offset:#x} = {value:#x}")
            self.config[offset : offset + width] = value.to_bytes(width, "little")
        elif index == Region.BAR4:
            self.log.append(f"bar4+{offset:#x} = {value:#x}")
            self.migration[offset] = value
        else:
            self._write_common(self._register(offset, width), value)

    def config_space(self) -> bytes:
        self._count()
        return bytes(self.config)

    def irq_count(self, index: Irq) -> int:
        return self.vectors if index == Irq.MSIX else 0

    def set_eventfds(self, index: Irq, start: int, fds: Sequence[int | None]) -> None:
        self._count()
        self.log.append(f"eventfds {start}..{start + len(fds) - 1}")
        for vector, fd in enumerate(fds, start):
            self.eventfds.pop(vector, None)
            if fd is not None:
                self.eventfds[vector] = fd

    def disable_irqs(self, index: Irq) -> None:
        self._count()
        self.log.append("eventfds off")
        self.eventfds.clear()

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        return ((0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1))  # of an IOMMU of 39 bits

    def dma_map(self, memory: MemoryRegion) -> None:
        self.mapped.append(memory)

    def dma_unmap(self, memory: MemoryRegion) -> None:
        self.mapped.remove(memory)

    def reset(self) -> None:
        self._count()
        self.log.append("function reset")
        self._reset_registers()

    def doorbell(self, index: Region, offset: int, value: int) -> Doorbell:
        assert (index, offset) == (Region.BAR0, NOTIFY_AT + value * NOTIFY_STRIDE)
        return Doorbell(fd=self._doorbells[value])

    def page(self, index: Region, offset: int) -> HostNotifier | None:
        return None

    @property
    def lost_fd(self) -> int:
        return self._lost_fd

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            for fd in (*self._doorbells, self._lost_fd):
                os.close(fd)

    # The register model

    def _count(self) -> None:
        self.accesses += 1
        if self.closed:
            raise DeviceLostError("fake: has been closed")
        if self.fail_at is None or self.accesses < self.fail_at:
            return
        if self.accesses == self.fail_at or self.fail_for_ever:
            raise self.fault(f"fake: fault at access {self.accesses}")

    def _reset_registers(self) -> None:
        self.registers = {"status": 0, "config_vector": NO_VECTOR, "queue_select": 0}
        self.migration.clear()
        self.queues = [{"queue_size": 256, "queue_vector": NO_VECTOR} for _ in range(2 * self.pairs + 1)]

    @staticmethod
    def _register(offset: int, width: int) -> str:
        name, wanted = COMMON_REGISTERS[offset]
        assert width == wanted, f"{name} accessed with {width} bytes"
        return name

    def _read_common(self, name: str) -> int:
        if name == "num_queues":
            return len(self.queues)
        if name == "device_feature":
            return self.features >> 32 * self.registers["device_feature_select"] & 0xFFFFFFFF
        if name == "queue_notify_off":
            return self.registers["queue_select"]
        if name in PER_QUEUE:
            return self.queues[self.registers["queue_select"]].get(name, 0)
        return self.registers.get(name, 0)

    def _write_common(self, name: str, value: int) -> None:
        queue = self.registers["queue_select"]
        if name == "queue_select":
            self.registers[name] = value
            return
        self.log.append(f"{name}[{queue}] = {value:#x}" if name in PER_QUEUE else f"{name} = {value:#x}")
        if name == "status" and value == 0:
            if not self.never_reset:
                self._reset_registers()
            if self.until_reset:
                self.refuse_features = False
        elif name == "status" and self.refuse_features:
            self.registers[name] = value & ~Status.FEATURES_OK
        elif name in PER_QUEUE:
            if name == "queue_vector" and self.no_vectors:
                value = NO_VECTOR
            if name != "queue_enable" or value or not self.queues_never_stop:
                self.queues[queue][name] = value
        else:
            self.registers[name] = value
