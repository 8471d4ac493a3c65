"""Announcing a guest: frames that tell the network where it is now.

A front-end asks for one when a guest has moved here and does not announce itself (SEND_RARP), the first
time before its rings run: that is kept until they do, when the guest can be reached. A front-end is not
trusted: with a frame in another guest's name it could draw that one's traffic. Owns what is asked for and not
yet sent, and what became of the rest; the way out is `uplink.py`'s.
"""

import re
import time
from collections import deque
from collections.abc import Callable

from datapath.uplink import Uplink

BROADCAST = b"\xff" * 6
ETHERTYPE_RARP = 0x8035
#: Shortest Ethernet frame in bytes, without its check sequence.
MIN_FRAME = 60
#: Ethernet; IPv4; lengths of their addresses; operation "request reverse" (RFC 903).
_RARP_HEAD = bytes.fromhex("0001 0800 06 04 0003")
#: Addresses kept at most, of those that the front-end asked for.
MAX_PENDING = 16
#: Frames sent in a second at most, and as many refusals told; QEMU sends five in a second and a half.
MAX_PER_SECOND = 10


def rarp_frame(mac: bytes) -> bytes:
    """The frame by which a guest's address is announced: what QEMU sends for its own NICs."""
    unknown = bytes(4)
    body = _RARP_HEAD + mac + unknown + mac + unknown
    return (BROADCAST + mac + ETHERTYPE_RARP.to_bytes(2, "big") + body).ljust(MIN_FRAME, b"\0")


def parse_mac(text: object) -> bytes:
    """A unicast address such as 52:54:00:12:34:56.

    :raise ValueError: for anything else.
    """
    if not isinstance(text, str) or not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", text):
        raise ValueError(f"{text!r} is not a MAC address like 52:54:00:12:34:56")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1:
        raise ValueError(f"{text} is a multicast address")
    return mac


class RateLimit:
    """Allows `MAX_PER_SECOND` in any second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: deque[float] = deque(maxlen=MAX_PER_SECOND)

    def allows(self) -> bool:
        """Whether one more is allowed now; if so it counts."""
        now = self._clock()
        if len(self._last) == MAX_PER_SECOND and now - self._last[0] < 1:
            return False
        self._last.append(now)
        return True


class Announcer:
    """What a port announces on its uplink, if it has one."""

    def __init__(
        self,
        uplink: Uplink | None,
        told: Callable[[dict[str, object]], None],
        mac: bytes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        :param uplink: stays the caller's.
        :param told: called with what became of each announcement: {"mac", "sent", "problem"}.
        :param mac: the only address that is announced; None: any.
        """
        self._uplink = uplink
        self._told = told
        self._mac = mac
        self._frames, self._refusals = RateLimit(clock), RateLimit(clock)
        self._pending: list[bytes] = []
        self._sent = 0
        self._last_sent: float | None = None
        self._problem: str | None = None

    def announce(self, mac: bytes, now: bool) -> None:
        """Announce an address now, or at the next `rings_run`."""
        if self._uplink is None:
            self._refuse(mac, "the port has no uplink: announcements are dropped")
        elif mac[0] & 1 or self._mac not in (None, mac):
            self._refuse(mac, "it is not the guest's address")
        elif not now:
            if mac not in self._pending and len(self._pending) < MAX_PENDING:
                self._pending.append(mac)
        elif self._frames.allows():
            self._send(self._uplink, mac)
        else:
            self._refuse(mac, f"more than {MAX_PER_SECOND} announcements a second")

    def rings_run(self) -> None:
        """Carry out what was kept."""
        pending, self._pending = self._pending, []
        for mac in pending:
            self.announce(mac, now=True)

    def describe(self) -> dict[str, object]:
        """What query-status tells, the uplink's name apart."""
        return {
            "pending": bool(self._pending),
            "sent": self._sent,
            "last_sent": self._last_sent,
            "problem": self._problem,
        }

    def _send(self, uplink: Uplink, mac: bytes) -> None:
        uplink.send(rarp_frame(mac), lambda problem: self._note(mac, problem))

    def _refuse(self, mac: bytes, problem: str) -> None:
        """Nothing is sent. It is told, but not as often as a front-end that goes on and on may ask."""
        self._problem = problem
        if self._refusals.allows():
            self._note(mac, problem)

    def _note(self, mac: bytes, problem: str | None) -> None:
        self._problem = problem
        if problem is None:
            self._sent += 1
            self._last_sent = time.time()
        self._told({"mac": mac.hex(":"), "sent": self._sent, "problem": problem})
