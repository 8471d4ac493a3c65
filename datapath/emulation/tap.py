"""A TAP interface: the uplink of an emulated VF (Linux Documentation/networking/tuntap.rst).

Not persistent: it vanishes with the descriptor. Before each frame stands a virtio header of 12 bytes, by
which the kernel and the VF's driver leave checksums and segmentation to each other.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct

from datapath.virtio import NET_HEADER_SIZE, Feature, bit

# linux/if_tun.h and linux/sockios.h
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ, TUNSETVNETLE = 0x400454CA, 0x400454D0, 0x400454D8, 0x400454DC
TUNSETQUEUE = 0x400454D9
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE = 0x0200, 0x0400
#: Make a new interface, or fail: one of that name may be a persistent TAP of somebody else's.
IFF_TUN_EXCL = 0x8000
#: What the reader of a TAP can take: TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN.
OFFLOADS = {
    Feature.NET_F_GUEST_CSUM: 0x01,
    Feature.NET_F_GUEST_TSO4: 0x02,
    Feature.NET_F_GUEST_TSO6: 0x04,
    Feature.NET_F_GUEST_ECN: 0x08,
}
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFMTU = 0x8913, 0x8914, 0x8922
SIOCGIFINDEX, SIOCBRADDIF = 0x8933, 0x89A2
IFF_UP = 0x1
#: Longest interface name, without its NUL.
MAX_NAME = 15


class TapError(Exception):
    """A TAP that cannot be had; the text says which, why, and what to do."""


class Tap:
    """A TAP that is up, and maybe in a bridge, with a queue for each queue pair of the VF.

    The kernel gives a flow to the queue that the last frame of the flow came from, and spreads the others.
    Its descriptors do not block.
    """

    has_header = True

    def __init__(self, name: str, mtu: int, bridge: str | None = None, pairs: int = 1) -> None:
        """Make it, with its first queue in use.

        :raise TapError: when it cannot be made.
        """
        if not 0 < len(name.encode()) <= MAX_NAME or "/" in name:
            raise TapError(f"TAP {name}: an interface name has 1 to {MAX_NAME} bytes and no '/'")
        self._offloads = 0
        #: Queues that the kernel uses, from the first on.
        self.used_pairs = pairs
        fds: list[int] = []
        with contextlib.ExitStack() as undo:
            for number in range(pairs):
                fds.append(_open(name, first=number == 0, several=pairs > 1))
                undo.callback(os.close, fds[-1])
            self.fds = tuple(fds)
            self.use_pairs(1)
            try:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                    _set_up(control, name, mtu)
            except OSError as error:
                raise _refused(name, error) from error
            if bridge is not None:
                _enslave(name, bridge)
            undo.pop_all()

    def accept(self, features: int) -> None:
        """Have the kernel hand over unfinished what a driver with these features finishes itself."""
        offloads = sum(flag for feature, flag in OFFLOADS.items() if features & bit(feature))
        if offloads == self._offloads:
            return
        self._tell(self.fds[0], TUNSETOFFLOAD, offloads)
        self._offloads = offloads

    def use_pairs(self, pairs: int) -> None:
        """Have the kernel use so many queues. What waits in a queue that goes out of use is lost."""
        for number in range(self.used_pairs, pairs):
            self._tell(self.fds[number], TUNSETQUEUE, struct.pack("16xH22x", IFF_ATTACH_QUEUE))
        # From the end, for the last queue takes the place of one that goes.
        for number in reversed(range(pairs, self.used_pairs)):
            self._tell(self.fds[number], TUNSETQUEUE, struct.pack("16xH22x", IFF_DETACH_QUEUE))
        self.used_pairs = pairs

    def send(self, frame: bytes) -> None:
        """Let a frame out as it is.

        :raise OSError: when the TAP takes no more.
        """
        os.write(self.fds[0], bytes(NET_HEADER_SIZE) + frame)

    def close(self) -> None:
        """Remove the interface."""
        for fd in self.fds:
            os.close(fd)

    @staticmethod
    def _tell(fd: int, request: int, argument: int | bytes) -> None:
        try:
            fcntl.ioctl(fd, request, argument)
        except OSError as error:
            if error.errno != errno.EBADFD:  # somebody has removed the interface
                raise


def _open(name: str, *, first: bool, several: bool) -> int:
    """The descriptor of a new TAP, or of one more queue of it."""
    with contextlib.ExitStack() as undo:
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise TapError(
                f"TAP {name}: /dev/net/tun: {error.strerror}; is the tun module loaded?"
            ) from error
        undo.callback(os.close, fd)
        try:
            flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
            flags |= (IFF_TUN_EXCL if first else 0) | (IFF_MULTI_QUEUE if several else 0)
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", NET_HEADER_SIZE))
            fcntl.ioctl(fd, TUNSETVNETLE, struct.pack("i", 1))
        except OSError as error:
            raise _refused(name, error) from error
        undo.pop_all()
    return fd


def _refused(name: str, error: OSError) -> TapError:
    return TapError(f"TAP {name}: {error.strerror}; it needs CAP_NET_ADMIN and a free name")


def _set_up(control: socket.socket, name: str, mtu: int) -> None:
    fcntl.ioctl(control, SIOCSIFMTU, struct.pack("16si20x", name.encode(), mtu))
    request = fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0))
    (flags,) = struct.unpack_from("H", request, 16)
    fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags | IFF_UP))


def _enslave(name: str, bridge: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            request = fcntl.ioctl(control, SIOCGIFINDEX, struct.pack("16si20x", name.encode(), 0))
            (index,) = struct.unpack_from("i", request, 16)
            fcntl.ioctl(control, SIOCBRADDIF, struct.pack("16si20x", bridge.encode(), index))
        except OSError as error:
            raise TapError(
                f"TAP {name}: bridge {bridge}: {error.strerror}; does the bridge exist?"
            ) from error
