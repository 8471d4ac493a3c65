"""Names and numbers of the virtio specification (version 1.3) that more than one room uses.

Bare bit numbers as the specification lists them; `bit()` makes a mask. Section numbers refer to
"Virtual I/O Device (VIRTIO) Version 1.3".
"""

from enum import IntEnum, IntFlag


def bit(number: int) -> int:
    """The 64-bit feature mask of one feature bit number."""
    return 1 << number


class Feature(IntEnum):
    """Feature bit numbers: network device (section 5.1.3), reserved bits (section 6), vhost's own."""

    NET_F_CSUM = 0
    NET_F_GUEST_CSUM = 1
    NET_F_CTRL_GUEST_OFFLOADS = 2
    NET_F_MTU = 3
    NET_F_MAC = 5
    NET_F_GUEST_TSO4 = 7
    NET_F_GUEST_TSO6 = 8
    NET_F_GUEST_ECN = 9
    NET_F_GUEST_UFO = 10
    NET_F_HOST_TSO4 = 11
    NET_F_HOST_TSO6 = 12
    NET_F_HOST_ECN = 13
    NET_F_HOST_UFO = 14
    NET_F_MRG_RXBUF = 15
    NET_F_STATUS = 16
    NET_F_CTRL_VQ = 17
    NET_F_CTRL_RX = 18
    NET_F_CTRL_VLAN = 19
    NET_F_GUEST_ANNOUNCE = 21
    NET_F_MQ = 22
    NET_F_CTRL_MAC_ADDR = 23
    F_NOTIFY_ON_EMPTY = 24  # legacy
    VHOST_F_LOG_ALL = 26  # vhost, not virtio: log every write to guest memory
    F_ANY_LAYOUT = 27  # legacy
    F_INDIRECT_DESC = 28
    F_EVENT_IDX = 29
    VHOST_USER_F_PROTOCOL_FEATURES = 30  # vhost-user, not virtio
    F_VERSION_1 = 32
    F_ACCESS_PLATFORM = 33
    F_RING_PACKED = 34
    F_IN_ORDER = 35
    F_ORDER_PLATFORM = 36
    F_SR_IOV = 37
    F_NOTIFICATION_DATA = 38
    F_NOTIF_CONFIG_DATA = 39
    F_RING_RESET = 40
    NET_F_GUEST_USO4 = 54
    NET_F_GUEST_USO6 = 55
    NET_F_HOST_USO = 56
    NET_F_HASH_REPORT = 57
    NET_F_RSS = 60


def feature_names(features: int) -> list[str]:
    """The names of the bits set in a feature word, lowest first; `BIT_n` for one without a name."""
    known = {int(feature): feature.name for feature in Feature}
    return [known.get(n, f"BIT_{n}") for n in range(64) if features >> n & 1]


class Status(IntFlag):
    """Device status bits (section 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


#: Virtio device type of a network card (section 5.1.1).
DEVICE_NET = 1
#: PCI vendor of all virtio devices (section 4.1.2).
PCI_VENDOR = 0x1AF4
#: PCI device id of a modern device is this plus the virtio device type (section 4.1.2.1).
PCI_MODERN_DEVICE_BASE = 0x1040
#: PCI device id of a transitional network device, whose subsystem then is the type (section 4.1.2.3).
PCI_TRANSITIONAL_NET = 0x1000
#: Where a packed virtqueue begins: place 0, wrap counter 1 in bit 15 (sections 2.8.1 and 2.8.14).
PACKED_START = 0x8000
#: Largest size of a split virtqueue (section 2.7).
MAX_QUEUE_SIZE = 32768
#: "no vector", in the MSI-X vector registers (section 4.1.5.1.3).
NO_VECTOR = 0xFFFF
#: Bytes of `struct virtio_net_hdr_v1`, which VERSION_1 puts before every packet (section 5.1.6).
NET_HEADER_SIZE = 12
#: Bytes of `struct virtio_net_hdr`, where neither VERSION_1 nor MRG_RXBUF was accepted (section 5.1.6.1).
SHORT_NET_HEADER_SIZE = 10
#: Status bit in the network device's configuration: the link is up (section 5.1.4).
NET_S_LINK_UP = 1


class PciCapability(IntEnum):
    """`cfg_type` of a virtio vendor capability (section 4.1.4)."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI_ACCESS = 5


class Common:
    """Byte offsets in the PCI common configuration structure (section 4.1.4.3)."""

    DEVICE_FEATURE_SELECT = 0x00
    DEVICE_FEATURE = 0x04
    DRIVER_FEATURE_SELECT = 0x08
    DRIVER_FEATURE = 0x0C
    CONFIG_MSIX_VECTOR = 0x10
    NUM_QUEUES = 0x12
    DEVICE_STATUS = 0x14
    CONFIG_GENERATION = 0x15
    QUEUE_SELECT = 0x16
    QUEUE_SIZE = 0x18
    QUEUE_MSIX_VECTOR = 0x1A
    QUEUE_ENABLE = 0x1C
    QUEUE_NOTIFY_OFF = 0x1E
    QUEUE_DESC = 0x20
    QUEUE_DRIVER = 0x28
    QUEUE_DEVICE = 0x30
    SIZE = 0x38


class NetConfig:
    """Byte offsets in the network device's configuration (section 5.1.4)."""

    MAC = 0
    STATUS = 6
    MAX_VIRTQUEUE_PAIRS = 8
    MTU = 10
    SIZE = 12


def ring_bytes(size: int) -> tuple[int, int, int]:
    """Bytes of a split ring's descriptor table, available ring and used ring (section 2.7).

    The last two include the 16-bit event fields of EVENT_IDX.
    """
    return 16 * size, 6 + 2 * size, 6 + 8 * size


def packed_ring_bytes(size: int) -> tuple[int, int, int]:
    """Bytes of a packed ring (section 2.8): its descriptors, and what driver and device want to hear."""
    return 16 * size, 4, 4
