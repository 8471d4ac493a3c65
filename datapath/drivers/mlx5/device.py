"""The vDPA driver for ConnectX: VFs of ConnectX-6, ConnectX-6 Dx and BlueField, through DevX.

The kernel's own driver stays bound; the firmware is told by mailboxes what to do (docs/drivers/mlx5.md).
This module owns the device as `VdpaDevice` has it: which calls are allowed when, guest memory, the dirty log,
what the device reports. Rings are `rings`' business.
"""

import contextlib
import os
import select
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from datapath.drivers.mlx5.capabilities import capabilities
from datapath.drivers.mlx5.dirty_log import DirtyLog
from datapath.drivers.mlx5.features import FEATURES
from datapath.drivers.mlx5.glue import Context, Glue, RdmaDevice
from datapath.drivers.mlx5.holder import Holder
from datapath.drivers.mlx5.memory import Domain, GuestMemory
from datapath.drivers.mlx5.options import Options
from datapath.drivers.mlx5.rings import Rings
from datapath.drivers.mlx5.undo import Undo
from datapath.drivers.mlx5.workers import Workers
from datapath.features import Way
from datapath.vdpa import (
    DeviceError,
    DeviceEvent,
    DeviceLostError,
    DeviceSpec,
    DirtyBitmap,
    HostNotifier,
    LogMode,
    MemoryRegion,
    Ring,
    RingState,
    VdpaDevice,
)
from datapath.virtio import Feature, bit

#: The largest ring that is shown to work: that of DPDK's `queue_size` (doc/guides/vdpadevs/mlx5.rst).
MAX_QUEUE_SIZE = 1024
#: Seconds that it may take to pin a GiB of guest memory.
PINNING = 10.0
#: A queue is made anew after an error, unless it is the third within so many seconds (DPDK's
#: drivers/vdpa/mlx5/mlx5_vdpa_event.c, MLX5_VDPA_ERROR_TIME_SEC).
ERRORS, ERROR_TIME = 3, 3.0
#: What an asynchronous event begins with: element, type (struct ib_uverbs_async_event_desc of
#: include/uapi/rdma/ib_user_verbs.h); and the type that says that the device is gone (enum ibv_event_type).
ASYNC_EVENT = struct.Struct("=QII")
DEVICE_FATAL = 8
#: Counter of the firmware's -> its name in statistics.
COUNTED: Mapping[str, str] = {
    "received_desc": "received_descriptors",
    "completed_desc": "completed_descriptors",
    "error_cqes": "completion_errors",
    "bad_desc_errors": "bad_descriptor_errors",
    "exceed_max_chain": "exceeded_max_chain",
    "invalid_buffer": "invalid_buffer",
}


class Mlx5Device(VdpaDevice):
    """A ConnectX, idle or running."""

    def __init__(self, name: str, glue: Glue, found: RdmaDevice, options: Options, mac: bytes | None) -> None:
        """Open it and make all that does not depend on a guest.

        :param mac: the guest's, when it is to receive no other's frames.
        :raise DeviceError: when another process has it, or it cannot do what is needed.
        :raise OSError: when descriptors or threads have run out.
        """
        self.name = name
        self._glue = glue
        self._features = 0
        self._log: DirtyLog | None = None
        self._marked = self._missed = 0
        self._lost = self._told_lost = False
        self._fault: str | None = None
        #: Of each ring, when its queue met errors, by the monotonic clock; and how often it was made anew.
        self._errors: dict[int, deque[float]] = {}
        self._renewed: Counter[str] = Counter()
        #: What the firmware said when it was last asked for its counters.
        self._counted: dict[str, int] = {}
        #: Whether a worker has something to do that may take long.
        self._busy = False
        self._meanwhile: Callable[[], None] = lambda: None
        self._workers = Workers(glue, options.max_conf_threads)
        with Undo() as undo:
            undo.callback(self._workers.close)
            undo.callback(Holder(found.name, name).close)
            (self._context,) = self._workers.run(partial(glue.open, found))
            undo.callback(self._close_context, self._context)
            (capable,) = self._workers.run(lambda: capabilities(glue, self._context))
            (domain,) = self._workers.run(lambda: Domain(glue, self._context))
            undo.callback(domain.close)
            self._domain = domain
            self._memory = GuestMemory(domain)
            undo.callback(self._memory.close)
            undo.callback(self._end_log)
            self._rings = Rings(domain, capable, options, self._workers, mac)
            undo.callback(self._rings.close)
            self._events = undo.enter_context(select.epoll())
            self._async_fd = glue.async_fd(self._context)
            self._lost_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._lost_fd)
            self._watched = (self._rings.errors.fd, self._rings.broken_fd, self._async_fd, self._lost_fd)
            for fd in self._watched:
                os.set_blocking(fd, False)
                self._events.register(fd, select.EPOLLIN)
            self._resources = undo.pop_all()
        self.queue_pairs = capable.queue_pairs
        self.promised = FEATURES.mask(Way.PROMISED)
        self.features = capable.features & FEATURES.mask(Way.CARRIED) | self.promised
        self.max_queue_size = MAX_QUEUE_SIZE
        self.max_mtu = found.mtu
        if self.max_mtu is None:
            self.features &= ~bit(Feature.NET_F_MTU)
        self.log_modes = (LogMode.HARDWARE,)
        self.serves_legacy = True

    def _close_context(self, context: Context) -> None:
        self._workers.run(partial(self._glue.close, context))

    # Memory

    def map_memory(self, region: MemoryRegion) -> None:
        self._check_alive()
        seconds = PINNING * region.size / (1 << 30)
        if self._rings.running:
            self._rebuild(partial(self._memory.add, region), seconds)
        else:
            self._busily(partial(self._memory.add, region), seconds)

    def unmap_memory(self, region: MemoryRegion) -> None:
        self._check_alive()
        seconds = PINNING * region.size / (1 << 30)
        if self._rings.running:
            self._rebuild(partial(self._memory.remove, region), seconds)
        else:
            self._rings.forget_stopped()
            self._busily(partial(self._memory.remove, region), seconds)

    def call_meanwhile(self, callback: Callable[[], None]) -> None:
        self._meanwhile = callback

    def _busily(self, task: Callable[[], None], seconds: float) -> None:
        """Do what may take long; others are served meanwhile, as far as they ask the firmware nothing."""
        self._busy = True
        try:
            self._workers.run(task, more=seconds, meanwhile=self._meanwhile)
        finally:
            self._busy = False

    def _rebuild(self, change: Callable[[], None], seconds: float) -> None:
        """Change guest memory under rings that run: their queues' key is another then."""
        before = self._rings.running
        with self._halting():
            states = self._rings.stop(before)
            self._rings.forget_stopped()
            self._workers.run(self._memory.forget_key)
        try:
            self._busily(change, seconds)
        finally:
            self._run({index: replace(ring, state=states[index]) for index, ring in before.items()})

    # Running

    def start(self, features: int, rings: Mapping[int, Ring]) -> None:
        self._check_alive()
        if self._rings.running:
            raise DeviceError(f"{self.name}: is running already")
        if not features & bit(Feature.F_VERSION_1) and not features & ~self.promised:
            # QEMU that has lost what the guest accepted (see `Backend.former`): its header may be any.
            raise DeviceError(
                f"{self.name}: the guest did not accept VERSION_1 or anything else of the device's, or its"
                " front-end has forgotten it; reset the guest"
            )
        for index, ring in rings.items():
            self._check_ring(index, ring)
        self._features = features
        self._fault = None
        self._errors.clear()
        self._run(rings)

    def start_ring(self, index: int, ring: Ring) -> None:
        self._check_alive()
        if not self._rings.running or index in self._rings.running:
            raise DeviceError(f"{self.name}: ring {index} runs already, or the device does not")
        self._check_ring(index, ring)
        self._run({index: ring})

    def _run(self, rings: Mapping[int, Ring]) -> None:
        with self._halting():
            (key,) = self._workers.run(self._memory.key)
            try:
                self._rings.start(rings, self._features, key, self._log)
            except OSError as error:
                raise DeviceError(f"{self.name}: ring descriptor: {error.strerror}") from error

    def set_call(self, index: int, fd: int | None) -> None:
        self._check_runs(index)
        if not self._rings.set_call(index, fd):
            with self._halting():
                self._rings.renew(index, replace(self._rings.running[index], call=fd))

    def stop_ring(self, index: int) -> RingState:
        self._check_runs(index)
        with self._halting():
            return self._rings.stop([index])[index]

    def suspend(self) -> dict[int, RingState]:
        self._check_alive()
        with self._halting():
            return self._rings.stop(self._rings.running)

    @contextmanager
    def _halting(self) -> Iterator[None]:
        """Around what starts or stops rings: should it fail, none runs afterwards.

        :raise DeviceLostError: when that cannot be brought about.
        """
        try:
            yield
        except BaseException as failure:
            try:
                self._rings.halt()
            except DeviceError as error:
                if isinstance(failure, DeviceLostError):
                    raise failure from None
                raise DeviceLostError(f"{self.name}: its queues cannot be stopped: {error}") from error
            raise

    # Logging

    def start_logging(self, bitmap: DirtyBitmap) -> None:
        self._check_alive()
        if self._log is not None and self._log.is_in(bitmap):
            return
        (log,) = self._workers.run(lambda: DirtyLog(self._domain, bitmap))
        try:
            self._change_log(log)
        except BaseException:
            with contextlib.suppress(DeviceError):
                self._change_log(None)
            raise

    def stop_logging(self) -> None:
        if self._log is not None:
            self._check_alive()
            self._change_log(None)

    def _change_log(self, log: DirtyLog | None) -> None:
        """Have rings mark elsewhere, or nowhere; then take the bitmap until now back from the device."""
        before, self._log = self._log, log
        with self._halting():
            self._rings.log(log)
            if before is not None:
                self._drop(before)

    def _drop(self, log: DirtyLog) -> None:
        self._marked += log.marked
        self._missed += log.missed
        self._workers.run(log.close)

    def _end_log(self) -> None:
        if self._log is not None:
            log, self._log = self._log, None
            self._drop(log)

    @property
    def log_mode(self) -> LogMode | None:
        return None if self._log is None else LogMode.HARDWARE

    @property
    def log_missed(self) -> int:
        return self._missed + (0 if self._log is None else self._log.missed)

    @property
    def shadowed(self) -> bool:
        return False

    def notifier(self, index: int) -> HostNotifier | None:
        return self._rings.notifier

    # Events and numbers

    @property
    def event_fd(self) -> int:
        return self._events.fileno()

    @property
    def fault(self) -> str | None:
        return self._fault

    def take_event(self) -> DeviceEvent | None:
        try:
            event = self._next_event({fd for fd, _ in self._events.poll(0)})
        except DeviceError:
            self._lose()
            event = None
        return self._tell_lost() if self._lost else event

    def _next_event(self, ready: Container[int]) -> DeviceEvent | None:
        """
        :raise DeviceError: when the device is of no more use.
        """
        if self._async_fd in ready and self._is_fatal():
            raise DeviceLostError(f"{self.name}: the device is gone")
        if self._rings.errors.fd in ready:
            return self._take_error()
        if self._rings.broken_fd in ready:
            os.eventfd_read(self._rings.broken_fd)
            self._fault = "an event queue has failed: the guest would not hear what is completed"
            return DeviceEvent.NEEDS_RESET
        return None

    def _tell_lost(self) -> DeviceEvent | None:
        """That the device is gone is told once, and there is no more to be told then."""
        if self._told_lost:
            return None
        self._told_lost = True
        for fd in self._watched:
            self._events.unregister(fd)
        return DeviceEvent.LOST

    def _is_fatal(self) -> bool:
        """Whether the device's next event says that it is gone."""
        try:
            data = os.read(self._async_fd, ASYNC_EVENT.size)
        except BlockingIOError:
            return False
        except OSError:
            return True  # the kernel has taken the device away
        return len(data) < ASYNC_EVENT.size or ASYNC_EVENT.unpack(data)[1] == DEVICE_FATAL

    def _lose(self) -> None:
        """The device is gone: whoever serves it hears of it by an event."""
        self._lost = True
        os.eventfd_write(self._lost_fd, 1)

    def _take_error(self) -> DeviceEvent | None:
        """A queue has met an error: make it anew, unless it has met too many.

        :raise DeviceError: when the device is of no more use.
        """
        cookie = self._glue.take_event(self._rings.errors)
        failed = None if cookie is None else self._rings.failed(cookie)
        if failed is None:
            return None
        index, error_type = failed
        times = self._errors.setdefault(index, deque(maxlen=ERRORS))
        times.append(time.monotonic())
        if len(times) == ERRORS and times[-1] - times[0] < ERROR_TIME:
            self._fault = f"ring {index}: {ERRORS} errors within {ERROR_TIME:g} s, now of type {error_type}"
            return DeviceEvent.NEEDS_RESET
        try:
            with self._halting():
                self._rings.renew(index)
        except DeviceLostError:
            raise
        except (DeviceError, OSError) as error:
            self._fault = f"ring {index}: has met an error of type {error_type}, and afterwards: {error}"
            return DeviceEvent.NEEDS_RESET
        self._renewed[f"renewed.{index}"] += 1
        return None

    def statistics(self) -> dict[str, int]:
        """As `VdpaDevice.statistics`; what the relay has none of; and, by the firmware, of each ring.

        `received_descriptors.N`, `completed_descriptors.N`, `completion_errors.N`, `bad_descriptor_errors.N`,
        `exceeded_max_chain.N`, `invalid_buffer.N`: its counters; `renewed.N`: how often its queue was made
        anew after an error; `completions.N`, `interrupts.N`: see `Completions.statistics`. Of a firmware that
        does not answer, or has other things to do, they are what they were.
        """
        self._count()
        numbers = self._rings.statistics() | self._renewed | self._counted
        marked = self._marked
        if self._log is not None:
            self._log.look()
            marked += self._log.marked
        return numbers | {"logged_pages": marked, "log_missed": self.log_missed}

    def _count(self) -> None:
        """Ask the firmware for its counters."""
        if self._busy or self._lost:
            return
        try:
            told = self._rings.counters()
        except DeviceLostError:
            self._lose()
        except DeviceError:
            pass  # one that has died tells by an event
        else:
            for index, counters in told.items():
                self._counted |= {f"{COUNTED[name]}.{index}": count for name, count in counters.items()}

    def close(self) -> None:
        self._lost = True
        # The firmware may die of it, as of anything: then all that is not its own is given back.
        closing = threading.Thread(target=self._give_back, name="mlx5 close", daemon=True)
        closing.start()
        while closing.is_alive() and self._answers(closing):
            pass
        if closing.is_alive():
            self._glue.give_up("its firmware has not answered while it was closed")
            with contextlib.suppress(DeviceError, OSError):
                self._rings.close()
            self._give_back()

    def _answers(self, closing: threading.Thread) -> bool:
        """Whether the firmware has answered anything within its time, or all is closed."""
        gigabytes = sum(region.size for region in self._memory.regions) / (1 << 30)
        before = self._glue.answers
        closing.join(self._workers.deadline + PINNING * gigabytes)
        return not closing.is_alive() or self._glue.answers != before

    def _give_back(self) -> None:
        with contextlib.suppress(DeviceError, OSError):
            self._resources.close()

    # Inside

    def _check_alive(self) -> None:
        if self._lost:
            raise DeviceLostError(f"{self.name}: the device is gone")
        self._glue.check_alive()

    def _check_runs(self, index: int) -> None:
        self._check_alive()
        if index not in self._rings.running:
            raise DeviceError(f"{self.name}: ring {index} does not run")

    def _check_ring(self, index: int, ring: Ring) -> None:
        if not 0 <= index < 2 * self.queue_pairs:
            raise DeviceError(f"{self.name}: no ring {index}; the device has {self.queue_pairs} queue pairs")
        if ring.packed:
            raise DeviceError(f"{self.name}: ring {index}: packed rings are not served")
        if not 1 <= ring.size <= self.max_queue_size or ring.size & (ring.size - 1):
            raise DeviceError(
                f"{self.name}: ring {index} of {ring.size} descriptors; the device takes"
                f" powers of two up to {self.max_queue_size}"
            )


def open_device(spec: DeviceSpec, log_mode: LogMode = LogMode.AUTO, mac: bytes | None = None) -> Mlx5Device:
    """Take hold of the ConnectX that a device string names: `mlx5,pci=ADDRESS` or `mlx5,ibdev=NAME`.

    :raise DeviceSpecError: for options that make no sense.
    :raise DeviceError: when the device cannot be had, or the relay is to mark what it writes.
    """
    options = Options.parse(spec)
    name = f"mlx5,pci={options.pci}" if options.pci else f"mlx5,ibdev={options.ibdev}"
    if log_mode is LogMode.SOFTWARE:
        raise DeviceError(f"{name}: marks what it writes itself: use log mode 'hardware' or 'auto'")
    glue = Glue(options.libraries, name)
    found = _find(glue.devices(), options, name)
    try:
        return Mlx5Device(name, glue, found, options, None if options.promiscuous else mac)
    except OSError as error:
        raise DeviceError(f"{name}: {error.strerror}") from error


def _find(devices: Sequence[RdmaDevice], options: Options, name: str) -> RdmaDevice:
    """
    :raise DeviceError: when there is no such device.
    """
    for device in devices:
        if options.ibdev == device.name or (options.pci and options.pci == device.pci_address):
            return device
    there = ", ".join(f"{device.name} ({device.pci_address or 'no PCI function'})" for device in devices)
    raise DeviceError(f"{name}: no such RDMA device; there are: {there or 'none'}")
