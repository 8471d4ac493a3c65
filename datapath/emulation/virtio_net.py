"""The register model of a modern virtio network function (virtio 1.3 sections 4.1.4 and 5.1).

Owns the common configuration, the device configuration and the ISR byte: features, status, queues and
their vectors. What moves packets is the engine; where the registers lie, and PCI, is the function's.
Offers no control queue, though there is a queue in its place: an IFCVF is told by a register of its own how
many pairs are used. MQ without CTRL_VQ is against section 5.1.3.1; who minds withholds MQ
(`NetSpec.features`).
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from datapath.emulation.engine import MAX_QUEUE_SIZE, QueueEngine, QueueSetup
from datapath.emulation.msix import MsixVectors
from datapath.vdpa import RingState
from datapath.virtio import NET_S_LINK_UP, NO_VECTOR, PACKED_START, Common, Feature, Status, bit

#: All that there is to offer; MQ by a device with more than one queue pair.
FEATURES = sum(
    bit(feature)
    for feature in (
        Feature.NET_F_CSUM,
        Feature.NET_F_GUEST_CSUM,
        Feature.NET_F_MTU,
        Feature.NET_F_MAC,
        Feature.NET_F_GUEST_TSO4,
        Feature.NET_F_GUEST_TSO6,
        Feature.NET_F_GUEST_ECN,
        Feature.NET_F_HOST_TSO4,
        Feature.NET_F_HOST_TSO6,
        Feature.NET_F_HOST_ECN,
        Feature.NET_F_MRG_RXBUF,
        Feature.NET_F_STATUS,
        Feature.NET_F_MQ,
        Feature.F_INDIRECT_DESC,
        Feature.F_EVENT_IDX,
        Feature.F_VERSION_1,
        Feature.F_RING_PACKED,
        Feature.F_IN_ORDER,
    )
)
#: What a feature needs one of to be offered (section 5.1.3.1), what is needed before what needs it.
NEEDS = {
    Feature.NET_F_GUEST_TSO4: bit(Feature.NET_F_GUEST_CSUM),
    Feature.NET_F_GUEST_TSO6: bit(Feature.NET_F_GUEST_CSUM),
    Feature.NET_F_GUEST_ECN: bit(Feature.NET_F_GUEST_TSO4) | bit(Feature.NET_F_GUEST_TSO6),
    Feature.NET_F_HOST_TSO4: bit(Feature.NET_F_CSUM),
    Feature.NET_F_HOST_TSO6: bit(Feature.NET_F_CSUM),
    Feature.NET_F_HOST_ECN: bit(Feature.NET_F_HOST_TSO4) | bit(Feature.NET_F_HOST_TSO6),
}
#: With one of these the header before a packet has its last field, num_buffers (section 5.1.6.1).
LONG_HEADER = bit(Feature.F_VERSION_1) | bit(Feature.NET_F_MRG_RXBUF)
#: Bits of the ISR byte (section 4.1.4.5); queue interrupts need MSI-X here and set none.
ISR_CONFIG = 2

#: Of the status, as plain numbers: an enumeration's operators are slower than the rest of an access together.
NEEDS_RESET, FEATURES_OK, DRIVER_OK = map(
    int, (Status.DEVICE_NEEDS_RESET, Status.FEATURES_OK, Status.DRIVER_OK)
)

#: The common configuration, field by field in the order of `virtio.Common`.
COMMON = struct.Struct("<IIIIHHBBHHHHHQQQ")
#: The device configuration: MAC, status, pairs, MTU.
NET_CONFIG = struct.Struct("<6sHHH")


def consistent(features: int) -> int:
    """These features but for those that need others of which there are none (section 5.1.3.1)."""
    for feature, needed in NEEDS.items():
        if not features & needed:
            features &= ~bit(feature)
    return features


@dataclass(frozen=True)
class NetSpec:
    """What a network device is to be."""

    mac: bytes
    #: Largest packet in bytes, without its Ethernet header.
    mtu: int
    #: Feature mask to offer.
    features: int = FEATURES


@dataclass
class Queue:
    """What the driver wrote about one queue."""

    size: int = MAX_QUEUE_SIZE
    vector: int = NO_VECTOR
    enabled: bool = False
    descriptors: int = 0
    avail: int = 0
    used: int = 0


class VirtioNet:
    """One virtio network device as its registers show it."""

    #: Whether a driver may leave VERSION_1 out, and so be one of virtio 0.95 (section 6.1 forbids it by these
    #: registers).
    TAKES_LEGACY = False

    def __init__(self, engine: QueueEngine, vectors: MsixVectors, spec: NetSpec) -> None:
        """A device in reset, with its link up, and as many queue pairs as the engine."""
        self._engine = engine
        self._vectors = vectors
        self._spec = spec
        self._features = spec.features & ~(bit(Feature.NET_F_MQ) if engine.pairs == 1 else 0)
        self._link_up = True
        self._bus_master = False
        self._generation = 0
        self._device_features_select = 0
        self._driver_features_select = 0
        self._driver_features = 0
        self._config_vector = NO_VECTOR
        self._queue_select = 0
        self._isr = 0
        self._queues: list[Queue] = []
        #: Whether the engine has been told to run.
        self._moving = False
        #: Device status as the driver reads it.
        self.status = Status(0)
        #: Why the device needs a reset, while it does.
        self.failure: str | None = None
        vectors.changed = self._connect_interrupts
        self._writers = self._writable_fields()
        self.reset()

    # For the function

    def reset(self) -> None:
        """What writing 0 to the status does (section 2.4). The link is as it was."""
        self._engine.reset()
        self._moving = False
        self.status = Status(0)
        self.failure = None
        self._device_features_select = self._driver_features_select = self._driver_features = 0
        self._config_vector = NO_VECTOR
        self._queue_select = 0
        self._isr = 0
        self._queues = [Queue() for _ in range(self._data_queues + 1)]  # the last is the control queue's
        self._connect_interrupts()

    def set_bus_master(self, on: bool) -> None:
        """Whether PCI lets the device reach memory; it moves no packets otherwise."""
        self._bus_master = on
        self._update_running()

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out; the device moves no packets without."""
        if up != self._link_up:
            self._link_up = up
            self._update_running()
            self._config_changed()

    def fail(self, reason: str) -> None:
        """The driver did what no driver may: stop until it resets the device (section 2.1.2)."""
        if self.failure is None:
            self.failure = reason
            self.status |= Status.DEVICE_NEEDS_RESET
            self._update_running()
            if self.status & Status.DRIVER_OK:
                self._config_changed()

    @property
    def running(self) -> bool:
        """Whether packets move."""
        wanted = self._bus_master and self._link_up and self.failure is None
        return wanted and bool(int(self.status) & DRIVER_OK)

    @property
    def link_up(self) -> bool:
        return self._link_up

    # Registers

    def read_common(self, offset: int, size: int) -> bytes:
        """Read any part of the common configuration."""
        exists = self._queue_select < len(self._queues)
        queue = self._queues[self._queue_select] if exists else Queue(size=0)
        fields = COMMON.pack(
            self._device_features_select,
            self._word(self._features, self._device_features_select),
            self._driver_features_select,
            self._word(self._driver_features, self._driver_features_select),
            self._config_vector,
            len(self._queues),
            self.status,
            self._generation,
            self._queue_select,
            queue.size,
            queue.vector,
            queue.enabled,
            self._queue_select if exists else 0,
            queue.descriptors,
            queue.avail,
            queue.used,
        )
        return fields[offset : offset + size]

    def write_common(self, offset: int, data: bytes) -> None:
        """Write one field, or half of a 64-bit one (section 4.1.3.1); anything else has no effect."""
        writer = self._writers.get((offset, len(data)))
        if writer is not None:
            writer(int.from_bytes(data, "little"))

    def read_device(self, offset: int, size: int) -> bytes:
        """Read any part of the device configuration."""
        status = NET_S_LINK_UP if self._link_up else 0
        return NET_CONFIG.pack(self._spec.mac, status, self._engine.pairs, self._spec.mtu)[
            offset : offset + size
        ]

    def read_isr(self) -> bytes:
        """Read and so clear the ISR byte."""
        value, self._isr = self._isr, 0
        return bytes([value])

    # Hooks for a function that can restore queues

    def _initial_state(self, _index: int) -> RingState:
        """Where a split queue begins that is enabled; a packed one always begins at its start."""
        return RingState(0, 0)

    def _publish_state(self, index: int, state: RingState) -> None:
        """Take note of where a queue stood that was disabled."""

    def _receiving_pairs(self) -> int:
        """How many queue pairs receive: one until the driver has said more (section 5.1.6.5.5)."""
        return 1

    # Inside

    @property
    def _data_queues(self) -> int:
        return 2 * self._engine.pairs

    def _writable_fields(self) -> dict[tuple[int, int], Callable[[int], None]]:
        """What may be written, by offset and bytes; a 64-bit field at once or by halves."""
        fields: dict[tuple[int, int], Callable[[int], None]] = {
            (Common.DEVICE_FEATURE_SELECT, 4): partial(setattr, self, "_device_features_select"),
            (Common.DRIVER_FEATURE_SELECT, 4): partial(setattr, self, "_driver_features_select"),
            (Common.DRIVER_FEATURE, 4): self._write_driver_features,
            (Common.CONFIG_MSIX_VECTOR, 2): self._write_config_vector,
            (Common.DEVICE_STATUS, 1): self._write_status,
            (Common.QUEUE_SELECT, 2): partial(setattr, self, "_queue_select"),
            (Common.QUEUE_SIZE, 2): partial(self._write_queue_field, "size", 0, 16),
            (Common.QUEUE_MSIX_VECTOR, 2): self._write_queue_vector,
            (Common.QUEUE_ENABLE, 2): self._write_queue_enable,
        }
        addresses = {
            Common.QUEUE_DESC: "descriptors",
            Common.QUEUE_DRIVER: "avail",
            Common.QUEUE_DEVICE: "used",
        }
        for offset, name in addresses.items():
            fields[offset, 8] = partial(self._write_queue_field, name, 0, 64)
            fields[offset, 4] = partial(self._write_queue_field, name, 0, 32)
            fields[offset + 4, 4] = partial(self._write_queue_field, name, 32, 32)
        return fields

    @staticmethod
    def _word(value: int, select: int) -> int:
        return value >> 32 * select & 0xFFFFFFFF if select < 2 else 0

    def _update_running(self) -> None:
        moving = self.running
        if moving != self._moving:  # each turn to the engine wakes its thread
            self._moving = moving
            self._engine.run(moving)

    def _config_changed(self) -> None:
        self._generation = self._generation + 1 & 0xFF
        self._isr |= ISR_CONFIG
        self._vectors.signal(self._config_vector)

    def _connect_interrupts(self) -> None:
        for index in range(self._data_queues):
            self._engine.set_call(index, self._vectors[self._queues[index].vector])

    def _selected(self) -> Queue | None:
        return self._queues[self._queue_select] if self._queue_select < len(self._queues) else None

    def _vector(self, value: int) -> int:
        return value if value < len(self._vectors) else NO_VECTOR

    def _write_driver_features(self, value: int) -> None:
        if self._driver_features_select < 2 and not self.status & Status.FEATURES_OK:
            shift = 32 * self._driver_features_select
            self._driver_features = self._driver_features & ~(0xFFFFFFFF << shift) | value << shift

    def _write_status(self, value: int) -> None:
        if value == 0:
            self.reset()
            return
        before = int(self.status)
        status = value & ~NEEDS_RESET | before
        if status & ~before & FEATURES_OK and not self._features_acceptable():
            status &= ~FEATURES_OK
        if status & ~before & DRIVER_OK:
            self._engine.accept(consistent(self._driver_features & self._features))
            self._engine.use_pairs(self._receiving_pairs())
        self.status = Status(status)
        self._update_running()

    def _features_acceptable(self) -> bool:
        if self._driver_features & ~self._features:
            return False
        return self.TAKES_LEGACY or bool(self._driver_features & bit(Feature.F_VERSION_1))

    def _write_config_vector(self, value: int) -> None:
        self._config_vector = self._vector(value)

    def _write_queue_field(self, name: str, shift: int, width: int, value: int) -> None:
        """Change bits of a field of the selected queue; that of an enabled queue cannot be changed."""
        queue = self._selected()
        if queue is not None and not queue.enabled:
            mask = (1 << width) - 1 << shift
            setattr(queue, name, getattr(queue, name) & ~mask | value << shift)

    def _write_queue_vector(self, value: int) -> None:
        queue = self._selected()
        if queue is not None:
            queue.vector = self._vector(value)
            self._connect_interrupts()

    def _write_queue_enable(self, value: int) -> None:
        queue = self._selected()
        if queue is None or value not in (0, 1) or queue.enabled == bool(value):
            return
        queue.enabled = bool(value)
        if self._queue_select >= self._data_queues:
            return
        if queue.enabled:
            self._start_queue(self._queue_select, queue)
        else:
            self._publish_state(self._queue_select, self._engine.stop_queue(self._queue_select))

    def _start_queue(self, index: int, queue: Queue) -> None:
        packed = bool(self._driver_features & bit(Feature.F_RING_PACKED))
        setup = QueueSetup(
            size=queue.size,
            descriptors=queue.descriptors,
            avail=queue.avail,
            used=queue.used,
            state=RingState(PACKED_START, PACKED_START) if packed else self._initial_state(index),
            event_idx=bool(self._driver_features & bit(Feature.F_EVENT_IDX)),
            indirect=bool(self._driver_features & bit(Feature.F_INDIRECT_DESC)),
            mergeable=bool(self._driver_features & bit(Feature.NET_F_MRG_RXBUF)),
            short_header=not self._driver_features & LONG_HEADER,
            packed=packed,
        )
        try:
            self._engine.start_queue(index, setup)
        except OSError as error:
            self.fail(f"queue {index}: size {queue.size} or its addresses cannot be: {error.strerror}")
