"""The emulated ConnectX from its driver's process: what it refuses, and how its queues live."""

import ctypes
import mmap
import os
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from datapath import mlx5_prm as prm
from datapath.mlx5_mailbox import Structure, pack, unpack
from datapath.mlx5_prm import ModifyQueue, QueueState, Status
from tests.harness.mlx5_emulation import Emulation, EventPair, QueueSetup, RefusedError, ffi
from tests.harness.processes import wait_for
from tests.harness.virtqueue import Buffer, Virtqueue

RX, TX = 0, 1
HEADER = 12
FRAME = bytes.fromhex("020000000002 020000000001 88b5") + bytes(50)
COMES_BACK = bytes.fromhex("020000000001 020000000002 88b5") + bytes(50)
NOBODY = 0xABCDEF


@pytest.fixture
def device() -> Iterator[Emulation]:
    with Emulation() as opened:
        yield opened


@pytest.fixture
def setup(device: Emulation) -> QueueSetup:
    return QueueSetup(device)


def refusal(error: pytest.ExceptionInfo[RefusedError]) -> Status:
    assert error.value.syndrome >= 0xE0000002
    return Status(error.value.status)


def test_is_open_once(device: Emulation) -> None:
    with pytest.raises(OSError, match="busy"):
        Emulation()


def test_a_command_that_nobody_knows(device: Emulation) -> None:
    with pytest.raises(RefusedError) as error:
        device.general(bytes.fromhex("07ff0000") + bytes(12))
    assert refusal(error) == Status.BAD_OPERATION


def test_a_command_by_another_call(device: Emulation) -> None:
    with pytest.raises(RefusedError) as error:
        device.create(pack(prm.QUERY_HCA_CAP_IN, op_mod=1), 0x1010)
    assert refusal(error) == Status.BAD_OPERATION


def test_a_reserved_bit(device: Emulation) -> None:
    mailbox = bytearray(pack(prm.ALLOC_TRANSPORT_DOMAIN_IN))
    mailbox[0x0F] = 1
    with pytest.raises(RefusedError) as error:
        device.create(bytes(mailbox))
    assert refusal(error) == Status.BAD_PARAMETER


def test_lengths(device: Emulation) -> None:
    query = pack(prm.QUERY_HCA_CAP_IN, op_mod=1)
    with pytest.raises(RefusedError) as error:
        device.general(query + bytes(4))
    assert refusal(error) == Status.BAD_INPUT_LENGTH
    with pytest.raises(RefusedError) as error:
        device.general(query, 0x100F)
    assert refusal(error) == Status.BAD_OUTPUT_LENGTH


def test_a_capability_page_that_there_is_not(device: Emulation) -> None:
    with pytest.raises(RefusedError) as error:
        device.general(pack(prm.QUERY_HCA_CAP_IN, op_mod=0x04 << 1 | 1))
    assert refusal(error) == Status.BAD_PARAMETER


def test_capabilities() -> None:
    with Emulation(pairs=3, resumes=0) as device:
        page = device.general(pack(prm.QUERY_HCA_CAP_IN, op_mod=0x27))
    told = unpack(prm.QUERY_VDPA_CAP_OUT, page)
    assert (told["max_num_virtio_queues"], told["freeze_to_rdy_supported"]) == (7, 0)
    assert (told["event_mode"], told["virtio_queue_type"]) == (0b11, 0b01)


@pytest.mark.parametrize(
    ("structure", "fields"),
    [
        (prm.CREATE_TIS_IN, {"transport_domain": NOBODY}),
        (prm.CREATE_TIR_IN, {"disp_type": 1, "rx_hash_fn": 2, "indirect_table": NOBODY}),
        (prm.CREATE_CQ_IN, {"uar_page": 40}),
        (prm.CREATE_QP_IN, {"no_sq": 1, "rq_type": 3, "pd": NOBODY}),
    ],
)
def test_objects_that_there_are_not(device: Emulation, structure: Structure, fields: dict[str, int]) -> None:
    with pytest.raises(RefusedError) as error:
        device.create(pack(structure, **fields))
    assert refusal(error) == Status.BAD_RESOURCE


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"pd": NOBODY}, Status.BAD_RESOURCE),
        ({"tisn_or_qpn": NOBODY}, Status.BAD_RESOURCE),
        ({"virtio_q_mkey": NOBODY}, Status.BAD_RESOURCE),
        ({"counter_set_id": NOBODY}, Status.BAD_RESOURCE),
        ({"umem_2_id": NOBODY}, Status.BAD_RESOURCE),
        ({"umem_3_size": 4096}, Status.BAD_RESOURCE),
        ({"event_mode": 1, "event_qpn_or_msix": NOBODY}, Status.BAD_RESOURCE),
        ({"event_mode": 2}, Status.BAD_PARAMETER),
        ({"queue_size": 0}, Status.BAD_PARAMETER),
        ({"queue_size": 96}, Status.BAD_PARAMETER),
        ({"virtio_q_type": 1}, Status.BAD_PARAMETER),
        ({"state": 1}, Status.BAD_PARAMETER),
        ({"queue_index": 17}, Status.BAD_INDEX),
    ],
)
def test_queues_that_cannot_be(setup: QueueSetup, fields: dict[str, int], status: Status) -> None:
    with pytest.raises(RefusedError) as error:
        setup.device.create(setup.mailbox(RX, None, **fields))
    assert refusal(error) == status


def test_a_queue_there_already_is(setup: QueueSetup) -> None:
    setup.device.create(setup.mailbox(RX))
    with pytest.raises(RefusedError) as error:
        setup.device.create(setup.mailbox(RX))
    assert refusal(error) == Status.BAD_INDEX


@pytest.mark.parametrize(
    "way",
    [
        [QueueState.SUSPENDED],
        [QueueState.ERROR],
        [QueueState.READY, QueueState.READY],
        [QueueState.READY, QueueState.SUSPENDED, QueueState.INIT],
    ],
)
def test_ways_that_do_not_lead_on(setup: QueueSetup, way: list[QueueState]) -> None:
    queue = setup.device.create(setup.mailbox(TX, Virtqueue(setup.memory, 0x10000)))
    for state in way[:-1]:
        setup.go_to(queue, TX, state)
    with pytest.raises(RefusedError) as error:
        setup.go_to(queue, TX, way[-1])
    assert refusal(error) == Status.BAD_RESOURCE_STATE
    assert setup.query(queue)["state"] == (way[-2] if way[:-1] else QueueState.INIT)


def test_a_queue_without_a_key_is_never_ready(setup: QueueSetup) -> None:
    queue = setup.device.create(setup.mailbox(TX, virtio_q_mkey=0))
    with pytest.raises(RefusedError) as error:
        setup.go_to(queue, TX, QueueState.READY)
    assert refusal(error) == Status.BAD_RESOURCE


def test_what_runs_is_not_moved(setup: QueueSetup) -> None:
    queue = setup.device.create(setup.mailbox(TX, Virtqueue(setup.memory, 0x10000)))
    setup.go_to(queue, TX, QueueState.READY)
    with pytest.raises(RefusedError) as error:
        setup.modify(queue, TX, ModifyQueue.ADDRESSES, desc_addr=0x20000)
    assert refusal(error) == Status.BAD_RESOURCE_STATE
    with pytest.raises(RefusedError) as error:
        setup.modify(queue, TX, 1 << 20)
    assert refusal(error) == Status.BAD_PARAMETER
    with pytest.raises(RefusedError) as error:
        setup.modify(queue, RX, ModifyQueue.STATE, state=QueueState.SUSPENDED)
    assert refusal(error) == Status.BAD_INDEX


def test_a_suspended_queue_that_cannot_be_resumed() -> None:
    with Emulation(resumes=0) as device:
        setup = QueueSetup(device)
        queue = device.create(setup.mailbox(TX, Virtqueue(setup.memory, 0x10000)))
        for state in (QueueState.READY, QueueState.SUSPENDED):
            setup.go_to(queue, TX, state)
        with pytest.raises(RefusedError) as error:
            setup.go_to(queue, TX, QueueState.READY)
        assert refusal(error) == Status.BAD_RESOURCE_STATE


def test_what_is_used_stays(setup: QueueSetup) -> None:
    queue = setup.device.create(setup.mailbox(TX))
    for used in (setup.key, setup.tis, setup.td):
        with pytest.raises(RefusedError):
            setup.device.destroy(used)
    assert setup.device.lib.ibv_dereg_mr(setup.region) != 0
    setup.device.destroy(queue)
    for free in (setup.key, setup.tis, setup.td):
        setup.device.destroy(free)
    assert setup.device.lib.ibv_dereg_mr(setup.region) == 0


def test_keys(device: Emulation) -> None:
    memory = mmap.mmap(-1, 0x8000)
    key = device.region(memory, 0x10000).lkey
    device.mkey([(0x4000, key, 0x10000), (0x4000, key, 0x14000)], 0x10000, 0x8000)
    for entries, status in (
        ([(0x4000, key + 1, 0x10000)], Status.BAD_RESOURCE),
        ([(0x4000, key, 0x15000)], Status.BAD_RESOURCE),
        ([(0x2000, key, 0x10000)], Status.BAD_PARAMETER),
    ):
        with pytest.raises(RefusedError) as error:
            device.mkey(entries, 0x10000, 0x4000)
        assert refusal(error) == status


def test_a_key_has_eight_bits_that_the_driver_chooses(setup: QueueSetup) -> None:
    size = len(setup.memory.bytes)
    key = setup.device.mkey([(size, setup.region.lkey, 0)], 0, size, mkey_7_0=0x5A)
    with pytest.raises(RefusedError) as error:
        setup.device.create(setup.mailbox(RX, virtio_q_mkey=key.id << 8))
    assert refusal(error) == Status.BAD_RESOURCE
    setup.device.create(setup.mailbox(RX, virtio_q_mkey=key.id << 8 | 0x5A))


def test_qps_move_in_their_order(device: Emulation) -> None:
    with EventPair(device) as pair:
        with pytest.raises(RefusedError) as error:
            device.modify(pair.hardware, pack(prm.INIT2RTR_QP_IN, qpn=pair.hardware.id))
        assert refusal(error) == Status.BAD_QP_STATE
        pair.connect()
        device.modify(pair.hardware, pack(prm.TO_RST_QP_IN, qpn=pair.hardware.id))
        device.modify(pair.hardware, pack(prm.RST2INIT_QP_IN, qpn=pair.hardware.id))


def test_a_command_that_is_to_fail() -> None:
    with Emulation(fail=2) as device:
        with pytest.raises(RefusedError) as error:
            device.create(pack(prm.ALLOC_TRANSPORT_DOMAIN_IN))
        assert error.value.status == Status.INTERNAL_ERROR
        device.create(pack(prm.ALLOC_TRANSPORT_DOMAIN_IN))


class Running:
    """A pair that sends its frames back to itself, and tells of what it has received."""

    def __init__(self, setup: QueueSetup, events: EventPair) -> None:
        self.setup = setup
        self.rings = [Virtqueue(setup.memory, at) for at in (0x10000, 0x20000)]
        self.queues = [
            setup.device.create(
                setup.mailbox(RX, self.rings[RX], event_mode=1, event_qpn_or_msix=events.hardware.id)
            ),
            setup.device.create(setup.mailbox(TX, self.rings[TX])),
        ]
        for index, queue in enumerate(self.queues):
            setup.go_to(queue, index, QueueState.READY)
        var = setup.device.lib.mlx5dv_alloc_var(setup.device.context, 0)
        self.doorbell = mmap.mmap(setup.device.cmd_fd, var.length, offset=var.mmap_off)

    def kick(self, index: int) -> None:
        with memoryview(self.doorbell) as view, view.cast("I") as cells:
            cells[0] = index

    def offer(self, count: int = 1) -> None:
        for n in range(count):
            self.rings[RX].add(Buffer(0x100000 + 4096 * n, 2048, writable=True))
        self.kick(RX)

    def send(self, frame: bytes = FRAME) -> None:
        self.setup.memory.write(0x200000, bytes(HEADER) + frame)
        self.rings[TX].add(Buffer(0x200000, HEADER + len(frame)))
        self.kick(TX)

    def wait_sent(self, count: int) -> None:
        wait_for(f"{count} frames sent", lambda: self.rings[TX].used_index == count, 5.0)

    def wait_received(self, count: int) -> None:
        wait_for(f"{count} frames received", lambda: self.rings[RX].used_index == count, 5.0)


@pytest.fixture
def events(device: Emulation) -> Iterator[EventPair]:
    with EventPair(device) as pair:
        pair.connect()
        yield pair


@pytest.fixture
def running(setup: QueueSetup, events: EventPair) -> Running:
    return Running(setup, events)


def test_a_frame_comes_back_where_it_is_steered_to(running: Running) -> None:
    running.offer(2)
    running.send()
    running.wait_sent(1)
    assert running.rings[RX].used_index == 0, "nothing leads there yet"
    running.setup.steer(running.queues[RX])
    running.send()
    running.wait_received(1)
    assert running.setup.memory.read(0x100000 + HEADER, len(FRAME)) == COMES_BACK


def test_an_uplink_gives_and_takes_frames() -> None:
    wire, uplink = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    uplink.setblocking(False)
    wire.settimeout(5.0)
    with wire, uplink, Emulation(pairs=1, uplink=uplink.fileno()) as device, EventPair(device) as events:
        events.connect()
        running = Running(QueueSetup(device), events)
        running.setup.steer(running.queues[RX])
        running.offer()
        running.send()
        assert wire.recv(2048) == FRAME
        wire.send(COMES_BACK)
        running.wait_received(1)
        assert running.setup.memory.read(0x100000 + HEADER, len(FRAME)) == COMES_BACK


def test_an_armed_cq_tells_once(running: Running, events: EventPair) -> None:
    running.setup.steer(running.queues[RX])
    running.offer(3)
    events.arm(0)
    running.send()
    assert events.event() == 0xC00C1E
    assert events.completions == 1
    running.send()
    running.wait_received(2)
    assert events.event(0.1) is None, "it was not armed again"
    events.arm(1)
    assert events.event() == 0xC00C1E


def test_a_cq_is_armed_by_its_record_and_the_doorbell(running: Running, events: EventPair) -> None:
    running.setup.steer(running.queues[RX])
    running.offer(2)
    events.write_arm_record(0)
    running.send()
    running.wait_received(1)
    assert events.event(0.1) is None, "the doorbell has not been rung"
    events.ring()
    assert events.event() == 0xC00C1E
    events.write_arm_record(1)
    running.send()
    running.wait_received(2)
    assert events.event(0.1) is None, "nor again"
    events.ring()
    assert events.event() == 0xC00C1E
    events.ring()
    assert events.event(0.1) is None, "the record is the same"


def test_no_more_completions_than_receives_posted(device: Emulation, setup: QueueSetup) -> None:
    with EventPair(device) as events:
        events.post(0)
        events.connect()
        running = Running(setup, events)
        setup.steer(running.queues[RX])
        running.offer()
        running.send()
        running.wait_received(1)
        assert events.completions == 0
        events.post(1)
        wait_for("the completion", lambda: events.completions == 1, 5.0)


def test_a_suspended_queue_knows_where_it_is_and_goes_on(running: Running) -> None:
    for number in (1, 2, 3):
        running.send()
        running.wait_sent(number)
    running.setup.go_to(running.queues[TX], TX, QueueState.SUSPENDED)
    told = running.setup.query(running.queues[TX])
    assert (told["state"], told["hw_available_index"], told["hw_used_index"]) == (2, 3, 3)
    running.send()
    running.setup.go_to(running.queues[TX], TX, QueueState.READY)
    running.wait_sent(4)


def test_pages_that_are_received_are_marked(running: Running) -> None:
    setup = running.setup
    log = mmap.mmap(-1, 4096)
    region = setup.device.region(log, 0x7F0000000000)
    key = setup.device.mkey([(4096, region.lkey, 0x7F0000000000)], 0x7F0000000000, 4096)
    where = {"dirty_bitmap_mkey": key.id << 8, "dirty_bitmap_size": 4096, "dirty_bitmap_addr": 0x7F0000000000}
    setup.modify(running.queues[RX], RX, ModifyQueue.DIRTY_BITMAP, **where)
    setup.modify(running.queues[RX], RX, ModifyQueue.DIRTY_ENABLE, dirty_bitmap_dump_enable=1)
    setup.steer(running.queues[RX])
    running.offer(2)
    running.send()
    running.wait_received(1)
    assert {page for page in range(8 * 4096) if log[page // 8] >> page % 8 & 1} == {0x100}


def test_a_broken_ring_is_an_error_of_its_queue_alone(running: Running) -> None:
    setup, lib = running.setup, running.setup.device.lib
    channel = lib.mlx5dv_devx_create_event_channel(setup.device.context, 1)
    changed = ffi.new("uint16_t[]", [prm.EVENT_OBJECT_CHANGE])
    assert lib.mlx5dv_devx_subscribe_devx_event(channel, running.queues[TX].handle, 2, changed, 7) == 0
    setup.steer(running.queues[RX])
    running.rings[TX].add(Buffer(1 << 40, 64))
    running.kick(TX)
    assert int.from_bytes(os.read(channel.fd, 64), "little") == 7
    told = setup.query(running.queues[TX])
    assert told["state"] == QueueState.ERROR
    assert told["error_type"] != 0
    assert setup.query(running.queues[RX])["state"] == QueueState.READY


def give_up_all_capabilities() -> None:
    """Those of this thread alone: capset(2) with none effective."""
    header = struct.pack("=II", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    assert ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)) == 0


def test_a_rule_needs_a_privilege(running: Running) -> None:
    def steer() -> None:
        give_up_all_capabilities()
        running.setup.steer(running.queues[RX])

    with ThreadPoolExecutor(1) as thread, pytest.raises(PermissionError):
        thread.submit(steer).result()
    running.setup.steer(running.queues[RX])
