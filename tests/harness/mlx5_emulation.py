"""The emulated ConnectX as a driver's process has it: its libraries' calls, and objects made by mailboxes.

Nothing here corrects what a test tells the device, and what that refuses is `RefusedError`. `Emulation` is
the open device, `EventPair` how a virtqueue tells, `QueueSetup` what one is made of.
"""

import mmap
import os
import select
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cffi import FFI

from datapath import mlx5_prm as prm
from datapath.emulation.mlx5 import LIBRARY
from datapath.mlx5_mailbox import Structure, get, pack, unpack
from tests.harness.closeable import Closeable
from tests.harness.virtqueue import Virtqueue

ffi = FFI()
ffi.cdef("""
typedef struct { uint32_t flags; uint64_t comp_mask; } attributes;
typedef struct { void *context; uint32_t handle; } pd;
typedef struct { void *context; pd *pd; void *addr; size_t length; uint32_t handle, lkey, rkey; } mr;
typedef struct { uint8_t others[96]; pd *in; struct { uint32_t pdn; uint64_t comp_mask; } *out; } object;
typedef struct { uint32_t umem_id; } umem;
typedef struct { void *reg_addr; uint8_t *base_addr; uint32_t page_id; long mmap_off; uint64_t mask; } uar;
typedef struct { uint32_t page_id; uint32_t length; long mmap_off; uint64_t comp_mask; } var;
typedef struct { int fd; } channel;
typedef struct { size_t size; uint8_t buffer[320]; } match;
void **ibv_get_device_list(int *count);
void ibv_free_device_list(void **list);
void *mlx5dv_open_device(void *device, attributes *attributes);
int ibv_close_device(void *context);
pd *ibv_alloc_pd(void *context);
int ibv_dealloc_pd(pd *pd);
int mlx5dv_init_obj(object *object, uint64_t type);
mr *ibv_reg_mr_iova2(pd *pd, void *address, size_t size, uint64_t iova, unsigned int access);
int ibv_dereg_mr(mr *mr);
int mlx5dv_devx_general_cmd(void *context, const void *in, size_t insize, void *out, size_t outsize);
void *mlx5dv_devx_obj_create(void *context, const void *in, size_t insize, void *out, size_t outsize);
int mlx5dv_devx_obj_modify(void *object, const void *in, size_t insize, void *out, size_t outsize);
int mlx5dv_devx_obj_query(void *object, const void *in, size_t insize, void *out, size_t outsize);
int mlx5dv_devx_obj_destroy(void *object);
umem *mlx5dv_devx_umem_reg(void *context, void *address, size_t size, uint32_t access);
int mlx5dv_devx_umem_dereg(umem *umem);
uar *mlx5dv_devx_alloc_uar(void *context, uint32_t type);
void mlx5dv_devx_free_uar(uar *uar);
var *mlx5dv_alloc_var(void *context, uint32_t flags);
void mlx5dv_free_var(var *var);
channel *mlx5dv_devx_create_event_channel(void *context, int flags);
void mlx5dv_devx_destroy_event_channel(channel *channel);
int mlx5dv_devx_subscribe_devx_event(
    channel *channel, void *object, uint16_t size, uint16_t *events, uint64_t cookie);
void *mlx5dv_dr_domain_create(void *context, int type);
void *mlx5dv_dr_table_create(void *domain, uint32_t level);
void *mlx5dv_dr_matcher_create(void *table, uint16_t priority, uint8_t criteria, match *mask);
void *mlx5dv_dr_action_create_dest_devx_tir(void *object);
void *mlx5dv_dr_rule_create(void *matcher, match *value, size_t count, void **actions);
int mlx5dv_dr_rule_destroy(void *rule);
int mlx5dv_dr_action_destroy(void *action);
int mlx5dv_dr_matcher_destroy(void *matcher);
int mlx5dv_dr_table_destroy(void *table);
int mlx5dv_dr_domain_destroy(void *domain);
""")

OUT_SIZE = 0x1010
EVENT_OF_COMPLETION = 0
MATCH_SIZE = 0x140
#: Offset of the `cmd_fd` in an ibv_context.
CMD_FD = 264


class RefusedError(Exception):
    """A command that the device has not executed."""

    def __init__(self, errno: int, status: int, syndrome: int) -> None:
        super().__init__(f"errno {errno}, status {status:#x}, syndrome {syndrome:#x}")
        self.errno = errno
        self.status = status
        self.syndrome = syndrome


@dataclass(frozen=True)
class Object:
    """An object of the device."""

    handle: Any
    id: int


class Emulation(Closeable):
    """The open device with a protection domain."""

    def __init__(self, **options: int | str) -> None:
        """
        :param options: see datapath/emulation/mlx5/options.h; commands take no time unless they are to.
        :raise OSError: when it cannot be opened.
        """
        chosen = {"latency_us": 0, **options}
        os.environ["MLX5_EMULATION"] = ",".join(f"{name}={value}" for name, value in chosen.items())
        library: Any = ffi.dlopen(str(LIBRARY))
        self.lib = library
        devices = self.lib.ibv_get_device_list(ffi.NULL)
        device = devices[0]
        self.lib.ibv_free_device_list(devices)
        self.context = self.lib.mlx5dv_open_device(device, ffi.new("attributes *", {"flags": 1}))
        if self.context == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self.pd = self.lib.ibv_alloc_pd(self.context)
        self.pdn = int(self.pd.handle)
        self._kept: list[Any] = []

    def close(self) -> None:
        """Close the device; it frees what was left."""
        self.lib.ibv_close_device(self.context)

    @property
    def cmd_fd(self) -> int:
        return int(ffi.cast("int *", ffi.cast("uint8_t *", self.context) + CMD_FD)[0])

    def _answer(self, result: int, out: Any) -> bytes:
        answer = bytes(ffi.buffer(out))
        if result:
            values = unpack(prm.COMMAND_OUT, answer)
            raise RefusedError(result, int(values["status"]), int(values["syndrome"]))
        return answer

    def general(self, mailbox: bytes, size: int = OUT_SIZE) -> bytes:
        out = ffi.new("uint8_t[]", size)
        return self._answer(
            self.lib.mlx5dv_devx_general_cmd(self.context, mailbox, len(mailbox), out, size), out
        )

    def create(self, mailbox: bytes, size: int = 0x10) -> Object:
        out = ffi.new("uint8_t[]", size)
        made = self.lib.mlx5dv_devx_obj_create(self.context, mailbox, len(mailbox), out, size)
        answer = self._answer(ffi.errno if made == ffi.NULL else 0, out)
        return Object(made, get(prm.CREATED_OUT, answer, "id"))

    def modify(self, what: Object, mailbox: bytes) -> None:
        out = ffi.new("uint8_t[]", 0x10)
        self._answer(self.lib.mlx5dv_devx_obj_modify(what.handle, mailbox, len(mailbox), out, 0x10), out)

    def query(self, what: Object, mailbox: bytes, answer: Structure) -> dict[str, int | bytes]:
        out = ffi.new("uint8_t[]", answer.size)
        result = self.lib.mlx5dv_devx_obj_query(what.handle, mailbox, len(mailbox), out, answer.size)
        return unpack(answer, self._answer(result, out))

    def destroy(self, what: Object) -> None:
        if result := self.lib.mlx5dv_devx_obj_destroy(what.handle):
            raise RefusedError(result, 0, 0)

    def region(self, memory: mmap.mmap, iova: int) -> Any:
        """Register memory; its `lkey` is a key to it."""
        return self.lib.ibv_reg_mr_iova2(self.pd, self._address(memory), len(memory), iova, 1)

    def umem(self, memory: mmap.mmap) -> int:
        """Register memory for the device's own use; the id."""
        made = self.lib.mlx5dv_devx_umem_reg(self.context, self._address(memory), len(memory), 1)
        return int(made.umem_id)

    def _address(self, memory: mmap.mmap) -> Any:
        self._kept.append(ffi.from_buffer(memory))
        return self._kept[-1]

    def mkey(self, entries: Sequence[tuple[int, int, int]], start: int, size: int, **fields: int) -> Object:
        """An indirect key with a list of (bytes, key, address)."""
        padded = [*entries, *[(0, 0, 0)] * (-len(entries) % 4)]
        values = {
            "access_mode": prm.AccessMode.KLM,
            "lr": 1,
            "lw": 1,
            "qpn": 0xFFFFFF,
            "pd": self.pdn,
            "start_addr": start,
            "len": size,
            "translations_octword_size": len(padded),
            "translations_octword_actual_size": len(padded),
            **fields,
        }
        klms = b"".join(pack(prm.KLM, byte_count=n, mkey=key, address=at) for n, key, at in padded)
        return self.create(pack(prm.CREATE_MKEY_IN, **values) + klms)


class EventPair(Closeable):
    """A CQ and the two QPs by which a virtqueue tells; armed, with `entries` receives posted."""

    def __init__(self, device: Emulation, entries: int = 256, cookie: int = 0xC00C1E) -> None:
        self._device = device
        log = entries.bit_length() - 1
        self.memory = mmap.mmap(-1, 64 * entries + 4096)
        umem = device.umem(self.memory)
        self.uar = device.lib.mlx5dv_devx_alloc_uar(device.context, 1)
        shared = {"dbr_umem_valid": 1, "dbr_umem_id": umem}
        self._record = 64 * entries
        self.cq = device.create(
            pack(
                prm.CREATE_CQ_IN,
                cc=1,
                log_cq_size=log,
                uar_page=self.uar.page_id,
                dbr_addr=self._record,
                cq_umem_id=umem,
                cq_umem_valid=1,
                **shared,
            )
        )
        self.hardware = device.create(
            pack(prm.CREATE_QP_IN, pd=device.pdn, no_sq=1, rq_type=prm.RECEIVE_NOTHING, pm_state=3)
        )
        self.software = device.create(
            pack(
                prm.CREATE_QP_IN,
                pd=device.pdn,
                no_sq=1,
                log_rq_size=log,
                uar_page=self.uar.page_id,
                cqn_rcv=self.cq.id,
                dbr_addr=self._record + 64,
                wq_umem_id=umem,
                wq_umem_valid=1,
                **shared,
            )
        )
        self.post(entries)
        self.channel = device.lib.mlx5dv_devx_create_event_channel(device.context, 1)
        events = ffi.new("uint16_t[]", [EVENT_OF_COMPLETION])
        device.lib.mlx5dv_devx_subscribe_devx_event(self.channel, self.cq.handle, 2, events, cookie)
        self._arms = 0

    def close(self) -> None:
        self._device.lib.mlx5dv_devx_destroy_event_channel(self.channel)

    def connect(self) -> None:
        """Lead both QPs to where they send."""
        for qp, remote in ((self.hardware, self.software), (self.software, self.hardware)):
            self._device.modify(qp, pack(prm.RST2INIT_QP_IN, qpn=qp.id, vhca_port_num=1, rre=1, rwe=1))
            self._device.modify(qp, pack(prm.INIT2RTR_QP_IN, qpn=qp.id, remote_qpn=remote.id, mtu=1))
            self._device.modify(qp, pack(prm.RTR2RTS_QP_IN, qpn=qp.id, retry_count=7, rnr_retry=7))

    def post(self, count: int) -> None:
        self.memory[self._record + 64 : self._record + 68] = struct.pack(">I", count)

    def arm(self, consumer: int) -> None:
        """Ask for an event when there are more completions than the driver has seen."""
        self.write_arm_record(consumer)
        self.ring()

    def write_arm_record(self, consumer: int) -> None:
        """The first half of that, which alone asks for nothing."""
        word = pack(prm.CQ_ARM, arm_sn=self._arms % 4, consumer_index=consumer)
        self._arms += 1
        self.memory[self._record + 4 : self._record + 8] = word

    def ring(self) -> None:
        """The second half: tell the device to look at the record."""
        word = self.memory[self._record + 4 : self._record + 8]
        ffi.buffer(self.uar.base_addr, 4096)[0x20:0x28] = word + struct.pack(">I", self.cq.id)

    @property
    def completions(self) -> int:
        """How many the CQ's only entry tells of."""
        counter = get(prm.CQE, self.memory[:64], "wqe_counter")
        return counter + 1 if get(prm.CQE, self.memory[:64], "opcode") == prm.CQE_RECEIVED_SEND else 0

    def event(self, seconds: float = 5.0) -> int | None:
        """The cookie of the next event, None when there is none."""
        if not select.select([self.channel.fd], [], [], seconds)[0]:
            return None
        (cookie,) = struct.unpack("=Q", os.read(self.channel.fd, 8))
        return int(cookie)


class ProcessMemory:
    """Guest memory in this process, as a virtqueue's driver side writes it."""

    def __init__(self, size: int) -> None:
        self.bytes = mmap.mmap(-1, size)

    def read(self, address: int, size: int) -> bytes:
        return self.bytes[address : address + size]

    def write(self, address: int, data: bytes) -> None:
        self.bytes[address : address + len(data)] = data


class QueueSetup:
    """What virtqueues are made of: guest memory from address 0 with its key, TIS, UMEMs."""

    def __init__(self, device: Emulation, size: int = 1 << 22, entries: int = 256) -> None:
        self.device = device
        self.entries = entries
        self.memory = ProcessMemory(size)
        self.td = device.create(pack(prm.ALLOC_TRANSPORT_DOMAIN_IN))
        self.tis = device.create(pack(prm.CREATE_TIS_IN, transport_domain=self.td.id))
        self.region = device.region(self.memory.bytes, 0)
        self.key = device.mkey([(size, self.region.lkey, 0)], 0, size)
        page = device.general(
            pack(prm.QUERY_HCA_CAP_IN, op_mod=prm.capability_op_mod(prm.CapabilityPage.VDPA_EMULATION))
        )
        self.capabilities = unpack(prm.QUERY_VDPA_CAP_OUT, page)
        self.umem_size = 0
        for number in (1, 2, 3):
            a, b = (int(self.capabilities[f"umem_{number}_buffer_param_{which}"]) for which in "ab")
            self.umem_size = max(self.umem_size, a * entries + b)

    def mailbox(self, index: int, ring: Virtqueue | None = None, **fields: int) -> bytes:
        """To create a queue whose ring is `ring`, with whatever else is given."""
        values: dict[str, int | bytes] = {
            "queue_index": index,
            "queue_size": self.entries,
            "virtio_version_1_0": 1,
            "pd": self.device.pdn,
            "tisn_or_qpn": self.tis.id,
            "virtio_q_mkey": self.key.id << 8,
        }
        if ring is not None:
            values |= {"desc_addr": ring.descriptors, "available_addr": ring.avail, "used_addr": ring.used}
        for number in (1, 2, 3):
            memory = mmap.mmap(-1, self.umem_size)
            values[f"umem_{number}_id"] = self.device.umem(memory)
            values[f"umem_{number}_size"] = self.umem_size
        return pack(prm.CREATE_VIRTIO_NET_Q_IN, **{**values, **fields})

    def modify(self, queue: Object, index: int, select: int, **fields: int) -> None:
        """Modify what `select` names of a queue."""
        self.device.modify(
            queue,
            pack(
                prm.MODIFY_VIRTIO_NET_Q_IN,
                obj_id=queue.id,
                queue_index=index,
                modify_field_select=select,
                **fields,
            ),
        )

    def go_to(self, queue: Object, index: int, state: prm.QueueState) -> None:
        self.modify(queue, index, prm.ModifyQueue.STATE, state=state)

    def query(self, queue: Object) -> dict[str, int | bytes]:
        mailbox = pack(prm.QUERY_VIRTIO_NET_Q_IN, obj_id=queue.id)
        return self.device.query(queue, mailbox, prm.QUERY_VIRTIO_NET_Q_OUT)

    def steer(self, *queues: Object) -> Any:
        """Lead everything that comes to these queues; the rule."""
        entries = b"".join(pack(prm.RQT_ENTRY, queue=queue.id) for queue in queues)
        table = self.device.create(
            pack(
                prm.CREATE_RQT_IN,
                list_q_type=prm.RQT_VIRTIO_NET_Q,
                rqt_max_size=len(queues),
                rqt_actual_size=len(queues),
            )
            + entries
        )
        tir = self.device.create(
            pack(
                prm.CREATE_TIR_IN,
                disp_type=prm.TIR_INDIRECT,
                rx_hash_fn=prm.HASH_TOEPLITZ,
                indirect_table=table.id,
                transport_domain=self.td.id,
            )
        )
        lib, everything = self.device.lib, ffi.new("match *", {"size": MATCH_SIZE})
        root = lib.mlx5dv_dr_table_create(lib.mlx5dv_dr_domain_create(self.device.context, 0), 0)
        matcher = lib.mlx5dv_dr_matcher_create(root, 7, 0, everything)
        action = lib.mlx5dv_dr_action_create_dest_devx_tir(tir.handle)
        rule = lib.mlx5dv_dr_rule_create(matcher, everything, 1, ffi.new("void *[]", [action]))
        if rule == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        return rule
