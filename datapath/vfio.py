"""Numbers and structures of linux/vfio.h: what kernel VFIO and vfio-user share, and what only the kernel has.

The structures that vfio-user took over (regions, interrupts, DMA) are in `datapath.vfio_user`, where they
are a command's payload. No I/O.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Self


class DeviceFlag(IntFlag):
    """VFIO_DEVICE_FLAGS_*."""

    RESET = 1
    PCI = 2


class Region(IntEnum):
    """VFIO_PCI_*_REGION_INDEX."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


class RegionFlag(IntFlag):
    """VFIO_REGION_INFO_FLAG_*."""

    READ = 1
    WRITE = 2
    MMAP = 4
    CAPS = 8


class Irq(IntEnum):
    """VFIO_PCI_*_IRQ_INDEX."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class IrqFlag(IntFlag):
    """VFIO_IRQ_INFO_*."""

    EVENTFD = 1
    MASKABLE = 2
    AUTOMASKED = 4
    NORESIZE = 8


class SetIrqsFlag(IntFlag):
    """VFIO_IRQ_SET_*: one of DATA_* with one of ACTION_*."""

    DATA_NONE = 0x01
    DATA_BOOL = 0x02
    DATA_EVENTFD = 0x04
    ACTION_MASK = 0x08
    ACTION_UNMASK = 0x10
    ACTION_TRIGGER = 0x20


class DmaFlag(IntFlag):
    """Access that DMA_MAP grants to the device (VFIO_DMA_MAP_FLAG_*)."""

    READ = 1
    WRITE = 2


class Request(IntEnum):
    """ioctl requests: _IO(VFIO_TYPE, VFIO_BASE + n). Some of a container have a device's numbers."""

    # of a container
    GET_API_VERSION = 0x3B64
    CHECK_EXTENSION = 0x3B65
    SET_IOMMU = 0x3B66
    IOMMU_GET_INFO = 0x3B70
    IOMMU_MAP_DMA = 0x3B71
    IOMMU_UNMAP_DMA = 0x3B72
    # of a group
    GROUP_GET_STATUS = 0x3B67
    GROUP_SET_CONTAINER = 0x3B68
    GROUP_GET_DEVICE_FD = 0x3B6A
    # of a device
    DEVICE_GET_INFO = 0x3B6B
    DEVICE_GET_REGION_INFO = 0x3B6C
    DEVICE_GET_IRQ_INFO = 0x3B6D
    DEVICE_SET_IRQS = 0x3B6E
    DEVICE_RESET = 0x3B6F


#: What GET_API_VERSION returns (VFIO_API_VERSION).
API_VERSION = 0
#: The IOMMU type that unmaps what was mapped and no part of it (VFIO_TYPE1v2_IOMMU).
TYPE1V2_IOMMU = 3

#: struct vfio_group_status: argsz, flags.
GROUP_STATUS = struct.Struct("=II")


class GroupFlag(IntFlag):
    """VFIO_GROUP_FLAGS_*."""

    VIABLE = 1
    CONTAINER_SET = 2


class IommuFlag(IntFlag):
    """VFIO_IOMMU_INFO_*."""

    PGSIZES = 1
    CAPS = 2


@dataclass(frozen=True)
class IommuInfo:
    """struct vfio_iommu_type1_info with the capabilities that follow it; the defaults are a request."""

    flags: int = 0
    #: Page sizes that can be mapped, a bit each.
    page_sizes: int = 0
    #: (first, last) of IOVAs that can be mapped; None where the kernel does not say.
    iova_ranges: tuple[tuple[int, int], ...] | None = None
    #: How many more mappings there can be; None where the kernel does not say.
    dma_avail: int | None = None
    #: Bytes of answer that there is room for; in an answer, those that the whole of it needs.
    argsz: int = 24

    #: argsz, flags, iova_pgsizes, cap_offset, and padding to a multiple of 8.
    LAYOUT = struct.Struct("=IIQI4x")
    #: struct vfio_info_cap_header: id, version, next.
    CAPABILITY = struct.Struct("=HHI")
    #: VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE: a number of ranges and so many; _DMA_AVAIL: one number.
    CAP_IOVA_RANGE, CAP_DMA_AVAIL = 1, 3
    COUNT = struct.Struct("=I4x")
    RANGE = struct.Struct("=QQ")
    NUMBER = struct.Struct("=I")

    def pack(self) -> bytes:
        """The request, with room for `argsz` bytes."""
        return self.LAYOUT.pack(self.argsz, 0, 0, 0).ljust(self.argsz, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        argsz, flags, page_sizes, at = cls.LAYOUT.unpack_from(data)
        ranges, avail = None, None
        while flags & IommuFlag.CAPS and 0 < at < len(data):
            number, _, following = cls.CAPABILITY.unpack_from(data, at)
            body = at + cls.CAPABILITY.size
            if number == cls.CAP_IOVA_RANGE:
                (count,) = cls.COUNT.unpack_from(data, body)
                first = body + cls.COUNT.size
                ranges = tuple(cls.RANGE.iter_unpack(data[first : first + count * cls.RANGE.size]))
            elif number == cls.CAP_DMA_AVAIL:
                (avail,) = cls.NUMBER.unpack_from(data, body)
            at = following
        return cls(flags, page_sizes if flags & IommuFlag.PGSIZES else 0, ranges, avail, argsz)
