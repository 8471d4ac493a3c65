"""What the memory of a packed ring tells of where a function without ring state has stopped in it.

No index stands in the memory of a packed ring (virtio 1.3 section 2.8), and its descriptors alone do not say
it either: a chain that was given back leaves all but its first descriptor as they were. What can be told is
whether the function has given anything back at all. If not, the ring begins at its start once more; otherwise
nobody can go on with it, which the driver says when it is asked to.
"""

import struct
from collections.abc import Iterator

from datapath.drivers.guest_regions import GuestRegions
from datapath.vdpa import Ring, RingState
from datapath.virtio import PACKED_START

#: A descriptor (section 2.8.13): address, length, buffer id, flags.
DESCRIPTOR = struct.Struct("<QIHH")
NEXT, AVAIL, USED = 1, 1 << 7, 1 << 15
START = RingState(PACKED_START, PACKED_START)
#: Stands for any place but the start.
IN_USE = RingState(0, 0)


def stopped_at(guest: GuestRegions, ring: Ring) -> RingState:
    """Where a function that began at the start has stopped: `START` or `IN_USE`.

    :raise DeviceError: when the ring's memory has gone.
    """
    return START if at_start(guest, ring) else IN_USE


def at_start(guest: GuestRegions, ring: Ring) -> bool:
    """Whether nothing has been given back in a ring since it was made.

    :raise DeviceError: when its memory has gone.
    """
    descriptors = list(_descriptors(guest, ring))
    first, last = descriptors[0], descriptors[-1]
    nothing_there = not any(first)
    first_round = _waits(first[3]) and not any(last)
    all_wait = all(_waits(flags) and not flags & NEXT for *_, flags in descriptors)
    return nothing_there or first_round or all_wait


def has_work(guest: GuestRegions, ring: Ring) -> bool:
    """Whether the function may have something to do; it may have nothing, as the rest of a chain stays there.

    :raise DeviceError: when the ring's memory has gone.
    """
    return any(bool(flags & AVAIL) != bool(flags & USED) for *_, flags in _descriptors(guest, ring))


def _descriptors(guest: GuestRegions, ring: Ring) -> Iterator[tuple[int, int, int, int]]:
    yield from DESCRIPTOR.iter_unpack(guest.read(ring.descriptors, DESCRIPTOR.size * ring.size))


def _waits(flags: int) -> bool:
    """Whether a descriptor was made available on the first round, or another odd one, and not given back."""
    return bool(flags & AVAIL) and not flags & USED
