"""The registers of a modern virtio PCI function, by name (virtio 1.3 section 4.1.4).

Knows where registers are and how they are accessed: one access of the field's own width, 64-bit ones as
two of 32 bits, low first (section 4.1.3.1). Decides nothing: the order of accesses is the driver's.
"""

import contextlib
import mmap
import time
from collections.abc import Callable

from datapath.bus.function import PciFunction
from datapath.bus.pci import VirtioStructure, virtio_structures
from datapath.native.relay import Doorbell
from datapath.vdpa import DeviceError, DeviceLostError, HostNotifier, Ring
from datapath.vfio import Region
from datapath.virtio import NET_S_LINK_UP, NO_VECTOR, Common, NetConfig, PciCapability, Status

#: Seconds between two looks at a register that is waited for.
POLL_INTERVAL = 0.001
#: Seconds that a device has to finish a reset. DPDK waits for ever. With the wait for its queues before and
#: the function's reset after it, whoever waits for a port has its answer within five.
RESET_DEADLINE = 1.5
#: What a read of 8 bits gives when no function answers; no status has the bits 16 and 32 (section 2.1).
ALL_ONES = 0xFF
#: Structures that a driver cannot do without.
REQUIRED = (PciCapability.COMMON, PciCapability.NOTIFY, PciCapability.DEVICE)


class NotAsLeftError(DeviceError):
    """The device has failed, or was reset, since it was told the features; it can be told them anew."""


def wait_until(condition: Callable[[], bool], seconds: float, failure: Callable[[], str]) -> None:
    """Look again and again until `condition` holds.

    :param failure: says what did not happen.
    :raise DeviceError: with that text when it does not hold within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            raise DeviceError(f"{failure()} within {seconds:g} s")
        time.sleep(POLL_INTERVAL)


class VirtioRegisters:
    """Named access to a function's common configuration, notify registers and network configuration."""

    def __init__(self, function: PciFunction) -> None:
        """Find the structures.

        :raise DeviceError: when one that is needed is missing or unusable.
        """
        self._function = function
        found = virtio_structures(function.config_space(), lambda bar: function.region(Region(bar)).size)
        missing = [kind.name for kind in REQUIRED if kind not in found]
        if missing:
            raise DeviceError(f"{function.name}: no usable virtio structure {', '.join(missing)}")
        self._common = found[PciCapability.COMMON]
        self._notify = found[PciCapability.NOTIFY]
        #: The last reset was not finished in time; another one had better not be waited for.
        self.stuck = False
        self._device = found[PciCapability.DEVICE]
        #: What queue_select holds, None if unknown: it saves messages where registers are in another process.
        self._selected: int | None = None
        #: The status as it was last written: to read it costs a turn to the device and back.
        self._status = Status(0)
        #: Whether the device has been reset, and not been told a status since.
        self._fresh = False
        #: Features that the device has been told; its status before that, and after it.
        self._proposed: tuple[int, Callable[[], int], Callable[[], int]] | None = None
        #: The status of a device that was told them a while ago, and what it should be; seen by `confirm`.
        self._left: tuple[Callable[[], int], Status] | None = None
        #: Vectors that were written, and what the device then held; seen by `confirm`.
        self._unsure: list[tuple[Callable[[], int], int, str]] = []
        self._doorbells: dict[int, Doorbell] = {}
        #: Where in the notify structure each queue is notified, as far as that has been asked.
        self._notify_offsets: dict[int, int] = {}

    # Device status and features (sections 4.1.4.3, 2.1, 2.2)

    @property
    def status(self) -> Status:
        """:raise DeviceLostError: when it reads as a PCI function that is not there any more."""
        return self._present(self._read(Common.DEVICE_STATUS, 1))

    def add_status(self, bits: Status) -> None:
        """Set status bits; none is ever cleared but by `reset`."""
        self._status |= bits
        self._fresh = False
        self._write(Common.DEVICE_STATUS, 1, self._status)

    def status_later(self) -> Callable[[], int]:
        """The status as it is now, from a function that is called when it may be waited for."""
        return self._read_later(Common.DEVICE_STATUS, 1)

    def reset(self) -> None:
        """Reset the virtio device and wait until it says that it is done (section 4.1.4.3.2).

        :raise DeviceError: when it does not.
        """
        self._forget_proposal()
        self._status = Status(0)
        self._write(Common.DEVICE_STATUS, 1, self._status)
        self._selected = None
        self._unsure.clear()
        self.stuck = True
        wait_until(lambda: self.status == 0, RESET_DEADLINE, lambda: f"{self._function.name}: is not reset")
        self.stuck = False
        self._fresh = True

    def make_fresh(self) -> None:
        """Reset the device unless it is as the last reset has left it; raises what `reset` does."""
        if not self._fresh:
            self.reset()

    def device_features(self) -> int:
        """What the device offers."""
        words = []
        for select in (0, 1):
            self._write(Common.DEVICE_FEATURE_SELECT, 4, select)
            words.append(self._read(Common.DEVICE_FEATURE, 4))
        return words[0] | words[1] << 32

    def propose_features(self, features: int) -> None:
        """Say that the device was seen and has a driver, and which features that will use.

        It is reset first, unless it is as the last reset has left it; see `accept_features` for its answer.

        :raise DeviceError: when it is not reset.
        """
        if self._proposed is None or self._proposed[0] != features:
            self.make_fresh()
            found = self.status_later()
            self._proposed = features, found, self._tell_features(features)

    def accept_features(self, features: int) -> None:
        """Propose features, unless that was done, and see that the device takes them.

        What had failed while it was idle is reset first: its status was read along, at no wait of its own.

        :raise DeviceError: when it refuses the combination, or is not reset.
        """
        beforehand = self._proposed is not None and self._proposed[0] == features
        found, told = self._take_proposal(features)
        if found():  # what it has been told counts for nothing
            self.reset()
            beforehand = False
            found, told = self._take_proposal(features)
        if beforehand:
            self._left = self.status_later(), self._status
        if not told() & Status.FEATURES_OK:
            raise DeviceError(f"{self._function.name}: refuses the features {features:#x}")

    # Queues (section 4.1.4.3)

    @property
    def num_queues(self) -> int:
        return self._read(Common.NUM_QUEUES, 2)

    def max_queue_size(self, queue: int) -> int:
        """Largest size of a queue in descriptors; after a reset, and 0 for a queue that does not exist."""
        self._select(queue)
        return self._read(Common.QUEUE_SIZE, 2)

    def set_config_vector(self, vector: int) -> None:
        """Give configuration changes a vector; `confirm` sees whether the device has taken it."""
        self._write_vector(Common.CONFIG_MSIX_VECTOR, vector, "configuration changes")

    def set_queue_vector(self, queue: int, vector: int) -> None:
        """Give a queue a vector; `confirm` sees whether the device has taken it."""
        self._select(queue)
        self._write_vector(Common.QUEUE_MSIX_VECTOR, vector, f"queue {queue}")

    def confirm(self) -> None:
        """Wait until all that was written has arrived, and see that the device has taken the vectors.

        What follows may go on another way, as doorbells do. Vectors are to be read (section 4.1.5.1.2.1).

        :raise NotAsLeftError: when what it was told before does not count any more.
        :raise DeviceError: when it has no room for a vector.
        """
        unsure, self._unsure = self._unsure, []
        left, self._left = self._left, None
        status = self.status_later()
        if left is not None and left[0]() != left[1]:
            raise NotAsLeftError(
                f"{self._function.name}: has failed, or was reset, while its start was prepared"
            )
        for held, vector, what in unsure:
            if held() != vector:
                raise DeviceError(f"{self._function.name}: has no MSI-X vector {vector} for {what}")
        self._present(status())

    def set_ring(self, queue: int, ring: Ring) -> None:
        """Size and addresses of a queue that is not enabled."""
        self._select(queue)
        self._write(Common.QUEUE_SIZE, 2, ring.size)
        self._write_address(Common.QUEUE_DESC, ring.descriptors)
        self._write_address(Common.QUEUE_DRIVER, ring.avail)
        self._write_address(Common.QUEUE_DEVICE, ring.used)

    def enable_queue(self, queue: int, enable: bool) -> None:
        """Only a device that says more than virtio does lets a queue be disabled."""
        self._select(queue)
        self._write(Common.QUEUE_ENABLE, 2, int(enable))

    def queue_enabled(self, queue: int) -> bool:
        self._select(queue)
        return self._read(Common.QUEUE_ENABLE, 2) != 0

    def doorbell(self, queue: int) -> Doorbell:
        """How to notify a queue (section 4.1.4.4).

        :raise DeviceError: when its register is outside the notify structure, or no doorbell reaches it.
        """
        if queue not in self._doorbells:
            self._doorbells[queue] = self._find_doorbell(queue)
        return self._doorbells[queue]

    def notifier(self, queue: int) -> HostNotifier | None:
        """The page of a queue's doorbell, if it has one of its own and the doorbell is its beginning.

        :raise DeviceError: as `doorbell`.
        """
        self.doorbell(queue)
        at, multiplier = self._notify_offsets[queue], self._notify.notify_multiplier
        place = self._notify.offset + at
        alone = multiplier and not multiplier % mmap.PAGESIZE and at + mmap.PAGESIZE <= self._notify.length
        if not alone or place % mmap.PAGESIZE:
            return None
        return self._function.page(Region(self._notify.bar), place)

    def _find_doorbell(self, queue: int) -> Doorbell:
        self._select(queue)
        at = self._read(Common.QUEUE_NOTIFY_OFF, 2) * self._notify.notify_multiplier
        self._notify_offsets[queue] = at
        if at + 2 > self._notify.length:
            raise DeviceError(
                f"{self._function.name}: queue {queue} has its notify register at {at:#x}, outside"
            )
        return self._function.doorbell(Region(self._notify.bar), self._notify.offset + at, queue)

    # Network device configuration (section 5.1.4)

    def mtu(self) -> int | None:
        """The MTU in the device configuration, in bytes; only of a device that offers NET_F_MTU."""
        if self._device.length < NetConfig.MTU + 2:
            return None
        return self._function.read(*self._place(self._device, NetConfig.MTU), 2)

    def link_up(self) -> bool | None:
        """The link status in the device configuration; only of a device that offers NET_F_STATUS."""
        if self._device.length < NetConfig.STATUS + 2:
            return None
        return bool(self._function.read(*self._place(self._device, NetConfig.STATUS), 2) & NET_S_LINK_UP)

    # Inside

    def _tell_features(self, features: int) -> Callable[[], int]:
        """Go from a reset to FEATURES_OK; the status, which says whether the device keeps that."""
        self.add_status(Status.ACKNOWLEDGE)
        self.add_status(Status.DRIVER)
        for select in (0, 1):
            self._write(Common.DRIVER_FEATURE_SELECT, 4, select)
            self._write(Common.DRIVER_FEATURE, 4, features >> 32 * select & 0xFFFFFFFF)
        self.add_status(Status.FEATURES_OK)
        return self.status_later()

    def _take_proposal(self, features: int) -> tuple[Callable[[], int], Callable[[], int]]:
        """The answers to a proposal, which is made unless it was."""
        self.propose_features(features)
        assert self._proposed is not None
        (_, found, told), self._proposed = self._proposed, None
        return found, told

    def _forget_proposal(self) -> None:
        """Take the answers that nobody wants any more; they are kept so long."""
        answers = self._proposed[1:] if self._proposed is not None else ()
        self._proposed = self._left = None
        for answer in answers:
            with contextlib.suppress(DeviceError):
                answer()

    def _present(self, status: int) -> Status:
        if status == ALL_ONES:
            raise DeviceLostError(f"{self._function.name}: is gone: its registers read as all ones")
        return Status(status)

    @staticmethod
    def _place(structure: VirtioStructure, offset: int) -> tuple[Region, int]:
        return Region(structure.bar), structure.offset + offset

    def _read(self, field: int, width: int) -> int:
        return self._function.read(*self._place(self._common, field), width)

    def _read_later(self, field: int, width: int) -> Callable[[], int]:
        return self._function.read_later(*self._place(self._common, field), width)

    def _write(self, field: int, width: int, value: int) -> None:
        self._function.write(*self._place(self._common, field), width, value)

    def _write_address(self, field: int, address: int) -> None:
        self._write(field, 4, address & 0xFFFFFFFF)
        self._write(field + 4, 4, address >> 32)

    def _select(self, queue: int) -> None:
        if self._selected != queue:
            self._selected = None  # should the write fail
            self._write(Common.QUEUE_SELECT, 2, queue)
            self._selected = queue

    def _write_vector(self, field: int, vector: int, what: str) -> None:
        self._write(field, 2, vector)
        if vector != NO_VECTOR:
            self._unsure.append((self._read_later(field, 2), vector, what))
