"""The rows of the feature table, and how a driver declares its column of it.

The rows are those of DPDK's vDPA drivers (doc/guides/vdpadevs/features), so that the tables can be laid side
by side. What a driver offers to a guest follows from its column and is declared nowhere else: a cell says how
much of the row there is, which test shows it, and what becomes of the row's virtio features (`Way`). A column
speaks for the hardware of that family; what only an emulated NIC does is a footnote.

Owns the names and their order, the type of a cell, the masks that a column makes. The columns are the
drivers', the rows "proto ..." the back-end's; `feature_table` puts them together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from datapath.virtio import Feature, bit

#: What our back-end program is: "type" in QEMU docs/interop/vhost-user.json, which knows features of programs
#: for input and graphics, and of none for this type.
BACKEND_TYPE = "net"


class Row(Enum):
    """A row of the table, by its name there; in the table's order."""

    CSUM = "csum"
    GUEST_CSUM = "guest csum"
    MAC = "mac"
    GSO = "gso"
    GUEST_TSO4 = "guest tso4"
    GUEST_TSO6 = "guest tso6"
    ECN = "ecn"
    UFO = "ufo"
    HOST_TSO4 = "host tso4"
    HOST_TSO6 = "host tso6"
    MRG_RXBUF = "mrg rxbuf"
    CTRL_VQ = "ctrl vq"
    CTRL_RX = "ctrl rx"
    ANY_LAYOUT = "any layout"
    GUEST_ANNOUNCE = "guest announce"
    MQ = "mq"
    VERSION_1 = "version 1"
    LOG_ALL = "log all"
    INDIRECT_DESC = "indirect desc"
    EVENT_IDX = "event idx"
    MTU = "mtu"
    IN_ORDER = "in_order"
    IOMMU_PLATFORM = "IOMMU platform"
    PACKED = "packed"
    PROTO_MQ = "proto mq"
    PROTO_LOG_SHMFD = "proto log shmfd"
    PROTO_RARP = "proto rarp"
    PROTO_REPLY_ACK = "proto reply ack"
    PROTO_HOST_NOTIFIER = "proto host notifier"
    PROTO_PAGEFAULT = "proto pagefault"
    QUEUE_STATISTICS = "queue statistics"
    BSD_NIC_UIO = "BSD nic_uio"
    LINUX_VFIO = "Linux VFIO"
    OTHER_KDRV = "Other kdrv"
    ARMV7 = "ARMv7"
    ARMV8 = "ARMv8"
    POWER8 = "Power8"
    X86_32 = "x86-32"
    X86_64 = "x86-64"
    USAGE_DOC = "Usage doc"
    DESIGN_DOC = "Design doc"
    PERF_DOC = "Perf doc"

    @property
    def features(self) -> tuple[Feature, ...]:
        """The virtio features that the row stands for."""
        return FEATURES_OF.get(self, ())


#: "gso" stands for a bit (6) that virtio 1.0 took away.
FEATURES_OF: Mapping[Row, tuple[Feature, ...]] = {
    Row.CSUM: (Feature.NET_F_CSUM,),
    Row.GUEST_CSUM: (Feature.NET_F_GUEST_CSUM,),
    Row.MAC: (Feature.NET_F_MAC,),
    Row.GUEST_TSO4: (Feature.NET_F_GUEST_TSO4,),
    Row.GUEST_TSO6: (Feature.NET_F_GUEST_TSO6,),
    Row.ECN: (Feature.NET_F_GUEST_ECN, Feature.NET_F_HOST_ECN),
    Row.UFO: (Feature.NET_F_GUEST_UFO, Feature.NET_F_HOST_UFO),
    Row.HOST_TSO4: (Feature.NET_F_HOST_TSO4,),
    Row.HOST_TSO6: (Feature.NET_F_HOST_TSO6,),
    Row.MRG_RXBUF: (Feature.NET_F_MRG_RXBUF,),
    Row.CTRL_VQ: (Feature.NET_F_CTRL_VQ,),
    Row.CTRL_RX: (Feature.NET_F_CTRL_RX, Feature.NET_F_CTRL_VLAN, Feature.NET_F_CTRL_MAC_ADDR),
    Row.ANY_LAYOUT: (Feature.F_ANY_LAYOUT,),
    Row.GUEST_ANNOUNCE: (Feature.NET_F_GUEST_ANNOUNCE,),
    Row.MQ: (Feature.NET_F_MQ,),
    Row.VERSION_1: (Feature.F_VERSION_1,),
    Row.LOG_ALL: (Feature.VHOST_F_LOG_ALL,),
    Row.INDIRECT_DESC: (Feature.F_INDIRECT_DESC,),
    Row.EVENT_IDX: (Feature.F_EVENT_IDX,),
    Row.MTU: (Feature.NET_F_MTU,),
    Row.IN_ORDER: (Feature.F_IN_ORDER,),
    Row.IOMMU_PLATFORM: (Feature.F_ACCESS_PLATFORM,),
    Row.PACKED: (Feature.F_RING_PACKED,),
}


class Mark(Enum):
    """How much of a row there is."""

    YES = "Y"
    PARTLY = "P"
    NO = ""


class Way(Enum):
    """What becomes of a virtio feature."""

    #: The business of guest and function alone: offered where the function has it, and negotiated with it.
    CARRIED = "carried"
    #: Offered on behalf of the front-end, which does it itself, whatever the function has.
    PROMISED = "promised"
    #: Agreed on with a function that has it, without asking the guest.
    AGREED = "agreed"
    #: Offered by the front-end, which does it itself, whatever it is offered: nothing of it is here.
    FRONT_END = "front-end's"
    #: Neither offered nor agreed on.
    KEPT_BACK = "kept back"


@dataclass(frozen=True)
class Cell:
    """What one column has of one row."""

    mark: Mark
    #: Why there is not all of it; of a "Y", what is to be known. May be empty then.
    reason: str
    #: Node ids of tests that show it, without parameters where all of them do.
    proofs: tuple[str, ...] = ()
    way: Way = Way.CARRIED
    #: What an emulated NIC does beyond what its family is said to do here.
    emulated: str = ""

    def but_emulated(self, text: str) -> "Cell":
        """The same cell with a footnote on emulated NICs."""
        return replace(self, emulated=text)


def yes(*proofs: str, note: str = "", way: Way = Way.CARRIED) -> Cell:
    """All of it, as each of these tests shows."""
    return Cell(Mark.YES, note, proofs, way)


def partly(reason: str, *proofs: str, way: Way = Way.CARRIED) -> Cell:
    """Some of it; `proofs` show what there is."""
    return Cell(Mark.PARTLY, reason, proofs, way)


def no(reason: str) -> Cell:
    """Nothing of it."""
    return Cell(Mark.NO, reason, way=Way.KEPT_BACK)


@dataclass(frozen=True)
class Column:
    """What a driver declares: a cell for each row that is not the back-end's, and features without a row."""

    #: Name of the driver, as in a device string.
    driver: str
    #: The hardware that the column speaks for.
    family: str
    cells: Mapping[Row, Cell]
    #: Virtio features that have no row.
    beside: Mapping[Feature, Way]

    def mask(self, way: Way) -> int:
        """The virtio features that go this way."""
        of_rows = {feature: cell.way for row, cell in self.cells.items() for feature in row.features}
        return sum(bit(feature) for feature, taken in {**of_rows, **self.beside}.items() if taken is way)
