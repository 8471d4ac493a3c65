"""What leads received frames to virtqueues, and sent ones out: steering, TIRs, the receive table, TISs.

    frame -> flow (to whom, which protocol) -> TIR (how it is hashed) -> receive table (RQT) -> queue

Flows are made once, when the device is opened: the kernel wants CAP_NET_RAW of who makes one, and a port
may give that up. Afterwards only the table changes. It may not be empty, so a queue that is never started,
the device's last, stands in it while no other does. Kinds of frames, their priorities and hashes are those
of DPDK's drivers/vdpa/mlx5/mlx5_vdpa_steer.c; destinations are looked at as by Linux'
drivers/vdpa/mlx5/net/mlx5_vnet.c.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from datapath.drivers.mlx5.capabilities import Capabilities
from datapath.drivers.mlx5.glue import DevxObject, Steering
from datapath.drivers.mlx5.memory import Domain
from datapath.drivers.mlx5.undo import Undo
from datapath.drivers.mlx5.virtqueue import VirtioNetQueue
from datapath.drivers.mlx5.workers import Workers
from datapath.mlx5_mailbox import Structure, pack
from datapath.mlx5_prm import (
    ALLOC_TRANSPORT_DOMAIN_IN,
    CREATE_RQT_IN,
    CREATE_TIR_IN,
    CREATE_TIS_IN,
    FLOW_MATCH,
    HASH_TOEPLITZ,
    MODIFY_RQT_IN,
    MODIFY_RQT_LIST,
    RQT_ENTRY,
    RQT_VIRTIO_NET_Q,
    TIR_INDIRECT,
)

#: Most entries of a receive table that there is any use for, as in DPDK's driver.
MOST_ENTRIES = 512
#: The key of the hash: the same on every host, so that flows stay with their queues. It is DPDK's.
HASH_KEY = bytes.fromhex("2cc681d15bdbf4f7fca28319db1a3e946b9e38d92c9c03d1ad9944a7d9563d59063c25f3fc1fdc2a")
#: `outer_selected_fields` of a TIR.
ADDRESSES, ADDRESSES_AND_PORTS = 0b0011, 0b1111
TCP, UDP = 6, 17
#: `criteria` of a matcher that looks at outer headers.
OUTER_HEADERS = 1


class Kind(NamedTuple):
    """Frames that are hashed in one way."""

    #: The lower, the earlier it is looked at.
    priority: int
    #: What they must have; 0: anything.
    ip_version: int
    protocol: int
    #: `outer_selected_fields` of their TIR.
    fields: int


KINDS = (
    Kind(7, 0, 0, 0),
    *(Kind(6, version, 0, ADDRESSES) for version in (4, 6)),
    *(Kind(5, version, protocol, ADDRESSES_AND_PORTS) for version in (4, 6) for protocol in (UDP, TCP)),
)


class Destination(NamedTuple):
    """Frames to certain addresses: what of the 48 bits must be what."""

    mask: int
    value: int


#: The first bit on the wire says that a frame is to a group; one to everybody is (IEEE 802, section 8.2).
GROUPS = Destination(1 << 40, 1 << 40)
ANYBODY = Destination(0, 0)


def destinations(mac: bytes | None) -> tuple[Destination, ...]:
    """Whom frames must be to.

    :param mac: the guest's address; None: it gets all that reaches the function.
    """
    if mac is None:
        return (ANYBODY,)
    return Destination((1 << 48) - 1, int.from_bytes(mac, "big")), GROUPS


def _match(destination: int, ip_version: int, protocol: int) -> bytes:
    return pack(
        FLOW_MATCH,
        dmac_47_16=destination >> 16,
        dmac_15_0=destination & 0xFFFF,
        ip_version=ip_version,
        ip_protocol=protocol,
    )


def _mask(kind: Kind, destination: Destination) -> bytes:
    return _match(destination.mask, 0xF if kind.ip_version else 0, 0xFF if kind.protocol else 0)


class TransportDomain:
    """What queues send by: a transport domain, and a TIS for each port of the card."""

    def __init__(self, domain: Domain, ports: int) -> None:
        """
        :raise CommandError: when the firmware does not make it.
        """
        glue = domain.glue
        with Undo() as undo:
            made = glue.create(domain.context, pack(ALLOC_TRANSPORT_DOMAIN_IN))
            undo.callback(glue.destroy, made)
            self.number = made.id
            self._tis = []
            for port in range(ports):
                # One port is no link aggregation: nothing is said of it then.
                affinity = port + 1 if ports > 1 else 0
                mailbox = pack(CREATE_TIS_IN, transport_domain=made.id, lag_tx_port_affinity=affinity)
                tis = glue.create(domain.context, mailbox)
                undo.callback(glue.destroy, tis)
                self._tis.append(tis.id)
            self._undo = undo.pop_all()

    def tis(self, pair: int) -> int:
        """Number of the TIS that a pair sends by: pairs are spread over the ports."""
        return self._tis[pair % len(self._tis)]

    def close(self) -> None:
        """Give it back.

        :raise DeviceError: when something still uses it.
        """
        self._undo.close()


class Receivers:
    """The steering of an open device."""

    def __init__(
        self,
        domain: Domain,
        capable: Capabilities,
        workers: Workers,
        transport: TransportDomain,
        mac: bytes | None,
        placeholder: VirtioNetQueue,
    ) -> None:
        """
        :param mac: the guest's address; None: it gets all that reaches the function.
        :param placeholder: a queue that is not started, for the table; the caller's to close.
        :raise DeviceError: when the device does not make all of it; of a process without CAP_NET_RAW the
            kernel takes no flow.
        """
        self._domain = domain
        self._glue = domain.glue
        self._transport = transport.number
        self._placeholder = placeholder.number
        self._room = min(MOST_ENTRIES, 1 << capable.log_max_rqt_size)
        with Undo() as undo:
            self._undo = undo
            (root,) = workers.run(self._prepare)
            tirs = workers.run(*(partial(self._create_tir, kind) for kind in KINDS))
            wanted = destinations(mac)
            led = zip(KINDS, tirs, strict=True)
            workers.run(*(partial(self._lead, root, kind, tir, wanted) for kind, tir in led))
            self._undo = undo.pop_all()

    def _prepare(self) -> Steering:
        """Make what TIRs and flows need; the table that flows are in."""
        self._table = self._create(self._list(CREATE_RQT_IN, [self._placeholder], rqt_max_size=self._room))
        steering = self._glue.create_domain(self._domain.context)
        self._undo.callback(self._glue.destroy_domain, steering)
        root = self._glue.create_root_table(steering)
        self._undo.callback(self._glue.destroy_table, root)
        return root

    def _create(self, mailbox: bytes) -> DevxObject:
        made = self._glue.create(self._domain.context, mailbox)
        self._undo.callback(self._glue.destroy, made)
        return made

    def _create_tir(self, kind: Kind) -> DevxObject:
        return self._create(
            pack(
                CREATE_TIR_IN,
                disp_type=TIR_INDIRECT,
                rx_hash_symmetric=1,
                indirect_table=self._table.id,
                rx_hash_fn=HASH_TOEPLITZ,
                transport_domain=self._transport,
                rx_hash_toeplitz_key=HASH_KEY,
                outer_l3_prot_type=int(kind.ip_version == 6),
                outer_l4_prot_type=int(kind.protocol == UDP),
                outer_selected_fields=kind.fields,
            )
        )

    def _lead(self, root: Steering, kind: Kind, tir: DevxObject, wanted: Sequence[Destination]) -> None:
        """Have frames of a kind go to its TIR."""
        action = self._glue.create_tir_action(tir)
        self._undo.callback(self._glue.destroy_action, action)
        for destination in wanted:
            mask = _mask(kind, destination)
            matcher = self._glue.create_matcher(root, kind.priority, OUTER_HEADERS if any(mask) else 0, mask)
            self._undo.callback(self._glue.destroy_matcher, matcher)
            value = _match(destination.value, kind.ip_version, kind.protocol)
            rule = self._glue.create_rule(matcher, value, [action])
            self._undo.callback(self._glue.destroy_rule, rule)

    def _list(self, layout: Structure, queues: Sequence[int], **fields: int) -> bytes:
        """A mailbox with a table in which each queue is as often as another, but for one."""
        each = [pack(RQT_ENTRY, queue=queue) for queue in queues]
        entries = b"".join(each[at % len(each)] for at in range(self._room))
        return pack(layout, list_q_type=RQT_VIRTIO_NET_Q, rqt_actual_size=self._room, **fields) + entries

    def lead_to(self, queues: Sequence[VirtioNetQueue]) -> None:
        """Spread received frames over these queues; over none, they are dropped.

        :raise CommandError: when the firmware refuses.
        """
        numbers = [queue.number for queue in queues] or [self._placeholder]
        mailbox = self._list(MODIFY_RQT_IN, numbers, rqtn=self._table.id, modify_bitmask=MODIFY_RQT_LIST)
        self._glue.modify(self._table, mailbox)

    def close(self) -> None:
        """Take it all down.

        :raise DeviceError: when the device does not let go of something; what it does is given back.
        """
        self._undo.close()
