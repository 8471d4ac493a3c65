"""A modern virtio-net PCI function as a vDPA device: the part of the life cycle that is plain virtio 1.3.

What virtio does not define, namely to stop a ring and to tell and set where it stands, is left to three
hooks (`_use_rings`, `_restore_ring`, `_stop_rings`) that a driver supplies. Registers are `virtio_registers`.

    open: function reset, memory decoding and bus mastering on, virtio reset: idle
    start: virtio reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK, MSI-X eventfds, rings, DRIVER_OK,
           notify relay, one notification a ring: running
    suspend: relay off, rings stopped and read, MSI-X off, virtio reset: idle

The guest's notifications go kick eventfd -> notify relay -> doorbell of the bus; interrupts go from the
function to the guest's own eventfds with nothing in between. Vector 0 is for configuration changes,
vector q + 1 for queue q.
"""

import abc
import contextlib
import os
import select
from collections.abc import Collection, Mapping

from datapath.bus.function import PciFunction
from datapath.drivers.virtio_registers import VirtioRegisters
from datapath.native.relay import Relay
from datapath.vdpa import (
    DeviceError,
    DeviceEvent,
    DeviceLostError,
    MemoryRegion,
    Ring,
    RingState,
    VdpaDevice,
)
from datapath.vfio import Irq
from datapath.virtio import NO_VECTOR, Feature, Status, bit

#: Features of the data path: the business of guest and function alone, so a driver can pass them on.
#: Left out are those that need more of the driver (ACCESS_PLATFORM, RING_PACKED, NOTIFICATION_DATA,
#: NOTIF_CONFIG_DATA, RING_RESET, SR_IOV) and commands of the control queue, which the front-end
#: serves itself and the function never sees (CTRL_RX, CTRL_VLAN, CTRL_MAC_ADDR, offloads, RSS).
CARRIED = sum(
    bit(feature)
    for feature in (
        Feature.NET_F_CSUM,
        Feature.NET_F_GUEST_CSUM,
        Feature.NET_F_MTU,
        Feature.NET_F_MAC,
        Feature.NET_F_GUEST_TSO4,
        Feature.NET_F_GUEST_TSO6,
        Feature.NET_F_GUEST_ECN,
        Feature.NET_F_GUEST_UFO,
        Feature.NET_F_HOST_TSO4,
        Feature.NET_F_HOST_TSO6,
        Feature.NET_F_HOST_ECN,
        Feature.NET_F_HOST_UFO,
        Feature.NET_F_MRG_RXBUF,
        Feature.NET_F_STATUS,
        Feature.NET_F_CTRL_VQ,
        Feature.NET_F_MQ,
        Feature.F_ANY_LAYOUT,
        Feature.F_INDIRECT_DESC,
        Feature.F_EVENT_IDX,
        Feature.F_VERSION_1,
        Feature.F_IN_ORDER,
        Feature.F_ORDER_PLATFORM,
        Feature.NET_F_HOST_USO,
    )
)

#: Promised on the front-end's behalf, which owns the control queue and the link status it shows (QEMU),
#: and the two vhost bits. Never written to the function unless it has them itself.
PROMISED = sum(
    bit(feature)
    for feature in (
        Feature.NET_F_STATUS,
        Feature.NET_F_CTRL_VQ,
        Feature.NET_F_GUEST_ANNOUNCE,
        Feature.VHOST_F_LOG_ALL,
        Feature.VHOST_USER_F_PROTOCOL_FEATURES,
    )
)

CONFIG_VECTOR = 0


def queue_vector(index: int) -> int:
    return index + 1


class VirtioNetDevice(VdpaDevice):
    """A virtio-net function, idle or running."""

    def __init__(self, name: str, function: PciFunction) -> None:
        """Reset the function and learn what it offers; `close` closes it.

        :raise DeviceError: when it is not what it should be; `function` is then the caller's to close.
        """
        self.name = name
        self._function = function
        self._running = False
        self._lost = False
        self._rings: dict[int, Ring] = {}
        function.reset()
        function.enable()
        self._registers = VirtioRegisters(function)
        self._registers.reset()
        self._device_features = self._registers.device_features()
        self.features = self._device_features & CARRIED | PROMISED
        self.queue_pairs = self._count_pairs()
        self.max_queue_size = min(
            self._registers.max_queue_size(queue) for queue in range(2 * self.queue_pairs)
        )
        has_mtu = self._device_features & bit(Feature.NET_F_MTU)
        self.max_mtu = self._registers.mtu() if has_mtu else None
        with contextlib.ExitStack() as undo:
            self._relay = Relay(2 * self.queue_pairs)
            undo.callback(self._relay.close)
            self._config_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._config_fd)
            self._events = undo.enter_context(select.epoll())
            self._events.register(self._config_fd, select.EPOLLIN)
            self._events.register(function.lost_fd, select.EPOLLIN)
            self._resources = undo.pop_all()

    # What virtio does not define

    @abc.abstractmethod
    def _use_rings(self, rings: Collection[int]) -> None:
        """Tell the function which rings run, or are about to."""

    @abc.abstractmethod
    def _restore_ring(self, index: int, state: RingState) -> None:
        """Tell the function where a ring stands, before it is enabled."""

    @abc.abstractmethod
    def _stop_rings(self, rings: Collection[int]) -> dict[int, RingState]:
        """Stop rings, wait until nothing of them is in flight, return where each stands."""

    # Memory

    def map_memory(self, region: MemoryRegion) -> None:
        self._check_present()
        self._function.dma_map(region)

    def unmap_memory(self, region: MemoryRegion) -> None:
        self._check_present()
        self._function.dma_unmap(region)

    # Running

    def start(self, features: int, rings: Mapping[int, Ring]) -> None:
        self._check_present()
        if self._running:
            raise DeviceError(f"{self.name}: is running already")
        if not features & bit(Feature.F_VERSION_1):
            raise DeviceError(
                f"{self.name}: the guest did not accept VERSION_1; legacy guests cannot be served"
            )
        for index, ring in rings.items():
            self._check_ring(index, ring)
        self._running = True
        self._rings.update(rings)
        try:
            self._initialise(features & self._device_features)
            for index, ring in rings.items():
                self._program(index, ring)
            self._registers.add_status(Status.DRIVER_OK)
            for index, ring in rings.items():
                self._notify(index, ring)
        except BaseException:
            self._halt()
            raise

    def start_ring(self, index: int, ring: Ring) -> None:
        self._check_present()
        if not self._running or index in self._rings:
            raise DeviceError(f"{self.name}: ring {index} runs already, or the device does not")
        self._check_ring(index, ring)
        self._rings[index] = ring
        try:
            self._function.set_eventfds(Irq.MSIX, queue_vector(index), [ring.call])
            self._use_rings(self._rings)
            self._program(index, ring)
            self._notify(index, ring)
        except BaseException:
            with contextlib.suppress(DeviceError):
                self.stop_ring(index)
            raise

    def set_call(self, index: int, fd: int | None) -> None:
        self._check_ring_runs(index)
        self._function.set_eventfds(Irq.MSIX, queue_vector(index), [fd])

    def stop_ring(self, index: int) -> RingState:
        self._check_ring_runs(index)
        self._relay.remove(index)
        state = self._stop_rings([index])[index]
        # Only now: the guest must hear of the entries that were completed last.
        self._registers.set_queue_vector(index, NO_VECTOR)
        self._function.set_eventfds(Irq.MSIX, queue_vector(index), [None])
        del self._rings[index]
        if self._rings:
            self._use_rings(self._rings)
        return state

    def suspend(self) -> dict[int, RingState]:
        self._check_present()
        for index in self._rings:
            self._relay.remove(index)
        try:
            states = self._stop_rings(self._rings)
            self._function.disable_irqs(Irq.MSIX)
            self._registers.reset()
        except BaseException:
            self._halt()
            raise
        self._rings.clear()
        self._running = False
        return states

    # Events and numbers

    @property
    def event_fd(self) -> int:
        return self._events.fileno()

    def take_event(self) -> DeviceEvent | None:
        ready = {fd for fd, _ in self._events.poll(0)}
        if not ready:
            return None
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._config_fd)
        try:
            if ready != {self._config_fd}:
                raise DeviceLostError(f"{self.name}: the connection is gone")
            self._check_present()
            status = self._registers.status
        except DeviceError:
            self._give_up()
            return DeviceEvent.LOST
        return DeviceEvent.NEEDS_RESET if status & Status.DEVICE_NEEDS_RESET else DeviceEvent.CONFIG_CHANGED

    def statistics(self) -> dict[str, int]:
        return self._relay.statistics()

    def close(self) -> None:
        if not self._lost:
            self._halt()
        self._relay.close()
        self._function.close()
        self._resources.close()

    # Inside

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
        return pairs

    def _initialise(self, features: int) -> None:
        """From reset up to the rings (section 3.1.1, steps 1 to 6 and the beginning of 7)."""
        self._registers.reset()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._config_fd)  # what the device said of the run before
        self._registers.add_status(Status.ACKNOWLEDGE)
        self._registers.add_status(Status.DRIVER)
        self._registers.accept_features(features)
        rings = (self._rings.get(index) for index in range(2 * self.queue_pairs))
        calls = (ring.call if ring else None for ring in rings)
        self._function.set_eventfds(Irq.MSIX, CONFIG_VECTOR, [self._config_fd, *calls])
        self._registers.set_config_vector(CONFIG_VECTOR)
        self._use_rings(self._rings)

    def _program(self, index: int, ring: Ring) -> None:
        self._registers.set_ring(index, ring)
        self._restore_ring(index, ring.state)
        self._registers.set_queue_vector(index, queue_vector(index))
        self._registers.enable_queue(index, True)

    def _notify(self, index: int, ring: Ring) -> None:
        """Forward the guest's notifications, and add one of ours: entries may be waiting already."""
        doorbell = self._registers.doorbell(index)
        try:
            self._relay.add(index, ring.kick, doorbell)
            self._relay.ring(index)
        except OSError as error:
            raise DeviceError(f"{self.name}: ring {index}: kick descriptor: {error.strerror}") from error

    def _halt(self) -> None:
        """Make sure that nothing runs, by ever harder means; the last is to let the function go."""
        self._forget_rings()
        try:
            self._registers.reset()
            self._function.disable_irqs(Irq.MSIX)
        except DeviceError:
            try:
                self._function.reset()
                self._function.disable_irqs(Irq.MSIX)
                self._function.enable()
            except DeviceError:
                self._give_up()
                os.eventfd_write(self._config_fd, 1)

    def _give_up(self) -> None:
        """Let go of a function that is gone, or answers nothing; what serves it resets it then."""
        self._forget_rings()
        self._function.close()
        self._lost = True

    def _forget_rings(self) -> None:
        for index in self._rings:
            self._relay.remove(index)
        self._rings.clear()
        self._running = False

    def _check_present(self) -> None:
        if self._lost:
            raise DeviceLostError(f"{self.name}: the device is gone")

    def _check_ring_runs(self, index: int) -> None:
        self._check_present()
        if index not in self._rings:
            raise DeviceError(f"{self.name}: ring {index} does not run")

    def _check_ring(self, index: int, ring: Ring) -> None:
        if not 0 <= index < 2 * self.queue_pairs:
            raise DeviceError(f"{self.name}: no ring {index}; the device has {self.queue_pairs} queue pairs")
        if ring.size > self.max_queue_size or ring.size < 1 or ring.size & (ring.size - 1):
            raise DeviceError(
                f"{self.name}: ring {index} of {ring.size} descriptors; the device takes"
                f" powers of two up to {self.max_queue_size}"
            )
