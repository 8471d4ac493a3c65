"""Who marks what a function writes, the function itself or the relay, and in which bitmap.

    hardware: rings run directly; the function marks buffers by DMA, and we its used rings when they stop
    software: rings are shadowed; the relay marks both

Owns that choice, the bitmap in use and the numbers. That rings stop and start for another way is the device's
business (`virtio_net`). What could fail when a migration begins is tried when the function is opened.
"""

import abc
import contextlib
import mmap
import os
from collections.abc import Iterable

from datapath.bus.function import PciFunction
from datapath.drivers.dma_addresses import DmaAddresses, overlap
from datapath.drivers.hardware_log import HardwareLog
from datapath.drivers.ring_paths import RingPaths
from datapath.native._native import ffi
from datapath.vdpa import DeviceError, DeviceLostError, DirtyBitmap, LogMode, MemoryRegion, Ring


class LogRefusedError(DeviceError):
    """A function answers, but does not do with its log what it was told."""


class LogRegisters(abc.ABC):
    """How a function is told to keep a dirty log. It forgets it at every virtio reset."""

    @abc.abstractmethod
    def check(self, base: int, end: int) -> None:
        """See that the registers do what they should, with nothing running; the log is off afterwards.

        :raise DeviceError: when they do not.
        """

    @abc.abstractmethod
    def switch_on(self, base: int, end: int) -> None:
        """Log in the bitmap at these DMA addresses, `end` being the first that is not its.

        On return the function has heard of it.

        :raise LogRefusedError: when it does not.
        """

    @abc.abstractmethod
    def switch_off(self, *, wait: bool = True) -> None:
        """Log no more; on return the function has heard of it.

        :param wait: False for a function that is reset next: it hears of this before that.
        :raise LogRefusedError: when it goes on.
        """


class DirtyLogging:
    """The dirty log of one function."""

    def __init__(
        self,
        function: PciFunction,
        addresses: DmaAddresses,
        paths: RingPaths,
        registers: LogRegisters | None,
        wanted: LogMode,
    ) -> None:
        """Find out what is possible; nothing is logged yet.

        :param registers: None for a function that has no log.
        :raise DeviceError: when it is not what is wanted.
        """
        self._function = function
        self._addresses = addresses
        self._paths = paths
        self._registers = registers
        self._wanted = wanted
        self._bitmap: DirtyBitmap | None = None
        self._log: HardwareLog | None = None
        self._next: HardwareLog | None = None
        self._marked = self._missed = 0
        problem = self._find_problem()
        if problem is not None and wanted is LogMode.HARDWARE:
            raise DeviceError(f"{function.name}: {problem}; use log mode 'software' or 'auto'")
        #: Who can mark.
        self.modes: tuple[LogMode, ...] = (LogMode.SOFTWARE,)
        if problem is None:
            self.modes = (LogMode.HARDWARE, LogMode.SOFTWARE)

    @property
    def mode(self) -> LogMode | None:
        """Who marks; None: nobody."""
        if self._bitmap is None:
            return None
        return LogMode.SOFTWARE if self._log is None else LogMode.HARDWARE

    @property
    def missed(self) -> int:
        """Pages that bitmaps of the function's own log had no room for, and such bitmaps that vanished."""
        return self._missed + (0 if self._log is None else self._log.missed)

    # Bitmaps

    def is_in(self, bitmap: DirtyBitmap) -> bool:
        """Whether the function logs in these bytes of this file already."""
        if self._log is None or not self._log.is_in(bitmap):
            return False
        self._bitmap = bitmap
        return True

    def prepare(self, bitmap: DirtyBitmap) -> bool:
        """See whether the function itself will log there, for `use`; the log until now goes on.

        :raise DeviceError: when it should and cannot, and nobody else may.
        """
        if self._wanted is LogMode.SOFTWARE or LogMode.HARDWARE not in self.modes:
            return False
        try:
            self._next = HardwareLog(self._function, self._addresses, bitmap)
        except DeviceError as error:
            if self._wanted is LogMode.HARDWARE or isinstance(error, DeviceLostError):
                raise
        return self._next is not None

    def use(self, bitmap: DirtyBitmap, running: bool) -> None:
        """Log there from now on: the function if that is prepared, otherwise the relay.

        :param running: whether the function has registers that count: it has been reset otherwise.
        """
        self._end(running)
        self._bitmap = bitmap
        self._log, self._next = self._next, None
        self._paths.log(bitmap if self._log is None else None)
        if running:
            self.function_starts()  # should it refuse, the mode tells

    def forget(self, running: bool) -> None:
        """Log no more; on return neither function nor relay touches a bitmap."""
        self._bitmap = None
        self._paths.log(None)
        with contextlib.ExitStack() as stack:
            if self._next is not None:
                stack.callback(self._next.close)
                self._next = None
            self._end(running)

    def make_way(self, region: MemoryRegion, running: bool) -> None:
        """Guest memory comes where the bitmap may be.

        :raise DeviceError: when it is there, and rings run.
        """
        if self._log is None or self._bitmap is None or not overlap(region, self._log.memory):
            return
        if running:
            raise DeviceError(
                f"{self._function.name}: guest memory {region.guest_address:#x}+{region.size:#x} is where"
                f" the dirty log is, {self._log.memory.guest_address:#x}"
            )
        self.prepare(self._bitmap)
        self.use(self._bitmap, running)

    # Of the function and its rings

    def function_starts(self) -> bool:
        """The function has been reset and agreed on features, its rings come next.

        :return: False when it refuses to log and the relay takes over.
        :raise DeviceError: when it should and does not, and nobody else may.
        """
        if self._log is None or self._registers is None:
            return True
        try:
            self._registers.switch_on(*self._log.span)
        except LogRefusedError:
            if self._wanted is LogMode.HARDWARE:
                raise
            self._paths.log(self._bitmap)
            self._end(running=True)
            return False
        return True

    def rings_stopped(self, rings: Iterable[Ring]) -> None:
        """Rings have stopped: mark what a function that logs has left out."""
        if self._log is not None:
            for ring in rings:
                self._log.mark_used(ring)

    def function_stops(self) -> None:
        """No ring runs any more, and the function is about to be reset."""
        if self._log is not None and self._registers is not None:
            self._registers.switch_off(wait=False)

    def function_lost(self) -> None:
        """The function has been closed, and all that it had mapped with it."""
        self._keep_counts()
        self._bitmap = self._log = self._next = None
        self._paths.log(None)

    def statistics(self) -> dict[str, int]:
        """`logged_pages` and `log_missed` by the function's log; the relay counts its own."""
        marked = self._marked
        if self._log is not None:
            self._log.look()
            marked += self._log.marked
        return {"logged_pages": marked, "log_missed": self.missed}

    # Inside

    def _end(self, running: bool) -> None:
        """The function logs no more, if it does; should it not hear of that, the bitmap is taken from it."""
        self._keep_counts()
        log, self._log = self._log, None
        if log is None or self._registers is None:
            return
        try:
            if running:
                self._registers.switch_off()
        finally:
            log.close()

    def _keep_counts(self) -> None:
        """Count on from what the log in use has counted."""
        if self._log is not None:
            self._marked += self._log.marked
            self._missed += self._log.missed

    def _find_problem(self) -> str | None:
        """Why the function cannot log, by trying it with a page."""
        if self._registers is None:
            return "has no dirty log of its own"
        fd = os.memfd_create("dirty-log-trial", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            with mmap.mmap(fd, mmap.PAGESIZE) as view, ffi.from_buffer(view) as pin:
                page = DirtyBitmap(fd, 0, int(ffi.cast("uintptr_t", pin)), mmap.PAGESIZE)
                with contextlib.closing(HardwareLog(self._function, self._addresses, page)) as log:
                    self._registers.check(*log.span)
        except DeviceLostError:
            raise
        except DeviceError as error:
            return f"its dirty log cannot be used: {error}"
        finally:
            os.close(fd)
        return None
