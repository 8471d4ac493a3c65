"""A shadow ring between a guest and a device that a test plays by hand on shared memory."""

import itertools
import mmap
import os
import select
from collections.abc import Callable

from datapath.native._native import ffi
from datapath.native.relay import Relay, ShadowRing, ShadowState
from tests.harness.private_ring import PrivateRing
from tests.harness.processes import wait_for
from tests.harness.virtqueue import USED_F_NO_NOTIFY, Buffer, MemfdMemory, Virtqueue

PAGE = 4096
BASE = 0x40000000
MEMORY = 4 << 20
RING = BASE
BUFFERS = BASE + (2 << 20)


class Link:
    """A guest's ring, a device's, and the relay between them as ring 0."""

    def __init__(
        self, relay: Relay, size: int = 8, start: int = 0, event_idx: bool = False, polled: bool = False
    ) -> None:
        self.relay = relay
        self.event_idx = event_idx
        self.polled = polled
        self.memory = MemfdMemory(MEMORY, BASE)
        self.view = mmap.mmap(self.memory.fd, MEMORY)
        self.address = int(ffi.cast("uintptr_t", ffi.from_buffer(self.view)))
        self.guest = Virtqueue(self.memory, RING, size, start)
        self.device = PrivateRing(size)
        self.start = start

    def map(self, *splits: int) -> None:
        """Map guest memory, in pieces that end at these addresses."""
        edges = [BASE, *splits, BASE + MEMORY]
        for start, end in itertools.pairwise(edges):
            self.relay.map(start, end - start, self.address + start - BASE)

    def ring(self, **changes: object) -> ShadowRing:
        guest = self.guest
        values = {
            "size": guest.size,
            "event_idx": self.event_idx,
            "descriptors": guest.descriptors,
            "avail": guest.avail,
            "used": guest.used,
            "index": guest.used_index,
            "private_avail": self.device.avail_address,
            "private_used": self.device.used_address,
            "kick": None if self.polled else guest.kick_fd,
            "call": guest.call_fd,
            "interrupt": self.device.interrupt_fd,
            "doorbell": self.device.doorbell,
        }
        return ShadowRing(**{**values, **changes})  # type: ignore[arg-type]

    def add(self, **changes: object) -> None:
        self.relay.add_shadow(0, self.ring(**changes))

    def offer(self, count: int = 1, size: int = PAGE) -> list[int]:
        """Make writable buffers available, each on pages of its own, and kick."""
        heads = [
            self.guest.add(Buffer(BUFFERS + size * (self.guest._next_descriptor), size, True))
            for _ in range(count)
        ]
        self.guest.kick()
        return heads

    def given(self, count: int = 1) -> list[int]:
        """Wait until the device has been given so many heads more."""
        heads: list[int] = []

        def enough() -> bool:
            heads.extend(self.device.take())
            return len(heads) >= count

        wait_for(f"{count} heads", enough, 5)
        return heads

    def settled(self) -> None:
        """Wait until the relay has seen all there is, and asks for notifications on both sides."""

        def armed() -> bool:
            used = (self.start + self.device.used_index) & 0xFFFF
            if (self.state.avail, self.state.used) != (self.guest.avail_index, used):
                return False
            if self.event_idx:
                return (
                    self.avail_event == self.guest.avail_index
                    and self.device.used_event == self.device.used_index
                )
            return self.device.interrupts_wanted and not self.guest_flags & USED_F_NO_NOTIFY

        wait_for("the relay to sleep", armed, 5)

    @property
    def guest_flags(self) -> int:
        return int.from_bytes(self.memory.read(self.guest.used, 2), "little")

    @property
    def avail_event(self) -> int:
        at = self.guest.used + 4 + 8 * self.guest.size
        return int.from_bytes(self.memory.read(at, 2), "little")

    def set_used_event(self, index: int) -> None:
        at = self.guest.avail + 4 + 2 * self.guest.size
        self.memory.write(at, (index & 0xFFFF).to_bytes(2, "little"))

    def set_avail_flags(self, flags: int) -> None:
        self.memory.write(self.guest.avail, flags.to_bytes(2, "little"))

    @property
    def state(self) -> ShadowState:
        return self.relay.state(0)

    def broken(self) -> str:
        """Wait until the ring is broken; why."""
        assert select.select([self.relay.broken_fd], [], [], 5)[0], "the ring is not broken"
        os.eventfd_read(self.relay.broken_fd)
        assert self.state.error is not None
        return self.state.error

    def close(self) -> None:
        """End the relay and all else."""
        self.relay.close()
        self.device.close()
        self.guest.close()
        self.memory.close()


#: Makes a link with these arguments, its memory mapped, and closes it after the test.
MakeLink = Callable[..., Link]


def quiet(fd: int) -> bool:
    return not select.select([fd], [], [], 0.02)[0]


def rung(fd: int) -> int:
    assert select.select([fd], [], [], 5)[0], "not signalled"
    return os.eventfd_read(fd)
