"""The dirty bitmap that a ConnectX' queues mark what they write in.

They mark buffers; used rings are marked here when they have stopped (see `log_bitmap`).
"""

from datapath.drivers.log_bitmap import LogBitmap
from datapath.drivers.mlx5.memory import Domain, HostMemory
from datapath.drivers.mlx5.virtqueue import VirtioNetQueue
from datapath.vdpa import DirtyBitmap


class DirtyLog(LogBitmap):
    """One bitmap, reached by the device until `close`."""

    def __init__(self, domain: Domain, bitmap: DirtyBitmap) -> None:
        """
        :raise DeviceError: when the device does not take it.
        """
        super().__init__(domain.glue.name, bitmap)
        self._memory = HostMemory(domain, bitmap.address, bitmap.size)
        self.bitmap = bitmap

    def is_in(self, bitmap: DirtyBitmap) -> bool:
        # The device has it by its address here.
        return bitmap.address == self.bitmap.address and super().is_in(bitmap)

    def switch_on(self, queue: VirtioNetQueue) -> None:
        """Have a queue mark here.

        :raise CommandError: when the firmware refuses.
        """
        queue.log(self._memory.key, self.bitmap.address, self.bitmap.size)

    def close(self) -> None:
        """Take the bitmap back.

        :raise DeviceError: when a queue still marks in it.
        """
        self._memory.close()
        super().close()
