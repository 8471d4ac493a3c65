"""How rings travel between the guest and the VF: directly, or through the shadow-ring relay.

    direct: the VF works on the guest's own rings and signals the guest's eventfds; only kicks pass through
            the relay's thread
    shadow: the VF works on private rings that begin at index 0; the relay copies heads and used entries
            between them and the guest's, and marks in a dirty bitmap what was written

All rings of a device travel the same way, which can change only while none runs. Owns the relay and the
private rings, which are there from the beginning: should there be no room for them, that had better be known
before a migration begins.
"""

import dataclasses
from collections.abc import Iterable

from datapath.bus.function import PciFunction
from datapath.descriptors import signal_eventfd
from datapath.drivers.dma_addresses import DmaAddresses
from datapath.drivers.private_rings import PrivateRings
from datapath.native.relay import Doorbell, Relay, ShadowRing
from datapath.vdpa import DeviceError, DirtyBitmap, MemoryRegion, Ring, RingState
from datapath.virtio import Feature, bit


class RingPaths:
    """The paths of one function's rings."""

    def __init__(self, function: PciFunction, addresses: DmaAddresses, rings: int, size: int) -> None:
        """For `rings` rings of up to `size` descriptors; all direct until told otherwise.

        :raise OSError: when descriptors or threads have run out.
        :raise DeviceError: when the function has no room for private rings, or the host does not.
        """
        self._function = function
        self._addresses = addresses
        self._count = rings
        self._size = size
        self._open: set[int] = set()
        self._event_idx = self._in_order = False
        #: Whether the rings that run, or run next, are shadowed.
        self.shadowed = False
        self._relay = Relay(rings)
        self._private: PrivateRings | None = None
        try:
            self._private = self._make_private()
        except BaseException:
            self._relay.close()
            raise

    @property
    def broken_fd(self) -> int:
        """An eventfd that is readable when a shadowed ring met something that breaks virtio's rules."""
        return self._relay.broken_fd

    # Memory

    def map(self, region: MemoryRegion) -> None:
        """Guest memory that rings and buffers may lie in.

        :raise DeviceError: when it wants DMA addresses that the private rings have, and rings run.
        """
        if self._private is not None and self._private.overlaps(region):
            if self._open:
                raise DeviceError(
                    f"{self._function.name}: guest memory {region.guest_address:#x}+{region.size:#x} is where"
                    f" the private rings are, {self._private.memory.guest_address:#x}"
                )
            # They are made anew, elsewhere, at the next start.
            self._function.dma_unmap(self._private.memory)
            self._private.close()
            self._private = None
        try:
            self._relay.map(region.guest_address, region.size, region.address)
        except OSError as error:
            raise DeviceError(
                f"{self._function.name}: guest memory {region.guest_address:#x}+{region.size:#x}:"
                f" {error.strerror}"
            ) from error
        self._addresses.take(region)

    def unmap(self, region: MemoryRegion) -> None:
        """Undo `map`; no ring may lie there any more."""
        self._relay.unmap(region.guest_address, region.size)
        self._addresses.release(region)

    # Rings

    def prepare(self, shadowed: bool, features: int) -> None:
        """Say how rings travel from now on. None may run.

        :param features: those that the guest has accepted.
        :raise DeviceError: when the private rings had to make room for guest memory, and there is no other.
        """
        if self._private is None:
            self._private = self._make_private()
        self.shadowed = shadowed
        self._event_idx = bool(features & bit(Feature.F_EVENT_IDX))
        self._in_order = bool(features & bit(Feature.F_IN_ORDER))

    def as_seen_by_device(self, index: int, ring: Ring) -> Ring:
        """A guest's ring as its VF is to be given it."""
        if not self.shadowed:
            return ring
        private = self._rings.clear(index)
        return dataclasses.replace(
            ring, avail=private.avail, used=private.used, state=RingState(0, 0), call=private.interrupt
        )

    def open(self, index: int, ring: Ring, doorbell: Doorbell) -> None:
        """Let a ring travel; the VF runs it, and is notified once, as entries may be waiting already.

        :raise DeviceError: when the kick eventfd is none.
        """
        try:
            if self.shadowed:
                self._relay.add_shadow(index, self._shadow_ring(index, ring, doorbell))
            else:
                self._relay.add(index, ring.kick, doorbell)
            self._open.add(index)
            self._relay.ring(index)
        except OSError as error:
            text = f"{self._function.name}: ring {index}: kick descriptor: {error.strerror}"
            raise DeviceError(text) from error

    def hold(self, index: int) -> None:
        """Hand the VF no more of a ring that is about to stop; what it completes still goes to the guest."""
        if not self.shadowed:
            self._relay.remove(index)
        elif index in self._open:
            self._relay.hold(index)

    def in_flight(self, index: int) -> int:
        """How many buffers of a shadowed ring the VF has."""
        return self._relay.state(index).in_flight

    def close(self, index: int) -> None:
        """A ring has stopped: hand over what the VF completed last, and use its eventfds no more."""
        self._relay.remove(index)
        self._open.discard(index)

    def fault(self, index: int) -> str | None:
        """What guest or VF did wrong on a shadowed ring, also after `close`; None while all is well."""
        try:
            return self._relay.state(index).error
        except OSError:
            return None  # it has not been shadowed

    def set_call(self, index: int, call: int | None) -> None:
        """Interrupt the guest of a shadowed ring by another eventfd."""
        self._relay.set_call(index, call)

    def log(self, bitmap: DirtyBitmap | None) -> None:
        """Mark what shadowed rings write, or no more."""
        self._relay.log(None if bitmap is None else (bitmap.address, bitmap.size))

    @property
    def log_missed(self) -> int:
        """Pages that shadowed rings wrote and a bitmap had no room for, and bitmaps that vanished."""
        return self._relay.log_missed

    def statistics(self) -> dict[str, int]:
        return self._relay.statistics()

    def end(self) -> None:
        """End the relay; nothing is mapped or open afterwards. The function must have been closed."""
        self._relay.close()
        if self._private is not None:
            self._private.close()
            self._private = None

    # Inside

    def _make_private(self) -> PrivateRings:
        return PrivateRings(self._function, self._addresses, self._count, self._size)

    @property
    def _rings(self) -> PrivateRings:
        assert self._private is not None
        return self._private

    def _shadow_ring(self, index: int, ring: Ring, doorbell: Doorbell) -> ShadowRing:
        place = self._rings.place(index)
        return ShadowRing(
            size=ring.size,
            event_idx=self._event_idx,
            in_order=self._in_order,
            descriptors=ring.descriptors,
            avail=ring.avail,
            used=ring.used,
            index=ring.state.used,
            private_avail=place.avail_here,
            private_used=place.used_here,
            kick=ring.kick,
            call=ring.call,
            interrupt=place.interrupt,
            doorbell=doorbell,
        )


def interrupt_guest(rings: Iterable[Ring]) -> None:
    """Interrupt the guest for each ring: what was on its way when the ring stopped may have been lost."""
    for ring in rings:
        if ring.call is not None:
            signal_eventfd(ring.call)
