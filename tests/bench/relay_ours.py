"""Our half of `./bench relay`: the shadow ring's used half, as the relay's thread calls it.

The guest is a ring in shared memory, as the peer's. Owns the two sides of the ring and the module that
drives it.
"""

import mmap
from pathlib import Path

from tests.bench.compiled import compiled
from tests.bench.used_entries import LOG_SIZE, QUEUE, fill
from tests.harness.front_end import MEMORY_SIZE, RING_STRIDE
from tests.harness.processes import HarnessError
from tests.harness.virtqueue import MemfdMemory, Virtqueue

#: What the shadow ring consists of.
UNITS = ("shadow", "written", "log", "dma", "guard")


class OurRelay:
    """A shadow ring whose used entries are carried over."""

    name = "our shadow ring"

    def __init__(self, folder: Path) -> None:
        """:raise HarnessError: when it cannot be compiled or set up."""
        module = compiled("relay_ours", folder, native=UNITS)
        self._ffi, self._lib = module.ffi, module.lib
        self._memory = MemfdMemory(MEMORY_SIZE)
        self._view = mmap.mmap(self._memory.fd, MEMORY_SIZE)
        self._log = mmap.mmap(-1, LOG_SIZE)
        self._logging = False
        self.queue = Virtqueue(self._memory, RING_STRIDE * QUEUE)
        fill(self._memory, self.queue)
        guest = {
            "memory": self._ffi.from_buffer(self._view),
            "memory_size": MEMORY_SIZE,
            "descriptors": self.queue.descriptors,
            "avail": self.queue.avail,
            "used": self.queue.used,
            "size": self.queue.size,
        }
        self._ring = self._lib.ours_begin(self._ffi.new("struct ours_guest *", guest))
        if not self._ring:
            raise HarnessError("our half of the measurement has no ring")

    def log(self, on: bool) -> None:
        """Let the relay log what was written, or not."""
        self._logging = on

    def measure(self, length: int, batch: int, count: int) -> list[float]:
        """Relay `count` rings full of used entries; nanoseconds per entry of each.

        :raise HarnessError: when the relay finds fault.
        """
        times = self._ffi.new("double[]", count)
        log = self._ffi.from_buffer("uint8_t[]", self._log) if self._logging else self._ffi.NULL
        error = self._lib.ours_relay(self._ring, length, batch, log, LOG_SIZE, times, count)
        if error:
            raise HarnessError(f"{self.name}: {self._ffi.string(error).decode()}")
        return list(times)

    def logged(self) -> bytes:
        """The log as the last measurement has left it."""
        return self._log[:]

    def close(self) -> None:
        """Let go of the ring and its memory."""
        self._lib.ours_end(self._ring)
        self.queue.close()
        self._log.close()
        # The mapping goes with the last of what cffi has of it.
        self._memory.close()
