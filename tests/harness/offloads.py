"""IP packets whose checksums and segmentation are left to a device, and the header that says so.

Sources: virtio 1.3 section 5.1.6 for the header; RFC 9293 and 768 for checksums over a pseudo-header.
"""

import socket
import struct
from dataclasses import dataclass

NEEDS_CSUM, DATA_VALID = 1, 2
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_ECN = 0, 1, 4, 0x80
TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
ETHERNET, TCP_BYTES, UDP_BYTES = 14, 20, 8
TCP_CHECKSUM, UDP_CHECKSUM = 16, 6
ACK, CWR, ECE = 0x10, 0x80, 0x40
SOURCE, TARGET = bytes.fromhex("02000000aa01"), bytes.fromhex("02000000bb01")
PORTS = (40000, 5001)


@dataclass(frozen=True)
class NetHeader:
    """`struct virtio_net_hdr_v1`."""

    flags: int = 0
    gso_type: int = GSO_NONE
    header_length: int = 0
    gso_size: int = 0
    checksum_start: int = 0
    checksum_offset: int = 0
    buffers: int = 0

    LAYOUT = struct.Struct("<BBHHHHH")

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            self.flags,
            self.gso_type,
            self.header_length,
            self.gso_size,
            self.checksum_start,
            self.checksum_offset,
            self.buffers,
        )

    @classmethod
    def unpack(cls, data: bytes) -> "NetHeader":
        return cls(*cls.LAYOUT.unpack(data[: cls.LAYOUT.size]))


def ones_sum(data: bytes) -> int:
    """The ones' complement sum of 16-bit words (RFC 1071), not inverted."""
    words = struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2))
    total: int = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@dataclass(frozen=True)
class IpPacket:
    """A TCP or UDP packet over one version of IP, on Ethernet."""

    version: int
    protocol: int
    payload: bytes
    flags: int = ACK
    ports: tuple[int, int] = PORTS

    @property
    def transport_at(self) -> int:
        """Where in the frame TCP or UDP begins."""
        return ETHERNET + (20 if self.version == 4 else 40)

    @property
    def headers(self) -> int:
        """Bytes of the frame before the payload."""
        return self.transport_at + (TCP_BYTES if self.protocol == TCP else UDP_BYTES)

    @property
    def frame(self) -> bytes:
        """The frame with only the pseudo-header in the checksum, as a driver with NET_F_CSUM leaves it."""
        transport = self._transport(ones_sum(self._pseudo_header()))
        kind = 0x0800 if self.version == 4 else 0x86DD
        return TARGET + SOURCE + struct.pack(">H", kind) + self._ip(len(transport)) + transport

    def net_header(self, gso_size: int = 0) -> NetHeader:
        """What goes before the frame: finish the checksum, and with `gso_size` cut the payload up."""
        offset = TCP_CHECKSUM if self.protocol == TCP else UDP_CHECKSUM
        kind = GSO_NONE
        if gso_size:
            kind = GSO_TCPV4 if self.version == 4 else GSO_TCPV6
            kind |= GSO_ECN if self.flags & CWR else 0
        length = self.headers if gso_size else 0
        return NetHeader(NEEDS_CSUM, kind, length, gso_size, self.transport_at, offset)

    def _addresses(self) -> tuple[bytes, bytes]:
        if self.version == 4:
            return socket.inet_aton("10.97.0.1"), socket.inet_aton("10.97.0.2")
        family = socket.AF_INET6
        return socket.inet_pton(family, "fd97::1"), socket.inet_pton(family, "fd97::2")

    def _pseudo_header(self) -> bytes:
        length = self.headers - self.transport_at + len(self.payload)
        return b"".join(self._addresses()) + struct.pack(">II", length, self.protocol)

    def _ip(self, length: int) -> bytes:
        addresses = b"".join(self._addresses())
        if self.version == 6:
            return struct.pack(">IHBB", 6 << 28, length, self.protocol, 64) + addresses
        head = struct.pack(">BBHHHBB", 0x45, 0, 20 + length, 1, 0x4000, 64, self.protocol)
        checksum = ~ones_sum(head + addresses) & 0xFFFF
        return head + struct.pack(">H", checksum) + addresses

    def _transport(self, checksum: int) -> bytes:
        if self.protocol == UDP:
            length = UDP_BYTES + len(self.payload)
            return struct.pack(">HHHH", *self.ports, length, checksum) + self.payload
        return (
            struct.pack(">HHIIBBHHH", *self.ports, 1, 1, 5 << 4, self.flags, 0xFFFF, checksum, 0)
            + self.payload
        )


def is_ours(frame: bytes) -> bool:
    """Whether a frame is one of these packets, or cut out of one."""
    return frame.startswith(TARGET + SOURCE)


def payload_of(frame: bytes) -> bytes:
    """What TCP or UDP carries in a frame of ours."""
    version = frame[ETHERNET] >> 4
    protocol = frame[ETHERNET + (9 if version == 4 else 6)]
    return frame[IpPacket(version, protocol, b"").headers :]


def tcp_flags(frame: bytes) -> int:
    """The flags of a TCP frame of ours."""
    return frame[IpPacket(frame[ETHERNET] >> 4, TCP, b"").transport_at + 13]


def checksum_is_right(frame: bytes) -> bool:
    """Whether the sum over pseudo-header and TCP or UDP comes out as the RFCs want it."""
    version = frame[ETHERNET] >> 4
    begin = ETHERNET + (20 if version == 4 else 40)
    protocol = frame[ETHERNET + (9 if version == 4 else 6)]
    addresses = frame[begin - (8 if version == 4 else 32) : begin]
    transport = frame[begin:]
    return ones_sum(addresses + struct.pack(">II", len(transport), protocol) + transport) == 0xFFFF
