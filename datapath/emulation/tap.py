"""A TAP interface: the uplink of an emulated VF (Linux Documentation/networking/tuntap.rst).

Not persistent: it vanishes with the descriptor.
"""

import contextlib
import fcntl
import os
import socket
import struct

# linux/if_tun.h and linux/sockios.h
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
#: Make a new interface, or fail: one of that name may be a persistent TAP of somebody else's.
IFF_TUN_EXCL = 0x8000
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFMTU = 0x8913, 0x8914, 0x8922
SIOCGIFINDEX, SIOCBRADDIF = 0x8933, 0x89A2
IFF_UP = 0x1
#: Longest interface name, without its NUL.
MAX_NAME = 15


class TapError(Exception):
    """A TAP that cannot be had; the text says which, why, and what to do."""


def open_tap(name: str, mtu: int, bridge: str | None = None) -> int:
    """Make a TAP, set it up, put it into a bridge. Returns its non-blocking descriptor.

    :raise TapError: when it cannot be made.
    """
    if not 0 < len(name.encode()) <= MAX_NAME or "/" in name:
        raise TapError(f"TAP {name}: an interface name has 1 to {MAX_NAME} bytes and no '/'")
    with contextlib.ExitStack() as undo:
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise TapError(
                f"TAP {name}: /dev/net/tun: {error.strerror}; is the tun module loaded?"
            ) from error
        undo.callback(os.close, fd)
        try:
            flags = IFF_TAP | IFF_NO_PI | IFF_TUN_EXCL
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                _set_up(control, name, mtu)
        except OSError as error:
            raise TapError(f"TAP {name}: {error.strerror}; it needs CAP_NET_ADMIN and a free name") from error
        if bridge is not None:
            _enslave(name, bridge)
        undo.pop_all()
    return fd


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
