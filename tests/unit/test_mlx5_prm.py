"""The mailbox table against the same facts in another notation, and mailboxes against literal bytes."""

import re

import pytest

from datapath import mlx5_prm as prm
from datapath.mlx5_mailbox import Field, get, layout, pack, reserved, unpack

#: Structure -> its fields as hardware manuals print them: the byte of a dword with its bits from 31 to 0, or
#: the byte of a longer field and its length.
PLACES = {
    "command_in": """
        opcode 0x00[31:16]
        uid 0x00[15:0]
        op_mod 0x04[15:0]
    """,
    "command_out": """
        status 0x00[31:24]
        syndrome 0x04[31:0]
    """,
    "object_in": """
        opcode 0x00[31:16]
        uid 0x00[15:0]
        obj_type 0x04[15:0]
        obj_id 0x08[31:0]
    """,
    "object_out": """
        obj_id 0x08[31:0]
    """,
    "roce_capabilities": """
        qp_ts_format 0x00[1:0]
    """,
    "general_capabilities": """
        relaxed_ordering_write 0x1C[23]
        relaxed_ordering_read 0x1C[22]
        eth_virt 0x34[28]
        eswitch_manager 0x34[24]
        wqe_based_flow_table_update 0x3C[4]
        qos 0x40[4]
        eth_net_offloads 0x40[3]
        roce 0x40[2]
        num_lag_ports 0x4C[3:0]
        pci_relaxed_ordered_read 0x64[21]
        log_max_rqt_size 0x70[12:8]
        general_obj_types 0x80 8 bytes
        crypto 0x8C[22]
        hca_cap_2 0x04[31]
    """,
    "vdpa_capabilities": """
        desc_tunnel_offload_type 0x00[31]
        eth_frame_offload_type 0x00[30]
        virtio_version_1_0 0x00[29]
        tso_ipv4 0x00[28]
        tso_ipv6 0x00[27]
        tx_csum 0x00[26]
        rx_csum 0x00[25]
        event_mode 0x00[15:8]
        virtio_queue_type 0x00[7:0]
        log_doorbell_stride 0x04[12:8]
        vnet_modify_ext 0x04[7]
        virtio_net_q_addr_modify 0x04[6]
        virtio_q_index_modify 0x04[5]
        log_doorbell_bar_size 0x04[4:0]
        doorbell_bar_offset 0x08 8 bytes
        max_num_virtio_queues 0x10[23:0]
        freeze_to_rdy_supported 0x18[11]
        umem_1_buffer_param_a 0x20[31:0]
        umem_1_buffer_param_b 0x24[31:0]
        umem_2_buffer_param_a 0x28[31:0]
        umem_2_buffer_param_b 0x2C[31:0]
        umem_3_buffer_param_a 0x30[31:0]
        umem_3_buffer_param_b 0x34[31:0]
    """,
    "mkey_context": """
        relaxed_ordering_write 0x00[18]
        umr_en 0x00[15]
        rw 0x00[13]
        rr 0x00[12]
        lw 0x00[11]
        lr 0x00[10]
        access_mode 0x00[9:8]
        qpn 0x04[31:8]
        mkey_7_0 0x04[7:0]
        pd 0x0C[23:0]
        start_addr 0x10 8 bytes
        len 0x18 8 bytes
        translations_octword_size 0x34[31:0]
        relaxed_ordering_read 0x38[6]
        log_page_size 0x38[4:0]
    """,
    "create_mkey_in": """
        pg_access 0x0C[31]
        translations_octword_actual_size 0x60[31:0]
        mkey_umem_id 0x64[31:0]
        mkey_umem_offset 0x68 8 bytes
    """,
    "created_out": """
        id 0x08[23:0]
    """,
    "klm": """
        byte_count 0x0[31:0]
        mkey 0x4[31:0]
        address 0x8 8 bytes
    """,
    "virtio_net_q": """
        modify_field_select 0x00 8 bytes
        tso_ipv4 0x10[31]
        tso_ipv6 0x10[30]
        tx_csum 0x10[29]
        rx_csum 0x10[28]
        dirty_bitmap_dump_enable 0x10[21]
        vhost_log_page 0x10[20:16]
        state 0x10[3:0]
        tisn_or_qpn 0x14[23:0]
        dirty_bitmap_mkey 0x18[31:0]
        dirty_bitmap_size 0x1C[31:0]
        dirty_bitmap_addr 0x20 8 bytes
        hw_available_index 0x28[31:16]
        hw_used_index 0x28[15:0]
    """,
    "virtio_q": """
        virtio_q_type 0x00[31:24]
        event_mode 0x00[18:16]
        queue_index 0x00[15:0]
        full_emulation 0x04[31]
        virtio_version_1_0 0x04[30]
        offload_type 0x04[27:24]
        event_qpn_or_msix 0x04[23:0]
        doorbell_stride_index 0x08[31:16]
        queue_size 0x08[15:0]
        device_emulation_id 0x0C[31:0]
        desc_addr 0x10 8 bytes
        used_addr 0x18 8 bytes
        available_addr 0x20 8 bytes
        virtio_q_mkey 0x28[31:0]
        error_type 0x2C[7:0]
        umem_1_id 0x30[31:0]
        umem_1_size 0x34[31:0]
        umem_1_offset 0x38 8 bytes
        umem_2_id 0x40[31:0]
        umem_2_size 0x44[31:0]
        umem_2_offset 0x48 8 bytes
        umem_3_id 0x50[31:0]
        umem_3_size 0x54[31:0]
        umem_3_offset 0x58 8 bytes
        counter_set_id 0x60[31:0]
        pd 0x64[23:0]
        queue_period_mode 0x68[29:28]
        queue_period_us 0x68[27:16]
        queue_max_count 0x68[15:0]
    """,
    "virtio_q_counters": """
        received_desc 0x10 8 bytes
        completed_desc 0x18 8 bytes
        error_cqes 0x20[31:0]
        bad_desc_errors 0x24[31:0]
        exceed_max_chain 0x28[31:0]
        invalid_buffer 0x2C[31:0]
    """,
    "tis_context": """
        strict_lag_tx_port_affinity 0x00[31]
        lag_tx_port_affinity 0x00[27:24]
        prio 0x00[19:16]
        transport_domain 0x24[23:0]
    """,
    "rqt_context": """
        list_q_type 0x14[26:24]
        rqt_max_size 0x14[15:0]
        rqt_actual_size 0x18[15:0]
    """,
    "modify_rqt_in": """
        rqtn 0x08[23:0]
        modify_bitmask 0x10 8 bytes
    """,
    "tir_context": """
        disp_type 0x04[31:28]
        rx_hash_symmetric 0x20[31]
        indirect_table 0x20[23:0]
        rx_hash_fn 0x24[31:28]
        self_lb_block 0x24[25:24]
        transport_domain 0x24[23:0]
        rx_hash_toeplitz_key 0x28 40 bytes
        outer_l3_prot_type 0x50[31]
        outer_l4_prot_type 0x50[30]
        outer_selected_fields 0x50[29:0]
        inner_l3_prot_type 0x54[31]
        inner_l4_prot_type 0x54[30]
        inner_selected_fields 0x54[29:0]
    """,
    "cq_context": """
        dbr_umem_valid 0x00[25]
        cqe_sz 0x00[23:21]
        cc 0x00[20]
        oi 0x00[17]
        dbr_umem_id 0x04[31:0]
        log_cq_size 0x0C[28:24]
        uar_page 0x0C[23:0]
        c_eqn 0x14[7:0]
        log_page_size 0x18[28:24]
        dbr_addr 0x38 8 bytes
    """,
    "create_cq_in": """
        cq_umem_offset 0x50 8 bytes
        cq_umem_id 0x58[31:0]
        cq_umem_valid 0x5C[31]
    """,
    "qp_context": """
        st 0x00[23:16]
        pm_state 0x00[12:11]
        pd 0x04[23:0]
        mtu 0x08[31:29]
        log_msg_max 0x08[28:24]
        log_rq_size 0x08[22:19]
        log_rq_stride 0x08[18:16]
        no_sq 0x08[15]
        log_sq_size 0x08[14:11]
        ts_format 0x08[7:6]
        uar_page 0x0C[23:0]
        remote_qpn 0x14[23:0]
        log_ack_req_freq 0x70[31:28]
        retry_count 0x70[18:16]
        rnr_retry 0x70[15:13]
        cqn_snd 0x7C[23:0]
        rre 0x90[15]
        rwe 0x90[14]
        min_rnr_nak 0x94[28:24]
        cqn_rcv 0x9C[23:0]
        dbr_addr 0xA0 8 bytes
        rq_type 0xAC[26:24]
        dbr_umem_valid 0xD0[28]
        dbr_umem_id 0xE4[31:0]
    """,
    "address_path": """
        fl 0x00[31]
        ack_timeout 0x08[31:27]
        vhca_port_num 0x24[23:16]
    """,
    "create_qp_in": """
        wq_umem_offset 0x100 8 bytes
        wq_umem_id 0x108[31:0]
        wq_umem_valid 0x10C[31]
    """,
    "to_rst_qp_in": """
        qpn 0x08[23:0]
    """,
    "cqe": """
        wqe_counter 0x3C[31:16]
        opcode 0x3C[7:4]
        owner 0x3C[0]
    """,
    "cq_arm": """
        arm_sn 0x0[29:28]
        solicited_only 0x0[24]
        consumer_index 0x0[23:0]
    """,
    "cq_doorbell": """
        cqn 0x4[31:0]
    """,
    "flow_match": """
        smac_47_16 0x0[31:0]
        smac_15_0 0x4[31:16]
        ethertype 0x4[15:0]
        dmac_47_16 0x8[31:0]
        dmac_15_0 0xC[31:16]
        first_vid 0xC[11:0]
        ip_protocol 0x10[31:24]
        cvlan_tag 0x10[15]
        ip_version 0x10[12:9]
    """,
}
#: Structure -> bytes of its fixed part.
SIZES = {
    "query_hca_cap_in": 0x10,
    "query_general_cap_out": 0x1010,
    "query_roce_cap_out": 0x1010,
    "query_vdpa_cap_out": 0x1010,
    "create_mkey_in": 0x110,
    "klm": 16,
    "create_virtio_net_q_in": 0xD0,
    "modify_virtio_net_q_in": 0xD0,
    "query_virtio_net_q_in": 0x10,
    "query_virtio_net_q_out": 0xD0,
    "create_virtio_q_counters_in": 0x48,
    "query_virtio_q_counters_in": 0x10,
    "query_virtio_q_counters_out": 0x48,
    "alloc_transport_domain_in": 0x10,
    "create_tis_in": 0xC0,
    "create_rqt_in": 0x110,
    "modify_rqt_in": 0x110,
    "rqt_entry": 4,
    "create_tir_in": 0x110,
    "create_cq_in": 0x110,
    "create_qp_in": 0x110,
    "rst2init_qp_in": 0x110,
    "init2rtr_qp_in": 0x110,
    "rtr2rts_qp_in": 0x110,
    "to_rst_qp_in": 0x10,
    "cqe": 64,
    "flow_match": 0x140,
}
#: Command -> its opcode, and the type of its object.
OPCODES = {
    "query_hca_cap_in": (0x100, None),
    "create_mkey_in": (0x200, None),
    "create_cq_in": (0x400, None),
    "create_qp_in": (0x500, None),
    "rst2init_qp_in": (0x502, None),
    "init2rtr_qp_in": (0x503, None),
    "rtr2rts_qp_in": (0x504, None),
    "to_rst_qp_in": (0x50A, None),
    "alloc_transport_domain_in": (0x816, None),
    "create_tir_in": (0x900, None),
    "create_tis_in": (0x912, None),
    "create_rqt_in": (0x916, None),
    "modify_rqt_in": (0x917, None),
    "create_virtio_net_q_in": (0xA00, 0x0D),
    "modify_virtio_net_q_in": (0xA01, 0x0D),
    "query_virtio_net_q_in": (0xA02, 0x0D),
    "create_virtio_q_counters_in": (0xA00, 0x1C),
    "query_virtio_q_counters_in": (0xA02, 0x1C),
}
#: The mailboxes that have another structure in them, and at which byte.
WITHIN = [
    ("query_general_cap_out", "general_capabilities", 0x10),
    ("query_roce_cap_out", "roce_capabilities", 0x10),
    ("query_vdpa_cap_out", "vdpa_capabilities", 0x10),
    ("create_mkey_in", "mkey_context", 0x10),
    ("create_virtio_net_q_in", "virtio_net_q", 0x10),
    ("create_virtio_net_q_in", "virtio_q", 0x50),
    ("modify_virtio_net_q_in", "virtio_q", 0x50),
    ("query_virtio_net_q_out", "virtio_q", 0x50),
    ("query_virtio_q_counters_out", "virtio_q_counters", 0x10),
    ("create_tis_in", "tis_context", 0x20),
    ("create_rqt_in", "rqt_context", 0x20),
    ("modify_rqt_in", "rqt_context", 0x20),
    ("create_tir_in", "tir_context", 0x20),
    ("create_cq_in", "cq_context", 0x10),
    ("create_qp_in", "qp_context", 0x18),
    ("rst2init_qp_in", "address_path", 0x30),
    ("rtr2rts_qp_in", "qp_context", 0x18),
]
KEY = bytes.fromhex("2cc681d15bdbf4f7fca28319db1a3e946b9e38d92c9c03d1ad9944a7d9563d59063c25f3fc1fdc2a")


def place(text: str) -> Field:
    """A field from the notation of `PLACES`."""
    if bits := re.fullmatch(r"0x(\w+)\[(\d+)(?::(\d+))?\]", text):
        high = int(bits[2])
        low = int(bits[3] or high)
        return Field(8 * int(bits[1], 16) + 31 - high, high - low + 1)
    whole = re.fullmatch(r"0x(\w+) (\d+) bytes", text)
    assert whole, text
    return Field(8 * int(whole[1], 16), 8 * int(whole[2]))


def places(name: str) -> dict[str, Field]:
    lines = (line.split(None, 1) for line in PLACES[name].strip().splitlines())
    return {field: place(text.strip()) for field, text in lines}


@pytest.mark.parametrize("name", PLACES)
def test_fields_lie_where_the_manuals_have_them(name: str) -> None:
    expected = places(name)
    known = prm.STRUCTURES[name].fields
    assert {field: known[field] for field in expected} == expected


@pytest.mark.parametrize("name", PLACES)
def test_each_field_fills_its_own_bits(name: str) -> None:
    structure = prm.STRUCTURES[name]
    for field, where in places(name).items():
        ones = (1 << where.width) - 1
        value = ones.to_bytes(where.width // 8) if where.width > 64 else ones
        if field not in structure.constants:
            expected = ones << 8 * structure.size - where.offset - where.width
            base = int.from_bytes(pack(structure))
            assert int.from_bytes(pack(structure, **{field: value})) ^ base == expected, field


@pytest.mark.parametrize(("outer", "inner", "at"), WITHIN)
def test_structures_within_others(outer: str, inner: str, at: int) -> None:
    fields = prm.STRUCTURES[outer].fields
    for name, field in prm.STRUCTURES[inner].fields.items():
        assert fields[name] == Field(8 * at + field.offset, field.width), name


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    assert prm.STRUCTURES[name].size == SIZES[name]


def test_every_structure_is_known_here() -> None:
    assert {*PLACES, *SIZES} == prm.STRUCTURES.keys()


@pytest.mark.parametrize("name", OPCODES)
def test_commands_begin_with_their_opcode(name: str) -> None:
    opcode, kind = OPCODES[name]
    mailbox = pack(prm.STRUCTURES[name])
    assert int.from_bytes(mailbox[:4]) == opcode << 16
    assert int.from_bytes(mailbox[4:8]) == (kind or 0)


def test_every_command_has_its_opcode_tested() -> None:
    assert {name for name, it in prm.STRUCTURES.items() if "opcode" in it.constants} == OPCODES.keys()


def test_capability_pages() -> None:
    queries = [pack(prm.QUERY_HCA_CAP_IN, op_mod=prm.capability_op_mod(page)) for page in prm.CapabilityPage]
    assert queries == [
        bytes.fromhex("01000000 00000001 00000000 00000000"),
        bytes.fromhex("01000000 00000009 00000000 00000000"),
        bytes.fromhex("01000000 00000027 00000000 00000000"),
    ]


def test_a_tir_as_dpdk_makes_it() -> None:
    """IPv4 and UDP, hashed by addresses and ports."""
    tir = pack(
        prm.CREATE_TIR_IN,
        disp_type=prm.TIR_INDIRECT,
        rx_hash_symmetric=1,
        indirect_table=0x1234,
        rx_hash_fn=prm.HASH_TOEPLITZ,
        transport_domain=0x56,
        rx_hash_toeplitz_key=KEY,
        outer_l4_prot_type=1,
        outer_selected_fields=0xF,
    )
    expected = bytearray(0x110)
    expected[0x00:0x04] = bytes.fromhex("09000000")
    expected[0x24:0x28] = bytes.fromhex("10000000")
    expected[0x40:0x44] = bytes.fromhex("80001234")
    expected[0x44:0x48] = bytes.fromhex("20000056")
    expected[0x48:0x70] = KEY
    expected[0x70:0x74] = bytes.fromhex("4000000f")
    assert tir == expected


def test_steering_of_ipv4_udp_as_dpdk_matches_it() -> None:
    mask = pack(prm.FLOW_MATCH, ip_protocol=0xFF, ip_version=0xF)
    value = pack(prm.FLOW_MATCH, ip_protocol=17, ip_version=4)
    assert (mask[0x10:0x14].hex(), value[0x10:0x14].hex()) == ("ff001e00", "11000800")
    assert not any(mask[:0x10] + mask[0x14:] + value[:0x10] + value[0x14:])


def test_a_queue_that_is_made_ready() -> None:
    ready = pack(
        prm.MODIFY_VIRTIO_NET_Q_IN,
        obj_id=0x41,
        modify_field_select=prm.ModifyQueue.STATE,
        state=prm.QueueState.READY,
        queue_index=5,
    )
    expected = bytearray(0xD0)
    expected[0x00:0x04] = bytes.fromhex("0a010000")
    expected[0x04:0x08] = bytes.fromhex("0000000d")
    expected[0x08:0x0C] = bytes.fromhex("00000041")
    expected[0x10:0x18] = bytes.fromhex("0000000000000001")
    expected[0x20:0x24] = bytes.fromhex("00000001")
    expected[0x50:0x54] = bytes.fromhex("00000005")
    assert ready == expected


def test_the_fields_of_a_modification() -> None:
    everything = 0x3FE1 | prm.ModifyQueue.DIRTY_BITMAP | prm.ModifyQueue.DIRTY_ENABLE
    assert sum(prm.ModifyQueue) == everything == 0x3FF9


def test_what_is_packed_is_unpacked() -> None:
    values = unpack(prm.CREATE_TIR_IN, pack(prm.CREATE_TIR_IN, rx_hash_toeplitz_key=KEY, indirect_table=7))
    assert values["rx_hash_toeplitz_key"] == KEY
    assert values["indirect_table"] == 7
    assert values["opcode"] == 0x900
    assert {type(value) for value in values.values()} == {int, bytes}
    assert [name for name, value in values.items() if value not in (0, KEY)] == ["opcode", "indirect_table"]


def test_what_follows_a_structure_is_left_alone() -> None:
    assert get(prm.KLM, pack(prm.KLM, mkey=9) + b"more", "mkey") == 9
    assert unpack(prm.RQT_ENTRY, b"\0\0\0\7\0\0\0\10") == {"queue": 7}


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"nothing": 1}, "has no field nothing"),
        ({"transport_domain": 1 << 24}, "does not fit in 24 bits"),
        ({"transport_domain": -1}, "does not fit in 24 bits"),
        ({"transport_domain": b"abc"}, "no field of 3 bytes"),
        ({"rx_hash_toeplitz_key": KEY[1:]}, "no field of 39 bytes"),
        ({"rx_hash_toeplitz_key": 1}, "does not fit in 320 bits"),
        ({"opcode": 0x901}, "is always 0x900"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, int | bytes], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        pack(prm.CREATE_TIR_IN, **values)


def test_data_that_end_early_are_refused() -> None:
    complaint = "klm has 16 bytes, not 15"
    with pytest.raises(ValueError, match=complaint):
        unpack(prm.KLM, bytes(15))
    with pytest.raises(ValueError, match=complaint):
        get(prm.KLM, bytes(15), "mkey")
    with pytest.raises(ValueError, match=complaint):
        list(reserved(prm.KLM, bytes(15)))


def test_a_field_of_bytes_is_no_number() -> None:
    with pytest.raises(ValueError, match="rx_hash_toeplitz_key is no number"):
        get(prm.CREATE_TIR_IN, bytes(0x110), "rx_hash_toeplitz_key")


def test_reserved_bits_are_found() -> None:
    mailbox = bytearray(pack(prm.CREATE_TIS_IN, prio=0xF, transport_domain=0xFFFFFF, uid=0xFFFF))
    assert list(reserved(prm.CREATE_TIS_IN, bytes(mailbox))) == []
    mailbox[0x04] = 0x80
    mailbox[0xBF] = 0x01
    assert list(reserved(prm.CREATE_TIS_IN, bytes(mailbox) + b"\xff")) == [0x20, 0x5FF]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"one": (0, 8), "two": (7, 1)}, "two overlaps"),
        ({"one": (24, 9)}, "beyond its end"),
        ({"opcode": (16, 16), "other": (0, 16)}, "overlaps"),
    ],
)
def test_a_layout_without_sense_is_refused(fields: dict[str, tuple[int, int]], complaint: str) -> None:
    parts = {0: layout("part", 4, "", opcode=(0, 8))} if "opcode" in fields else {}
    with pytest.raises(ValueError, match=complaint):
        layout("test", 4, "", parts, None, **fields)
