"""What libvirt tells by itself: which domains run, which migrate, and which have stopped.

Hooks do the work; this finds what they missed, because virtvdpad was away or a hook was killed, and what
no hook is called for: migrations. All calls into libvirt are made in threads, since libvirt may block for
as long as a hook of ours runs: those that follow it here, in a thread of its own, others by hypervisor.py.
The daemon works without libvirt: the thread waits for it, and comes back after each loss.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

import libvirt
import libvirt_qemu

from libvirt_vdpa.connections import Connections, keep_alive
from libvirt_vdpa.hypervisor import WRITERS, Hypervisor, job_of

T = TypeVar("T")
logger = logging.getLogger(__name__)

#: Seconds between two tries to reach libvirt.
RECONNECT_INTERVAL = 2.0
#: Seconds until a second look at ports whose domain does not run, but whose QEMU has not left.
LOOK_AGAIN_INTERVAL = 5.0
#: Milliseconds after which libvirt's event loop looks whether there is something else to do.
TICK = 500
#: QEMU's events that are passed on, where libvirt lets us have them (virConnectDomainQemuMonitorEventRegister
#: taints nothing, but wants a connection that may write).
MONITOR_EVENTS = ("MIGRATION", "NIC_RX_FILTER_CHANGED")


class Reconciler(Protocol):
    """What is used of lifecycle.Lifecycle; called in the event loop."""

    def snapshot(self) -> Mapping[str, int]: ...

    def reconcile(self, running: set[str], snapshot: Mapping[str, int]) -> Coroutine[Any, Any, bool]: ...


class Listener(Protocol):
    """Who is told what happens to domains; called in the event loop, for all domains of the host."""

    def libvirt_found(self, jobs: Mapping[str, Mapping[str, object] | None]) -> None:
        """libvirt has been reached; UUIDs of the running domains, and what is being done with each: empty
        when that is nothing, None when it could not be told."""

    def lifecycle_event(self, uuid: str, event: int, detail: int) -> None:
        """VIR_DOMAIN_EVENT_ID_LIFECYCLE."""

    def iteration_event(self, uuid: str, iteration: int) -> None:
        """VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION: a pass over the memory has begun, from 1."""

    def job_event(self, uuid: str, figures: Mapping[str, object]) -> None:
        """VIR_DOMAIN_EVENT_ID_JOB_COMPLETED: a job has ended well; its figures."""

    def monitor_event(self, uuid: str, name: str, data: Mapping[str, object]) -> None:
        """One of MONITOR_EVENTS, from QEMU."""


class DomainWatcher:
    """A thread that follows one libvirt, tells what happens and reconciles ports with its domains."""

    def __init__(
        self,
        uri: str,
        reconciler: Reconciler,
        loop: asyncio.AbstractEventLoop,
        hypervisor: Hypervisor | None = None,
        listener: Listener | None = None,
    ) -> None:
        """Nothing is followed yet.

        :param hypervisor: is given the connection to use, as long as there is one.
        """
        self._uri = uri
        self._reconciler = reconciler
        self._loop = loop
        self._hypervisor = hypervisor or Hypervisor()
        self._listener = listener
        self._stopping = threading.Event()
        #: Set when a domain has stopped or libvirt has just been reached: there may be ports to release.
        self._due = threading.Event()
        #: When there may be ports to release though nothing has happened; by the monotonic clock.
        self._look_again = math.inf
        self._lost = threading.Event()
        #: Compares ports with domains; that may wait for hooks, and for libvirt, which waits for hooks.
        self._reconciling: threading.Thread | None = None
        self._complained = False
        self._told_read_only = False
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
        connection, writable = self._open()
        try:
            self._lost.clear()
            self._due.set()
            connection.registerCloseCallback(lambda *_details: self._lost.set(), None)
            self._register(connection, writable)
            logger.info("libvirt (%s): connected", self._uri)
            self._complained = False
            self._hypervisor.attach(Connections(partial(self._connect, writable)), writable=writable)
            self._tell_found(connection)
            while not self._stopping.is_set() and not self._lost.is_set():
                self._reconcile_if_due(connection)
                libvirt.virEventRunDefaultImpl()
            if self._lost.is_set():
                logger.warning("libvirt (%s): connection lost", self._uri)
        finally:
            self._hypervisor.attach(None)
            connection.close()

    def _open(self) -> tuple[libvirt.virConnect, bool]:
        """A connection, and whether it may change something.

        :raise libvirt.libvirtError: when there is none even to read.
        """
        try:
            return self._connect(writable=True), True
        except libvirt.libvirtError as error:
            connection = self._connect(writable=False)
            if not self._told_read_only:
                logger.warning(
                    "libvirt (%s) can only be read: %s; not possible: %s", self._uri, error, WRITERS
                )
                self._told_read_only = True
            return connection, False

    def _connect(self, writable: bool) -> libvirt.virConnect:
        """A connection; called in any thread.

        :raise libvirt.libvirtError: when there is none.
        """
        connection = libvirt.open(self._uri) if writable else libvirt.openReadOnly(self._uri)
        keep_alive(connection)
        return connection

    def _register(self, connection: libvirt.virConnect, writable: bool) -> None:
        """Have libvirt call us; what a driver does not know is gone without."""
        handlers: dict[int, Callable[..., None]] = {
            libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE: self._lifecycle_event,
            libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION: self._iteration_event,
            libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED: self._job_event,
        }
        for number, handler in handlers.items():
            connection.domainEventRegisterAny(None, number, handler, None)
        if not writable or self._listener is None:
            return
        every: Any = None  # domain; the binding declares no such value
        for name in MONITOR_EVENTS:
            try:
                libvirt_qemu.qemuMonitorEventRegister(connection, every, name, self._monitor_event, None)
            except libvirt.libvirtError as error:
                logger.warning("libvirt (%s): QEMU's %s events: %s", self._uri, name, error)

    # Called by libvirt, in the thread

    def _lifecycle_event(
        self, _connection: object, domain: libvirt.virDomain, event: int, detail: int, _opaque: object
    ) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            self._due.set()
        if self._listener is not None:
            self._tell(self._listener.lifecycle_event, domain.UUIDString(), event, detail)

    def _iteration_event(
        self, _connection: object, domain: libvirt.virDomain, iteration: int, _opaque: object
    ) -> None:
        if self._listener is not None:
            self._tell(self._listener.iteration_event, domain.UUIDString(), iteration)

    def _job_event(
        self, _connection: object, domain: libvirt.virDomain, figures: dict[str, object], _opaque: object
    ) -> None:
        if self._listener is not None:
            self._tell(self._listener.job_event, domain.UUIDString(), dict(figures))

    def _monitor_event(
        self,
        _connection: object,
        domain: libvirt.virDomain,
        name: str,
        _seconds: int,
        _microseconds: int,
        details: str | None,
        _opaque: object,
    ) -> None:
        data = json.loads(details) if details else {}
        if self._listener is not None:
            self._tell(self._listener.monitor_event, domain.UUIDString(), name, data)

    def _tell_found(self, connection: libvirt.virConnect) -> None:
        """Which domains run, and what is being done with them: what happened before is not told again."""
        if self._listener is None:
            return
        jobs: dict[str, Mapping[str, object] | None] = {}
        for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            job: dict[str, object] | None = None
            # One that has ended since or is busy, or a driver that has no jobs.
            with contextlib.suppress(libvirt.libvirtError):
                job = job_of(domain)
            jobs[domain.UUIDString()] = job
        self._tell(self._listener.libvirt_found, jobs)

    def _tell(self, call: Callable[..., None], *arguments: object) -> None:
        """Have a listener called in the event loop, without waiting for it."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(call, *arguments)

    def _reconcile_if_due(self, connection: libvirt.virConnect) -> None:
        """Begin to reconcile if there may be something to do; libvirt is listened to meanwhile."""
        if self._reconciling is not None and self._reconciling.is_alive():
            return
        if self._due.is_set() or time.monotonic() >= self._look_again:
            self._due.clear()
            self._look_again = math.inf
            work = threading.Thread(
                target=self._reconcile, args=(connection,), name="libvirt reconcile", daemon=True
            )
            self._reconciling = work
            work.start()

    # In a thread of its own

    def _reconcile(self, connection: libvirt.virConnect) -> None:
        """Compare the ports with the running domains; again later where that fails or something is left."""
        done = False
        try:
            done = self._reconcile_once(connection)
        except libvirt.libvirtError as error:
            logger.debug("libvirt (%s): %s", self._uri, error)
        except RuntimeError:
            # The daemon's event loop has ended meanwhile.
            if not self._stopping.is_set():
                raise
        if not done:
            self._look_again = time.monotonic() + LOOK_AGAIN_INTERVAL

    def _reconcile_once(self, connection: libvirt.virConnect) -> bool:
        """Whether nothing is left to do; the running domains are as they were not before the snapshot."""
        snapshot = self._in_loop(self._snapshot())
        if not snapshot:
            return True
        running = {
            domain.UUIDString()
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        }
        return self._in_loop(self._reconciler.reconcile(running, snapshot))

    async def _snapshot(self) -> Mapping[str, int]:
        return self._reconciler.snapshot()

    def _in_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Have something done in the event loop, and wait for it.

        :raise RuntimeError: when the loop has ended.
        """
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("the event loop ends") from None
        finally:
            work.close()  # without effect on one that was begun and has ended
