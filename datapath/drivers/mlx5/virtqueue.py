"""A virtqueue of a ConnectX: the firmware's VIRTIO_NET_Q, its three UMEMs and its states; and what it counts.

    INIT  --run-->  READY  --suspend-->  SUSPENDED  --run, if the device can-->  READY
                      any of them  --by itself-->  ERROR

A queue that cannot run on is closed and made anew, at the indices where it stood.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from datapath.drivers.mlx5.capabilities import Capabilities
from datapath.drivers.mlx5.glue import CommandError, EventChannel
from datapath.drivers.mlx5.memory import Buffer, Domain
from datapath.drivers.mlx5.options import LatencyMode
from datapath.drivers.mlx5.undo import Undo
from datapath.mlx5_mailbox import pack
from datapath.mlx5_prm import (
    CREATE_VIRTIO_NET_Q_IN,
    CREATE_VIRTIO_Q_COUNTERS_IN,
    EVENT_OBJECT_CHANGE,
    MODIFY_VIRTIO_NET_Q_IN,
    QUERY_VIRTIO_NET_Q_IN,
    QUERY_VIRTIO_NET_Q_OUT,
    QUERY_VIRTIO_Q_COUNTERS_IN,
    QUERY_VIRTIO_Q_COUNTERS_OUT,
    EventMode,
    ModifyQueue,
    QueueState,
)
from datapath.vdpa import DeviceError, Ring, RingState
from datapath.virtio import Feature

#: Counters of a queue, as VIRTIO_Q_COUNTERS has them.
COUNTERS = (
    "received_desc",
    "completed_desc",
    "bad_desc_errors",
    "exceed_max_chain",
    "invalid_buffer",
    "error_cqes",
)
#: Feature -> field of a queue that is told of it.
TOLD: Mapping[Feature, str] = {
    Feature.NET_F_CSUM: "tx_csum",
    Feature.NET_F_GUEST_CSUM: "rx_csum",
    Feature.NET_F_HOST_TSO4: "tso_ipv4",
    Feature.NET_F_HOST_TSO6: "tso_ipv6",
    Feature.F_VERSION_1: "virtio_version_1_0",
}


class Counters:
    """What the firmware counts of all the queues that are made with it, one after the other."""

    def __init__(self, domain: Domain) -> None:
        """
        :raise CommandError: when the firmware does not make it.
        """
        self._glue = domain.glue
        self._object = domain.glue.create(domain.context, pack(CREATE_VIRTIO_Q_COUNTERS_IN))
        #: The firmware's number of it.
        self.number = self._object.id

    def read(self) -> dict[str, int]:
        """What has been counted, by the names of COUNTERS.

        :raise CommandError: when the firmware does not tell.
        """
        mailbox = pack(QUERY_VIRTIO_Q_COUNTERS_IN, obj_id=self.number)
        told = self._glue.query(self._object, mailbox, QUERY_VIRTIO_Q_COUNTERS_OUT)
        return {name: int(told[name]) for name in COUNTERS}

    def close(self) -> None:
        """
        :raise DeviceError: when a queue still uses it.
        """
        self._glue.destroy(self._object)


@dataclass(frozen=True)
class Surroundings:
    """What a queue is made with, beside its ring."""

    #: Features that the guest has accepted, as a word.
    features: int
    #: Key of the guest's memory.
    key: int
    #: Number of the transmit interface (TIS).
    tis: int
    #: Number of the QP by which the firmware tells of completions; None: it does not.
    event_qp: int | None
    #: Number of its counters; 0: nothing is counted.
    counters: int = 0
    latency_mode: LatencyMode = LatencyMode.DEFAULT
    max_latency_us: int = 0
    max_pending: int = 0


def offloads(accepted: int) -> dict[str, int]:
    """What a queue is told of the features that the guest has accepted.

    Segments need checksums: a queue that cuts them is told to sum, too.
    """
    told = {field: accepted >> feature & 1 for feature, field in TOLD.items()}
    told["tx_csum"] |= told["tso_ipv4"] | told["tso_ipv6"]
    return told


class VirtioNetQueue:
    """One queue, made in the state INIT."""

    def __init__(
        self, domain: Domain, capable: Capabilities, index: int, ring: Ring, around: Surroundings
    ) -> None:
        """
        :param index: vhost-user's number of the ring.
        :raise DeviceError: when the device has no such queue, or does not make it.
        """
        self._glue = domain.glue
        self._name = f"{domain.glue.name}: queue {index}"
        self._resumes = capable.resumes
        self.index = index
        if ring.packed:
            raise DeviceError(f"{self._name}: packed rings are not served")
        if around.event_qp is None and not capable.silent:
            raise DeviceError(f"{self._name}: its firmware has no queues that tell nothing")
        with Undo() as undo:
            buffers = []
            for size in capable.umems:
                buffers.append(Buffer(domain, size.of(ring.size)))
                undo.callback(buffers[-1].close)
            fields = _ring_fields(index, ring) | _around_fields(around) | _buffer_fields(buffers)
            mailbox = pack(CREATE_VIRTIO_NET_Q_IN, **fields, pd=domain.number)
            self._queue = self._glue.create(domain.context, mailbox)
            undo.pop_all()
        #: What gives it back, the last first.
        self._left: list[Callable[[], None]] = [
            *(buffer.close for buffer in buffers),
            partial(self._glue.destroy, self._queue),
        ]
        self._state = QueueState.INIT

    @property
    def number(self) -> int:
        """The firmware's number of the queue, which a receive table lists."""
        return self._queue.id

    @property
    def state(self) -> QueueState:
        """Where it was led to; an error shows when the firmware is asked."""
        return self._state

    def _modify(self, select: ModifyQueue, **fields: int) -> None:
        """
        :raise CommandError: when the firmware refuses.
        """
        number = self._queue.id
        self._glue.modify(
            self._queue,
            pack(
                MODIFY_VIRTIO_NET_Q_IN,
                obj_id=number,
                queue_index=self.index,
                modify_field_select=select,
                **fields,
            ),
        )

    def _go_to(self, state: QueueState) -> None:
        self._modify(ModifyQueue.STATE, state=state)
        self._state = state

    def run(self) -> None:
        """Have it work, from INIT or, where the device can, from SUSPENDED.

        :raise DeviceError: when it cannot, or the firmware refuses.
        """
        suspended = self._state is QueueState.SUSPENDED
        if self._state is not QueueState.INIT and not (suspended and self._resumes):
            raise DeviceError(f"{self._name} cannot run: it is {self._state.name}")
        self._go_to(QueueState.READY)

    def suspend(self) -> RingState:
        """Stop it; it touches no memory any more. Returns where it stands.

        :raise DeviceError: when it does not run, has met an error, or the firmware refuses.
        """
        if self._state is not QueueState.READY:
            raise DeviceError(f"{self._name} cannot be suspended: it is {self._state.name}")
        self._go_to(QueueState.SUSPENDED)
        return self.ring_state()

    def ring_state(self) -> RingState:
        """Where its ring stands, as the firmware has it.

        :raise DeviceError: when the queue has met an error, or the firmware does not tell.
        """
        state, error_type = self.look()
        if self._state is QueueState.ERROR:
            raise DeviceError(f"{self._name} has met an error of type {error_type}")
        return state

    def look(self) -> tuple[RingState, int]:
        """See how it is: where its ring stands, and the type of the error, which is 0 without one.

        :raise CommandError: when the firmware does not tell.
        """
        told = self._glue.query(
            self._queue, pack(QUERY_VIRTIO_NET_Q_IN, obj_id=self._queue.id), QUERY_VIRTIO_NET_Q_OUT
        )
        failed = told["state"] == QueueState.ERROR
        if failed:
            self._state = QueueState.ERROR
        state = RingState(int(told["hw_available_index"]), int(told["hw_used_index"]))
        return state, int(told["error_type"]) if failed else 0

    def report_errors(self, channel: EventChannel, cookie: int) -> None:
        """Have the channel told, once, with this cookie, when the queue meets an error.

        :raise DeviceError: when it cannot be.
        """
        self._glue.subscribe(channel, self._queue, EVENT_OBJECT_CHANGE, cookie)

    def log(self, key: int, address: int, size: int) -> None:
        """Mark the pages that it writes, in a bitmap that `key` reaches.

        :param address: of the bitmap in this process.
        :param size: bytes.
        :raise CommandError: when the firmware refuses.
        """
        self._modify(
            ModifyQueue.DIRTY_BITMAP,
            dirty_bitmap_mkey=key,
            dirty_bitmap_addr=address,
            dirty_bitmap_size=size,
        )
        self._modify(ModifyQueue.DIRTY_ENABLE, dirty_bitmap_dump_enable=1)

    def stop_logging(self) -> None:
        """Mark no more, and let go of the bitmap's key.

        :raise CommandError: when the firmware refuses.
        """
        self._modify(ModifyQueue.DIRTY_ENABLE, dirty_bitmap_dump_enable=0)
        # Key 0 is what a queue has that never marked. A firmware that does not take it back so need not hold
        # it either: whether it does shows when the key is given back.
        with suppress(CommandError):
            self._modify(ModifyQueue.DIRTY_BITMAP)

    def close(self) -> None:
        """Give it back with all that it was made with, in any state.

        :raise DeviceError: when the device does not let go of something; to close it again tries that again.
        """
        self._state = QueueState.ERROR  # of no more use, whatever comes
        while self._left:
            self._left[-1]()
            self._left.pop()


def _ring_fields(index: int, ring: Ring) -> dict[str, int]:
    return {
        "queue_index": index,
        "queue_size": ring.size,
        "desc_addr": ring.descriptors,
        "available_addr": ring.avail,
        "used_addr": ring.used,
        "hw_available_index": ring.state.avail,
        "hw_used_index": ring.state.used,
    }


def _around_fields(around: Surroundings) -> dict[str, int]:
    silent = around.event_qp is None
    return {
        **offloads(around.features),
        "virtio_q_mkey": around.key,
        "tisn_or_qpn": around.tis,
        "event_mode": EventMode.NONE if silent else EventMode.QP,
        "event_qpn_or_msix": around.event_qp or 0,
        "counter_set_id": around.counters,
        "queue_period_mode": around.latency_mode,
        "queue_period_us": around.max_latency_us,
        "queue_max_count": around.max_pending,
    }


def _buffer_fields(buffers: list[Buffer]) -> dict[str, int]:
    fields = {}
    for number, buffer in enumerate(buffers, 1):
        fields[f"umem_{number}_id"] = buffer.id
        fields[f"umem_{number}_size"] = buffer.size
    return fields
