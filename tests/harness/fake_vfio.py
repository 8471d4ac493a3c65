"""A kernel's VFIO as far as its ioctls go, for refusals that no machine makes on demand.

Device nodes and the function are plain files; ioctls are answered here, in place of `fcntl.ioctl`. What
the real kernel does with a function is tested in tests/nested.
"""

import errno
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from datapath.bus.vfio import VfioFunction
from datapath.vfio import (
    API_VERSION,
    GroupFlag,
    IommuFlag,
    IommuInfo,
    Irq,
    IrqFlag,
    Region,
    RegionFlag,
    Request,
)
from datapath.vfio_user import Area, DeviceInfo, IrqInfo, RegionInfo
from tests.harness.sysfs_tree import add_function, bind, join_group

ADDRESS, NEIGHBOUR = "0000:01:00.0", "0000:01:00.1"
GROUP = 7
#: Where regions begin in the function's file, by index.
STRIDE = 0x10000
RANGES = ((0, 0xFEDFFFFF), (0xFEF00000, 0x7FFFFFFFFF))
VECTORS = 4


def refusal(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def iommu_info(
    ranges: tuple[tuple[int, int], ...] | None = RANGES,
    avail: int | None = 65535,
    page_sizes: int = 0x40201000,
) -> bytes:
    """struct vfio_iommu_type1_info with its capabilities, and one that nobody knows before them."""
    bodies = [(77, b"\xee" * 8)]
    if ranges is not None:
        body = struct.pack("=II", len(ranges), 0) + b"".join(struct.pack("=QQ", *pair) for pair in ranges)
        bodies.append((1, body))
    if avail is not None:
        bodies.append((3, struct.pack("=I", avail)))
    size = IommuInfo.LAYOUT.size
    parts = []
    for at, (number, body) in enumerate(bodies):
        size += 8 + len(body)
        parts.append(struct.pack("=HHI", number, 1, 0 if at + 1 == len(bodies) else size) + body)
    flags = IommuFlag.PGSIZES | IommuFlag.CAPS
    return IommuInfo.LAYOUT.pack(size, flags, page_sizes, IommuInfo.LAYOUT.size) + b"".join(parts)


@dataclass
class FakeVfio:
    """A host with one function, bound to vfio-pci in a group of its own, and the kernel's answers."""

    folder: Path
    #: Request -> errno of its refusal.
    refusals: dict[Request, int] = field(default_factory=dict)
    #: Which call of a request is refused, from 1; each, unless it is here.
    refused_from: dict[Request, int] = field(default_factory=dict)
    #: What requests return in place of 0.
    results: dict[Request, int] = field(
        default_factory=lambda: {Request.GET_API_VERSION: API_VERSION, Request.CHECK_EXTENSION: 1}
    )
    group_flags: int = GroupFlag.VIABLE
    info: bytes = field(default_factory=iommu_info)
    sparse: dict[Region, tuple[Area, ...]] = field(default_factory=dict)
    #: (request, its structure) of each call.
    calls: list[tuple[Request, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sysfs = self.folder / "sys"
        self.nodes = self.folder / "vfio"
        self.nodes.mkdir()
        self.container = self.nodes / "vfio"
        self.group = self.nodes / str(GROUP)
        self.function = self.folder / "function"
        for file in (self.container, self.group):
            file.touch()
        self.function.write_bytes(bytes(STRIDE * (Region.CONFIG + 1)))
        self.add(ADDRESS, "vfio-pci")

    def add(self, address: str, driver: str | None) -> None:
        """Add a function to the group."""
        folder = add_function(self.sysfs, address)
        join_group(self.sysfs, folder, GROUP)
        if driver is not None:
            bind(self.sysfs, folder, driver)

    def open(self) -> VfioFunction:
        return VfioFunction(ADDRESS, sysfs=self.sysfs, nodes=self.nodes)

    def pull_out(self) -> None:
        """Let the function read as ones."""
        self.function.write_bytes(b"\xff" * STRIDE * (Region.CONFIG + 1))

    def made(self, request: Request) -> list[bytes]:
        """The structures of all calls of a request."""
        return [data for made, data in self.calls if made == request]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Answer in the kernel's place."""
        monkeypatch.setattr("fcntl.ioctl", self.ioctl)

    def ioctl(self, fd: int, number: int, argument: bytearray | int = 0) -> int:
        request = Request(number)
        data = argument if isinstance(argument, bytearray) else bytearray()
        self.calls.append((request, bytes(data)))
        if request in self.refusals and len(self.made(request)) >= self.refused_from.get(request, 1):
            raise refusal(self.refusals[request])
        if request in self.results:
            return self.results[request]
        if request == Request.GROUP_GET_DEVICE_FD:
            assert data == ADDRESS.encode() + b"\0"
            return os.open(self.function, os.O_RDWR)
        answer = self._answer(request, bytes(data))
        data[: len(answer)] = answer[: len(data)]
        return 0

    def _answer(self, request: Request, data: bytes) -> bytes:
        if request == Request.GROUP_GET_STATUS:
            return struct.pack("=II", 8, self.group_flags)
        if request == Request.IOMMU_GET_INFO:
            fits = len(data) >= len(self.info)
            return self.info if fits else self.info[: IommuInfo.LAYOUT.size - 8] + bytes(8)
        if request == Request.DEVICE_GET_INFO:
            return DeviceInfo(flags=3, regions=9, irqs=5).pack()
        if request == Request.DEVICE_GET_REGION_INFO:
            room, _, index, *_ = RegionInfo.LAYOUT.unpack_from(data)
            return self._region(Region(index)).pack_reply(room)
        if request == Request.DEVICE_GET_IRQ_INFO:
            return self._irq(IrqInfo.unpack(data).index)
        return b""

    def _region(self, index: Region) -> RegionInfo:
        if index == Region.VGA:
            raise refusal(errno.EINVAL)
        size = 256 if index == Region.CONFIG else 0x4000
        flags = RegionFlag.READ | RegionFlag.WRITE
        if index != Region.CONFIG:
            flags |= RegionFlag.MMAP
        return RegionInfo(index, flags, size, index * STRIDE, self.sparse.get(index))

    @staticmethod
    def _irq(index: int) -> bytes:
        if index == Irq.ERR:
            raise refusal(errno.EINVAL)  # as of a function without PCI Express
        count = VECTORS if index == Irq.MSIX else 1
        return IrqInfo(index, IrqFlag.EVENTFD | IrqFlag.NORESIZE, count).pack()
