"""Kernel VFIO where no machine refuses on demand: what the kernel is asked, and how refusals are told."""

import ctypes
import errno
import mmap
import os
import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from datapath.bus.function import RegionDescription
from datapath.bus.vfio import VfioFunction
from datapath.bus.vfio_container import PIECE, pieces_of
from datapath.vdpa import DeviceError, DeviceLostError, MemoryRegion
from datapath.vfio import IommuInfo, Irq, Region, Request
from datapath.vfio_user import Area
from tests.harness import fake_vfio
from tests.harness.fake_vfio import ADDRESS, NEIGHBOUR, RANGES, FakeVfio, iommu_info

MEMORY = MemoryRegion(0x1_0000_0000, 0x200000, -1, 0, 0x7F00_0000_0000)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVfio:
    fake = FakeVfio(tmp_path)
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def function(kernel: FakeVfio) -> Iterator[VfioFunction]:
    opened = kernel.open()
    yield opened
    opened.close()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# The kernel's structures


def test_iommu_info_with_capabilities() -> None:
    info = IommuInfo.unpack(iommu_info())
    assert info.iova_ranges == RANGES
    assert info.dma_avail == 65535
    assert info.page_sizes == 0x40201000
    assert info.argsz == len(iommu_info())


def test_iommu_info_of_an_old_kernel() -> None:
    info = IommuInfo.unpack(struct.pack("=IIQI4x", 24, 1, 0x1000, 0))
    assert (info.page_sizes, info.iova_ranges, info.dma_avail) == (0x1000, None, None)


def test_iommu_info_without_room_for_capabilities() -> None:
    info = IommuInfo.unpack(struct.pack("=IIQI4x", 116, 3, 0x1000, 0))
    assert (info.argsz, info.iova_ranges) == (116, None)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("VFIO_GET_API_VERSION", Request.GET_API_VERSION),
        ("VFIO_SET_IOMMU", Request.SET_IOMMU),
        ("VFIO_IOMMU_GET_INFO", Request.IOMMU_GET_INFO),
        ("VFIO_IOMMU_MAP_DMA", Request.IOMMU_MAP_DMA),
        ("VFIO_IOMMU_UNMAP_DMA", Request.IOMMU_UNMAP_DMA),
        ("VFIO_GROUP_GET_STATUS", Request.GROUP_GET_STATUS),
        ("VFIO_GROUP_SET_CONTAINER", Request.GROUP_SET_CONTAINER),
        ("VFIO_GROUP_GET_DEVICE_FD", Request.GROUP_GET_DEVICE_FD),
        ("VFIO_DEVICE_SET_IRQS", Request.DEVICE_SET_IRQS),
        ("VFIO_DEVICE_RESET", Request.DEVICE_RESET),
    ],
)
def test_request_numbers_are_the_headers(name: str, number: int) -> None:
    header = Path("/usr/include/linux/vfio.h")
    if not header.exists():
        pytest.skip(f"no {header}")
    words = (line.split(maxsplit=2) for line in header.read_text().splitlines() if "VFIO_BASE +" in line)
    values = {word[1]: word[2] for word in words if word[0] == "#define"}
    base = int(values[name].split("VFIO_BASE +")[1].strip(" )"))
    assert number == ord(";") << 8 | 100 + base


# Opening


def test_opening(kernel: FakeVfio, function: VfioFunction) -> None:
    assert function.name == f"pci={ADDRESS}"
    assert function.iova_ranges() == RANGES
    assert [request for request, _ in kernel.calls][:7] == [
        Request.GET_API_VERSION,
        Request.CHECK_EXTENSION,
        Request.GROUP_GET_STATUS,
        Request.GROUP_SET_CONTAINER,
        Request.SET_IOMMU,
        Request.IOMMU_GET_INFO,
        Request.IOMMU_GET_INFO,
    ]


def test_only_removal_is_listened_to_where_there_are_no_errors(
    kernel: FakeVfio, function: VfioFunction
) -> None:
    (call,) = (data for request, data in kernel.calls if request == Request.DEVICE_SET_IRQS)
    assert struct.unpack("=IIIIIi", call) == (24, 0x24, Irq.REQ, 0, 1, function.lost_fd)


def test_a_kernel_that_tells_no_ranges(kernel: FakeVfio) -> None:
    kernel.info = iommu_info(ranges=None, avail=None)
    function = kernel.open()
    assert function.iova_ranges() == ((0, 0xFFFFFFFFFFFFFFFF),)
    function.close()


@pytest.mark.parametrize(
    ("request_", "number", "told"),
    [
        (Request.GET_API_VERSION, errno.EPERM, "asking .*/vfio what it can: Operation not permitted"),
        (
            Request.GROUP_SET_CONTAINER,
            errno.EBUSY,
            "putting its group into a container: Device or resource busy",
        ),
        (Request.SET_IOMMU, errno.EPERM, "does not remap interrupts; .* allow_unsafe_interrupts=1"),
        (Request.SET_IOMMU, errno.ENODEV, "making an address space: No such device"),
        (Request.IOMMU_GET_INFO, errno.EFAULT, "asking what its IOMMU can: Bad address"),
        (Request.GROUP_GET_DEVICE_FD, errno.ENODEV, "it is bound to vfio-pci, vfio-pci must have it"),
        (Request.GROUP_GET_DEVICE_FD, errno.EACCES, "wants a VF token"),
        (Request.GROUP_GET_DEVICE_FD, errno.EBUSY, "opening the function: Device or resource busy"),
        (Request.DEVICE_GET_INFO, errno.ENOTTY, "DEVICE_GET_INFO: Inappropriate ioctl"),
        (Request.DEVICE_GET_REGION_INFO, errno.EIO, "DEVICE_GET_REGION_INFO: Input/output error"),
        (Request.DEVICE_GET_IRQ_INFO, errno.EIO, "asking for REQ: Input/output error"),
        (Request.DEVICE_SET_IRQS, errno.ENOMEM, "eventfds for REQ 0 to 0: Cannot allocate memory"),
    ],
)
def test_refused_while_opening(kernel: FakeVfio, request_: Request, number: int, told: str) -> None:
    before = descriptors()
    kernel.refusals[request_] = number
    with pytest.raises(DeviceError, match=f"^pci={ADDRESS}: .*{told}"):
        kernel.open()
    assert descriptors() == before


@pytest.mark.parametrize(
    ("results", "told"),
    [
        ({Request.GET_API_VERSION: 1, Request.CHECK_EXTENSION: 1}, "has API version 1, not 0"),
        ({Request.GET_API_VERSION: 0, Request.CHECK_EXTENSION: 0}, "modprobe vfio_iommu_type1"),
    ],
)
def test_another_vfio(kernel: FakeVfio, results: dict[Request, int], told: str) -> None:
    kernel.results = results
    with pytest.raises(DeviceError, match=told):
        kernel.open()


def test_no_vfio(kernel: FakeVfio) -> None:
    kernel.container.unlink()
    with pytest.raises(DeviceError, match=r"no .*/vfio: run modprobe vfio-pci$"):
        kernel.open()


def test_no_iommu(kernel: FakeVfio) -> None:
    (kernel.sysfs / "bus/pci/devices" / ADDRESS / "iommu_group").unlink()
    with pytest.raises(DeviceError, match=r"no IOMMU stands before it; .* intel_iommu=on"):
        kernel.open()


def test_a_group_shared_with_functions_in_use(kernel: FakeVfio) -> None:
    kernel.group_flags = 0
    kernel.add(NEIGHBOUR, "mlx5_core")
    kernel.add("0000:01:00.2", "pcieport")
    kernel.add("0000:01:00.3", None)
    with pytest.raises(
        DeviceError, match=rf"shared with .* uses: {NEIGHBOUR} \(bound to mlx5_core\); the group"
    ):
        kernel.open()


# Registers


def test_one_access_of_the_registers_width(function: VfioFunction, monkeypatch: pytest.MonkeyPatch) -> None:
    accesses: list[tuple[int, int]] = []
    pwrite = os.pwrite

    def recorded(fd: int, data: bytes, at: int) -> int:
        accesses.append((len(data), at))
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", recorded)
    function.write(Region.BAR4, 0x10, 4, 0x12345678)
    function.write(Region.BAR4, 0x12, 2, 0xABCD)
    function.write(Region.BAR4, 0x15, 1, 0xEF)
    base = Region.BAR4 * fake_vfio.STRIDE
    assert accesses == [(4, base + 0x10), (2, base + 0x12), (1, base + 0x15)]
    assert function.read(Region.BAR4, 0x10, 4) == 0xABCD5678
    assert function.read(Region.BAR4, 0x14, 2) == 0xEF00


@pytest.mark.parametrize(
    ("offset", "width"), [(0, 8), (2, 4), (1, 2), (0x3FFE, 4), (0x4000, 1), (-4, 4), (0, 3)]
)
def test_what_is_no_register(function: VfioFunction, offset: int, width: int) -> None:
    with pytest.raises(DeviceError, match=rf"no {width}-byte register at BAR4\+"):
        function.read(Region.BAR4, offset, width)
    with pytest.raises(DeviceError, match=rf"no {width}-byte register at BAR4\+"):
        function.write(Region.BAR4, offset, width, 0)


def test_a_register_of_ones_is_read(function: VfioFunction) -> None:
    function.write(Region.BAR4, 0x10, 4, 0xFFFFFFFF)
    assert function.read(Region.BAR4, 0x10, 4) == 0xFFFFFFFF


def test_a_function_that_was_pulled_out(kernel: FakeVfio, function: VfioFunction) -> None:
    kernel.pull_out()
    with pytest.raises(DeviceLostError, match="reads as ones"):
        function.read(Region.BAR4, 0x14, 1)
    with pytest.raises(DeviceLostError, match="reads as ones"):
        function.config_space()
    with pytest.raises(DeviceLostError, match="reads as ones"):
        function.reset()
    kernel.refusals[Request.DEVICE_SET_IRQS] = errno.EIO
    with pytest.raises(DeviceLostError, match="eventfds for MSIX 0 to 0: the function is gone"):
        function.set_eventfds(Irq.MSIX, 0, [None])


def test_mappable_parts(kernel: FakeVfio, function: VfioFunction) -> None:
    kernel.sparse[Region.BAR1] = (Area(0, 0x1000), Area(0x3000, 0x1000))
    assert function.region(Region.BAR1) == RegionDescription(0x4000, ((0, 0x1000), (0x3000, 0x1000)))
    assert function.region(Region.BAR4) == RegionDescription(0x4000, ((0, 0x4000),))
    assert function.region(Region.CONFIG) == RegionDescription(256)


def test_doorbells_share_a_page(kernel: FakeVfio, function: VfioFunction) -> None:
    kernel.sparse[Region.BAR4] = (Area(0x2000, 0x2000),)
    bells = [function.doorbell(Region.BAR4, 0x3000 + 4 * queue, queue) for queue in (0, 1)]
    assert bells[0].address is not None
    assert bells[1].address == bells[0].address + 4
    ctypes.c_uint16.from_address(bells[0].address + 4).value = 1
    assert function.read(Region.BAR4, 0x3004, 2) == 1


@pytest.mark.parametrize(
    ("index", "offset"), [(Region.BAR4, 0x1000), (Region.CONFIG, 0), (Region.BAR4, 0x3001)]
)
def test_no_doorbell(kernel: FakeVfio, function: VfioFunction, index: Region, offset: int) -> None:
    kernel.sparse[Region.BAR4] = (Area(0x2000, 0x2000),)
    with pytest.raises(DeviceError, match=rf"no doorbell at {index.name}\+{offset:#x}: "):
        function.doorbell(index, offset, 0)


def test_pages_for_others(kernel: FakeVfio, function: VfioFunction) -> None:
    """A whole page, in the function's own file."""
    kernel.sparse[Region.BAR4] = (Area(0x1000, 0x1800), Area(0x3000, 0x1000))
    page = function.page(Region.BAR4, 0x3000)
    assert page is not None
    with mmap.mmap(page.fd, page.size, offset=page.offset) as mapping:
        mapping[4:6] = b"\x01\x00"
    assert function.read(Region.BAR4, 0x3004, 2) == 1
    assert page.size == mmap.PAGESIZE
    assert function.page(Region.BAR4, 0x2000) is None, "half of it can be mapped"
    assert function.page(Region.BAR4, 0) is None
    assert function.page(Region.CONFIG, 0) is None


# Interrupts


def test_eventfds(kernel: FakeVfio, function: VfioFunction) -> None:
    function.set_eventfds(Irq.MSIX, 0, [5, None, 6])
    assert kernel.calls[-1] == (
        Request.DEVICE_SET_IRQS,
        struct.pack("=IIIII3i", 32, 0x24, Irq.MSIX, 0, 3, 5, -1, 6),
    )
    function.disable_irqs(Irq.MSIX)
    assert kernel.calls[-1] == (Request.DEVICE_SET_IRQS, struct.pack("=IIIII", 20, 0x21, Irq.MSIX, 0, 0))
    asked = len(kernel.calls)
    function.disable_irqs(Irq.MSIX)
    assert len(kernel.calls) == asked


def test_kinds_of_interrupts(function: VfioFunction) -> None:
    assert function.irq_count(Irq.MSIX) == fake_vfio.VECTORS
    assert function.irq_count(Irq.ERR) == 0


def test_more_vectors_than_the_function_has(function: VfioFunction) -> None:
    with pytest.raises(DeviceError, match="6 MSIX interrupts are needed, the function has 4"):
        function.set_eventfds(Irq.MSIX, 0, [None] * 6)


def test_fewer_vectors_than_needed(kernel: FakeVfio, function: VfioFunction) -> None:
    kernel.results[Request.DEVICE_SET_IRQS] = 2
    with pytest.raises(DeviceError, match="4 MSIX interrupts are needed, the host has 2 for it"):
        function.set_eventfds(Irq.MSIX, 0, [None] * 4)
    asked = len(kernel.calls)
    function.disable_irqs(Irq.MSIX)  # nothing was enabled
    assert len(kernel.calls) == asked


# Memory


def test_memory_is_mapped_by_address(kernel: FakeVfio, function: VfioFunction) -> None:
    function.dma_map(MEMORY)
    assert kernel.calls[-1] == (
        Request.IOMMU_MAP_DMA,
        struct.pack("=IIQQQ", 32, 3, MEMORY.address, MEMORY.guest_address, MEMORY.size),
    )
    function.dma_unmap(MEMORY)
    assert kernel.calls[-1] == (
        Request.IOMMU_UNMAP_DMA,
        struct.pack("=IIQQ", 24, 0, MEMORY.guest_address, MEMORY.size),
    )
    with pytest.raises(DeviceError, match="is not mapped"):
        function.dma_unmap(MEMORY)


@pytest.mark.parametrize(
    ("number", "memory", "told"),
    [
        (errno.ENOSPC, MEMORY, "1 mappings are needed, the kernel allows 65535"),
        (errno.EFAULT, MEMORY, "the pages at 0x7f0000000000 here cannot be had, or not for writing"),
        (
            errno.EINVAL,
            MemoryRegion(0x800, 0x1000, -1, 0, 0x1000),
            "at address 0x1000 here: .* multiples of 4096",
        ),
        (
            errno.EINVAL,
            MemoryRegion(0xFEDFF000, 0x2000, -1, 0, 0),
            "maps only 0x0-0xfedfffff, 0xfef00000-0x7f",
        ),
        (errno.EINVAL, MEMORY, "Invalid argument"),
        (errno.EIO, MEMORY, "Input/output error"),
    ],
)
def test_refused_mappings(
    kernel: FakeVfio, function: VfioFunction, number: int, memory: MemoryRegion, told: str
) -> None:
    kernel.refusals[Request.IOMMU_MAP_DMA] = number
    where = rf"memory {memory.guest_address:#x}\+{memory.size:#x}"
    with pytest.raises(DeviceError, match=f"^pci={ADDRESS}: {where}:? .*{told}"):
        function.dma_map(memory)
    with pytest.raises(DeviceError, match="is not mapped"):
        function.dma_unmap(memory)


def test_memory_that_overlaps(kernel: FakeVfio, function: VfioFunction) -> None:
    function.dma_map(MEMORY)
    kernel.refusals[Request.IOMMU_MAP_DMA] = errno.EEXIST
    with pytest.raises(DeviceError, match=r"overlaps what is mapped: 0x100000000\+0x200000$"):
        function.dma_map(MemoryRegion(MEMORY.guest_address + 0x1000, 0x1000, -1, 0, 0))


def test_no_memory_with_and_without_a_limit(
    kernel: FakeVfio, function: VfioFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.refusals[Request.IOMMU_MAP_DMA] = errno.ENOMEM
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with pytest.raises(DeviceError, match="the host has no memory for it"):
        function.dma_map(MEMORY)


def test_memory_of_which_only_a_part_is_unmapped(
    kernel: FakeVfio, function: VfioFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    function.dma_map(MEMORY)
    monkeypatch.setattr(kernel, "_answer", lambda request, data: struct.pack("=IIQQ", 24, 0, 0, 0x1000))
    with pytest.raises(DeviceError, match="the kernel unmapped 0x1000 bytes of it"):
        function.dma_unmap(MEMORY)


# Memory in pieces: three, the first shorter than the others

PIECES = [(0x1_3FF0_0000, 0x10_0000), (0x1_4000_0000, PIECE), (0x1_5000_0000, PIECE)]


@pytest.fixture
def large() -> Iterator[MemoryRegion]:
    fd = os.memfd_create("guest")
    yield MemoryRegion(PIECES[0][0], 0x10_0000 + 2 * PIECE, fd, 0x3000, 0x7F00_0000_0000)
    os.close(fd)


def mapped(kernel: FakeVfio) -> list[tuple[int, int, int]]:
    """(address here, guest address, size) of each call."""
    return [struct.unpack("=8xQQQ", data) for data in kernel.made(Request.IOMMU_MAP_DMA)]


def unmapped(kernel: FakeVfio) -> list[tuple[int, int]]:
    return [struct.unpack("=8xQQ", data) for data in kernel.made(Request.IOMMU_UNMAP_DMA)]


def test_large_memory_is_mapped_and_unmapped_in_pieces(
    kernel: FakeVfio, function: VfioFunction, large: MemoryRegion
) -> None:
    seen: list[int] = []
    function.call_meanwhile(lambda: seen.append(len(kernel.calls)))
    before = len(kernel.calls)
    function.dma_map(large)
    shift = large.address - large.guest_address
    assert mapped(kernel) == [(at + shift, at, size) for at, size in PIECES]
    function.dma_unmap(large)
    assert sorted(unmapped(kernel)) == PIECES
    assert seen == [before + call for call in range(1, 7)]  # after each


def test_a_file_of_larger_huge_pages_is_not_cut_within_them() -> None:
    status = SimpleNamespace(st_blksize=1 << 30)
    memory = MemoryRegion(0xC000_0000, 0xA000_0000, 5, 0, 0x7F00_0000_0000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fstat", lambda fd: status)
        cut = [(piece.guest_address, piece.size, piece.fd_offset) for piece in pieces_of(memory)]
    assert cut == [
        (0xC000_0000, 1 << 30, 0),
        (0x1_0000_0000, 1 << 30, 1 << 30),
        (0x1_4000_0000, 1 << 29, 2 << 30),
    ]


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, "4 mappings are needed"), (errno.EIO, "error")])
def test_a_piece_that_is_refused_undoes_the_others(
    kernel: FakeVfio, function: VfioFunction, large: MemoryRegion, number: int, told: str
) -> None:
    function.dma_map(MemoryRegion(0, 0x1000, -1, 0, 0))
    kernel.refusals[Request.IOMMU_MAP_DMA] = number
    kernel.refused_from[Request.IOMMU_MAP_DMA] = 4
    with pytest.raises(DeviceError, match=rf"memory 0x13ff00000\+0x20100000: .*{told}"):
        function.dma_map(large)
    assert sorted(unmapped(kernel)) == PIECES[:2]
    with pytest.raises(DeviceError, match="is not mapped"):
        function.dma_unmap(large)


def test_locked_memory_is_told_without_what_was_undone(
    kernel: FakeVfio, function: VfioFunction, large: MemoryRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    undone: list[int] = []
    kernel.refusals[Request.IOMMU_MAP_DMA] = errno.ENOMEM
    kernel.refused_from[Request.IOMMU_MAP_DMA] = 3

    def limit(_which: int) -> tuple[int, int]:
        undone.append(len(unmapped(kernel)))
        return resource.RLIM_INFINITY, resource.RLIM_INFINITY

    monkeypatch.setattr(resource, "getrlimit", limit)
    with pytest.raises(DeviceError, match="the host has no memory for it"):
        function.dma_map(large)
    assert undone == [2]


def test_an_unmap_that_failed_half_way_goes_on_where_it_was(
    kernel: FakeVfio, function: VfioFunction, large: MemoryRegion
) -> None:
    function.dma_map(large)
    kernel.refusals[Request.IOMMU_UNMAP_DMA] = errno.EINVAL
    kernel.refused_from[Request.IOMMU_UNMAP_DMA] = 2
    with pytest.raises(DeviceError, match=r"memory 0x140000000\+0x10000000: cannot be unmapped: Invalid"):
        function.dma_unmap(large)
    kernel.refusals.clear()
    function.dma_unmap(large)
    assert unmapped(kernel) == [PIECES[2], PIECES[1], PIECES[1], PIECES[0]]


# The whole function


def test_a_reset_waits_for_who_has_the_function(kernel: FakeVfio, function: VfioFunction) -> None:
    answers = iter([errno.EAGAIN, errno.EAGAIN, None])

    def ioctl(fd: int, number: int, argument: bytearray | int = 0) -> int:
        refused = next(answers)
        if refused is not None:
            raise fake_vfio.refusal(refused)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcntl.ioctl", ioctl)
        function.reset()
    assert next(answers, "none left") == "none left"


def test_a_reset_does_not_wait_for_ever(
    kernel: FakeVfio, function: VfioFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datapath.bus.vfio.RESET_DEADLINE", 0.05)
    kernel.refusals[Request.DEVICE_RESET] = errno.EAGAIN
    with pytest.raises(DeviceError, match="reset: Resource temporarily unavailable"):
        function.reset()


def test_closing_twice_and_calls_after(kernel: FakeVfio) -> None:
    before = descriptors()
    function = kernel.open()
    function.doorbell(Region.BAR4, 0x3000, 0)
    function.close()
    function.close()
    assert descriptors() == before
    with pytest.raises(DeviceLostError, match="has been closed"):
        function.read(Region.BAR4, 0, 4)
