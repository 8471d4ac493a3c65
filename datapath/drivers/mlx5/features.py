"""The column of ConnectX in the feature table.

A ConnectX is no virtio function that negotiates by itself: its queues are told what a guest has accepted, and
know no more than `capabilities.OFFERED`. What a guest is offered besides is had for it by the front-end or
this driver.
"""

from collections.abc import Mapping

from datapath.features import Column, Row, Way, no, partly, yes
from datapath.virtio import Feature

UNKNOWN = "its queues know no such thing"

#: Features that have no row; see `virtio_net_features.BESIDE`.
BESIDE: Mapping[Feature, Way] = {
    Feature.NET_F_STATUS: Way.PROMISED,
    Feature.VHOST_USER_F_PROTOCOL_FEATURES: Way.PROMISED,
    Feature.F_ORDER_PLATFORM: Way.CARRIED,
}

FEATURES = Column(
    "mlx5",
    "VFs of ConnectX-6, ConnectX-6 Dx and BlueField",
    {
        Row.CSUM: partly("offered where the firmware has it"),
        Row.GUEST_CSUM: partly("offered where the firmware has it"),
        Row.MAC: yes(
            "tests/conformance/test_mlx5_port.py::test_whose_frames_a_guest_gets",
            note="the domain's, which the front-end shows and flows are made for",
            way=Way.PROMISED,
        ),
        Row.GSO: no("virtio 1.0 has taken the bit away; TSO and UFO have bits of their own"),
        Row.GUEST_TSO4: no(UNKNOWN),
        Row.GUEST_TSO6: no(UNKNOWN),
        Row.ECN: no(UNKNOWN),
        Row.UFO: no(UNKNOWN),
        Row.HOST_TSO4: partly("offered where the firmware has it"),
        Row.HOST_TSO6: partly("offered where the firmware has it"),
        Row.MRG_RXBUF: no(UNKNOWN),
        Row.CTRL_VQ: partly("the front-end serves it", way=Way.PROMISED),
        Row.CTRL_RX: partly("the front-end serves it", way=Way.FRONT_END),
        Row.ANY_LAYOUT: partly("VERSION_1 implies it"),
        Row.GUEST_ANNOUNCE: partly("as with ifcvf", way=Way.PROMISED),
        Row.MQ: partly("by receive table and hash"),
        Row.VERSION_1: partly("offered where the firmware has it"),
        Row.LOG_ALL: partly("by the firmware, and used rings by us", way=Way.PROMISED),
        Row.INDIRECT_DESC: no(UNKNOWN),
        Row.EVENT_IDX: no(UNKNOWN),
        Row.MTU: partly("that of its network interface"),
        Row.IN_ORDER: no(UNKNOWN),
        Row.IOMMU_PLATFORM: no("guests are not offered an IOMMU of their own"),
        Row.PACKED: no("no device was at hand to show how one takes them"),
        Row.QUEUE_STATISTICS: partly("where the firmware has counters"),
        Row.BSD_NIC_UIO: no("Linux only"),
        Row.LINUX_VFIO: no("the kernel's own driver stays bound"),
        Row.OTHER_KDRV: partly("mlx5_core stays bound; no such card was at hand"),
        Row.ARMV7: no("never built or run there"),
        Row.ARMV8: no("never built or run there"),
        Row.POWER8: no("never built or run there"),
        Row.X86_32: no("never built or run there"),
        Row.X86_64: partly("on the emulated device"),
        Row.USAGE_DOC: partly("docs/drivers/mlx5.md"),
        Row.DESIGN_DOC: partly("docs/drivers/mlx5.md"),
        Row.PERF_DOC: no("docs/performance.md measures the driver ifcvf"),
    },
    BESIDE,
)
