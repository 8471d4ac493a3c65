"""A container of kernel VFIO: the address space of one function, and the group through which it is had.

Owns the container and the group. What a group needs before it gives its function away, and what the
kernel's refusals mean, is here; what one does with the function is `datapath.bus.vfio`.

Each function has a container of its own, because each serves another guest: one container is one address
space. Limits are the kernel's to enforce; when it refuses, what it allows is read and told.

Source: linux/vfio.h and the kernel's Documentation/driver-api/vfio.rst.
"""

import contextlib
import errno
import fcntl
import os
import resource
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from datapath.bus.sysfs import SYSFS, HostFunction, function, in_the_way
from datapath.vdpa import DeviceError, MemoryRegion
from datapath.vfio import API_VERSION, GROUP_STATUS, TYPE1V2_IOMMU, DmaFlag, GroupFlag, IommuInfo, Request
from datapath.vfio_user import DmaMap, DmaUnmap

#: Where the kernel's VFIO has its device nodes.
NODES = Path("/dev/vfio")
#: Number of the capability that lifts RLIMIT_MEMLOCK (linux/capability.h).
CAP_IPC_LOCK = 14
#: Bytes that are mapped by one call. The kernel pins them, which takes a quarter of a second in pages of
#: 4 KiB that nobody has touched yet.
PIECE = 256 << 20
#: The last address there is, for kernels that do not tell ranges.
LAST_ADDRESS = (1 << 64) - 1


class Container:
    """One function's address space, with the function's group in it."""

    def __init__(self, address: str, *, sysfs: Path = SYSFS, nodes: Path = NODES) -> None:
        """Open a container and put the group of the function at `address` into it.

        :raise DeviceError: when there is no such function, no VFIO, or the group cannot be had.
        """
        self.name = f"pci={address}"
        self._address = address
        self._sysfs = sysfs
        self._nodes = nodes
        #: (guest address, size) of what is mapped -> the kernel's mappings that it consists of.
        self._maps: dict[tuple[int, int], list[MemoryRegion]] = {}
        self._meanwhile: Callable[[], None] = lambda: None
        self._resources = contextlib.ExitStack()
        try:
            host_function = function(address, sysfs)
            self._container = self._open_container()
            self._group = self._open_group(host_function)
            self._join()
            self._info = self._ask_info()
        except BaseException:
            self.close()
            raise

    def open_function(self) -> int:
        """The function's descriptor, which is the caller's.

        :raise DeviceError: when the function is not VFIO's, or wants what we have not.
        """
        try:
            fd: int = fcntl.ioctl(
                self._group, Request.GROUP_GET_DEVICE_FD, bytearray(self._address.encode() + b"\0")
            )
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise self._not_bound() from error
            if error.errno == errno.EACCES:
                raise DeviceError(
                    f"{self.name}: wants a VF token, as a VF does whose physical function is bound to"
                    " vfio-pci; bind that to its own driver"
                ) from error
            raise self._refused("opening the function", error) from error
        return fd

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """(first, last) of the addresses that can be mapped."""
        ranges = self._info.iova_ranges
        return ((0, LAST_ADDRESS),) if ranges is None else ranges

    def map(self, memory: MemoryRegion) -> None:
        """Let the function read and write memory; its pages stay where they are until `unmap`.

        :raise DeviceError: when a limit of the kernel's is met; names needed and allowed.
        """
        mapped: list[MemoryRegion] = []
        for piece in pieces_of(memory):
            # The kernel's structure has the process's address where vfio-user's has the file's offset.
            request = DmaMap(DmaFlag.READ | DmaFlag.WRITE, piece.address, piece.guest_address, piece.size)
            try:
                fcntl.ioctl(self._container, Request.IOMMU_MAP_DMA, bytearray(request.pack()))
            except OSError as error:
                self._unmap_all(mapped)  # first, as the reason tells what is used without this memory
                reason = MAP_REFUSALS.get(error.errno or 0, Container._unexplained)(self, memory)
                raise DeviceError(f"{self._where(memory)}: {reason or error.strerror}") from error
            mapped.append(piece)
            self._meanwhile()
        self._maps[memory.guest_address, memory.size] = mapped

    def unmap(self, memory: MemoryRegion) -> None:
        """Take mapped memory back.

        :raise DeviceError: when exactly this is not mapped.
        """
        mapped = self._maps.get((memory.guest_address, memory.size))
        if mapped is None:
            raise DeviceError(f"{self._where(memory)}: is not mapped")
        self._unmap_all(mapped)
        del self._maps[memory.guest_address, memory.size]

    def call_meanwhile(self, callback: Callable[[], None]) -> None:
        """Have `callback` called after each piece of memory that is mapped or unmapped."""
        self._meanwhile = callback

    def close(self) -> None:
        """Give group and address space back, with all that is mapped; the function's descriptors first.

        Idempotent, raises nothing.
        """
        self._resources.close()
        # Nobody may meet a descriptor that has got these numbers since.
        self._container = self._group = -1
        self._maps.clear()

    # Mapping

    def _unmap_all(self, mapped: list[MemoryRegion]) -> None:
        """Unmap pieces and take them from the list; on failure those that are still mapped are left in it.

        One call could unmap them all, and last as long as to unpin a whole guest does.
        """
        while mapped:
            piece = mapped[-1]
            request = bytearray(DmaUnmap(0, piece.guest_address, piece.size).pack())
            try:
                fcntl.ioctl(self._container, Request.IOMMU_UNMAP_DMA, request)
            except OSError as error:
                raise DeviceError(f"{self._where(piece)}: cannot be unmapped: {error.strerror}") from error
            unmapped = DmaUnmap.unpack(bytes(request)).size
            if unmapped != piece.size:
                raise DeviceError(f"{self._where(piece)}: the kernel unmapped {unmapped:#x} bytes of it")
            mapped.pop()
            self._meanwhile()

    def _where(self, memory: MemoryRegion) -> str:
        return f"{self.name}: memory {memory.guest_address:#x}+{memory.size:#x}"

    # Opening

    def _open_container(self) -> int:
        node = self._nodes / "vfio"
        try:
            container = os.open(node, os.O_RDWR)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                raise DeviceError(f"{self.name}: no {node}: run modprobe vfio-pci") from error
            raise self._refused(f"opening {node}", error) from error
        self._resources.callback(os.close, container)
        with self._telling(f"asking {node} what it can"):
            version = fcntl.ioctl(container, Request.GET_API_VERSION)
            has_type1 = fcntl.ioctl(container, Request.CHECK_EXTENSION, TYPE1V2_IOMMU)
        if version != API_VERSION:
            raise DeviceError(f"{self.name}: the kernel's VFIO has API version {version}, not {API_VERSION}")
        if not has_type1:
            raise DeviceError(
                f"{self.name}: the kernel's VFIO has no type 1 IOMMU: run modprobe vfio_iommu_type1"
            )
        return container

    def _open_group(self, host_function: HostFunction) -> int:
        if host_function.iommu_group is None:
            raise DeviceError(
                f"{self.name}: no IOMMU stands before it; switch the host's on, in its firmware and with"
                " intel_iommu=on on the kernel command line (AMD's is on by default)"
            )
        node = self._nodes / str(host_function.iommu_group)
        try:
            group = os.open(node, os.O_RDWR)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise self._not_bound() from error
            if error.errno == errno.EBUSY:
                raise DeviceError(f"{self.name}: another process has it ({node} is open)") from error
            raise self._refused(f"opening {node}", error) from error
        self._resources.callback(os.close, group)
        return group

    def _join(self) -> None:
        """Put the group into the container and make an address space of it."""
        status = bytearray(GROUP_STATUS.pack(GROUP_STATUS.size, 0))
        with self._telling("asking for the state of its group"):
            fcntl.ioctl(self._group, Request.GROUP_GET_STATUS, status)
        _, flags = GROUP_STATUS.unpack(status)
        if not flags & GroupFlag.VIABLE:
            raise self._not_viable()
        container = bytearray(self._container.to_bytes(4, sys.byteorder))
        with self._telling("putting its group into a container"):
            fcntl.ioctl(self._group, Request.GROUP_SET_CONTAINER, container)
        try:
            fcntl.ioctl(self._container, Request.SET_IOMMU, TYPE1V2_IOMMU)
        except OSError as error:
            if error.errno == errno.EPERM:
                raise DeviceError(
                    f"{self.name}: the host's IOMMU does not remap interrupts; the kernel then wants"
                    " allow_unsafe_interrupts=1 of vfio_iommu_type1"
                ) from error
            raise self._refused("making an address space", error) from error

    def _ask_info(self) -> IommuInfo:
        """Ask once for the size of the answer, and again for the whole of it."""
        info = IommuInfo()
        for _ in range(2):
            answer = bytearray(info.pack())
            with self._telling("asking what its IOMMU can"):
                fcntl.ioctl(self._container, Request.IOMMU_GET_INFO, answer)
            info = IommuInfo.unpack(bytes(answer))
            if info.argsz <= len(answer):
                break
        return info

    # Refusals

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._refused(what, error) from error

    def _refused(self, what: str, error: OSError) -> DeviceError:
        return DeviceError(f"{self.name}: {what}: {error.strerror}")

    def _not_bound(self) -> DeviceError:
        driver = function(self._address, self._sysfs).driver
        has_it = "no driver has it" if driver is None else f"it is bound to {driver}"
        return DeviceError(
            f"{self.name}: {has_it}, vfio-pci must have it: run virt-vdpa bind {self._address}"
        )

    def _not_viable(self) -> DeviceError:
        """Name the members of the group that a driver of the kernel's has."""
        found = function(self._address, self._sysfs)
        others = ", ".join(f"{other.address} (bound to {other.driver})" for other in in_the_way(found))
        return DeviceError(
            f"{self.name}: its IOMMU group {found.iommu_group} is shared with functions that the host uses:"
            f" {others or 'unknown'}; the group goes to VFIO as a whole or not at all"
        )

    def _unexplained(self, memory: MemoryRegion) -> str:
        return ""

    def _invalid(self, memory: MemoryRegion) -> str:
        """EINVAL: not of pages, or at addresses that the IOMMU does not translate."""
        page = self._info.page_sizes & -self._info.page_sizes
        if page and (memory.guest_address | memory.size | memory.address) % page:
            return f"at address {memory.address:#x} here: the IOMMU needs multiples of {page} bytes"
        last = memory.guest_address + memory.size - 1
        ranges = self.iova_ranges()
        if not any(low <= memory.guest_address and last <= high for low, high in ranges):
            allowed = ", ".join(f"{low:#x}-{high:#x}" for low, high in ranges)
            return f"the host's IOMMU maps only {allowed}"
        return ""

    def _overlaps(self, memory: MemoryRegion) -> str:
        end = memory.guest_address + memory.size
        others = (
            f"{at:#x}+{size:#x}" for at, size in self._maps if at < end and memory.guest_address < at + size
        )
        return f"overlaps what is mapped: {', '.join(others)}"

    def _too_many(self, memory: MemoryRegion) -> str:
        needed = sum(map(len, self._maps.values())) + len(pieces_of(memory))
        return (
            f"{needed} mappings are needed, the kernel allows {self._info.dma_avail or 'fewer'}"
            " (dma_entry_limit of vfio_iommu_type1)"
        )

    def _locked_too_much(self, memory: MemoryRegion) -> str:
        """ENOMEM: pages that are mapped count as locked memory."""
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
        )
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if limit == resource.RLIM_INFINITY or int(status["CapEff"], 16) & 1 << CAP_IPC_LOCK:
            return "the host has no memory for it"
        locked = int(status["VmLck"].split()[0]) * 1024
        return (
            f"{locked + memory.size} bytes of locked memory are needed, RLIMIT_MEMLOCK allows {limit};"
            " raise it (LimitMEMLOCK= of systemd), or run with CAP_IPC_LOCK"
        )

    def _unreachable(self, memory: MemoryRegion) -> str:
        return f"the pages at {memory.address:#x} here cannot be had, or not for writing"


def pieces_of(memory: MemoryRegion) -> list[MemoryRegion]:
    """Memory as the kernel is given it, one call each.

    Cut where `PIECE` divides the guest's addresses, or huge pages begin that are larger than that: the IOMMU
    maps each by one entry of its own if it can.
    """
    if memory.size <= PIECE:
        return [memory]
    step = max(PIECE, os.fstat(memory.fd).st_blksize)
    end = memory.guest_address + memory.size
    starts = [memory.guest_address, *range((memory.guest_address // step + 1) * step, end, step)]
    return [
        MemoryRegion(
            start,
            following - start,
            memory.fd,
            memory.fd_offset + start - memory.guest_address,
            memory.address + start - memory.guest_address,
        )
        for start, following in pairwise([*starts, end])
    ]


#: What a refused IOMMU_MAP_DMA means, by errno; "" leaves it to the errno's own text.
MAP_REFUSALS: dict[int, Callable[[Container, MemoryRegion], str]] = {
    errno.EINVAL: Container._invalid,
    errno.EEXIST: Container._overlaps,
    errno.ENOSPC: Container._too_many,
    errno.ENOMEM: Container._locked_too_much,
    errno.EFAULT: Container._unreachable,
}
