"""The guest memory that a VF has been given, and the few bytes of it that a driver looks at itself.

Owns nothing: regions and their descriptors are whoever's that mapped them. Memory is read through the
descriptor, because a mapping of a file that has shrunk must not be touched.
"""

import os
from collections.abc import Callable

from datapath.vdpa import DeviceError, MemoryRegion


class GuestRegions:
    """Regions by guest physical address."""

    def __init__(self) -> None:
        self._regions: list[MemoryRegion] = []
        self._unfinished: list[tuple[MemoryRegion, Callable[[], None]]] = []
        self._refused: list[MemoryRegion] = []

    def add(self, region: MemoryRegion, finish: Callable[[], None] | None = None) -> None:
        """Know a region; `finish` is what `PciFunction.dma_map_later` gave for it."""
        self._regions.append(region)
        if finish is not None:
            self._unfinished.append((region, finish))

    def finish(self) -> None:
        """Wait until the VF reaches all regions.

        :raise DeviceError: when one was refused; it is told once.
        """
        while self._unfinished:
            region, finish = self._unfinished.pop(0)
            try:
                finish()
            except DeviceError:
                self._refused.append(region)
                raise

    def is_refused(self, region: MemoryRegion) -> bool:
        """Whether the VF does not reach a region, because `finish` has raised for it."""
        return region in self._refused

    def remove(self, region: MemoryRegion) -> None:
        self._regions.remove(region)
        if region in self._refused:
            self._refused.remove(region)

    def read(self, address: int, size: int) -> bytes:
        """Bytes at a guest physical address.

        :raise DeviceError: when no region has them all, or the memory has gone.
        """
        for region in self._regions:
            offset = address - region.guest_address
            if 0 <= offset <= region.size - size:
                data = os.pread(region.fd, size, region.fd_offset + offset)
                if len(data) == size:
                    return data
                raise DeviceError(f"guest memory at {address:#x} has shrunk away")
        raise DeviceError(f"guest address {address:#x} lies in no memory region")

    def read16(self, address: int) -> int:
        """The little-endian 16-bit field at a guest physical address.

        :raise DeviceError: as `read`.
        """
        return int.from_bytes(self.read(address, 2), "little")
