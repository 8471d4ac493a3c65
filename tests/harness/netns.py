"""A network namespace of a test's own, so that TAPs made there meet nobody else's.

Owns the process that holds the namespace; ending it ends the namespace and the links in it.
"""

import ctypes
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.harness.closeable import Closeable
from tests.harness.processes import HarnessError, run

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3
#: linux/if_packet.h: a socket's wish that its link pass frames to other addresses on, which a real NIC and an
#: emulated one drop; struct packet_mreq is the link's index, the wish, and an address that this one lacks.
SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC = 263, 1, 1
PACKET_MREQ = struct.Struct("=iH10x")


#: Links in it carry what a test sends, and none of the kernel's own IPv6.
SET_UP = "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6 && echo ready && exec sleep infinity"


def open_packet_socket(link: str) -> socket.socket:
    """A raw socket on a link: sends and sees whole Ethernet frames, to whomever they are."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sock.bind((link, 0))
    everything = PACKET_MREQ.pack(socket.if_nametoindex(link), PACKET_MR_PROMISC)
    sock.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, everything)
    sock.settimeout(10)
    return sock


def inside(namespace: Path, make: Callable[[], T]) -> T:
    """Call a function in a thread that has entered a network namespace: a socket stays where it was made.

    :param namespace: a process's, such as /proc/PID/ns/net.
    """
    made: list[T] = []
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            with namespace.open() as entrance:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(entrance.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(namespace))
            made.append(make())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return made[0]


class NetworkNamespace(Closeable):
    """A namespace with its loopback down and nothing else in it."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", SET_UP],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.path = Path(f"/proc/{self._holder.pid}/ns/net")
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self.close()
            raise HarnessError("cannot make a network namespace: are you root?")

    @property
    def prefix(self) -> list[str]:
        """Put before a command line, runs the command inside, as the same process."""
        return ["nsenter", f"--net={self.path}"]

    def run(self, *command: str) -> str:
        """What a command prints, inside."""
        return run([*self.prefix, *command]).stdout

    def packet_socket(self, link: str) -> socket.socket:
        """A raw socket on a link inside: sends and sees whole Ethernet frames."""
        return inside(self.path, lambda: open_packet_socket(link))

    def close(self) -> None:
        """End the namespace."""
        self._holder.kill()
        self._holder.communicate()
