"""Who has a ConnectX: the kernel lets any number of processes open one, and a second port would take frames
of the first.

A UNIX socket in the abstract namespace, named after the RDMA device, is held as long as the device is; it
goes with its process, however that ends.
"""

import contextlib
import os
import socket
import struct
from pathlib import Path

from datapath.vdpa import DeviceError

#: struct ucred of unix(7): pid, uid, gid.
CREDENTIALS = struct.Struct("3i")


class Holder:
    """The hold on one device."""

    def __init__(self, device: str, name: str) -> None:
        """
        :param device: name of the RDMA device.
        :param name: what messages call it.
        :raise DeviceError: when another process holds it, with that one's name.
        """
        address = f"\0libvirt-vdpa/mlx5/{device}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.bind(address)
            self._socket.listen()
        except OSError:
            self._socket.close()
            raise DeviceError(f"{name}: {device} is held by {_who(address)}") from None

    def close(self) -> None:
        self._socket.close()


def _who(address: str) -> str:
    """The process that holds an address, by the name that it was given on its command line."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.setblocking(False)  # nobody accepts, so one day there is no more room for those who ask
        other.connect(address)
        pid, _, _ = CREDENTIALS.unpack(
            other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        )
        if pid == os.getpid():
            return "this process"
        return f"{_name(pid)} (process {pid})"
    return "another process"


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
        for at, word in enumerate(words):
            if word == "--name":
                return f"port '{words[at + 1]}'"
            if word.startswith("--name="):
                return f"port '{word.removeprefix('--name=')}'"
    return "a port"
