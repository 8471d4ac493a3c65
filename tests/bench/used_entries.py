"""The guest's ring whose used entries `./bench relay` has carried over: the same for each relay.

A full ring of receive buffers, each in a page of its own.
"""

import struct

from tests.harness.front_end import BUFFERS, MEMORY_SIZE
from tests.harness.virtqueue import AVAIL_F_NO_INTERRUPT, Buffer, MemfdMemory, Virtqueue

#: The receive queue, whose buffers the device writes.
QUEUE = 0
PAGE = 4096
#: What virtio_net offers for a frame with its header, and what a frame of 1500 bytes takes of it.
BUFFER_SIZE = 1536
LENGTH = 1526
#: A bit for each page, in whole pages.
LOG_SIZE = (MEMORY_SIZE // PAGE // 8 + PAGE - 1) // PAGE * PAGE


def buffer_address(number: int) -> int:
    """Where a buffer lies, by guest physical address."""
    return BUFFERS + PAGE * number


def fill(memory: MemfdMemory, queue: Virtqueue) -> None:
    """Make as many buffers available as the ring has entries, head n being descriptor n; the guest wants no
    interrupts."""
    memory.write(queue.avail, struct.pack("<H", AVAIL_F_NO_INTERRUPT))
    for number in range(queue.size):
        queue.add(Buffer(buffer_address(number), BUFFER_SIZE, writable=True))


def check(queue: Virtqueue, log: bytes, logged: bool) -> None:
    """See that the last ring full of used entries has arrived in the guest, and in the log just then.

    :raise ValueError: when it has not.
    """
    queue.seen = (queue.used_index - queue.size) & 0xFFFF
    if sorted(queue.collect()) != [(head, LENGTH) for head in range(queue.size)]:
        raise ValueError("the guest's used ring lacks entries")
    for number in range(queue.size):
        page = buffer_address(number) // PAGE
        if bool(log[page // 8] >> page % 8 & 1) != logged:
            raise ValueError(f"the log is wrong at page {page}")
