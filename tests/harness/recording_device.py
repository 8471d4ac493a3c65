"""A vDPA device that only writes down what it is told: for tests of whoever drives one."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datapath.vdpa import (
    DeviceError,
    DeviceEvent,
    DirtyBitmap,
    LogMode,
    MemoryRegion,
    Ring,
    RingState,
    VdpaDevice,
)
from datapath.virtio import Feature, bit

FEATURES = sum(
    bit(feature)
    for feature in (
        Feature.NET_F_MAC,
        Feature.NET_F_STATUS,
        Feature.NET_F_MRG_RXBUF,
        Feature.F_EVENT_IDX,
        Feature.VHOST_F_LOG_ALL,
        Feature.VHOST_USER_F_PROTOCOL_FEATURES,
        Feature.F_VERSION_1,
    )
)


@dataclass
class RecordingDevice(VdpaDevice):
    """Answers every call at once; `calls` has them in order, `failures` makes one raise."""

    name: str = "recording"
    features: int = FEATURES
    promised: int = 0
    queue_pairs: int = 1
    max_queue_size: int = 1024
    max_mtu: int | None = 9000
    log_modes: tuple[LogMode, ...] = (LogMode.HARDWARE, LogMode.SOFTWARE)
    serves_legacy: bool = True
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    rings: dict[int, Ring] = field(default_factory=dict)
    mapped: list[MemoryRegion] = field(default_factory=list)
    #: Where a ring stands when it is stopped; where it began unless said otherwise.
    states: dict[int, RingState] = field(default_factory=dict)
    failures: dict[str, DeviceError] = field(default_factory=dict)
    bitmap: DirtyBitmap | None = None
    events: list[DeviceEvent] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    closed: bool = False

    def __post_init__(self) -> None:
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK)

    def _called(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name in self.failures:
            raise self.failures[name]

    def map_memory(self, region: MemoryRegion) -> None:
        self._called("map_memory", region.guest_address, region.size)
        self.mapped.append(region)

    def unmap_memory(self, region: MemoryRegion) -> None:
        self._called("unmap_memory", region.guest_address, region.size)
        self.mapped.remove(region)

    def start(self, features: int, rings: Mapping[int, Ring]) -> None:
        assert not self.rings
        self._called("start", features, sorted(rings))
        self.rings = dict(rings)

    def start_ring(self, index: int, ring: Ring) -> None:
        assert self.rings
        assert index not in self.rings
        self._called("start_ring", index)
        self.rings[index] = ring

    def set_call(self, index: int, fd: int | None) -> None:
        self._called("set_call", index, fd is not None)

    def stop_ring(self, index: int) -> RingState:
        self._called("stop_ring", index)
        return self._state(index, self.rings.pop(index))

    def suspend(self) -> dict[int, RingState]:
        rings, self.rings = self.rings, {}
        self._called("suspend")
        return {index: self._state(index, ring) for index, ring in rings.items()}

    def _state(self, index: int, ring: Ring) -> RingState:
        return self.states.get(index, ring.state)

    def start_logging(self, bitmap: DirtyBitmap) -> None:
        self._called("start_logging", bitmap.size)
        self.bitmap = bitmap

    def stop_logging(self) -> None:
        self._called("stop_logging")
        self.bitmap = None

    @property
    def log_mode(self) -> LogMode | None:
        return None if self.bitmap is None else LogMode.SOFTWARE

    @property
    def log_missed(self) -> int:
        return self.counters.get("log_missed", 0)

    @property
    def shadowed(self) -> bool:
        return self.bitmap is not None and bool(self.rings)

    @property
    def event_fd(self) -> int:
        return self._event_fd

    @property
    def fault(self) -> str | None:
        return None

    def take_event(self) -> DeviceEvent | None:
        return self.events.pop(0) if self.events else None

    def statistics(self) -> dict[str, int]:
        return self.counters

    def close(self) -> None:
        self.closed = True
        os.close(self._event_fd)


def names(
    device: RecordingDevice, *, skip: Callable[[str], bool] = lambda name: name.endswith("map_memory")
) -> list[str]:
    """The names of the calls so far, without those about memory."""
    return [call[0] for call in device.calls if not skip(call[0])]
