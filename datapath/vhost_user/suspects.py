"""Pages that a back-end before this one may have had written without a trace in the dirty log.

When a port dies while writes are logged, its VF may have filled buffers that nobody marked. All of them are
still described in the rings: a buffer leaves the descriptor table after the guest has seen it used, and it is
marked before. The relay sees to that; of a VF that marks by itself it is assumed (docs/drivers/ifcvf.md). So
every buffer that a descriptor lets the device write counts as written, and the used ring.

Guest memory is read through its descriptor and trusted in nothing: chains are not followed, each entry of a
table is taken for itself, indirect tables are as long as a ring at most and their entries no further ones.
"""

import struct
from collections.abc import Iterable, Iterator

from datapath import virtio
from datapath.vdpa import Ring
from datapath.vhost_user.memory import GuestMemory
from datapath.vhost_user.messages import ProtocolError

#: A descriptor (virtio 1.3 section 2.7.5): address, length, flags, next.
DESCRIPTOR = struct.Struct("<QIHH")
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
#: Most entries of an indirect table: it may not be longer than the largest ring (section 2.7.5.3).
MAX_INDIRECT = 32768
#: Most descriptors that are looked at for one ring.
MAX_DESCRIPTORS = 1 << 18


class TooManyError(Exception):
    """A ring describes more than is worth to look through: let every page count as written."""


def suspects(memory: GuestMemory, ring: Ring) -> list[tuple[int, int]]:
    """What a device could have written for a ring: guest physical address and length in bytes, no overlaps.

    :raise TooManyError: when its descriptors are too many, or it is packed.
    :raise ProtocolError: when the ring itself cannot be read.
    """
    if ring.packed:
        raise TooManyError  # its used descriptors have taken the place of what they tell of
    _, _, used_size = virtio.ring_bytes(ring.size)
    found = [(ring.used, used_size)]
    left = MAX_DESCRIPTORS
    for address, length, flags in _table(memory, ring.descriptors, ring.size):
        if flags & DESC_F_INDIRECT:
            entries = min(length // DESCRIPTOR.size, MAX_INDIRECT)
            left -= entries
            if left < 0:
                raise TooManyError
            try:
                inner = list(_table(memory, address, entries))
            except ProtocolError:
                continue  # a slot that the guest does not use now may hold anything
            found += [(at, size) for at, size, flag in inner if flag & DESC_F_WRITE]
        elif flags & DESC_F_WRITE:
            found.append((address, length))
    return list(_merged(found))


def _table(memory: GuestMemory, address: int, entries: int) -> Iterator[tuple[int, int, int]]:
    """Address, length and flags of each descriptor in a table."""
    if entries:
        for at, length, flags, _ in DESCRIPTOR.iter_unpack(memory.read(address, DESCRIPTOR.size * entries)):
            yield at, length, flags


def _merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same bytes in ranges that neither overlap nor touch, lowest first."""
    begin = end = 0
    for address, length in sorted(ranges):
        if address > end:
            if end > begin:
                yield begin, end - begin
            begin = address
        end = max(end, address + length)
    if end > begin:
        yield begin, end - begin
