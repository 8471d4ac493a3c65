"""The mailboxes of ConnectX, for the driver and the emulated device alike: where each field lies.

Offsets and widths are in bits; `datapath.mlx5_mailbox` packs and unpacks. Facts and names are those of DPDK's
drivers/common/mlx5/mlx5_prm.h and Linux' include/linux/mlx5/mlx5_ifc.h and mlx5_ifc_vdpa.h; the source
of a structure is its name there. `datapath/emulation/mlx5/prm_header.py` makes a C header of this table.
"""

from enum import IntEnum, IntFlag

from datapath.mlx5_mailbox import Structure, layout


class Opcode(IntEnum):
    """What a command mailbox asks for."""

    QUERY_HCA_CAP = 0x100
    CREATE_MKEY = 0x200
    DESTROY_MKEY = 0x202
    CREATE_CQ = 0x400
    DESTROY_CQ = 0x401
    CREATE_QP = 0x500
    DESTROY_QP = 0x501
    RST2INIT_QP = 0x502
    INIT2RTR_QP = 0x503
    RTR2RTS_QP = 0x504
    TO_RST_QP = 0x50A
    ALLOC_TRANSPORT_DOMAIN = 0x816
    DEALLOC_TRANSPORT_DOMAIN = 0x817
    CREATE_TIR = 0x900
    DESTROY_TIR = 0x902
    CREATE_TIS = 0x912
    DESTROY_TIS = 0x914
    CREATE_RQT = 0x916
    MODIFY_RQT = 0x917
    DESTROY_RQT = 0x918
    CREATE_GENERAL_OBJECT = 0xA00
    MODIFY_GENERAL_OBJECT = 0xA01
    QUERY_GENERAL_OBJECT = 0xA02
    DESTROY_GENERAL_OBJECT = 0xA03


class ObjectType(IntEnum):
    """General objects; also the number of their bit in `general_obj_types`."""

    VIRTIO_NET_Q = 0x0D
    VIRTIO_Q_COUNTERS = 0x1C


class Status(IntEnum):
    """How a command ended (Linux include/linux/mlx5/device.h, MLX5_CMD_STAT_*)."""

    OK = 0x00
    INTERNAL_ERROR = 0x01
    BAD_OPERATION = 0x02
    BAD_PARAMETER = 0x03
    BAD_SYSTEM_STATE = 0x04
    BAD_RESOURCE = 0x05
    RESOURCE_BUSY = 0x06
    EXCEEDS_LIMIT = 0x08
    BAD_RESOURCE_STATE = 0x09
    BAD_INDEX = 0x0A
    NO_RESOURCES = 0x0F
    BAD_QP_STATE = 0x10
    BAD_INPUT_LENGTH = 0x50
    BAD_OUTPUT_LENGTH = 0x51


class CapabilityPage(IntEnum):
    """What QUERY_HCA_CAP can be asked for; see `capability_op_mod`."""

    GENERAL = 0x00
    ROCE = 0x04
    VDPA_EMULATION = 0x13


class QueueState(IntEnum):
    """States of a VIRTIO_NET_Q."""

    INIT = 0
    READY = 1
    SUSPENDED = 2
    ERROR = 3


class EventMode(IntEnum):
    """How a VIRTIO_NET_Q tells of what it has completed; as a capability, the number of a bit."""

    NONE = 0
    QP = 1
    MSIX = 2


class QueueType(IntEnum):
    """Rings of a VIRTIO_NET_Q; as a capability, the number of a bit."""

    SPLIT = 0
    PACKED = 1


class ModifyQueue(IntFlag):
    """What a modification of a VIRTIO_NET_Q is to change."""

    STATE = 1 << 0
    DIRTY_BITMAP = 1 << 3
    DIRTY_ENABLE = 1 << 4
    PERIOD = 1 << 5
    ADDRESSES = 1 << 6
    AVAILABLE_INDEX = 1 << 7
    USED_INDEX = 1 << 8
    TYPE = 1 << 9
    VERSION_1_0 = 1 << 10
    MKEY = 1 << 11
    FEATURES = 1 << 12
    EVENT_MODE = 1 << 13


class AccessMode(IntEnum):
    """How a memory key translates: by pages, a list of other keys, or a list with entries of one size."""

    MTT = 1
    KLM = 2
    KLM_FIXED_SIZE = 3


#: The event that a CQ raises when it is armed and has completions.
EVENT_COMPLETION = 0x00
#: The event that a VIRTIO_NET_Q raises when it has gone to ERROR.
EVENT_OBJECT_CHANGE = 0x27
#: `list_q_type` of an RQT that spreads over VIRTIO_NET_Qs.
RQT_VIRTIO_NET_Q = 1
#: `disp_type` of a TIR that leads to an RQT, and its `rx_hash_fn`.
TIR_INDIRECT = 1
HASH_TOEPLITZ = 2
#: `modify_bitmask` of MODIFY_RQT: the list.
MODIFY_RQT_LIST = 1
#: `opcode` of a completion entry: a receive that a peer's send has completed; and one never written.
CQE_RECEIVED_SEND = 2
CQE_INVALID = 15
#: `pm_state` of a QP that has migrated, which is the one in use; and the types of its receive queue.
PATH_MIGRATED = 3
#: `ts_format` of a QP: times are of a counter that runs free, or as the device has them; as a capability the
#: first says that there are no others.
FREE_RUNNING, DEVICE_TIME = 0, 1
RECEIVE_QUEUE = 0
RECEIVE_NOTHING = 3


COMMAND_IN = layout(
    "command_in", 0x10, "general_obj_in_cmd_hdr", opcode=(0x0, 16), uid=(0x10, 16), op_mod=(0x30, 16)
)
COMMAND_OUT = layout("command_out", 0x10, "general_obj_out_cmd_hdr", status=(0x0, 8), syndrome=(0x20, 32))
CREATED_OUT = layout("created_out", 0x10, "create_*_out", {0: COMMAND_OUT}, id=(0x48, 24))

QUERY_HCA_CAP_IN = layout(
    "query_hca_cap_in", 0x10, "query_hca_cap_in", {0: COMMAND_IN}, {"opcode": Opcode.QUERY_HCA_CAP}
)
GENERAL_CAPABILITIES = layout(
    "general_capabilities",
    0x1000,
    "cmd_hca_cap",
    hca_cap_2=(0x20, 1),
    relaxed_ordering_write=(0xE8, 1),
    relaxed_ordering_read=(0xE9, 1),
    eth_virt=(0x1A3, 1),
    eswitch_manager=(0x1A7, 1),
    wqe_based_flow_table_update=(0x1FB, 1),
    qos=(0x21B, 1),
    eth_net_offloads=(0x21C, 1),
    roce=(0x21D, 1),
    num_lag_ports=(0x27C, 4),
    pci_relaxed_ordered_read=(0x32A, 1),
    log_max_rqt_size=(0x393, 5),
    general_obj_types=(0x400, 64),
    crypto=(0x469, 1),
)
VDPA_CAPABILITIES = layout(
    "vdpa_capabilities",
    0x1000,
    "virtio_emulation_cap",
    desc_tunnel_offload_type=(0x0, 1),
    eth_frame_offload_type=(0x1, 1),
    virtio_version_1_0=(0x2, 1),
    tso_ipv4=(0x3, 1),
    tso_ipv6=(0x4, 1),
    tx_csum=(0x5, 1),
    rx_csum=(0x6, 1),
    event_mode=(0x10, 8),
    virtio_queue_type=(0x18, 8),
    log_doorbell_stride=(0x33, 5),
    vnet_modify_ext=(0x38, 1),
    virtio_net_q_addr_modify=(0x39, 1),
    virtio_q_index_modify=(0x3A, 1),
    log_doorbell_bar_size=(0x3B, 5),
    doorbell_bar_offset=(0x40, 64),
    max_num_virtio_queues=(0x88, 24),
    freeze_to_rdy_supported=(0xD4, 1),
    umem_1_buffer_param_a=(0x100, 32),
    umem_1_buffer_param_b=(0x120, 32),
    umem_2_buffer_param_a=(0x140, 32),
    umem_2_buffer_param_b=(0x160, 32),
    umem_3_buffer_param_a=(0x180, 32),
    umem_3_buffer_param_b=(0x1A0, 32),
)
ROCE_CAPABILITIES = layout("roce_capabilities", 0x1000, "roce_caps", qp_ts_format=(0x1E, 2))
QUERY_GENERAL_CAP_OUT = layout(
    "query_general_cap_out", 0x1010, "query_hca_cap_out", {0: COMMAND_OUT, 0x10: GENERAL_CAPABILITIES}
)
QUERY_VDPA_CAP_OUT = layout(
    "query_vdpa_cap_out", 0x1010, "query_hca_cap_out", {0: COMMAND_OUT, 0x10: VDPA_CAPABILITIES}
)
QUERY_ROCE_CAP_OUT = layout(
    "query_roce_cap_out", 0x1010, "query_hca_cap_out", {0: COMMAND_OUT, 0x10: ROCE_CAPABILITIES}
)

MKEY_CONTEXT = layout(
    "mkey_context",
    0x40,
    "mkc",
    relaxed_ordering_write=(0xD, 1),
    umr_en=(0x10, 1),
    rw=(0x12, 1),
    rr=(0x13, 1),
    lw=(0x14, 1),
    lr=(0x15, 1),
    access_mode=(0x16, 2),
    qpn=(0x20, 24),
    mkey_7_0=(0x38, 8),
    pd=(0x68, 24),
    start_addr=(0x80, 64),
    len=(0xC0, 64),
    translations_octword_size=(0x1A0, 32),
    relaxed_ordering_read=(0x1D9, 1),
    log_page_size=(0x1DB, 5),
)
CREATE_MKEY_IN = layout(
    "create_mkey_in",
    0x110,
    "create_mkey_in",
    {0: COMMAND_IN, 0x10: MKEY_CONTEXT},
    {"opcode": Opcode.CREATE_MKEY},
    pg_access=(0x60, 1),
    translations_octword_actual_size=(0x300, 32),
    mkey_umem_id=(0x320, 32),
    mkey_umem_offset=(0x340, 64),
)
#: Entries of an indirect key, after CREATE_MKEY_IN.
KLM = layout("klm", 0x10, "klm", byte_count=(0x0, 32), mkey=(0x20, 32), address=(0x40, 64))

OBJECT_IN = layout(
    "object_in",
    0x10,
    "general_obj_in_cmd_hdr",
    opcode=(0x0, 16),
    uid=(0x10, 16),
    obj_type=(0x30, 16),
    obj_id=(0x40, 32),
)
OBJECT_OUT = layout("object_out", 0x10, "general_obj_out_cmd_hdr", {0: COMMAND_OUT}, obj_id=(0x40, 32))
VIRTIO_Q = layout(
    "virtio_q",
    0x80,
    "virtio_q",
    virtio_q_type=(0x0, 8),
    event_mode=(0xD, 3),
    queue_index=(0x10, 16),
    full_emulation=(0x20, 1),
    virtio_version_1_0=(0x21, 1),
    offload_type=(0x24, 4),
    event_qpn_or_msix=(0x28, 24),
    doorbell_stride_index=(0x40, 16),
    queue_size=(0x50, 16),
    device_emulation_id=(0x60, 32),
    desc_addr=(0x80, 64),
    used_addr=(0xC0, 64),
    available_addr=(0x100, 64),
    virtio_q_mkey=(0x140, 32),
    error_type=(0x178, 8),
    umem_1_id=(0x180, 32),
    umem_1_size=(0x1A0, 32),
    umem_1_offset=(0x1C0, 64),
    umem_2_id=(0x200, 32),
    umem_2_size=(0x220, 32),
    umem_2_offset=(0x240, 64),
    umem_3_id=(0x280, 32),
    umem_3_size=(0x2A0, 32),
    umem_3_offset=(0x2C0, 64),
    counter_set_id=(0x300, 32),
    pd=(0x328, 24),
    queue_period_mode=(0x342, 2),
    queue_period_us=(0x344, 12),
    queue_max_count=(0x350, 16),
)
VIRTIO_NET_Q = layout(
    "virtio_net_q",
    0xC0,
    "virtio_net_q",
    {0x40: VIRTIO_Q},
    modify_field_select=(0x0, 64),
    tso_ipv4=(0x80, 1),
    tso_ipv6=(0x81, 1),
    tx_csum=(0x82, 1),
    rx_csum=(0x83, 1),
    dirty_bitmap_dump_enable=(0x8A, 1),
    vhost_log_page=(0x8B, 5),
    state=(0x9C, 4),
    tisn_or_qpn=(0xA8, 24),
    dirty_bitmap_mkey=(0xC0, 32),
    dirty_bitmap_size=(0xE0, 32),
    dirty_bitmap_addr=(0x100, 64),
    hw_available_index=(0x140, 16),
    hw_used_index=(0x150, 16),
)
CREATE_VIRTIO_NET_Q_IN = layout(
    "create_virtio_net_q_in",
    0xD0,
    "create_virtq_in",
    {0: OBJECT_IN, 0x10: VIRTIO_NET_Q},
    {"opcode": Opcode.CREATE_GENERAL_OBJECT, "obj_type": ObjectType.VIRTIO_NET_Q},
)
MODIFY_VIRTIO_NET_Q_IN = layout(
    "modify_virtio_net_q_in",
    0xD0,
    "create_virtq_in",
    {0: OBJECT_IN, 0x10: VIRTIO_NET_Q},
    {"opcode": Opcode.MODIFY_GENERAL_OBJECT, "obj_type": ObjectType.VIRTIO_NET_Q},
)
QUERY_VIRTIO_NET_Q_IN = layout(
    "query_virtio_net_q_in",
    0x10,
    "general_obj_in_cmd_hdr",
    {0: OBJECT_IN},
    {"opcode": Opcode.QUERY_GENERAL_OBJECT, "obj_type": ObjectType.VIRTIO_NET_Q},
)
QUERY_VIRTIO_NET_Q_OUT = layout(
    "query_virtio_net_q_out", 0xD0, "query_virtq_out", {0: OBJECT_OUT, 0x10: VIRTIO_NET_Q}
)

VIRTIO_Q_COUNTERS = layout(
    "virtio_q_counters",
    0x38,
    "virtio_q_counters",
    received_desc=(0x80, 64),
    completed_desc=(0xC0, 64),
    error_cqes=(0x100, 32),
    bad_desc_errors=(0x120, 32),
    exceed_max_chain=(0x140, 32),
    invalid_buffer=(0x160, 32),
)
CREATE_VIRTIO_Q_COUNTERS_IN = layout(
    "create_virtio_q_counters_in",
    0x48,
    "create_virtio_q_counters_in",
    {0: OBJECT_IN, 0x10: VIRTIO_Q_COUNTERS},
    {"opcode": Opcode.CREATE_GENERAL_OBJECT, "obj_type": ObjectType.VIRTIO_Q_COUNTERS},
)
QUERY_VIRTIO_Q_COUNTERS_IN = layout(
    "query_virtio_q_counters_in",
    0x10,
    "general_obj_in_cmd_hdr",
    {0: OBJECT_IN},
    {"opcode": Opcode.QUERY_GENERAL_OBJECT, "obj_type": ObjectType.VIRTIO_Q_COUNTERS},
)
QUERY_VIRTIO_Q_COUNTERS_OUT = layout(
    "query_virtio_q_counters_out",
    0x48,
    "query_virtio_q_counters_out",
    {0: OBJECT_OUT, 0x10: VIRTIO_Q_COUNTERS},
)

ALLOC_TRANSPORT_DOMAIN_IN = layout(
    "alloc_transport_domain_in",
    0x10,
    "alloc_transport_domain_in",
    {0: COMMAND_IN},
    {"opcode": Opcode.ALLOC_TRANSPORT_DOMAIN},
)
TIS_CONTEXT = layout(
    "tis_context",
    0xA0,
    "tisc",
    strict_lag_tx_port_affinity=(0x0, 1),
    lag_tx_port_affinity=(0x4, 4),
    prio=(0xC, 4),
    transport_domain=(0x128, 24),
)
CREATE_TIS_IN = layout(
    "create_tis_in", 0xC0, "create_tis_in", {0: COMMAND_IN, 0x20: TIS_CONTEXT}, {"opcode": Opcode.CREATE_TIS}
)
RQT_CONTEXT = layout(
    "rqt_context",
    0xF0,
    "rqtc",
    list_q_type=(0xA5, 3),
    rqt_max_size=(0xB0, 16),
    rqt_actual_size=(0xD0, 16),
)
CREATE_RQT_IN = layout(
    "create_rqt_in",
    0x110,
    "create_rqt_in",
    {0: COMMAND_IN, 0x20: RQT_CONTEXT},
    {"opcode": Opcode.CREATE_RQT},
)
MODIFY_RQT_IN = layout(
    "modify_rqt_in",
    0x110,
    "modify_rqt_in",
    {0: COMMAND_IN, 0x20: RQT_CONTEXT},
    {"opcode": Opcode.MODIFY_RQT},
    rqtn=(0x48, 24),
    modify_bitmask=(0x80, 64),
)
#: Entries of an RQT, after CREATE_RQT_IN and MODIFY_RQT_IN.
RQT_ENTRY = layout("rqt_entry", 0x4, "rq_num", queue=(0x8, 24))
TIR_CONTEXT = layout(
    "tir_context",
    0xF0,
    "tirc",
    disp_type=(0x20, 4),
    rx_hash_symmetric=(0x100, 1),
    indirect_table=(0x108, 24),
    rx_hash_fn=(0x120, 4),
    self_lb_block=(0x126, 2),
    transport_domain=(0x128, 24),
    rx_hash_toeplitz_key=(0x140, 320),
    outer_l3_prot_type=(0x280, 1),
    outer_l4_prot_type=(0x281, 1),
    outer_selected_fields=(0x282, 30),
    inner_l3_prot_type=(0x2A0, 1),
    inner_l4_prot_type=(0x2A1, 1),
    inner_selected_fields=(0x2A2, 30),
)
CREATE_TIR_IN = layout(
    "create_tir_in", 0x110, "create_tir_in", {0: COMMAND_IN, 0x20: TIR_CONTEXT}, {"opcode": Opcode.CREATE_TIR}
)

CQ_CONTEXT = layout(
    "cq_context",
    0x40,
    "cqc",
    dbr_umem_valid=(0x6, 1),
    cqe_sz=(0x8, 3),
    cc=(0xB, 1),
    oi=(0xE, 1),
    dbr_umem_id=(0x20, 32),
    log_cq_size=(0x63, 5),
    uar_page=(0x68, 24),
    c_eqn=(0xB8, 8),
    log_page_size=(0xC3, 5),
    dbr_addr=(0x1C0, 64),
)
CREATE_CQ_IN = layout(
    "create_cq_in",
    0x110,
    "create_cq_in",
    {0: COMMAND_IN, 0x10: CQ_CONTEXT},
    {"opcode": Opcode.CREATE_CQ},
    cq_umem_offset=(0x280, 64),
    cq_umem_id=(0x2C0, 32),
    cq_umem_valid=(0x2E0, 1),
)
ADDRESS_PATH = layout(
    "address_path", 0x2C, "ads", fl=(0x0, 1), ack_timeout=(0x40, 5), vhca_port_num=(0x128, 8)
)
QP_CONTEXT = layout(
    "qp_context",
    0xE8,
    "qpc",
    {0x18: ADDRESS_PATH},
    st=(0x8, 8),
    pm_state=(0x13, 2),
    pd=(0x28, 24),
    mtu=(0x40, 3),
    log_msg_max=(0x43, 5),
    log_rq_size=(0x49, 4),
    log_rq_stride=(0x4D, 3),
    no_sq=(0x50, 1),
    log_sq_size=(0x51, 4),
    ts_format=(0x58, 2),
    uar_page=(0x68, 24),
    remote_qpn=(0xA8, 24),
    log_ack_req_freq=(0x380, 4),
    retry_count=(0x38D, 3),
    rnr_retry=(0x390, 3),
    cqn_snd=(0x3E8, 24),
    rre=(0x490, 1),
    rwe=(0x491, 1),
    min_rnr_nak=(0x4A3, 5),
    cqn_rcv=(0x4E8, 24),
    dbr_addr=(0x500, 64),
    rq_type=(0x565, 3),
    dbr_umem_valid=(0x683, 1),
    dbr_umem_id=(0x720, 32),
)
CREATE_QP_IN = layout(
    "create_qp_in",
    0x110,
    "create_qp_in",
    {0: COMMAND_IN, 0x18: QP_CONTEXT},
    {"opcode": Opcode.CREATE_QP},
    wq_umem_offset=(0x800, 64),
    wq_umem_id=(0x840, 32),
    wq_umem_valid=(0x860, 1),
)


def _qp_move(opcode: Opcode) -> Structure:
    name = f"{opcode.name.lower()}_in"
    parts = {0: COMMAND_IN, 0x18: QP_CONTEXT}
    return layout(name, 0x110, name, parts, {"opcode": opcode}, qpn=(0x48, 24))


RST2INIT_QP_IN = _qp_move(Opcode.RST2INIT_QP)
INIT2RTR_QP_IN = _qp_move(Opcode.INIT2RTR_QP)
RTR2RTS_QP_IN = _qp_move(Opcode.RTR2RTS_QP)
TO_RST_QP_IN = layout(
    "to_rst_qp_in", 0x10, "qp_2rst_in", {0: COMMAND_IN}, {"opcode": Opcode.TO_RST_QP}, qpn=(0x48, 24)
)

#: A completion entry, of which only its end matters here.
CQE = layout("cqe", 0x40, "mlx5_cqe", wqe_counter=(0x1E0, 16), opcode=(0x1F8, 4), owner=(0x1FF, 1))
#: The second word of a CQ's doorbell record, and what is stored to the UAR page after it.
CQ_ARM = layout(
    "cq_arm", 0x4, "mlx5_cq_arm", arm_sn=(0x2, 2), solicited_only=(0x7, 1), consumer_index=(0x8, 24)
)
CQ_DOORBELL = layout("cq_doorbell", 0x8, "mlx5_cq_arm", {0: CQ_ARM}, cqn=(0x20, 32))

#: What a steering rule matches of a packet's outer headers; the other parts of it are not used.
FLOW_MATCH = layout(
    "flow_match",
    0x140,
    "fte_match_param",
    smac_47_16=(0x0, 32),
    smac_15_0=(0x20, 16),
    ethertype=(0x30, 16),
    dmac_47_16=(0x40, 32),
    dmac_15_0=(0x60, 16),
    first_vid=(0x74, 12),
    ip_protocol=(0x80, 8),
    cvlan_tag=(0x90, 1),
    ip_version=(0x93, 4),
)


#: Name -> structure.
STRUCTURES = {value.name: value for value in tuple(globals().values()) if isinstance(value, Structure)}


def capability_op_mod(page: CapabilityPage) -> int:
    """`op_mod` of QUERY_HCA_CAP for the values in force of a page."""
    return page << 1 | 1
