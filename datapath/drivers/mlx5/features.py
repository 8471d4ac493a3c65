"""The column of ConnectX in the feature table.

A ConnectX is no virtio function that negotiates by itself: its queues are told what a guest has accepted, and
know no more than `capabilities.OFFERED`. What a guest is offered besides is had for it by the front-end or
this driver.
"""

from collections.abc import Mapping

from datapath.features import Cell, Column, Row, Way, no, partly, yes
from datapath.virtio import Feature

HERE = "tests/conformance/test_features.py"
OFFLOADS = "tests/conformance/test_nic_offloads.py"
PORT = "tests/conformance/test_mlx5_port.py"
QUEUES = "tests/conformance/test_nic_queues.py"
LOGGING = "tests/conformance/test_mlx5_logging.py"
DOCUMENTS = "tests/unit/test_features.py"
#: A guest moves to another kind of VF and back, logged and announced.
MOVED = "tests/e2e/test_drivers_migration.py::test_from_a_connectx_to_an_ifcvf_and_back"
UNKNOWN = "its queues know no such thing; DPDK's driver offers none either"

#: Features that have no row; see `virtio_net_features.BESIDE`.
BESIDE: Mapping[Feature, Way] = {
    Feature.NET_F_STATUS: Way.PROMISED,
    Feature.VHOST_USER_F_PROTOCOL_FEATURES: Way.PROMISED,
    Feature.F_ORDER_PLATFORM: Way.CARRIED,
}


def _packets() -> dict[Row, Cell]:
    checksum, unasked = "test_a_partial_checksum", "test_what_the_guest_did_not_accept_does_not_leave"
    leaves = "test_a_large_frame_leaves_in_one_piece"

    def test(name: str, case: str) -> str:
        return f"{OFFLOADS}::{name}[mlx5-{case}]"

    return {
        Row.CSUM: yes(test(checksum, "False-4"), test(checksum, "False-6"), test(unasked, "csum")),
        Row.GUEST_CSUM: yes(test(checksum, "True-4"), test(checksum, "True-6"), test(checksum, "False-4")),
        Row.MAC: yes(
            f"{PORT}::test_whose_frames_a_guest_gets",
            note="the domain's, which the front-end shows and flows are made for",
            way=Way.PROMISED,
        ),
        Row.GSO: no("virtio 1.0 has taken the bit away; TSO and UFO have bits of their own"),
        Row.GUEST_TSO4: no(UNKNOWN),
        Row.GUEST_TSO6: no(UNKNOWN),
        Row.ECN: no(UNKNOWN),
        Row.UFO: no(UNKNOWN),
        Row.HOST_TSO4: yes(test(leaves, "4"), test(unasked, "tso4")),
        Row.HOST_TSO6: yes(test(leaves, "6"), test(unasked, "tso")),
        Row.MRG_RXBUF: no(UNKNOWN),
        Row.CTRL_RX: partly(
            "QEMU serves the control queue; a guest that is trusted (trustGuestRxFilters) gets all that"
            " reaches the VF, another one its own address and all groups, whatever it asks for",
            f"{PORT}::test_whose_frames_a_guest_gets",
            way=Way.FRONT_END,
        ),
        Row.MTU: partly(
            "that of its network interface; no guest was seen to use it with this driver",
            f"{HERE}::test_an_mtu_is_offered_where_the_vf_has_one[mlx5]",
        ).but_emulated("it drops what is longer than its MTU"),
    }


def _rings() -> dict[Row, Cell]:
    return {
        Row.CTRL_VQ: yes(
            MOVED, note="the front-end serves it; the firmware's own is not known", way=Way.PROMISED
        ),
        Row.ANY_LAYOUT: yes(
            f"{HERE}::test_header_and_packet_are_cut_anywhere[mlx5]",
            note="VERSION_1 implies it; the bit itself is for older guests",
        ),
        Row.GUEST_ANNOUNCE: yes(MOVED, f"{PORT}::test_a_guest_that_cannot_is_announced", way=Way.PROMISED),
        Row.MQ: yes(
            f"{QUEUES}::test_flows_spread_over_the_queues_of_a_connectx",
            f"{QUEUES}::test_without_the_feature_a_connectx_has_one_pair",
            note="by the hash of the firmware, over the pairs that the guest uses; shown with 4",
        ).but_emulated("the kernel's TAP spreads flows, in place of the firmware's hash"),
        Row.VERSION_1: yes(
            f"{HERE}::test_a_guest_of_virtio_1[mlx5]",
            f"{HERE}::test_a_guest_of_virtio_0_95[mlx5]",
            note="guests of virtio 0.95, without the bit, are served as well",
        ),
        Row.LOG_ALL: yes(
            f"{LOGGING}::test_the_device_marks_buffers_and_we_the_used_rings",
            f"{LOGGING}::test_nothing_is_marked_after_logging",
            MOVED,
            note="by the VF; the relay has no part in it",
            way=Way.PROMISED,
        ),
        Row.INDIRECT_DESC: no(UNKNOWN),
        Row.EVENT_IDX: no(UNKNOWN),
        Row.IN_ORDER: no(UNKNOWN),
        Row.IOMMU_PLATFORM: no("guests are not offered an IOMMU of their own"),
        Row.PACKED: no(
            "DPDK's driver offers them and sets up split ones; no device was at hand to show how it is done"
        ),
        Row.QUEUE_STATISTICS: yes(
            "tests/conformance/test_mlx5_driver.py::test_statistics",
            f"{HERE}::test_numbers_of_each_ring[mlx5]",
            note="the firmware's counters where it has them, notifications and interrupts",
        ),
    }


def _platforms() -> dict[Row, Cell]:
    unbuilt = no("never built or run there")
    return {
        Row.BSD_NIC_UIO: no("Linux only"),
        Row.LINUX_VFIO: no("mlx5_core, the kernel's own driver, stays bound: its functions are not VFIO's"),
        Row.OTHER_KDRV: partly("mlx5_core; no card was at hand").but_emulated("no kernel driver is involved"),
        Row.ARMV7: unbuilt,
        Row.ARMV8: unbuilt,
        Row.POWER8: unbuilt,
        Row.X86_32: unbuilt,
        Row.X86_64: yes(f"{HERE}::test_frames_pass_on_x86_64[mlx5]"),
        Row.USAGE_DOC: yes(f"{DOCUMENTS}::test_its_use_is_described[mlx5]"),
        Row.DESIGN_DOC: yes(f"{DOCUMENTS}::test_its_design_is_described[mlx5]"),
        Row.PERF_DOC: partly(
            "docs/performance.md: beside DPDK's driver on the emulated card; no card was at hand"
        ),
    }


FEATURES = Column(
    "mlx5",
    "VFs of ConnectX-6, ConnectX-6 Dx and BlueField",
    {**_packets(), **_rings(), **_platforms()},
    BESIDE,
)
