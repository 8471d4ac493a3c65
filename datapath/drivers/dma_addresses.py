"""Which DMA addresses of a function are taken, and where there is room for what the driver maps itself.

Guest memory is mapped at the guest's addresses, which grow from the lowest upwards. What the guest knows
nothing of, private rings and dirty logs, goes to the highest addresses that there are.
"""

import mmap

from datapath.bus.function import PciFunction
from datapath.vdpa import DeviceError, MemoryRegion

#: DMA addresses end below this one, should the IOMMU allow more: a VF may drive fewer address lines than the
#: IOMMU has. 46 bits are what DPDK's IFCVF driver asks of the card (IFCVF_MEDIATED_VRING, 1 << 45, upwards).
ADDRESS_END = 1 << 46


def whole_pages(size: int) -> int:
    """The least multiple of a page that holds `size` bytes."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def overlap(one: MemoryRegion, other: MemoryRegion) -> bool:
    """Whether two ranges want an address both."""
    return (
        one.guest_address < other.guest_address + other.size
        and other.guest_address < one.guest_address + one.size
    )


class DmaAddresses:
    """The addresses of one function."""

    def __init__(self, function: PciFunction) -> None:
        self._function = function
        self._taken: list[MemoryRegion] = []

    def take(self, region: MemoryRegion) -> None:
        self._taken.append(region)

    def release(self, region: MemoryRegion) -> None:
        self._taken.remove(region)

    def place(self, length: int, what: str) -> int:
        """The highest address at which `length` bytes, whole pages, are free.

        :param what: what they are for, as the message of a failure says it.
        :raise DeviceError: when there are none.
        """
        for first, last in reversed(self._function.iova_ranges()):
            start = (min(last + 1, ADDRESS_END) - length) // mmap.PAGESIZE * mmap.PAGESIZE
            # From the highest down, so that each step below one leaves those above it clear.
            for region in sorted(self._taken, key=lambda region: region.guest_address, reverse=True):
                if overlap(region, MemoryRegion(start, length, -1, 0, 0)):
                    start = (region.guest_address - length) // mmap.PAGESIZE * mmap.PAGESIZE
            if start >= first:
                return start
        ranges = ", ".join(f"{first:#x}-{last:#x}" for first, last in self._function.iova_ranges())
        raise DeviceError(
            f"{self._function.name}: no DMA addresses for {length} bytes of {what} beside the guest's memory"
            f" in {ranges}"
        )
