"""A modern virtio-net PCI function as a vDPA device: the part of the life cycle that is plain virtio 1.3.

What virtio does not define, namely to stop a ring and to tell and set where it stands, is left to hooks
(`_use_rings`, `_restore_ring`, `_quiesce`, `_used_index`) that a driver supplies. Registers are
`virtio_registers`; how rings travel between guest and function is `ring_paths`.

    open: function reset, memory decoding and bus mastering on, virtio reset: idle
    start: virtio reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK (so far as `prepare` has not been there),
           MSI-X eventfds, rings, DRIVER_OK, relay, one notification a ring: running
    suspend: no more kicks, rings stopped and read, MSI-X off, virtio reset: idle

Rings are shadowed while the relay logs writes, and when one is to begin where the function cannot. Going over
from one way to the other, rings stop and start, between which the guest's kicks wait in their eventfds. A
function that has ring state is not reset for it, so that it keeps what arrives meanwhile.

Vector 0 is for configuration changes, vector q + 1 for queue q.
"""

import abc
import contextlib
import dataclasses
import os
import select
from collections.abc import Callable, Collection, Mapping
from typing import ClassVar, TypeVar

from datapath.bus.function import PciFunction
from datapath.bus.registry import open_function
from datapath.drivers import packed_rings
from datapath.drivers.dirty_logging import DirtyLogging, LogRegisters
from datapath.drivers.dma_addresses import DmaAddresses
from datapath.drivers.guest_regions import GuestRegions
from datapath.drivers.ring_paths import RingPaths, interrupt_guest
from datapath.drivers.virtio_registers import NotAsLeftError, VirtioRegisters
from datapath.features import Column, Way
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
from datapath.vfio import Irq
from datapath.virtio import NO_VECTOR, Feature, Status, bit

CONFIG_VECTOR = 0

Device = TypeVar("Device", bound="VirtioNetDevice")


def queue_vector(index: int) -> int:
    return index + 1


def take_hold(kind: type[Device], spec: DeviceSpec, log_mode: LogMode) -> Device:
    """Make a device out of the function that a device string names; on failure the function is let go.

    :raise DeviceSpecError: for options that name no function.
    :raise DeviceError: when the function cannot be had, is not one that this kind of device is made of, or
        cannot mark what it writes as is wanted.
    """
    function = open_function(spec)
    try:
        return kind(str(spec), function, log_mode)
    except BaseException:
        function.close()
        raise


class VirtioNetDevice(VdpaDevice):
    """A virtio-net function, idle or running."""

    #: What the driver has declared; the features that are offered follow from it.
    FEATURES: ClassVar[Column]
    #: Whether the function keeps ring state: its rings begin anywhere, and stop and start one by one.
    HAS_RING_STATE: ClassVar[bool]
    #: Whether the family's functions do without VERSION_1, though virtio does not let them.
    SERVES_LEGACY: ClassVar[bool]
    #: Most queue pairs that the driver runs.
    MAX_PAIRS: ClassVar[int]

    def __init__(self, name: str, function: PciFunction, log_mode: LogMode = LogMode.AUTO) -> None:
        """Reset the function and learn what it offers; `close` closes it.

        :param log_mode: who is to mark what the function writes, whenever that is asked for.
        :raise DeviceError: when it is not what it should be; `function` is then the caller's to close.
        """
        self.name = name
        self.serves_legacy = self.SERVES_LEGACY
        self._function = function
        self._running = False
        self._lost = False
        self._features = 0
        self._rings: dict[int, Ring] = {}
        self._guest = GuestRegions()
        function.reset()
        function.enable()
        self._registers = VirtioRegisters(function)
        self._registers.reset()
        self._device_features = self._registers.device_features()
        if not self._device_features & bit(Feature.F_VERSION_1):
            raise DeviceError(f"{name}: is a legacy virtio device (no VERSION_1); only virtio 1.x is driven")
        self.queue_pairs = self._count_pairs()
        self.features = self._device_features & self.FEATURES.mask(Way.CARRIED)
        self.promised = self.FEATURES.mask(Way.PROMISED)
        self.features |= self.promised
        self.max_queue_size = min(
            self._registers.max_queue_size(queue) for queue in range(2 * self.queue_pairs)
        )
        has_mtu = self._device_features & bit(Feature.NET_F_MTU)
        self.max_mtu = self._registers.mtu() if has_mtu else None
        for queue in range(2 * self.queue_pairs):
            self._registers.doorbell(queue)  # found now, it costs no time when a guest waits
        self._check_registers()
        addresses = DmaAddresses(function)
        with contextlib.ExitStack() as undo:
            self._paths = RingPaths(function, addresses, 2 * self.queue_pairs, self.max_queue_size)
            undo.callback(self._paths.end)
            self._log = DirtyLogging(function, addresses, self._paths, self._log_registers(), log_mode)
            self.log_modes = self._log.modes
            self._config_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._config_fd)
            self._events = undo.enter_context(select.epoll())
            for fd in (self._config_fd, function.lost_fd, self._paths.broken_fd):
                self._events.register(fd, select.EPOLLIN)
            self._resources = undo.pop_all()

    # What virtio does not define

    @abc.abstractmethod
    def _check_registers(self) -> None:
        """See that the function has what the driver needs besides virtio.

        :raise DeviceError: when it has not.
        """

    @abc.abstractmethod
    def _log_registers(self) -> LogRegisters | None:
        """The registers of the function's own dirty log; None when it has none."""

    @abc.abstractmethod
    def _use_rings(self, rings: Collection[int]) -> None:
        """Tell the function which rings run, or are about to."""

    @abc.abstractmethod
    def _restore_ring(self, index: int, state: RingState) -> None:
        """Tell a function that has ring state where a ring stands, before it is enabled."""

    @abc.abstractmethod
    def _quiesce(self, rings: Collection[int]) -> None:
        """Stop rings and wait until nothing of them is in flight; all, unless there is ring state."""

    @abc.abstractmethod
    def _used_index(self, index: int, ring: Ring) -> int:
        """The used index at which a ring that was not shadowed has stopped."""

    # Memory

    def map_memory(self, region: MemoryRegion) -> None:
        self._check_present()
        self._paths.map(region)
        try:
            self._log.make_way(region, self._running)
            finish = self._function.dma_map_later(region)
            if self._running:
                finish()
        except BaseException:
            self._paths.unmap(region)
            raise
        self._guest.add(region, None if self._running else finish)

    def unmap_memory(self, region: MemoryRegion) -> None:
        self._check_present()
        with contextlib.suppress(DeviceError):
            self._guest.finish()  # who takes memory back need not hear that some was refused
        if not self._guest.is_refused(region):
            self._function.dma_unmap(region)
        self._paths.unmap(region)
        self._guest.remove(region)

    def call_meanwhile(self, callback: Callable[[], None]) -> None:
        self._function.call_meanwhile(callback)

    # Running

    def prepare(self, features: int) -> None:
        if self._lost or self._running:
            return
        with contextlib.suppress(DeviceError), self._function.together():
            self._registers.propose_features(self._agreed(features & self._device_features, shadowed=False))

    def start(self, features: int, rings: Mapping[int, Ring]) -> None:
        self._check_present()
        if self._running:
            raise DeviceError(f"{self.name}: is running already")
        if not features & bit(Feature.F_VERSION_1):
            self._check_legacy(features)
        for index, ring in rings.items():
            self._check_ring(index, ring)
        self._features = features & self._device_features
        self._run(rings)

    def start_ring(self, index: int, ring: Ring) -> None:
        self._check_present()
        if not self._running or index in self._rings:
            raise DeviceError(f"{self.name}: ring {index} runs already, or the device does not")
        self._check_ring(index, ring)
        if not self.HAS_RING_STATE:
            # Rings are set up before DRIVER_OK (section 3.1.1), so all of them once more.
            self._restart(more={index: ring})
            return
        self._rings[index] = ring
        try:
            placed = self._paths.as_seen_by_device(index, ring)
            with self._function.together():
                self._function.set_eventfds(Irq.MSIX, queue_vector(index), [placed.call])
                self._use_rings(self._rings)
                self._program(index, placed)
                self._registers.confirm()
            self._paths.open(index, ring, self._registers.doorbell(index))
        except BaseException:
            self._halt()
            raise

    def set_call(self, index: int, fd: int | None) -> None:
        self._check_ring_runs(index)
        if self._paths.shadowed:
            self._paths.set_call(index, fd)
        else:
            self._function.set_eventfds(Irq.MSIX, queue_vector(index), [fd])
        self._rings[index] = dataclasses.replace(self._rings[index], call=fd)

    def stop_ring(self, index: int) -> RingState:
        self._check_ring_runs(index)
        if not self.HAS_RING_STATE:
            return self._restart(without=index)[index]
        try:
            state = self._stop([index])[index]
            # Only now: the guest must hear of the entries that were completed last.
            self._registers.set_queue_vector(index, NO_VECTOR)
            self._function.set_eventfds(Irq.MSIX, queue_vector(index), [None])
            del self._rings[index]
            if self._rings:
                self._use_rings(self._rings)
        except BaseException:
            self._halt()
            raise
        return state

    def suspend(self) -> dict[int, RingState]:
        self._check_present()
        try:
            states = self._stop(self._rings)
            self._log.function_stops()
            self._function.disable_irqs(Irq.MSIX)
            self._registers.reset()
        except BaseException:
            self._halt()
            raise
        self._rings.clear()
        self._running = False
        return states

    # Logging

    def start_logging(self, bitmap: DirtyBitmap) -> None:
        self._check_present()
        if self._log.is_in(bitmap):
            return
        try:
            by_function = not self.shadowed and self._log.prepare(bitmap)
            rings_run_on = self.shadowed or (by_function and self._log.mode is None)
            if rings_run_on or not self._running:
                self._log.use(bitmap, self._running)
            else:
                self._change_path(lambda: self._log.use(bitmap, self._running))
            if self._running and self._log.mode is LogMode.SOFTWARE and not self.shadowed:
                self._change_path(lambda: None)  # the function has refused to log
        except BaseException:
            self._forget_log()
            raise

    def stop_logging(self) -> None:
        self._forget_log()
        if self.shadowed and self._could_go_on_directly():
            self._change_path(lambda: None)

    @property
    def log_mode(self) -> LogMode | None:
        return self._log.mode

    @property
    def log_missed(self) -> int:
        return self._paths.log_missed + self._log.missed

    @property
    def shadowed(self) -> bool:
        return self._running and self._paths.shadowed

    def notifier(self, index: int) -> HostNotifier | None:
        self._check_present()
        return self._registers.notifier(index)

    # Events and numbers

    @property
    def event_fd(self) -> int:
        return self._events.fileno()

    @property
    def fault(self) -> str | None:
        return self._fault(self._rings)

    def take_event(self) -> DeviceEvent | None:
        ready = {fd for fd, _ in self._events.poll(0)}
        if not ready:
            return None
        ours = {self._config_fd, self._paths.broken_fd}
        for fd in ready & ours:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
        try:
            if ready - ours:
                raise DeviceLostError(f"{self.name}: the function is gone")
            self._check_present()
            status = self._registers.status
        except DeviceError:
            self._give_up()
            return DeviceEvent.LOST
        if status & Status.DEVICE_NEEDS_RESET or self.fault:
            return DeviceEvent.NEEDS_RESET
        return DeviceEvent.CONFIG_CHANGED if self._config_fd in ready else None

    def link_up(self) -> bool | None:
        self._check_present()
        return self._registers.link_up() if self._device_features & bit(Feature.NET_F_STATUS) else None

    def statistics(self) -> dict[str, int]:
        numbers = self._paths.statistics()
        for name, number in self._log.statistics().items():
            numbers[name] += number
        return numbers

    def close(self) -> None:
        if not self._lost:
            self._halt()
        self._function.close()
        self._resources.close()
        self._lost = True  # for whoever closes once more

    # Inside: the function as a whole

    def _forget_log(self) -> None:
        try:
            self._log.forget(self._running)
        except BaseException:
            self._halt()  # it might go on to write where the bitmap was
            raise

    def _count_pairs(self) -> int:
        """Queue pairs that the function has queues and vectors for."""
        # A control queue, if there is one, is the odd one at the end (section 5.1.2).
        queues = self._registers.num_queues // 2 * 2
        vectors = self._function.irq_count(Irq.MSIX) - queue_vector(0)
        pairs = min(queues, vectors) // 2
        if pairs < 1:
            raise DeviceError(
                f"{self.name}: {queues} data queues, {vectors} MSI-X vectors for them; 2 are needed"
            )
        return min(pairs, self.MAX_PAIRS)

    def _can_be_direct(self, rings: Mapping[int, Ring]) -> bool:
        """Whether the function itself can take rings up where they stand, and nobody wants a log."""
        if self._log.mode is LogMode.SOFTWARE:
            return False
        return self.HAS_RING_STATE or all(ring.at_start for ring in rings.values())

    def _could_go_on_directly(self) -> bool:
        """Whether the function itself could take the rings over where they stand now."""
        return self.HAS_RING_STATE or not any(self._guest_used(ring) for ring in self._rings.values())

    def _run(self, rings: Mapping[int, Ring]) -> None:
        """From idle to running, with the features that were agreed on."""
        self._running = True
        self._rings.update(rings)
        try:
            self._guest.finish()
            try:
                self._bring_up(rings)
            except NotAsLeftError:
                self._registers.reset()
                self._bring_up(rings)
            for index, ring in rings.items():
                self._paths.open(index, ring, self._registers.doorbell(index))
        except BaseException:
            self._halt()
            raise

    def _bring_up(self, rings: Mapping[int, Ring]) -> None:
        """From reset, or what `prepare` made of that, to DRIVER_OK."""
        placed = self._place(rings)
        with self._function.together():
            self._initialise(placed)
            if not self._log.function_starts():
                placed = self._place(rings)
                self._set_calls(placed)
            for index, ring in placed.items():
                self._program(index, ring)
            self._registers.add_status(Status.DRIVER_OK)
            self._registers.confirm()

    def _place(self, rings: Mapping[int, Ring]) -> dict[int, Ring]:
        """Decide how rings travel, of which none runs, and see them as the function is to be given them."""
        shadowed = not self._can_be_direct(rings)
        packed = [ring for ring in rings.values() if ring.packed]
        # A front-end whose back-end has died may not know that a ring was in use: the memory does.
        if any(shadowed or not packed_rings.at_start(self._guest, ring) for ring in packed):
            raise DeviceError(
                f"{self.name}: the guest's packed rings have been in use, and virtio has no register by which"
                " the function could go on with them; have the guest's driver begin anew"
            )
        self._paths.prepare(shadowed, self._features)
        return {index: self._paths.as_seen_by_device(index, ring) for index, ring in rings.items()}

    def _change_path(self, meanwhile: Callable[[], None]) -> None:
        """Have all rings go on where they stand, on the path that fits when `meanwhile` has been done."""
        if self.HAS_RING_STATE:
            self._reroute(meanwhile)
        else:
            self._restart(meanwhile=meanwhile)

    def _reroute(self, meanwhile: Callable[[], None]) -> None:
        """Stop all rings and start them again, the function being as it is all the while."""
        try:
            states = self._stop(self._rings)
            meanwhile()
            for index, state in states.items():
                self._rings[index] = dataclasses.replace(self._rings[index], state=state)
            placed = self._place(self._rings)
            with self._function.together():
                self._set_calls(placed)
                for index, ring in placed.items():
                    self._program(index, ring)
                self._registers.confirm()
            for index, ring in self._rings.items():
                self._paths.open(index, ring, self._registers.doorbell(index))
        except BaseException:
            self._halt()
            raise
        interrupt_guest(self._rings.values())

    def _restart(
        self,
        without: int | None = None,
        more: Mapping[int, Ring] | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[int, RingState]:
        """Stop, reset, and start again where the rings stand, on whichever path fits now.

        :param without: a ring that is to rest.
        :param more: rings that are new.
        :param meanwhile: what is to be done while nothing runs.
        :return: where the rings stopped.
        """
        before = dict(self._rings)
        states = self.suspend()
        meanwhile()
        rings = {
            index: dataclasses.replace(ring, state=states[index])
            for index, ring in before.items()
            if index != without
        }
        rings.update(more or {})
        if rings:
            self._run(rings)
        interrupt_guest(before.values())
        return states

    def _initialise(self, rings: Mapping[int, Ring]) -> None:
        """From reset up to the rings (section 3.1.1, steps 1 to 6 and the beginning of 7)."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._config_fd)  # what the device said of the run before
        self._registers.accept_features(self._agreed(self._features, self._paths.shadowed))
        self._set_calls(rings)
        self._registers.set_config_vector(CONFIG_VECTOR)
        self._use_rings(rings)

    def _agreed(self, features: int, shadowed: bool) -> int:
        """What the function is to negotiate where its guest has accepted these of its features."""
        features |= self._device_features & self.FEATURES.mask(Way.AGREED)
        # The relay keeps the order itself: native/shadow.h says why.
        return features & ~bit(Feature.F_IN_ORDER) if shadowed else features

    def _set_calls(self, rings: Mapping[int, Ring]) -> None:
        """Connect all vectors: the whole range at once, as a bus may be unable to enlarge it."""
        given = (rings.get(index) for index in range(2 * self.queue_pairs))
        calls = (ring.call if ring else None for ring in given)
        self._function.set_eventfds(Irq.MSIX, CONFIG_VECTOR, [self._config_fd, *calls])

    # Inside: rings

    def _program(self, index: int, ring: Ring) -> None:
        self._registers.set_ring(index, ring)
        self._restore_ring(index, ring.state)
        self._registers.set_queue_vector(index, queue_vector(index))
        self._registers.enable_queue(index, True)

    def _stop(self, rings: Collection[int]) -> dict[int, RingState]:
        """Stop rings and return where each stands."""
        known = self._fault(rings)  # an event tells of it, or has told
        for index in rings:
            self._paths.hold(index)
        self._quiesce(rings)
        for index in rings:
            self._paths.close(index)
        self._log.rings_stopped(self._rings[index] for index in rings)
        if (fault := self._fault(rings)) and not known:
            raise DeviceError(f"{self.name}: {fault}")
        # What was fetched but not completed is fetched again: the used index counts for both.
        return {index: self._stopped_at(index) for index in rings}

    def _fault(self, rings: Collection[int]) -> str | None:
        """What is wrong with a shadowed ring, if something is."""
        faults = ((index, self._paths.fault(index)) for index in rings)
        return next((f"ring {index}: {fault}" for index, fault in faults if fault), None)

    def _stopped_at(self, index: int) -> RingState:
        ring = self._rings[index]
        if ring.packed:
            return packed_rings.stopped_at(self._guest, ring)
        # What the function says of a shadowed ring is about the private one.
        at = self._guest_used(ring) if self._paths.shadowed else self._used_index(index, ring)
        return RingState(at, at)

    def _guest_used(self, ring: Ring) -> int:
        """The used index that the guest sees (section 2.7.8)."""
        return self._guest.read16(ring.used + 2)

    def _check_ring_runs(self, index: int) -> None:
        self._check_present()
        if index not in self._rings:
            raise DeviceError(f"{self.name}: ring {index} does not run")

    def _check_ring(self, index: int, ring: Ring) -> None:
        if not 0 <= index < 2 * self.queue_pairs:
            raise DeviceError(f"{self.name}: no ring {index}; the device has {self.queue_pairs} queue pairs")
        whole = ring.packed or not ring.size & (ring.size - 1)
        if ring.size > self.max_queue_size or ring.size < 1 or not whole:
            raise DeviceError(
                f"{self.name}: ring {index} of {ring.size} descriptors; the device takes"
                f" powers of two up to {self.max_queue_size}"
            )

    def _check_legacy(self, features: int) -> None:
        """Whether a guest of virtio 0.95 can be served.

        :raise DeviceError: when it cannot, or may not be one.
        """
        if not self.SERVES_LEGACY:
            raise DeviceError(
                f"{self.name}: the guest did not accept VERSION_1, and the function needs it; boot a guest"
                " whose driver knows virtio 1.0, with a device that is not disable-modern, or use an IFCVF"
            )
        if not features & ~self.promised:
            # QEMU that has lost what the guest accepted (see `Backend.former`): its header may be any.
            raise DeviceError(
                f"{self.name}: the guest did not accept VERSION_1 or anything else of the VF's, or its"
                " front-end has forgotten it; reset the guest"
            )

    # Inside: when things go wrong

    def _halt(self) -> None:
        """Make sure that nothing runs, by ever harder means; the last is to let the function go."""
        for index in self._rings:
            self._paths.hold(index)
        try:
            if self._registers.stuck:
                raise DeviceError("it has had its time for a reset")
            self._registers.reset()
            self._function.disable_irqs(Irq.MSIX)
        except DeviceError:
            try:
                self._function.reset()
                self._function.disable_irqs(Irq.MSIX)
                self._function.enable()
                self._registers.stuck = False
            except DeviceError:
                self._give_up()
                os.eventfd_write(self._config_fd, 1)
        self._forget_rings()

    def _give_up(self) -> None:
        """Let go of a function that is gone, or answers nothing; what serves it resets it then."""
        for index in self._rings:
            self._paths.hold(index)
        self._function.close()
        self._lost = True
        self._forget_rings()
        self._log.function_lost()

    def _forget_rings(self) -> None:
        for index in self._rings:
            self._paths.close(index)
        self._log.rings_stopped(self._rings.values())
        self._rings.clear()
        self._running = False

    def _check_present(self) -> None:
        if self._lost:
            raise DeviceLostError(f"{self.name}: the device is gone")
