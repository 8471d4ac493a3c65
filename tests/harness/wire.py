"""Frames on the cable of a VF, seen from the other end: of an emulated VF, the host's side of its TAP."""

import socket

from tests.harness.netns import NetworkNamespace, open_packet_socket

#: Broadcast, from a locally administered address, of an EtherType for experiments (RFC 7042).
HEADER = bytes.fromhex("ffffffffffff 02000000aa01 88b5".replace(" ", ""))
#: What follows is a number, and this much padding.
PADDING = 60


def frame(number: int) -> bytes:
    """An Ethernet frame that tells its number."""
    return HEADER + number.to_bytes(4, "big") + bytes(PADDING)


def number_of(data: bytes) -> int | None:
    """The number of one of our frames; None for a foreign one (IPv6 of the host, say)."""
    if not data.startswith(HEADER):
        return None
    return int.from_bytes(data[len(HEADER) : len(HEADER) + 4], "big")


class Wire:
    """The host's end of a TAP, or whatever interface is at the other end of a VF's cable."""

    def __init__(self, namespace: NetworkNamespace | None, link: str) -> None:
        """Listen on an interface; without a namespace, on one of the test's own."""
        self.socket = open_packet_socket(link) if namespace is None else namespace.packet_socket(link)

    def send(self, *numbers: int) -> None:
        """Send numbered frames to the guest."""
        for number in numbers:
            self.socket.send(frame(number))

    def expect(self, *numbers: int) -> None:
        """Wait for numbered frames from the guest, in that order.

        :raise TimeoutError: when one does not come.
        """
        wanted = list(numbers)
        while wanted:
            data, address = self.socket.recvfrom(2048)
            number = number_of(data)
            if number is None or address[2] == socket.PACKET_OUTGOING:
                continue
            assert data == frame(wanted[0]), f"frame {number} instead of {wanted[0]}"
            del wanted[0]

    def close(self) -> None:
        self.socket.close()
