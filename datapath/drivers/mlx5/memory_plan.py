"""What an indirect memory key is made of, so that guest physical addresses are the device's: pure planning.

One key covers all guest memory, from its first byte to its last. Its entries (KLM) name the keys of regions,
and for the holes between them the key of memory that is not there. A device finds an entry faster when all
are of one size, a power of two; where that takes too many, each entry has the size that it needs.
Rules are those of DPDK's drivers/vdpa/mlx5/mlx5_vdpa_mem.c.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from datapath.mlx5_prm import AccessMode
from datapath.vdpa import DeviceError

#: The most bytes that one entry covers.
LARGEST_ENTRY = 1 << 31
#: The most entries that a mailbox holds: its length has 16 bits.
MOST_ENTRIES = 4078
#: The least size of entries that have one size: a page.
LEAST_SIZE = 4096
#: Entries that a key holds without a fetch: a cache line of 64 bytes.
NEAR = 4


@dataclass(frozen=True)
class Span:
    """A range of guest physical addresses, all of one region or all hole."""

    address: int
    size: int
    #: Which region it belongs to, in the order in which they were given; None for a hole.
    region: int | None

    @property
    def end(self) -> int:
        return self.address + self.size


@dataclass(frozen=True)
class KeyPlan:
    """An indirect key, before it is made."""

    start: int
    size: int
    mode: AccessMode
    #: Base-2 logarithm of each entry's size, 0 where they differ.
    log_page_size: int
    entries: tuple[Span, ...]


def spans(regions: Sequence[tuple[int, int]]) -> list[Span]:
    """Regions, of address and size, in the order of their addresses and with the holes between them.

    :raise DeviceError: when there are none, one is empty, or two overlap.
    """
    if not regions:
        raise DeviceError("a memory key needs guest memory, and there is none")
    found: list[Span] = []
    for (address, size), number in sorted((region, number) for number, region in enumerate(regions)):
        end = found[-1].end if found else address
        if size <= 0 or address < end:
            raise DeviceError(f"guest memory at {address:#x}: {size} bytes that are none or another's too")
        if address > end:
            found.append(Span(end, address - end, None))
        found.append(Span(address, size, number))
    return found


def _cut(whole: Iterable[Span], size: int) -> Iterator[Span]:
    """Pieces of at most `size` bytes."""
    for span in whole:
        for address in range(span.address, span.end, size):
            yield Span(address, min(size, span.end - address), span.region)


def plan(regions: Sequence[tuple[int, int]]) -> KeyPlan:
    """The key for these regions, of address and size.

    :raise DeviceError: when they are in too many pieces, or as `spans`.
    """
    whole = spans(regions)
    start, size = whole[0].address, whole[-1].end - whole[0].address
    # The greatest common divisor with a power of two is a power of two.
    common = math.gcd(LARGEST_ENTRY, *(span.size for span in whole))
    needed = sum(-(-span.size // LARGEST_ENTRY) for span in whole)
    even = size // common
    if common >= LEAST_SIZE and even <= MOST_ENTRIES and not needed <= NEAR < even:
        entries = tuple(_cut(whole, common))
        return KeyPlan(start, size, AccessMode.KLM_FIXED_SIZE, common.bit_length() - 1, entries)
    if needed > MOST_ENTRIES:
        raise DeviceError(f"guest memory is in {needed} pieces: a memory key holds {MOST_ENTRIES}")
    return KeyPlan(start, size, AccessMode.KLM, 0, tuple(_cut(whole, LARGEST_ENTRY)))
