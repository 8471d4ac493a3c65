"""A PCI function through kernel VFIO: registers, interrupts, memory, reset, and the signs that it is going.

Owns the function's descriptor and mappings of its BARs; its address space is `vfio_container`.

Registers are accessed by pread and pwrite on the descriptor: the kernel makes exactly one access of the
width asked for, where Python's ways to store into a mapping make two, or make it by bytes. Only doorbells are
mapped, for C to store to.

The kernel tells of a removal by an eventfd and waits until the function is closed. A function that has
been pulled out reads as ones everywhere, which is how it is known.

Source: linux/vfio.h; drivers/vfio/pci in the kernel for what its calls do.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from datapath.bus.function import WIDTHS, PciFunction, RegionDescription
from datapath.bus.sysfs import SYSFS
from datapath.bus.vfio_container import NODES, Container
from datapath.descriptors import closed_early
from datapath.native._native import ffi
from datapath.native.relay import Doorbell
from datapath.pci import CONFIG_SIZE, REVISION_AND_CLASS
from datapath.vdpa import DeviceError, DeviceLostError, HostNotifier, MemoryRegion
from datapath.vfio import DeviceFlag, Irq, IrqFlag, Region, Request, SetIrqsFlag
from datapath.vfio_user import DeviceInfo, IrqInfo, RegionInfo, SetIrqs

#: Seconds for a reset to find nobody else busy with the function, and between two attempts.
RESET_DEADLINE = 2.0
RESET_INTERVAL = 0.01


class VfioFunction(PciFunction):
    """A function of this host that is bound to vfio-pci."""

    def __init__(self, address: str, *, sysfs: Path = SYSFS, nodes: Path = NODES) -> None:
        """Take the function, with an address space of its own.

        :param address: in its full form, such as 0000:01:00.0.
        :raise DeviceError: when it cannot be had; the text says what to do.
        """
        self.name = f"pci={address}"
        self._resources = contextlib.ExitStack()
        self._device = -1
        #: Where configuration space begins in the descriptor; None while that is not known.
        self._config: int | None = None
        self._regions: dict[Region, RegionInfo] = {}
        #: Mapped pages: (region, offset of the page) -> address here.
        self._pages: dict[tuple[Region, int], int] = {}
        #: Kinds of interrupt that are set up.
        self._enabled: set[Irq] = set()
        try:
            self._container = Container(address, sysfs=sysfs, nodes=nodes)
            self._resources.callback(self._container.close)
            self._device = closed_early(self._container.open_function())
            self._resources.callback(os.close, self._device)
            self._info = DeviceInfo.unpack(self._ask(Request.DEVICE_GET_INFO, DeviceInfo().pack()))
            if not self._info.flags & DeviceFlag.PCI:
                raise DeviceError(f"{self.name}: is not a PCI function")
            self._config = self._region(Region.CONFIG).offset
            self._lost = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._resources.callback(os.close, self._lost)
            for index in (Irq.REQ, Irq.ERR):
                if self.irq_count(index):
                    self.set_eventfds(index, 0, [self._lost])
        except BaseException:
            self.close()
            raise

    # Regions

    def region(self, index: Region) -> RegionDescription:
        return RegionDescription.of(self._region(index))

    def read(self, index: Region, offset: int, width: int) -> int:
        self._check_access(index, offset, width)
        data = self._read(index, offset, width)
        if data == b"\xff" * width:
            self._check_present()
        return int.from_bytes(data, "little")

    def write(self, index: Region, offset: int, width: int, value: int) -> None:
        self._check_access(index, offset, width)
        place = f"{index.name}+{offset:#x}"
        try:
            written = os.pwrite(
                self._device, value.to_bytes(width, "little"), self._region(index).offset + offset
            )
        except OSError as error:
            raise self._failed(f"writing {place}", error) from error
        if written != width:
            raise DeviceError(f"{self.name}: {written} of {width} bytes written to {place}")

    def config_space(self) -> bytes:
        config = self._read(Region.CONFIG, 0, CONFIG_SIZE)
        self._check_present()
        return config

    # Interrupts

    def irq_count(self, index: Irq) -> int:
        if index >= self._info.irqs:
            return 0
        answer = bytearray(IrqInfo(index).pack())
        try:
            fcntl.ioctl(self._device, Request.DEVICE_GET_IRQ_INFO, answer)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return 0  # a kind that this function cannot have, such as ERR without PCI Express
            raise self._failed(f"asking for {index.name}", error) from error
        info = IrqInfo.unpack(bytes(answer))
        return info.count if info.flags & IrqFlag.EVENTFD else 0

    def set_eventfds(self, index: Irq, start: int, fds: Sequence[int | None]) -> None:
        data = struct.pack(f"={len(fds)}i", *(-1 if fd is None else fd for fd in fds))
        flags = SetIrqsFlag.DATA_EVENTFD | SetIrqsFlag.ACTION_TRIGGER
        request = SetIrqs(flags, index, start, len(fds), data)
        needed = start + len(fds)
        if needed > (count := self.irq_count(index)):
            raise DeviceError(
                f"{self.name}: {needed} {index.name} interrupts are needed, the function has {count}"
            )
        try:
            allowed = fcntl.ioctl(self._device, Request.DEVICE_SET_IRQS, bytearray(request.pack()))
        except OSError as error:
            raise self._failed(f"eventfds for {index.name} {start} to {needed - 1}", error) from error
        if allowed > 0:
            raise DeviceError(
                f"{self.name}: {needed} {index.name} interrupts are needed, the host has {allowed} for it"
            )
        self._enabled.add(index)

    def disable_irqs(self, index: Irq) -> None:
        if index not in self._enabled:
            return  # the kernel refuses to disable what is not enabled
        request = SetIrqs(SetIrqsFlag.DATA_NONE | SetIrqsFlag.ACTION_TRIGGER, index)
        try:
            fcntl.ioctl(self._device, Request.DEVICE_SET_IRQS, bytearray(request.pack()))
        except OSError as error:
            raise self._failed(f"disabling {index.name}", error) from error
        self._enabled.remove(index)

    # Memory

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        return self._container.iova_ranges()

    def dma_map(self, memory: MemoryRegion) -> None:
        self._container.map(memory)

    def dma_unmap(self, memory: MemoryRegion) -> None:
        self._container.unmap(memory)

    def call_meanwhile(self, callback: Callable[[], None]) -> None:
        self._container.call_meanwhile(callback)

    # The whole function

    def reset(self) -> None:
        if not self._info.flags & DeviceFlag.RESET:
            return
        self._check_present()  # the kernel would wait a minute for an answer to come back
        deadline = time.monotonic() + RESET_DEADLINE
        while True:
            try:
                fcntl.ioctl(self._device, Request.DEVICE_RESET)
            except OSError as error:
                # The kernel does not wait for whoever has the function locked: a removal, for example.
                if error.errno != errno.EAGAIN or time.monotonic() >= deadline:
                    raise self._failed("reset", error) from error
                time.sleep(RESET_INTERVAL)
            else:
                return

    def doorbell(self, index: Region, offset: int, value: int) -> Doorbell:
        page = offset // mmap.PAGESIZE * mmap.PAGESIZE
        if offset % 2 or not self.region(index).has_page(page):
            raise DeviceError(
                f"{self.name}: no doorbell at {index.name}+{offset:#x}: the kernel does not let it be mapped"
            )
        return Doorbell(address=self._map(index, page) + offset - page)

    def page(self, index: Region, offset: int) -> HostNotifier | None:
        if not self.region(index).has_page(offset):
            return None
        return HostNotifier(self._device, self._region(index).offset + offset, mmap.PAGESIZE)

    @property
    def lost_fd(self) -> int:
        return self._lost

    def close(self) -> None:
        self._resources.close()
        # Nobody may meet a descriptor that has got this number since.
        self._device = -1

    # Inside

    def _ask(self, request: Request, data: bytes) -> bytes:
        """The answer to a question about the function."""
        answer = bytearray(data)
        try:
            fcntl.ioctl(self._device, request, answer)
        except OSError as error:
            raise self._failed(request.name, error) from error
        return bytes(answer)

    def _failed(self, what: str, error: OSError) -> DeviceError:
        """The error to raise; when the function is gone, that."""
        if self._device < 0:
            return DeviceLostError(f"{self.name}: {what}: the function has been closed")
        if not self._is_present():
            return DeviceLostError(f"{self.name}: {what}: the function is gone")
        return DeviceError(f"{self.name}: {what}: {error.strerror}")

    def _check_present(self) -> None:
        if not self._is_present():
            raise DeviceLostError(f"{self.name}: reads as ones: the function is gone")

    def _is_present(self) -> bool:
        """Whether configuration space answers: no function's revision and class code are all ones.

        Not by the vendor id, which the kernel makes up for VFs.
        """
        if self._config is None:
            return True  # too early to know
        try:
            return os.pread(self._device, 4, self._config + REVISION_AND_CLASS) != b"\xff" * 4
        except OSError:
            return False

    def _read(self, index: Region, offset: int, size: int) -> bytes:
        place = f"{index.name}+{offset:#x}"
        try:
            data = os.pread(self._device, size, self._region(index).offset + offset)
        except OSError as error:
            raise self._failed(f"reading {place}", error) from error
        if len(data) != size:
            raise DeviceError(f"{self.name}: {len(data)} of {size} bytes read from {place}")
        return data

    def _region(self, index: Region) -> RegionInfo:
        if index not in self._regions:
            self._regions[index] = self._ask_region(index)
        return self._regions[index]

    def _ask_region(self, index: Region) -> RegionInfo:
        """Ask once for the size of the answer, and again if it carries more than the fixed part."""
        info = RegionInfo(index)
        while True:
            room = info.argsz
            request = RegionInfo(index, argsz=room).pack().ljust(room, b"\0")
            info = RegionInfo.unpack(self._ask(Request.DEVICE_GET_REGION_INFO, request))
            if info.argsz <= room:
                return info

    def _check_access(self, index: Region, offset: int, width: int) -> None:
        if width not in WIDTHS or offset % width or not 0 <= offset <= self._region(index).size - width:
            raise DeviceError(f"{self.name}: no {width}-byte register at {index.name}+{offset:#x}")

    def _map(self, index: Region, page: int) -> int:
        """The address of a mapped page."""
        if (index, page) not in self._pages:
            try:
                mapping = mmap.mmap(self._device, mmap.PAGESIZE, offset=self._region(index).offset + page)
            except (OSError, ValueError, OverflowError) as error:
                raise DeviceError(f"{self.name}: cannot map {index.name}+{page:#x}: {error}") from error
            self._resources.callback(mapping.close)
            self._pages[index, page] = int(ffi.cast("uintptr_t", ffi.from_buffer(mapping)))
        return self._pages[index, page]
