"""What is said on a host's bridge about where a MAC address is: RARP requests and gratuitous ARP.

Owns a packet socket and a thread that reads it. Times are the kernel's, seconds since the epoch.
"""

import socket
import struct
import threading
from dataclasses import dataclass

from tests.harness.closeable import Closeable
from tests.harness.host import Host
from tests.harness.netns import inside, open_packet_socket
from tests.harness.processes import wait_for

#: asm-generic/socket.h: have the kernel say when a frame came, as a timespec beside it.
SO_TIMESTAMPNS = 35
TIMESPEC = struct.Struct("qq")
#: RFC 826 and 903: Ethernet header up to the type, then hardware and protocol, operation, and the addresses.
ADDRESSES = struct.Struct("!6s6sH HHBBH 6s4s6s4s")
ETHERTYPE_ARP, ETHERTYPE_RARP = 0x0806, 0x8035
RARP_REQUEST = 3


@dataclass(frozen=True)
class Announcement:
    """One frame."""

    #: "rarp" or "arp".
    kind: str
    mac: str
    at: float


def read_announcement(frame: bytes, at: float) -> Announcement | None:
    """What a frame announces; None when it is another one."""
    if len(frame) < ADDRESSES.size:
        return None
    (_, source, ethertype, _, _, _, _, operation, sender, sender_ip, _, target_ip) = ADDRESSES.unpack_from(
        frame
    )
    is_rarp = ethertype == ETHERTYPE_RARP and operation == RARP_REQUEST
    # A gratuitous one is about its sender's own address (RFC 5944, 4.6).
    is_arp = ethertype == ETHERTYPE_ARP and sender_ip == target_ip
    if not (is_rarp or is_arp) or source != sender:
        return None
    return Announcement("rarp" if is_rarp else "arp", source.hex(":"), at)


class Announcements(Closeable):
    """All since it was made."""

    def __init__(self, host: Host, link: str = "br0") -> None:
        self._socket = inside(host.network, lambda: open_packet_socket(link))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.settimeout(0.05)
        self._all: list[Announcement] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._ended.is_set():
            try:
                frame, extra, _, _ = self._socket.recvmsg(2048, socket.CMSG_SPACE(TIMESPEC.size))
            except TimeoutError:
                continue
            seconds, nanoseconds = TIMESPEC.unpack(extra[0][2])
            found = read_announcement(frame, seconds + nanoseconds / 1e9)
            if found is not None:
                self._all.append(found)

    def of(self, mac: str, *, since: float = 0.0, kind: str | None = None) -> list[Announcement]:
        """Those of a MAC address, in their order."""
        return [
            one
            for one in self._all
            if one.mac == mac and one.at >= since and (kind is None or one.kind == kind)
        ]

    def wait_for(
        self, mac: str, *, since: float, kind: str | None = None, count: int = 1
    ) -> list[Announcement]:
        """The first ones after a moment.

        :raise HarnessError: when they do not come in time.
        """

        def come() -> list[Announcement] | None:
            found = self.of(mac, since=since, kind=kind)
            return found if len(found) >= count else None

        return wait_for(f"{count} announcements of {mac}", come, 10) or []

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()
