"""A PCI function behind a vfio-user socket: the client side of QEMU's docs/interop/vfio-user.rst.

Owns every descriptor and mapping that came over the connection (`vfio_user_channel`). The wire format is
`datapath.vfio_user`.

A posted write that the device refuses is not heard of; whether a register holds what was written is the
driver's to read. What a driver does `together` is waited for once.
"""

import contextlib
import mmap
import os
import select
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from datapath.bus.function import WIDTHS, PciFunction, RegionDescription
from datapath.bus.vfio_user_channel import DEADLINE, Channel, RefusedError
from datapath.descriptors import close_all
from datapath.native._native import ffi
from datapath.native.relay import Doorbell
from datapath.pci import CONFIG_SIZE
from datapath.vdpa import DeviceError, DeviceLostError, HostNotifier, MemoryRegion
from datapath.vfio import DeviceFlag, DmaFlag, Irq, IrqFlag, Region, SetIrqsFlag
from datapath.vfio_user import (
    MAJOR,
    MINOR,
    Area,
    Capabilities,
    Command,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    IoFd,
    IrqInfo,
    Message,
    ProtocolError,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    RegionWrite,
    SetIrqs,
    Version,
)

#: Flag of an ioeventfd that signals only when one certain value is written (linux/kvm.h).
KVM_IOEVENTFD_FLAG_DATAMATCH = 1


class VfioUserFunction(PciFunction):
    """The PCI function that a vfio-user device serves."""

    def __init__(self, path: str, deadline: float = DEADLINE) -> None:
        """Connect, agree on a version and learn what the function has.

        :param deadline: seconds that the device has to answer each command.
        :raise DeviceError: when nobody listens on `path`, or it is no PCI function.
        """
        self._resources = contextlib.ExitStack()
        self._channel = Channel(path, deadline)
        self.name = self._channel.name
        self._resources.callback(self._channel.close)
        self._regions: dict[Region, RegionInfo] = {}
        self._region_fds: dict[Region, int] = {}
        self._areas: dict[tuple[Region, Area], int] = {}
        self._io_fds: dict[Region, list[tuple[IoFd, int]]] = {}
        self._dma_maps: set[tuple[int, int]] = set()
        #: Of what is done together: commands whose answers are due at the end of it; None otherwise.
        self._due: list[Message] | None = None
        try:
            self._limits = self._negotiate()
            with self._understanding(Command.GET_INFO):
                self._info = DeviceInfo.unpack(
                    self._channel.command_without_fds(Command.GET_INFO, DeviceInfo().pack())
                )
            if not self._info.flags & DeviceFlag.PCI:
                raise DeviceError(f"{self.name}: is not a PCI function")
            self._lost = self._resources.enter_context(select.epoll())
            self._lost.register(self._channel, select.EPOLLRDHUP)
        except BaseException:
            self.close()
            raise

    # Regions

    def region(self, index: Region) -> RegionDescription:
        return RegionDescription.of(self._region(index))

    def read(self, index: Region, offset: int, width: int) -> int:
        self._check_access(index, offset, width)
        return int.from_bytes(self._read(index, offset, width), "little")

    def write(self, index: Region, offset: int, width: int, value: int) -> None:
        self._check_access(index, offset, width)
        data = value.to_bytes(width, "little")
        if self._due is not None and self._limits.write_multiple:
            self._channel.post_write(RegionWrite(offset, index, data))
        else:
            self._channel.post(Command.REGION_WRITE, RegionAccess(offset, index, width, data).pack())

    def read_later(self, index: Region, offset: int, width: int) -> Callable[[], int]:
        if self._due is None:
            return super().read_later(index, offset, width)
        self._check_access(index, offset, width)
        request = self._channel.ask(Command.REGION_READ, RegionAccess(offset, index, width).pack())
        return lambda: int.from_bytes(self._data_of(self._channel.answer(request), width), "little")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        self._due = []
        try:
            with self._channel.collecting():
                yield
                for request in self._due:
                    close_all(self._channel.answer(request).fds)
        finally:
            self._due = None

    def config_space(self) -> bytes:
        return self._read(Region.CONFIG, 0, CONFIG_SIZE)

    # Interrupts

    def irq_count(self, index: Irq) -> int:
        if index >= self._info.irqs:
            return 0
        with self._understanding(Command.GET_IRQ_INFO):
            payload = self._channel.command_without_fds(Command.GET_IRQ_INFO, IrqInfo(index).pack())
            info = IrqInfo.unpack(payload)
        return info.count if info.flags & IrqFlag.EVENTFD else 0

    def set_eventfds(self, index: Irq, start: int, fds: Sequence[int | None]) -> None:
        # A message either takes eventfds away or carries one for each interrupt of its range.
        for given, run in groupby(enumerate(fds, start), lambda entry: entry[1] is not None):
            entries = list(run)
            step = max(self._limits.max_msg_fds, 1) if given else len(entries)
            for at in range(0, len(entries), step):
                part = entries[at : at + step]
                request = SetIrqs(
                    SetIrqsFlag.DATA_EVENTFD | SetIrqsFlag.ACTION_TRIGGER, index, part[0][0], len(part)
                )
                given_fds = tuple(fd for _, fd in part if fd is not None)
                if self._due is None:
                    self._channel.command_without_fds(Command.SET_IRQS, request.pack(), given_fds)
                else:
                    self._due.append(self._channel.ask(Command.SET_IRQS, request.pack(), given_fds))

    def disable_irqs(self, index: Irq) -> None:
        request = SetIrqs(SetIrqsFlag.DATA_NONE | SetIrqsFlag.ACTION_TRIGGER, index)
        self._channel.command_without_fds(Command.SET_IRQS, request.pack())

    # Memory

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        return ((0, (1 << 64) - 1),)  # vfio-user knows no IOMMU that could want less

    def dma_map(self, memory: MemoryRegion) -> None:
        self.dma_map_later(memory)()

    def dma_map_later(self, memory: MemoryRegion) -> Callable[[], None]:
        where = f"{self.name}: memory {memory.guest_address:#x}+{memory.size:#x}"
        if len(self._dma_maps) >= self._limits.max_dma_maps:
            raise DeviceError(
                f"{where}: {len(self._dma_maps) + 1} mappings are needed,"
                f" the device allows {self._limits.max_dma_maps}"
            )
        page = self._page_size()
        if (memory.guest_address | memory.size | memory.fd_offset) % page:
            raise DeviceError(
                f"{where} at file offset {memory.fd_offset:#x}: the device needs multiples of {page} bytes"
            )
        request = DmaMap(DmaFlag.READ | DmaFlag.WRITE, memory.fd_offset, memory.guest_address, memory.size)
        asked = self._channel.ask(Command.DMA_MAP, request.pack(), (memory.fd,))
        place = memory.guest_address, memory.size
        self._dma_maps.add(place)

        def finish() -> None:
            try:
                close_all(self._channel.answer(asked).fds)
            except DeviceError:
                self._dma_maps.discard(place)
                raise

        return finish

    def dma_unmap(self, memory: MemoryRegion) -> None:
        request = DmaUnmap(0, memory.guest_address, memory.size)
        self._channel.command_without_fds(Command.DMA_UNMAP, request.pack())
        self._dma_maps.discard((memory.guest_address, memory.size))

    # The whole function

    def reset(self) -> None:
        if self._info.flags & DeviceFlag.RESET:
            self._channel.command_without_fds(Command.DEVICE_RESET)

    def doorbell(self, index: Region, offset: int, value: int) -> Doorbell:
        for entry, fd in self._offered_io_fds(index):
            matches = not entry.flags & KVM_IOEVENTFD_FLAG_DATAMATCH or entry.datamatch == value
            if entry.type == IoFd.IOEVENTFD and entry.offset == offset and entry.size in (0, 2) and matches:
                return Doorbell(fd=fd)
        info = self._region(index)
        for at, size in self.region(index).mappable:
            if at <= offset and offset + 2 <= at + size:
                return Doorbell(address=self._map(index, info, Area(at, size)) + offset - at)
        raise DeviceError(
            f"{self.name}: no doorbell at {index.name}+{offset:#x}: the device offers neither an eventfd"
            " (GET_REGION_IO_FDS) nor a mappable area there, and kicks do not share the command socket"
        )

    def page(self, index: Region, offset: int) -> HostNotifier | None:
        info = self._region(index)
        fd = self._region_fds.get(index)
        if fd is None or not self.region(index).has_page(offset):
            return None
        return HostNotifier(fd, info.offset + offset, mmap.PAGESIZE)

    @property
    def lost_fd(self) -> int:
        return self._lost.fileno()

    def close(self) -> None:
        self._resources.close()

    # Inside

    @contextlib.contextmanager
    def _understanding(self, command: Command) -> Iterator[None]:
        """A reply whose content is malformed ends the connection."""
        try:
            yield
        except ProtocolError as error:
            raise self._channel.lose(f"malformed answer to {command.name}: {error}") from error

    def _negotiate(self) -> Capabilities:
        try:
            payload = self._channel.command_without_fds(Command.VERSION, Version().pack())
        except DeviceLostError as error:
            raise DeviceError(
                f"{self.name}: hung up before it told its version; does another client hold it?"
            ) from error
        with self._understanding(Command.VERSION):
            version = Version.unpack(payload)
        if version.major != MAJOR or version.minor > MINOR:
            raise DeviceError(
                f"{self.name}: the device speaks vfio-user {version.major}.{version.minor},"
                f" this side {MAJOR}.{MINOR}"
            )
        return version.capabilities

    def _read(self, index: Region, offset: int, size: int) -> bytes:
        request = RegionAccess(offset, index, size)
        return self._data_of(self._channel.command(Command.REGION_READ, request.pack()), size)

    def _data_of(self, reply: Message, size: int) -> bytes:
        """What a REGION_READ has read."""
        close_all(reply.fds)
        with self._understanding(Command.REGION_READ):
            data = RegionAccess.unpack(reply.payload).data
            if len(data) != size:
                raise ProtocolError(f"{len(data)} bytes instead of {size}")
        return data

    def _region(self, index: Region) -> RegionInfo:
        if index not in self._regions:
            self._regions[index] = self._ask_region(index)
        return self._regions[index]

    def _ask_region(self, index: Region) -> RegionInfo:
        """Ask once for the size of the answer, and again if it carries more than the fixed part."""
        if index >= self._info.regions:
            return RegionInfo(index)
        info = RegionInfo(index)
        while True:
            request = RegionInfo(index, argsz=info.argsz)
            with self._understanding(Command.GET_REGION_INFO):
                reply = self._channel.command(Command.GET_REGION_INFO, request.pack())
                self._keep_region_fd(index, reply.fds)
                info = RegionInfo.unpack(reply.payload)
                if info.argsz > request.argsz and request.argsz > RegionInfo.LAYOUT.size:
                    raise ProtocolError(
                        f"{info.argsz} bytes needed, after {request.argsz} had been asked for"
                    )
            if info.argsz <= request.argsz:
                return info

    def _keep_region_fd(self, index: Region, fds: tuple[int, ...]) -> None:
        """A device may send the region's descriptor with either answer, or with both."""
        for fd in fds:
            if index in self._region_fds:
                os.close(fd)
            else:
                self._region_fds[index] = fd
                self._resources.callback(os.close, fd)

    def _check_access(self, index: Region, offset: int, width: int) -> None:
        if width not in WIDTHS or offset % width or not 0 <= offset <= self._region(index).size - width:
            raise DeviceError(f"{self.name}: no {width}-byte register at {index.name}+{offset:#x}")

    def _page_size(self) -> int:
        """Alignment of a mapping: the smallest page that the device knows, at least one of ours."""
        smallest = self._limits.pgsizes & -self._limits.pgsizes
        return max(smallest, mmap.PAGESIZE)

    def _offered_io_fds(self, index: Region) -> list[tuple[IoFd, int]]:
        if index not in self._io_fds:
            self._io_fds[index] = self._ask_io_fds(index)
        return self._io_fds[index]

    def _ask_io_fds(self, index: Region) -> list[tuple[IoFd, int]]:
        offered = RegionIoFds(index)
        while True:
            request = RegionIoFds(index, argsz=offered.argsz)
            try:
                reply = self._channel.command(Command.GET_REGION_IO_FDS, request.pack())
            except RefusedError:
                return []  # an optional command
            for fd in reply.fds:
                self._resources.callback(os.close, fd)
            with self._understanding(Command.GET_REGION_IO_FDS):
                offered = RegionIoFds.unpack(reply.payload)
                if offered.argsz <= request.argsz:
                    return [(entry, reply.fds[entry.fd_index]) for entry in _valid(offered, reply.fds)]
                if request.argsz > RegionIoFds(index).argsz:
                    raise ProtocolError(
                        f"{offered.argsz} bytes needed, after {request.argsz} had been asked for"
                    )

    def _map(self, index: Region, info: RegionInfo, area: Area) -> int:
        """The address of a mapped area."""
        if (index, area) not in self._areas:
            fd = self._region_fds.get(index)
            if fd is None:
                raise DeviceError(
                    f"{self.name}: {index.name} is said to be mappable, but came without descriptor"
                )
            try:
                mapping = mmap.mmap(fd, area.size, offset=info.offset + area.offset)
            except (OSError, ValueError, OverflowError) as error:
                raise DeviceError(
                    f"{self.name}: cannot map {index.name}+{area.offset:#x}, {area.size:#x} bytes: {error}"
                ) from error
            self._resources.callback(mapping.close)
            self._areas[index, area] = int(ffi.cast("uintptr_t", ffi.from_buffer(mapping)))
        return self._areas[index, area]


def _valid(offered: RegionIoFds, fds: tuple[int, ...]) -> list[IoFd]:
    """The entries that have a descriptor.

    :raise ProtocolError: for one whose descriptor did not come along.
    """
    entries = [entry for entry in offered.entries if entry.fd_index != IoFd.NO_FD]
    for entry in entries:
        if entry.fd_index >= len(fds):
            raise ProtocolError(f"entry for descriptor {entry.fd_index} of {len(fds)}")
    return entries
