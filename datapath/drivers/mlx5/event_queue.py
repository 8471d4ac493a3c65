"""How a virtqueue of a ConnectX tells that it has completed something: an empty message for each time.

The firmware sends it by a queue pair of its own to one of ours, whose completion queue gets an entry. Both
are connected to each other, in this process' memory: a UMEM with the entries of the completion queue, the
receives that are posted, and the records of how far either of them is used (doorbell records).

Layout, sizes and fields are those of DPDK's drivers/vdpa/mlx5/mlx5_vdpa_event.c.
"""

from datapath.drivers.mlx5.capabilities import Capabilities
from datapath.drivers.mlx5.glue import DevxObject, EventChannel, Uar
from datapath.drivers.mlx5.memory import Buffer, Domain
from datapath.drivers.mlx5.undo import Undo
from datapath.mlx5_mailbox import Structure, get, pack
from datapath.mlx5_prm import (
    CQE,
    CQE_INVALID,
    CREATE_CQ_IN,
    CREATE_QP_IN,
    EVENT_COMPLETION,
    INIT2RTR_QP_IN,
    PATH_MIGRATED,
    RECEIVE_NOTHING,
    RECEIVE_QUEUE,
    RST2INIT_QP_IN,
    RTR2RTS_QP_IN,
    TO_RST_QP_IN,
)
from datapath.native.completions import CompletionSource

#: Bytes of a posted receive, of which there is nothing to say.
RECEIVE = 16
#: Bytes that a record has to itself, as one cache line is one party's at a time.
CACHE_LINE = 64
#: `mtu` of a queue pair: 256 bytes; `log_msg_max`: 2^30; as others have it (DPDK's mlx5_devx_cmds.c).
MTU_256, LONGEST_MESSAGE = 1, 30
#: `ack_timeout`: 4.096 us times 2^16. `retry_count` and `rnr_retry`: 7 times, the latter for ever
#: (InfiniBand Architecture Specification, volume 1, section 9.7.6).
ACK_TIMEOUT, RETRIES = 16, 7
#: The firmware's number of the function's only port.
PORT = 1


class EventQueue:
    """What one virtqueue tells by. It may serve one after the other."""

    def __init__(
        self,
        domain: Domain,
        capable: Capabilities,
        uar: Uar,
        channel: EventChannel,
        event_queue_number: int,
        index: int,
        size: int,
    ) -> None:
        """
        :param channel: gets an event, with `index` for its cookie, once the completion queue was armed.
        :param event_queue_number: of the kernel's event queue.
        :param size: messages that may be under way, a power of two.
        :raise DeviceError: when the device does not make it.
        """
        self._glue = domain.glue
        self._domain = domain
        self.size = size
        with Undo() as undo:
            self._buffer = Buffer(domain, (CQE.size + RECEIVE) * size + 2 * CACHE_LINE)
            undo.callback(self._buffer.close)
            receives = CQE.size * size
            self._cq_record = receives + RECEIVE * size
            self._qp_record = self._cq_record + CACHE_LINE
            self._undo = undo
            self._queue = self._create_queue(uar, event_queue_number)
            self._glue.subscribe(channel, self._queue, EVENT_COMPLETION, index)
            self._sender = self._create(_sender(domain, capable))
            self._receiver = self._create(self._receiving(capable, uar, receives))
            self._connect()
            self._undo = undo.pop_all()

    def _create(self, mailbox: bytes) -> DevxObject:
        made = self._glue.create(self._domain.context, mailbox)
        self._undo.callback(self._glue.destroy, made)
        return made

    def _create_queue(self, uar: Uar, event_queue_number: int) -> DevxObject:
        return self._create(
            pack(
                CREATE_CQ_IN,
                cc=1,  # every entry in the place of the first: how many there were shows by its counter
                log_cq_size=self.size.bit_length() - 1,
                uar_page=uar.page_id,
                c_eqn=event_queue_number,
                dbr_umem_valid=1,
                dbr_umem_id=self._buffer.id,
                dbr_addr=self._cq_record,
                cq_umem_valid=1,
                cq_umem_id=self._buffer.id,
            )
        )

    def _receiving(self, capable: Capabilities, uar: Uar, receives: int) -> bytes:
        """The mailbox for our queue pair, which receives and has nothing to send."""
        return pack(
            CREATE_QP_IN,
            pd=self._domain.number,
            pm_state=PATH_MIGRATED,
            ts_format=capable.timestamp_format,
            uar_page=uar.page_id,
            no_sq=1,
            rq_type=RECEIVE_QUEUE,
            log_rq_size=self.size.bit_length() - 1,
            cqn_rcv=self._queue.id,
            dbr_umem_valid=1,
            dbr_umem_id=self._buffer.id,
            dbr_addr=self._qp_record,
            wq_umem_valid=1,
            wq_umem_id=self._buffer.id,
            wq_umem_offset=receives,
        )

    def _connect(self) -> None:
        """Lead both queue pairs from RESET to where they send, and then post all receives."""
        self._connected = False
        entry = pack(CQE, wqe_counter=0xFFFF, opcode=CQE_INVALID, owner=1)
        self._buffer.write(0, entry)
        self._write_record(self._qp_record, 0)
        pairs = ((self._sender, self._receiver), (self._receiver, self._sender))
        for own, _ in pairs:
            self._move(own, RST2INIT_QP_IN, vhca_port_num=PORT, rre=1, rwe=1, pm_state=PATH_MIGRATED)
        for own, other in pairs:
            self._move(
                own,
                INIT2RTR_QP_IN,
                fl=1,
                vhca_port_num=PORT,
                mtu=MTU_256,
                log_msg_max=LONGEST_MESSAGE,
                remote_qpn=other.id,
            )
        for own, _ in pairs:
            self._move(own, RTR2RTS_QP_IN, ack_timeout=ACK_TIMEOUT, retry_count=RETRIES, rnr_retry=RETRIES)
        self._write_record(self._qp_record, self.size)
        self._connected = True

    def _move(self, pair: DevxObject, layout: Structure, **fields: int) -> None:
        self._glue.modify(pair, pack(layout, qpn=pair.id, **fields))

    @property
    def number(self) -> int:
        """The firmware's number of the queue pair that a virtqueue sends by."""
        return self._sender.id

    @property
    def source(self) -> CompletionSource:
        """Where messages are found that have come."""
        start = self._buffer.address
        return CompletionSource(
            entry=start,
            cq_record=start + self._cq_record,
            qp_record=start + self._qp_record,
            number=self._queue.id,
            size=self.size,
        )

    def reset(self) -> None:
        """Be as new for another virtqueue; the one before has been closed, and nobody looks at the source.

        :raise CommandError: when the firmware refuses.
        """
        for pair in (self._sender, self._receiver):
            self._move(pair, TO_RST_QP_IN)
        if self._connected:  # else nothing can have come: it failed when it was to be as new
            self._count_missed()
        self._connect()

    def _count_missed(self) -> None:
        """Take what has come since somebody looked last: the completion queue goes on where it stands.

        One that is armed with an index that it is past raises an event for nothing, and none for what comes.
        """
        counter = get(CQE, self._buffer.read(0, CQE.size), "wqe_counter")
        received = self._read_record(self._qp_record) - self.size
        consumed = self._read_record(self._cq_record) + (counter + 1 - received & 0xFFFF)
        self._write_record(self._cq_record, consumed & 0xFFFFFFFF)

    def _read_record(self, place: int) -> int:
        return int.from_bytes(self._buffer.read(place, 4))

    def _write_record(self, place: int, value: int) -> None:
        self._buffer.write(place, value.to_bytes(4))

    def close(self) -> None:
        """Give it back; the virtqueue has been closed, and nobody looks at the source.

        :raise DeviceError: when the device does not let go of something; what it does is given back.
        """
        self._undo.close()


def _sender(domain: Domain, capable: Capabilities) -> bytes:
    """The mailbox for the firmware's queue pair, which sends messages that nobody has written."""
    return pack(
        CREATE_QP_IN,
        pd=domain.number,
        pm_state=PATH_MIGRATED,
        ts_format=capable.timestamp_format,
        no_sq=1,
        rq_type=RECEIVE_NOTHING,
    )
