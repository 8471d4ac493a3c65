"""Guest memory as the front-end shares it: the table of regions, their mappings, address translation.

Three address spaces meet here: guest physical, the front-end's own ("user", in which rings are named)
and this process's. Owns the descriptors and mappings of regions; which of them the VF may reach is told
to the device by `backend.py`. Source: QEMU docs/interop/vhost-user.rst, "Memory region description".

Guest memory can shrink under us: nothing here touches a mapping, it reads through the descriptor.
"""

import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datapath.descriptors import close_all
from datapath.native._native import ffi
from datapath.vdpa import MemoryRegion
from datapath.vhost_user.messages import ProtocolError, Region

#: Regions that a front-end may add one by one (CONFIGURE_MEM_SLOTS); a value that may never shrink, or a
#: front-end that comes back is refused by itself.
MAX_SLOTS = 256
ADDRESS_LIMIT = 1 << 64


@dataclass(frozen=True)
class Mapping:
    """One region with what we hold for it."""

    region: Region
    #: The file behind it, as (device, inode): tells a region sent again from a new one.
    file: tuple[int, int]
    #: What the device is given.
    memory: MemoryRegion
    _view: mmap.mmap
    _pin: Any

    def close(self) -> None:
        """Unmap and close the descriptor."""
        ffi.release(self._pin)
        self._view.close()
        os.close(self.memory.fd)


class GuestMemory:
    """The regions that one connection has shared, in the order of their arrival."""

    def __init__(self) -> None:
        self._mappings: list[Mapping] = []

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self._mappings)

    def __len__(self) -> int:
        return len(self._mappings)

    def add(self, region: Region, fd: int) -> Mapping:
        """Check and map a region; takes the descriptor, on failure too.

        :raise ProtocolError: for a range that is empty, wraps, overlaps another, or exceeds its file.
        """
        try:
            self._check(region)
            mapping = _map(region, fd)
        except BaseException:
            close_all([fd])
            raise
        self._mappings.append(mapping)
        return mapping

    def _check(self, region: Region) -> None:
        name = describe(region)
        if region.size == 0:
            raise ProtocolError(f"{name}: empty")
        for start in (region.guest_address, region.user_address, region.mmap_offset):
            if start + region.size > ADDRESS_LIMIT:
                raise ProtocolError(f"{name}: wraps around the end of the address space")
        for other in self._mappings:
            if _overlap(region.guest_address, other.region.guest_address, region.size, other.region.size):
                raise ProtocolError(f"{name}: overlaps {describe(other.region)} in guest memory")
            if _overlap(region.user_address, other.region.user_address, region.size, other.region.size):
                raise ProtocolError(f"{name}: overlaps {describe(other.region)} in the front-end's memory")

    def find(self, region: Region) -> Mapping:
        """The mapping of a region named again; its mmap offset does not count (REM_MEM_REG).

        :raise ProtocolError: when there is none.
        """
        for mapping in self._mappings:
            ours = mapping.region
            if (ours.guest_address, ours.user_address, ours.size) == (
                region.guest_address,
                region.user_address,
                region.size,
            ):
                return mapping
        raise ProtocolError(f"{describe(region)}: not a region of this connection")

    def outdated(self, regions: Sequence[Region], fds: Sequence[int]) -> list[Mapping]:
        """The mappings that a new table (SET_MEM_TABLE) no longer has."""
        fresh = {(region, _file(fd)) for region, fd in zip(regions, fds, strict=True)}
        return [mapping for mapping in self._mappings if (mapping.region, mapping.file) not in fresh]

    def holds(self, region: Region, fd: int) -> bool:
        """Whether that very region of that file is mapped already."""
        file = _file(fd)
        return any((mapping.region, mapping.file) == (region, file) for mapping in self._mappings)

    def remove(self, mapping: Mapping) -> None:
        """Unmap one region."""
        self._mappings.remove(mapping)
        mapping.close()

    def close(self) -> None:
        """Unmap everything."""
        while self._mappings:
            self._mappings.pop().close()

    def guest_address(self, user_address: int, size: int, what: str) -> int:
        """Translate a range of the front-end's addresses, which must lie within one region.

        :raise ProtocolError: naming `what` when it does not.
        """
        for mapping in self._mappings:
            region = mapping.region
            offset = user_address - region.user_address
            if offset >= 0 and offset + size <= region.size:
                return region.guest_address + offset
        raise ProtocolError(f"{what}: {size} bytes at {user_address:#x} lie in no memory region")

    def read(self, guest_address: int, size: int) -> bytes:
        """Bytes of guest memory, within one region.

        :raise ProtocolError: when the range is not mapped, or the memory behind it has gone.
        """
        for mapping in self._mappings:
            offset = guest_address - mapping.region.guest_address
            if offset >= 0 and offset + size <= mapping.region.size:
                data = os.pread(mapping.memory.fd, size, mapping.memory.fd_offset + offset)
                if len(data) != size:
                    raise ProtocolError(f"guest memory at {guest_address:#x} has shrunk away")
                return data
        raise ProtocolError(f"{size} bytes at guest address {guest_address:#x} lie in no memory region")


def describe(region: Region) -> str:
    """A region's guest range, for messages."""
    return f"memory region {region.guest_address:#x}+{region.size:#x}"


def _overlap(start: int, other: int, size: int, other_size: int) -> bool:
    return start < other + other_size and other < start + size


def _file(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _map(region: Region, fd: int) -> Mapping:
    """Map a region whole pages (of its file: huge ones too) at a time; the file must cover it."""
    status = os.fstat(fd)
    end = region.mmap_offset + region.size
    if not stat.S_ISREG(status.st_mode) or status.st_size < end:
        raise ProtocolError(f"{describe(region)}: {end} bytes of a file that has {status.st_size}")
    page = max(status.st_blksize, mmap.PAGESIZE)
    start = region.mmap_offset // page * page
    length = min(-(-end // page) * page, status.st_size) - start
    try:
        view = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
    except (OSError, ValueError, OverflowError) as error:
        raise ProtocolError(f"{describe(region)}: cannot be mapped: {error}") from error
    pin = ffi.from_buffer(view)
    address = int(ffi.cast("uintptr_t", pin)) + region.mmap_offset - start
    memory = MemoryRegion(region.guest_address, region.size, fd, region.mmap_offset, address)
    return Mapping(region, (status.st_dev, status.st_ino), memory, view, pin)
