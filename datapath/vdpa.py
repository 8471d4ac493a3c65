"""The vDPA device interface: the only thing that the vhost-user back-end and the drivers share.

A driver turns a VF into a `VdpaDevice`; the back-end drives it. The order of calls is the contract:

    open_device(spec, log_mode)
      map_memory / unmap_memory          any time; a range stays mapped until it is unmapped
      start(features, rings)             idle -> running, with one or more rings
        start_ring(index, ring)          one more ring while running
        set_call(index, fd)              another interrupt eventfd for a running ring
        stop_ring(index) -> RingState    one ring less
        take_event()                     when event_fd is readable
      start_logging(bitmap) / stop_logging()   any time, before start and while rings run
      suspend() -> {index: RingState}    running -> idle; state of every ring that ran
    close()                              from any state; releases the VF

Ring numbers are vhost-user's: 2p receives and 2p+1 transmits for queue pair p. Addresses are guest
physical and equal the device's DMA addresses (IOVA = GPA). Every call returns or raises within the
driver's own deadline (seconds at most): a front-end waits for the answer with its guest stopped. Only to
map or unmap memory may take longer, see `call_meanwhile`.

Owns the interface, its value types, the device string of the command line and the table of drivers;
cf. `struct rte_vdpa_dev_ops` in DPDK's lib/vhost/vdpa_driver.h.
"""

import abc
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from datapath.virtio import PACKED_START


class DeviceError(Exception):
    """The VF cannot do what was asked, or does not answer; the text names the device and the reason."""


class DeviceLostError(DeviceError):
    """The VF is gone (removed, or its process ended): only `close` is of use."""


class DeviceSpecError(ValueError):
    """A device string that names no driver of ours, or options that the driver does not take."""


class MemoryRegion(NamedTuple):
    """A range of guest memory that the VF may access.

    A kernel VFIO bus maps by `address`, a vfio-user bus by `fd` and `fd_offset`, hence both.
    """

    #: Guest physical address of the first byte, and the IOVA to map it at.
    guest_address: int
    #: Length in bytes.
    size: int
    #: File that backs the range; owned by whoever made the region, valid until it is unmapped.
    fd: int
    #: Offset of the range's first byte in that file.
    fd_offset: int
    #: Address of the range's first byte in this process.
    address: int


class RingState(NamedTuple):
    """Where a ring stands.

    A split one: free-running 16-bit indices of the next avail and used entry. A packed one: places of the
    next descriptor to fetch and to give back in bits 0 to 14, their wrap counters in bit 15.
    """

    avail: int
    used: int


@dataclass(frozen=True)
class Ring:
    """All that a VF needs to run one virtqueue, split (virtio 1.3 section 2.7) or packed (section 2.8)."""

    #: Number of descriptors; of a split ring a power of two.
    size: int
    #: Guest physical addresses of the descriptor table, the available ring and the used ring; of a packed
    #: ring those of the descriptor ring, and of what its driver and its device want to hear.
    descriptors: int
    avail: int
    used: int
    #: Where to begin.
    state: RingState
    #: Eventfd that the guest's notifications arrive on; None when the front-end asks for polling.
    kick: int | None
    #: Eventfd that interrupts the guest; None when the front-end wants none.
    call: int | None
    packed: bool = False

    @property
    def at_start(self) -> bool:
        """Whether it begins where every ring does after a reset."""
        start = PACKED_START if self.packed else 0
        return self.state == RingState(start, start)


class HostNotifier(NamedTuple):
    """The page of a ring's doorbell, for the guest itself to write the ring's number to, at its beginning."""

    #: File to map it from, and the offset there; owned by whoever told of it, open as long as the device.
    fd: int
    offset: int
    #: Length in bytes: a page of the host's.
    size: int


class DirtyBitmap(NamedTuple):
    """Where the pages that a VF writes are marked: bit n says that page n (4 KiB) of guest memory was.

    Pages beyond its end are not marked. Source: QEMU docs/interop/vhost-user.rst, "Migration".
    """

    #: File that backs it, and the offset there; owned by whoever made the bitmap, as the mapping is.
    fd: int
    fd_offset: int
    #: Address of the first byte in this process.
    address: int
    #: Length in bytes.
    size: int


class LogMode(Enum):
    """Who marks the pages that a VF writes."""

    #: The VF where it can, else the relay.
    AUTO = "auto"
    #: The VF itself.
    HARDWARE = "hardware"
    #: The shadow-ring relay; `sw-live-migration` in DPDK's words.
    SOFTWARE = "software"


class DeviceEvent(Enum):
    """What a VF reports by its configuration interrupt, or by vanishing."""

    #: Device configuration changed (link state).
    CONFIG_CHANGED = "config-changed"
    #: The device met an error that only a reset ends (virtio 1.3 section 2.1.2).
    NEEDS_RESET = "needs-reset"
    #: The device is gone.
    LOST = "lost"


class VdpaDevice(abc.ABC):
    """One VF as a vDPA device. All methods but `close` raise `DeviceError` (or `DeviceLostError`).

    One that fails to start, stop or re-route rings has stopped them all: the VF runs none then, and `suspend`
    has nothing to tell. What is refused beforehand (no such ring, one too large) changes nothing.
    """

    #: What messages call this device: driver and address, such as "ifcvf,vfio-user=/run/vf0.sock".
    name: str
    #: Virtio feature word the device can offer to a front-end: what the VF has, less what the driver
    #: cannot carry, plus what it promises on the front-end's behalf (VHOST_F_LOG_ALL and such).
    features: int
    #: Of virtio's features those that it promises so: a front-end that accepted no other has accepted nothing
    #: of the VF's.
    promised: int
    #: Number of receive/transmit queue pairs.
    queue_pairs: int
    #: Largest ring size in descriptors.
    max_queue_size: int
    #: Largest MTU in bytes that the VF forwards; None when it does not say.
    max_mtu: int | None
    #: Who can mark the pages that the VF writes: HARDWARE, SOFTWARE or both.
    log_modes: tuple[LogMode, ...]
    #: Whether guests without VERSION_1, those of virtio 0.95, are served.
    serves_legacy: bool

    @abc.abstractmethod
    def map_memory(self, region: MemoryRegion) -> None:
        """Let the VF read and write a range of guest memory."""

    @abc.abstractmethod
    def unmap_memory(self, region: MemoryRegion) -> None:
        """Take a range back; on return the VF does not touch it any more."""

    def call_meanwhile(self, callback: Callable[[], None]) -> None:  # noqa: B027
        """Have `callback` called again and again while memory is mapped or unmapped, where that takes long.

        :param callback: does not raise, and asks the device for nothing but its statistics and properties.
        """

    def prepare(self, features: int) -> None:  # noqa: B027
        """Do what can be done beforehand for a start with these features, which will probably come.

        Raises nothing; what cannot be is told by `start`.
        """

    @abc.abstractmethod
    def start(self, features: int, rings: Mapping[int, Ring]) -> None:
        """Reset the VF, negotiate `features`, program `rings`, run; every ring is notified once."""

    @abc.abstractmethod
    def start_ring(self, index: int, ring: Ring) -> None:
        """Run one more ring; it is notified once."""

    @abc.abstractmethod
    def set_call(self, index: int, fd: int | None) -> None:
        """Send a running ring's interrupts to another eventfd; the caller keeps owning it."""

    @abc.abstractmethod
    def stop_ring(self, index: int) -> RingState:
        """Stop one ring, the others go on; nothing of it is in flight on return."""

    @abc.abstractmethod
    def suspend(self) -> dict[int, RingState]:
        """Stop all rings that run and return where each stands; the VF is idle and memory stays mapped."""

    @abc.abstractmethod
    def start_logging(self, bitmap: DirtyBitmap) -> None:
        """From now on mark what the VF writes to guest memory, ring entries among it; again: elsewhere.

        Rings may run on through a relay in software, after a pause of milliseconds. A VF that marks buffers
        but not ring entries has them marked when its rings stop. Whatever was written until this returns
        without being marked here was marked in the bitmap before, if there was one. After `DeviceError`
        nothing is logged.
        """

    @abc.abstractmethod
    def stop_logging(self) -> None:
        """Mark no more: on return the bitmap is not touched. Without effect when nothing is logged."""

    @property
    @abc.abstractmethod
    def log_mode(self) -> LogMode | None:
        """How writes are marked now, HARDWARE or SOFTWARE; None when they are not."""

    @property
    @abc.abstractmethod
    def log_missed(self) -> int:
        """Pages that a bitmap had no room for, and bitmaps whose memory had gone, since the device is open.

        Asked for at any time: it looks at no bitmap.
        """

    @property
    @abc.abstractmethod
    def shadowed(self) -> bool:
        """Whether rings run through the shadow-ring relay now, not between guest and VF alone."""

    def notifier(self, index: int) -> HostNotifier | None:
        """The page of a ring's doorbell; None when it has none of its own, or none that can be mapped.

        Whoever writes there notifies the VF and not the relay, so it is of use only while the ring runs and
        is not shadowed. It stays the same as long as the device is open.
        """
        return None

    @property
    @abc.abstractmethod
    def event_fd(self) -> int:
        """A descriptor that is readable when `take_event` has something to tell; the same for life."""

    @property
    @abc.abstractmethod
    def fault(self) -> str | None:
        """What is known of why a running VF needs a reset: the ring and what is wrong with it."""

    @abc.abstractmethod
    def take_event(self) -> DeviceEvent | None:
        """The next event, or None when there is none. Does not wait for one, and does not raise."""

    def link_up(self) -> bool | None:
        """Whether the VF's link is up now; None when it does not say."""
        return None

    @abc.abstractmethod
    def statistics(self) -> dict[str, int]:
        """Counters by name, since the device was opened.

        `kicks.N` counts the notifications forwarded for ring N. `logged_pages` counts pages that were marked
        and had not been: all of the relay's and of the used rings; of a VF's own those that are seen by
        looking at the bitmap, now, which others have marked among them. What is taken from the bitmap
        between two such looks is not counted. `log_missed` is the property of
        that name.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Stop whatever runs and give the VF back. Idempotent, raises nothing."""


@dataclass(frozen=True)
class DeviceSpec:
    """A parsed device string, `DRIVER,key=value…`: the devargs form that DPDK uses."""

    driver: str
    options: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> "DeviceSpec":
        """Take a device string apart.

        :raise DeviceSpecError: for an unknown driver, or a part that is not `key=value`.
        """
        driver, *parts = text.split(",")
        if driver not in DRIVERS:
            raise DeviceSpecError(f"device '{text}': no driver '{driver}'; use one of: {', '.join(DRIVERS)}")
        options: dict[str, str] = {}
        for part in parts:
            key, separator, value = part.partition("=")
            if not key or not separator or not value:
                raise DeviceSpecError(f"device '{text}': '{part}' is not key=value")
            if key in options:
                raise DeviceSpecError(f"device '{text}': '{key}' is given twice")
            options[key] = value
        return cls(driver, options)

    def __str__(self) -> str:
        return ",".join([self.driver, *(f"{key}={value}" for key, value in self.options.items())])


#: Driver name -> module, imported only when it is asked for, that has
#: `open_device(spec: DeviceSpec, log_mode: LogMode, mac: bytes | None) -> VdpaDevice`.
DRIVERS: Mapping[str, str] = {
    "ifcvf": "datapath.drivers.ifcvf",
    "virtio": "datapath.drivers.virtio_pci",
    "mlx5": "datapath.drivers.mlx5.device",
}


def open_device(spec: DeviceSpec, log_mode: LogMode = LogMode.AUTO, mac: bytes | None = None) -> VdpaDevice:
    """Take hold of a VF.

    :param log_mode: who is to mark the pages that it writes, whenever that is asked for.
    :param mac: the guest's address, for a driver that tells the VF which frames are the guest's; None: it is
        not known, and the guest gets what the VF gets.
    :raise DeviceSpecError: for options that the driver does not take.
    :raise DeviceError: when the VF cannot be reached, is not one that the driver serves, or cannot log so.
    """
    module = importlib.import_module(DRIVERS[spec.driver])
    device = module.open_device(spec, log_mode, mac)
    assert isinstance(device, VdpaDevice)
    return device
