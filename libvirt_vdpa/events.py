"""What libvirt tells by itself: which domains run, and which have stopped.

Hooks do the work; this finds what they missed, because virtvdpad was away or a hook was killed. All calls
into libvirt are made in a thread of their own, since libvirt may block for as long as a hook of ours runs.
The daemon works without libvirt: the thread waits for it, and comes back after each loss.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol, TypeVar

import libvirt

T = TypeVar("T")
logger = logging.getLogger(__name__)

#: Seconds between two tries to reach libvirt, and between keep-alive messages to it.
RECONNECT_INTERVAL = 2.0
KEEPALIVE_INTERVAL = 5
KEEPALIVE_COUNT = 3
#: Seconds until a second look at ports whose domain does not run, but whose QEMU has not left.
LOOK_AGAIN_INTERVAL = 5.0
#: Milliseconds after which libvirt's event loop looks whether there is something else to do.
TICK = 500


class Reconciler(Protocol):
    """What is used of lifecycle.Lifecycle; called in the event loop."""

    def snapshot(self) -> Mapping[str, int]: ...

    def reconcile(self, running: set[str], snapshot: Mapping[str, int]) -> Coroutine[Any, Any, bool]: ...


class DomainWatcher:
    """A thread that follows one libvirt and reconciles ports with its domains."""

    def __init__(self, uri: str, reconciler: Reconciler, loop: asyncio.AbstractEventLoop) -> None:
        self._uri = uri
        self._reconciler = reconciler
        self._loop = loop
        self._stopping = threading.Event()
        #: Set when a domain has stopped or libvirt has just been reached: there may be ports to release.
        self._due = threading.Event()
        #: When there may be ports to release though nothing has happened; by the monotonic clock.
        self._look_again = math.inf
        self._lost = threading.Event()
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="libvirt", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Tell the thread to end; it does as soon as libvirt lets it."""
        self._stopping.set()

    # Everything below runs in the thread

    def _run(self) -> None:
        # Errors are raised as exceptions; libvirt would print them besides.
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        # Without a timer the loop would not return before libvirt has something to say.
        libvirt.virEventAddTimeout(TICK, lambda _timer, _opaque: None, None)
        while not self._stopping.is_set():
            try:
                self._follow()
            except libvirt.libvirtError as error:
                if not self._complained:
                    logger.warning(
                        "libvirt (%s): %s; working by hooks alone until it is back", self._uri, error
                    )
                    self._complained = True
            except RuntimeError:
                # The daemon's event loop has ended while we were in libvirt.
                if not self._stopping.is_set():
                    raise
            self._stopping.wait(RECONNECT_INTERVAL)

    def _follow(self) -> None:
        """Stay with libvirt until it or we end.

        :raise libvirt.libvirtError: when it cannot be reached or goes away.
        """
        connection = libvirt.openReadOnly(self._uri)
        try:
            self._lost.clear()
            self._due.set()
            connection.registerCloseCallback(lambda *_details: self._lost.set(), None)
            keep_alive(connection)
            lifecycle = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
            connection.domainEventRegisterAny(None, lifecycle, self._lifecycle_event, None)
            logger.info("libvirt (%s): connected", self._uri)
            self._complained = False
            while not self._stopping.is_set() and not self._lost.is_set():
                if self._due.is_set() or time.monotonic() >= self._look_again:
                    self._due.clear()
                    self._reconcile(connection)
                libvirt.virEventRunDefaultImpl()
            if self._lost.is_set():
                logger.warning("libvirt (%s): connection lost", self._uri)
        finally:
            connection.close()

    def _lifecycle_event(
        self, _connection: object, _domain: object, event: int, _detail: int, _opaque: object
    ) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            self._due.set()

    def _reconcile(self, connection: libvirt.virConnect) -> None:
        """Compare the ports with the running domains, as they were not before the snapshot."""
        self._look_again = math.inf
        snapshot = self._in_loop(self._snapshot())
        if not snapshot:
            return
        running = {
            domain.UUIDString()
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        }
        if not self._in_loop(self._reconciler.reconcile(running, snapshot)):
            self._look_again = time.monotonic() + LOOK_AGAIN_INTERVAL

    async def _snapshot(self) -> Mapping[str, int]:
        return self._reconciler.snapshot()

    def _in_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Have something done in the event loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def keep_alive(connection: libvirt.virConnect) -> None:
    """Notice a libvirtd that is gone without a word; a driver within this process needs none of that."""
    try:
        connection.setKeepAlive(KEEPALIVE_INTERVAL, KEEPALIVE_COUNT)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
            raise
