"""The kernel's word that PCI functions have come or gone: its uevents, a netlink multicast.

The form is that of lib/kobject_uevent.c: "ACTION@PATH", then KEY=VALUE, each ended by a NUL. A library
would bring a udev with it, for one socket and a split.
"""

import asyncio
import logging
import socket
from collections.abc import Callable

logger = logging.getLogger(__name__)

#: linux/netlink.h; the multicast group on which the kernel itself speaks (udev has another).
NETLINK_KOBJECT_UEVENT, KERNEL_GROUP = 15, 1
#: Bytes of an event: UEVENT_BUFFER_SIZE of linux/kobject.h, and the path before it (PATH_MAX).
EVENT_SIZE = 2048 + 4096
#: What a change of the host's functions begins with. A VF is added before its physical function has the link
#: to it, and changed after (drivers/pci/iov.c); once a physical function is bound, VFs can be created.
ACTIONS = (b"add@", b"remove@", b"change@", b"bind@")


class PciEvents:
    """Listens for functions that come and go, from `start` to `stop`."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """Not listening yet.

        :param changed: called for each function that has come or gone, by the event loop.
        """
        self._changed = changed
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Listen. Where that is not possible it is logged: functions are noticed when they are asked for."""
        try:
            listening = subscribe()
        except OSError as error:
            logger.warning("uevents: %s; PCI functions are looked for only when asked for", error.strerror)
            return
        asyncio.get_running_loop().add_reader(listening, self._readable)
        self._socket = listening

    def stop(self) -> None:
        """Listen no more. Idempotent."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            event, (sender, _groups) = self._socket.recvfrom(EVENT_SIZE)
        except BlockingIOError:
            return
        except OSError:
            self._changed()  # more events than the socket holds (ENOBUFS): one of them may have been ours
            return
        # 0 is the kernel. Others may send to us alone.
        if sender == 0 and concerns_pci(event):
            self._changed()


def subscribe() -> socket.socket:
    """A socket that gets what the kernel says.

    :raise OSError: when the kernel does not allow it.
    """
    listening = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT)
    try:
        listening.setblocking(False)
        listening.bind((0, KERNEL_GROUP))
    except OSError:
        listening.close()
        raise
    return listening


def concerns_pci(event: bytes) -> bool:
    """Whether an event says that a PCI function has come or gone, or that others can come of it now."""
    return event.startswith(ACTIONS) and b"SUBSYSTEM=pci" in event.split(b"\0")
