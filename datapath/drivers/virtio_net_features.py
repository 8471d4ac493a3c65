"""What the drivers of `virtio_net` have in common of their columns in the feature table.

A function that is plainly virtio does by itself what it has offered and the guest has accepted: the driver
passes such features on and is not asked again. Kept back are, besides what the cells say, features that need
more of the driver (NOTIFICATION_DATA, NOTIF_CONFIG_DATA, RING_RESET, SR_IOV), and commands of the control
queue, which the front-end serves itself and the function never sees (CTRL_GUEST_OFFLOADS, RSS).
"""

from collections.abc import Mapping

from datapath.features import Cell, Row, Way, no, partly, yes
from datapath.virtio import Feature

UNSHOWN = "passed on to a VF that has it; no test has seen a packet of that kind yet"
HERE = "tests/conformance/test_features.py"

#: Features that have no row. STATUS is promised, because the front-end owns the link status that it shows.
BESIDE: Mapping[Feature, Way] = {
    Feature.NET_F_STATUS: Way.PROMISED,
    Feature.VHOST_USER_F_PROTOCOL_FEATURES: Way.PROMISED,
    Feature.NET_F_HOST_USO: Way.CARRIED,
    Feature.F_ORDER_PLATFORM: Way.CARRIED,
}


#: What becomes of a guest of virtio 0.95.
WITHOUT_VERSION_1 = {
    "ifcvf": "guests of virtio 0.95, without the bit, are served as well",
    "virtio": "a guest of virtio 0.95, without the bit, is refused in one line",
}


def common(driver: str) -> dict[Row, Cell]:
    """The cells that the drivers share.

    :param driver: whose tests are meant, by its name, which is their parameter.
    """
    return {**_packets(driver), **_rings(driver), **_platforms(driver), **_documents(driver)}


def mac_offered(driver: str) -> str:
    """The test that the driver offers a MAC where the VF has one, and not else."""
    return f"{HERE}::test_a_mac_is_offered_where_the_vf_has_one[{driver}]"


def mtu_offered(driver: str) -> str:
    """The same of an MTU."""
    return f"{HERE}::test_an_mtu_is_offered_where_the_vf_has_one[{driver}]"


def _packets(driver: str) -> dict[Row, Cell]:
    return {
        **_offloads(driver),
        Row.UFO: partly(UNSHOWN).but_emulated("it has none: Linux makes no such packets any more"),
        Row.GSO: no("virtio 1.0 has taken the bit away; TSO and UFO have bits of their own"),
        Row.CTRL_RX: _receive_filter(driver),
    }


def _receive_filter(driver: str) -> Cell:
    """What a guest sets is known where QEMU tells; that a VF keeps to it is up to its physical function."""
    guest = "tests/e2e/test_rx_filters.py"
    return partly(
        "QEMU serves the control queue and tells what the guest wants, where the operator trusts it; but"
        " Linux has no way to tell a physical function for its VF, and no function's own control queue is"
        " used: of a real VF the guest gets what the physical function lets through",
        f"{guest}::test_a_guest_gets_what_it_asks_for",
        f"{guest}::test_a_guest_without_the_feature[ctrl_rx]",
        f"tests/conformance/test_port_filter.py::test_the_nic_filters[{driver}]",
        way=Way.FRONT_END,
    ).but_emulated("it is told, and drops what the guest does not want: addresses, groups, VLANs")


def _offloads(driver: str) -> dict[Row, Cell]:
    """Checksums and segmentation, each with a test in which the feature was not accepted."""

    def test(name: str, case: str) -> str:
        return f"tests/conformance/test_nic_offloads.py::{name}[{driver}-{case}]"

    checksum, unasked = "test_a_partial_checksum", "test_what_the_guest_did_not_accept_does_not_leave"
    leaves = "test_a_large_frame_leaves_in_one_piece"
    whole = "test_who_takes_large_frames_gets_them_whole"
    cut = "test_who_does_not_take_large_frames_gets_segments"
    marks = "test_congestion_marks"
    return {
        Row.CSUM: yes(test(checksum, "False-4"), test(checksum, "False-6"), test(unasked, "csum")),
        Row.GUEST_CSUM: yes(test(checksum, "True-4"), test(checksum, "True-6"), test(checksum, "False-4")),
        Row.GUEST_TSO4: yes(test(whole, "4"), test(cut, "nothing-4")),
        Row.GUEST_TSO6: yes(test(whole, "6"), test(cut, "nothing-6")),
        Row.ECN: yes(test(marks, "True"), test(marks, "False")),
        Row.HOST_TSO4: yes(test(leaves, "4"), test(unasked, "tso4")),
        Row.HOST_TSO6: yes(test(leaves, "6"), test(unasked, "tso")),
    }


def _rings(driver: str) -> dict[Row, Cell]:
    return {
        Row.VERSION_1: yes(
            f"{HERE}::test_a_guest_of_virtio_1[{driver}]",
            f"{HERE}::test_a_guest_of_virtio_0_95[{driver}]",
            note=WITHOUT_VERSION_1[driver],
        ),
        Row.MRG_RXBUF: yes(f"{HERE}::test_a_packet_fills_several_buffers[{driver}]"),
        Row.ANY_LAYOUT: yes(
            f"{HERE}::test_header_and_packet_are_cut_anywhere[{driver}]",
            note="VERSION_1 implies it; the bit itself is for older guests",
        ),
        Row.INDIRECT_DESC: yes(f"{HERE}::test_indirect_descriptors[{driver}]"),
        Row.EVENT_IDX: yes(f"{HERE}::test_interrupts_come_where_the_guest_wants_them[{driver}]"),
        # DMA addresses that an IOMMU translates are the addresses that the function is given here, whether
        # the guest knows of an IOMMU or not (virtio 1.3 section 6.1).
        Row.IOMMU_PLATFORM: partly(
            "agreed on with a VF that insists; guests are not offered an IOMMU of their own", way=Way.AGREED
        ),
        Row.QUEUE_STATISTICS: partly(
            "notifications of each ring, and used entries while the relay has them; a VF has no counters",
            f"{HERE}::test_numbers_of_each_ring[{driver}]",
        ),
    }


def _platforms(driver: str) -> dict[Row, Cell]:
    unbuilt = no("never built or run there")
    return {
        Row.BSD_NIC_UIO: no("Linux only"),
        Row.OTHER_KDRV: no("vfio-pci only: without an IOMMU's protection a guest would own its host"),
        Row.ARMV7: unbuilt,
        Row.ARMV8: unbuilt,
        Row.POWER8: unbuilt,
        Row.X86_32: unbuilt,
        Row.X86_64: yes(f"{HERE}::test_frames_pass_on_x86_64[{driver}]"),
    }


def _documents(driver: str) -> dict[Row, Cell]:
    documents = "tests/unit/test_features.py"
    return {
        Row.USAGE_DOC: yes(f"{documents}::test_its_use_is_described[{driver}]"),
        Row.DESIGN_DOC: yes(f"{documents}::test_its_design_is_described[{driver}]"),
    }
