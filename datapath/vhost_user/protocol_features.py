"""Which protocol features the back-end offers, whatever the driver: its part of the feature table.

`PROTOCOL_FEATURES`, what a front-end is told, follows from it.
"""

from collections.abc import Collection, Mapping

from datapath.features import Cell, Mark, Row, no, yes
from datapath.vhost_user.messages import ProtocolFeature
from datapath.virtio import bit

FEATURE_OF: Mapping[Row, ProtocolFeature] = {
    Row.PROTO_MQ: ProtocolFeature.MQ,
    Row.PROTO_LOG_SHMFD: ProtocolFeature.LOG_SHMFD,
    Row.PROTO_RARP: ProtocolFeature.RARP,
    Row.PROTO_REPLY_ACK: ProtocolFeature.REPLY_ACK,
    Row.PROTO_HOST_NOTIFIER: ProtocolFeature.HOST_NOTIFIER,
    Row.PROTO_PAGEFAULT: ProtocolFeature.PAGEFAULT,
}

PROTOCOL_CELLS: Mapping[Row, Cell] = {
    Row.PROTO_MQ: yes("tests/conformance/test_features.py::test_the_number_of_queue_pairs_is_told"),
    Row.PROTO_LOG_SHMFD: yes(
        "tests/conformance/test_port_logging.py::test_just_what_was_written_is_marked",
        "tests/conformance/test_port_logging.py::test_who_has_not_agreed_on_a_shared_log_has_none",
    ),
    Row.PROTO_RARP: yes(
        "tests/conformance/test_port_announce.py::test_a_request_is_kept_until_rings_run",
        "tests/conformance/test_port_announce.py::test_who_has_not_agreed_on_rarp_sends_none",
        "tests/e2e/test_migration.py::test_bridges_are_told[rarp]",
    ),
    Row.PROTO_REPLY_ACK: yes("tests/conformance/test_features.py::test_who_asks_is_told_how_it_went"),
    Row.PROTO_HOST_NOTIFIER: yes(
        "tests/conformance/test_host_notifiers.py::test_a_kick_goes_to_the_page",
        "tests/conformance/test_host_notifiers.py::test_without_the_bit_the_relay_works",
        "tests/conformance/test_host_notifiers_guest.py::test_kicks_of_a_guest_pass_no_relay",
        note="where the port is told to, the VF has a page for each queue, and the guest sees it so",
    ),
    Row.PROTO_PAGEFAULT: no(
        "post-copy migration: a VF that meets a page which has not arrived cannot wait for it, its DMA fails"
    ),
}

#: Rows whose feature is offered not always, but as the back-end finds it fit.
AT_TIMES: Collection[Row] = (Row.PROTO_HOST_NOTIFIER,)

#: Features that have no row. Never 14 (INBAND_NOTIFICATIONS) or 17 (XEN_MMAP): QEMU accepts and does not
#: implement them.
BESIDE = (
    ProtocolFeature.NET_MTU,
    ProtocolFeature.BACKEND_REQ,
    ProtocolFeature.CONFIGURE_MEM_SLOTS,
    ProtocolFeature.STATUS,
)

#: What is offered always.
PROTOCOL_FEATURES = sum(map(bit, BESIDE)) + sum(
    bit(FEATURE_OF[row])
    for row, cell in PROTOCOL_CELLS.items()
    if cell.mark is not Mark.NO and row not in AT_TIMES
)
