"""What a ConnectX can do, as its firmware tells (HCA capabilities), and the virtio features that follow.

The mask of features is that of DPDK's drivers/vdpa/mlx5/mlx5_vdpa.c, less RING_PACKED: that driver offers
packed rings and does not set them up, and no device was at hand to show how one takes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from datapath.drivers.mlx5.glue import Context, Glue
from datapath.mlx5_mailbox import Structure, pack, unpack
from datapath.mlx5_prm import (
    DEVICE_TIME,
    FREE_RUNNING,
    QUERY_GENERAL_CAP_OUT,
    QUERY_HCA_CAP_IN,
    QUERY_ROCE_CAP_OUT,
    QUERY_VDPA_CAP_OUT,
    CapabilityPage,
    EventMode,
    ObjectType,
    QueueType,
    capability_op_mod,
)
from datapath.vdpa import DeviceError
from datapath.virtio import Feature

#: What every device does, or what is done for it.
ALWAYS = (
    Feature.NET_F_MTU,
    Feature.NET_F_GUEST_ANNOUNCE,
    Feature.NET_F_MQ,
    Feature.VHOST_F_LOG_ALL,
    Feature.F_ANY_LAYOUT,
    Feature.VHOST_USER_F_PROTOCOL_FEATURES,
    Feature.F_ORDER_PLATFORM,
)
#: Capability -> feature.
OFFERED: Mapping[str, Feature] = {
    "tx_csum": Feature.NET_F_CSUM,
    "rx_csum": Feature.NET_F_GUEST_CSUM,
    "tso_ipv4": Feature.NET_F_HOST_TSO4,
    "tso_ipv6": Feature.NET_F_HOST_TSO6,
    "virtio_version_1_0": Feature.F_VERSION_1,
}


@dataclass(frozen=True)
class UmemSize:
    """How large a virtqueue's UMEM is, by the number of the queue's descriptors."""

    per_descriptor: int
    constant: int

    def of(self, queue_size: int) -> int:
        return self.per_descriptor * queue_size + self.constant


@dataclass(frozen=True)
class Capabilities:
    """What matters here of a device's capabilities."""

    #: Virtio features that it has or that are had for it, as a word.
    features: int
    queue_pairs: int
    #: Of a queue's three UMEMs.
    umems: tuple[UmemSize, UmemSize, UmemSize]
    #: Whether queues can be had that tell nothing when they have completed something.
    silent: bool
    #: Whether it counts what its queues do.
    counts: bool
    #: Whether a queue that was suspended can run on.
    resumes: bool
    #: Base-2 logarithm of the most queues that a receive table has.
    log_max_rqt_size: int
    #: Ports that it sends by; queues are spread over them.
    lag_ports: int
    #: `ts_format` of a QP.
    timestamp_format: int
    #: Where the doorbell lies in its page.
    doorbell_offset: int


def _page(glue: Glue, context: Context, page: CapabilityPage, answer: Structure) -> dict[str, int]:
    """
    :raise CommandError: when the firmware does not tell.
    """
    mailbox = pack(QUERY_HCA_CAP_IN, op_mod=capability_op_mod(page))
    values = unpack(answer, glue.command(context, mailbox, answer))
    return {name: value for name, value in values.items() if isinstance(value, int)}


def capabilities(glue: Glue, context: Context) -> Capabilities:
    """Ask a device.

    :raise DeviceError: when it does not tell, or has no virtqueues that we can use.
    """
    general = _page(glue, context, CapabilityPage.GENERAL, QUERY_GENERAL_CAP_OUT)
    objects = general["general_obj_types"]
    if not objects >> ObjectType.VIRTIO_NET_Q & 1:
        raise DeviceError(f"{glue.name}: its firmware has no virtqueues")
    vdpa = _page(glue, context, CapabilityPage.VDPA_EMULATION, QUERY_VDPA_CAP_OUT)
    if not vdpa["virtio_queue_type"] >> QueueType.SPLIT & 1:
        raise DeviceError(f"{glue.name}: its firmware has no virtqueues with split rings")
    if not vdpa["event_mode"] >> EventMode.QP & 1:
        raise DeviceError(f"{glue.name}: its firmware cannot tell of completions by a QP")
    roce = _page(glue, context, CapabilityPage.ROCE, QUERY_ROCE_CAP_OUT) if general["roce"] else None
    free = roce is None or roce["qp_ts_format"] == FREE_RUNNING
    return Capabilities(
        features=features(vdpa),
        # One queue is kept for the receive table, see `receivers`.
        queue_pairs=(vdpa["max_num_virtio_queues"] - 1) // 2,
        umems=(_umem(vdpa, 1), _umem(vdpa, 2), _umem(vdpa, 3)),
        silent=bool(vdpa["event_mode"] >> EventMode.NONE & 1),
        counts=bool(objects >> ObjectType.VIRTIO_Q_COUNTERS & 1),
        resumes=bool(vdpa["freeze_to_rdy_supported"]),
        log_max_rqt_size=general["log_max_rqt_size"],
        lag_ports=max(1, general["num_lag_ports"]),
        timestamp_format=FREE_RUNNING if free else DEVICE_TIME,
        doorbell_offset=vdpa["doorbell_bar_offset"],
    )


def features(vdpa: Mapping[str, int]) -> int:
    """The virtio features of a device with these capabilities (VDPA_CAPABILITIES), as a word."""
    found = [*ALWAYS, *(feature for name, feature in OFFERED.items() if vdpa[name])]
    return sum(1 << feature for feature in found)


def _umem(vdpa: Mapping[str, int], number: int) -> UmemSize:
    name = f"umem_{number}_buffer_param"
    return UmemSize(vdpa[f"{name}_a"], vdpa[f"{name}_b"])
