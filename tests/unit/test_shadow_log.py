"""What the shadow-ring relay marks in the dirty log: buffers that the device wrote, and the used ring."""

import mmap
import os
import select
import struct
from collections.abc import Callable, Iterator

import pytest

from datapath.native._native import ffi
from tests.harness.dirty_log import marked_pages
from tests.harness.shadow_link import BASE, BUFFERS, MEMORY, PAGE, Link, MakeLink
from tests.harness.virtqueue import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    USED_F_NO_NOTIFY,
    Buffer,
)

WHOLE = (BASE + MEMORY) // PAGE // 8
TABLE = BASE + (1 << 20)


class Log:
    """A bitmap in a file."""

    def __init__(self, size: int = WHOLE, offset: int = 0) -> None:
        self._offset = offset
        self.size = size
        self.fd = os.memfd_create("log")
        os.ftruncate(self.fd, offset + size)
        self._view = mmap.mmap(self.fd, offset + size)
        self.area = int(ffi.cast("uintptr_t", ffi.from_buffer(self._view))) + offset, size

    def fill(self, byte: int) -> None:
        os.pwrite(self.fd, bytes([byte]) * self.size, self._offset)

    def take(self) -> set[int]:
        """Addresses of the pages marked since the last look."""
        data = os.pread(self.fd, self.size, self._offset)
        self.fill(0)
        return marked_pages(data)


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    yield log
    os.close(log.fd)


def pages(*ranges: tuple[int, int]) -> set[int]:
    """Pages of (address, bytes)."""
    return {
        page * PAGE for start, size in ranges for page in range(start // PAGE, (start + size - 1) // PAGE + 1)
    }


def complete(link: Link, log: Log, length: int, *heads: int) -> set[int]:
    """Let the device give heads back, and see what was marked besides the used ring."""
    link.settled()
    log.take()
    link.device.complete(*heads, length=length)
    link.guest.wait_used(len(heads))
    link.settled()
    marked = log.take()
    used = pages((link.guest.used, 6 + 8 * link.guest.size))
    assert marked & used, "the used ring is not marked"
    return marked - used


def give(link: Link, *buffers: Buffer) -> int:
    head = link.guest.add(*buffers)
    link.guest.kick()
    assert link.given() == [head]
    return head


CHAIN = (
    Buffer(BUFFERS, 16),
    Buffer(BUFFERS + PAGE, 2 * PAGE),
    Buffer(BUFFERS + 4 * PAGE - 8, 16, True),
    Buffer(BUFFERS + 8 * PAGE, 3 * PAGE, True),
)


@pytest.mark.parametrize(
    ("length", "marked"),
    [
        (0, set()),
        (1, pages((BUFFERS + 3 * PAGE, 1))),
        (8, pages((BUFFERS + 3 * PAGE, 1))),
        (9, pages((BUFFERS + 3 * PAGE, 2 * PAGE))),
        (16, pages((BUFFERS + 3 * PAGE, 2 * PAGE))),
        (17, pages((BUFFERS + 3 * PAGE, 2 * PAGE), (BUFFERS + 8 * PAGE, 1))),
        (16 + PAGE, pages((BUFFERS + 3 * PAGE, 2 * PAGE), (BUFFERS + 8 * PAGE, 1))),
        (17 + PAGE, pages((BUFFERS + 3 * PAGE, 2 * PAGE), (BUFFERS + 8 * PAGE, 2 * PAGE))),
        (0xFFFFFFFF, pages((BUFFERS + 3 * PAGE, 2 * PAGE), (BUFFERS + 8 * PAGE, 3 * PAGE))),
    ],
)
def test_what_was_written_of_a_chain_is_marked(
    make_link: MakeLink, log: Log, length: int, marked: set[int]
) -> None:
    link = make_link(start=6)
    link.relay.log(log.area)
    link.add()
    assert complete(link, log, length, give(link, *CHAIN)) == marked


@pytest.mark.parametrize("split", [TABLE + 8, TABLE + 16, TABLE + 40, None])
def test_indirect_tables(make_link: MakeLink, log: Log, split: int | None) -> None:
    """Also those that lie in two mappings of memory."""
    link = make_link()
    if split is not None:
        link.relay.unmap(BASE, MEMORY)
        link.map(split)
    link.relay.log(log.area)
    link.add()
    head = link.guest.add_indirect(TABLE, CHAIN)
    link.guest.kick()
    link.given()
    assert complete(link, log, 17, head) == pages((BUFFERS + 3 * PAGE, 2 * PAGE), (BUFFERS + 8 * PAGE, 1))


def test_large_buffers(make_link: MakeLink, log: Log) -> None:
    link = make_link()
    link.relay.log(log.area)
    link.add()
    for start, size in [(3, 70), (8, 8), (8, 16), (7, 2), (15, 1), (0, 64)]:
        buffer = Buffer(BUFFERS + start * PAGE, size * PAGE, True)
        assert complete(link, log, size * PAGE, give(link, buffer)) == pages((buffer.address, buffer.size))


def test_a_batch_with_more_pages_than_are_noted_at_a_time(make_link: MakeLink, log: Log) -> None:
    link = make_link(64)
    link.relay.log(log.area)
    link.add()
    # Each has its pages in two bytes of the log, and shares neither with another.
    places = [BUFFERS - (1 << 20) + (16 * turn + 7) * PAGE for turn in range(47)]
    heads = [link.guest.add(Buffer(place, 2 * PAGE, True)) for place in places]
    link.guest.kick()
    link.given(47)
    assert complete(link, log, 2 * PAGE, *heads) == pages(*((place, 2 * PAGE) for place in places))


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize(("size", "start"), [(1024, 500), (1024, 1023), (4096, 0)])
def test_what_the_relay_writes_itself_is_marked(
    make_link: MakeLink, log: Log, size: int, start: int, event_idx: bool
) -> None:
    """Entries before and after the end of the ring, the index, the flags or the event index."""
    link = make_link(size, start, event_idx)
    link.relay.log(log.area)
    link.add()
    used = link.guest.used
    heads = [link.guest.add(Buffer(BUFFERS, 1)) for _ in range(20)]
    link.guest.kick()
    link.given(20)
    link.settled()
    assert log.take() == pages((used + 4 + 8 * size if event_idx else used, 2))
    link.set_used_event(start + 19)
    link.device.complete(*heads)
    link.guest.wait_used(20)
    link.settled()
    entries = {used + 4 + 8 * ((start + n) % size) for n in range(20)}
    assert log.take() >= pages((used, 4), *((entry, 8) for entry in entries))


def test_a_ring_that_breaks_has_marked_what_it_last_wrote(make_link: MakeLink, log: Log) -> None:
    """More heads than one turn gives, then a bad one: the wish for no notifications is not taken back."""
    link = make_link(128)
    link.relay.log(log.area)
    link.add()
    give(link, Buffer(BUFFERS, 1))
    link.settled()
    assert link.state.error is None, "which waits for the end of the turn"
    log.take()
    for head in range(1, 101):
        link.guest.describe(head, Buffer(BUFFERS, 1))
    # All at once, so that the bad one is met in a later turn than the first.
    link.memory.write(link.guest.avail + 6, struct.pack("<101H", *range(1, 101), 128))
    link.guest.set_avail_index(102)
    link.guest.kick()
    assert "beyond the descriptor table" in link.broken()
    assert link.guest_flags & USED_F_NO_NOTIFY
    assert log.take() == pages((link.guest.used, 2))


def test_a_used_ring_that_is_not_at_the_beginning_of_a_page(make_link: MakeLink, log: Log) -> None:
    """Its index, its first entries, its last and the event index are then on a page each."""
    link = make_link(1024, 1022, event_idx=True)
    link.guest.used += PAGE - 4
    link.memory.write(link.guest.used, struct.pack("<HH", 0, 1022))
    link.relay.log(log.area)
    link.add()
    heads = [link.guest.add(Buffer(BUFFERS, 1)) for _ in range(4)]
    link.guest.kick()
    link.given(4)
    link.settled()
    event = link.guest.used + 4 + 8 * 1024
    assert log.take() == pages((event, 2))
    link.set_used_event(1025)
    link.device.complete(*heads)
    link.guest.wait_used(4)
    link.settled()
    entries = [(link.guest.used + 4, 2 * 8), (event - 2 * 8, 2 * 8)]
    assert log.take() == pages((link.guest.used, 2), *entries, (event, 2))


def test_what_leaving_writes_is_marked(make_link: MakeLink, log: Log) -> None:
    link = make_link(8)
    link.add()
    [head] = link.offer()
    link.given()
    link.relay.log(log.area)
    link.device.put(head, PAGE)
    link.device.publish()
    link.relay.remove(0)
    assert log.take() == pages((link.guest.used, 1), (BUFFERS, 1))


def test_buffers_are_in_the_bitmap_before_the_guest_sees_them(make_link: MakeLink, log: Log) -> None:
    """A relay that dies after that, here of its guest's used ring, marks no more."""
    link = make_link(8)
    last_page = BASE + MEMORY - PAGE
    link.guest.used = last_page
    link.relay.log(log.area)
    link.add()
    heads = [give(link, Buffer(BUFFERS + n * 8 * PAGE, PAGE, True)) for n in range(2)]
    link.settled()
    log.take()
    os.ftruncate(link.memory.fd, MEMORY - PAGE)
    link.device.complete(*heads, length=1)
    assert link.broken() == "memory has gone under the ring"
    assert log.take() == {BUFFERS, BUFFERS + 8 * PAGE}


def test_pages_are_counted_when_they_are_newly_marked(make_link: MakeLink, log: Log) -> None:
    link = make_link()
    link.relay.log(log.area)
    link.add()
    heads = [give(link, Buffer(BUFFERS + n * PAGE, PAGE, True)) for n in (0, 0, 1)]
    link.settled()
    log.take()

    def marked_by(head: int) -> int:
        before = link.relay.statistics()["logged_pages"]
        link.device.complete(head, length=1)
        link.guest.wait_used()
        link.settled()
        return link.relay.statistics()["logged_pages"] - before

    assert [marked_by(head) for head in heads] == [2, 0, 1], "the first with the used ring, which is one page"


def test_bits_that_are_set_stay_set(make_link: MakeLink, log: Log) -> None:
    link = make_link()
    link.relay.log(log.area)
    link.add()
    head = give(link, Buffer(BUFFERS, PAGE, True))
    log.fill(0xFF)
    link.device.complete(head, length=1)
    link.guest.wait_used()
    link.settled()
    assert len(log.take()) == 8 * WHOLE


def test_another_log_and_none(make_link: MakeLink, log: Log) -> None:
    link = make_link()
    other = Log(offset=12)
    link.add()
    heads = link.offer(3)
    link.given(3)
    link.settled()
    for number, (area, marked) in enumerate([(log.area, log), (other.area, other), (None, None)]):
        link.relay.log(area)
        link.device.complete(heads[number], length=1)
        link.guest.wait_used()
        link.settled()
        for each in (log, other):
            taken = each.take()
            assert (BUFFERS + number * PAGE in taken) == (each is marked)
            assert bool(taken) == (each is marked)
    os.close(other.fd)


# Logs and chains that are not what they should be


def test_a_log_that_is_too_short(make_link: MakeLink) -> None:
    link = make_link()
    end = BUFFERS + 8 * PAGE
    log = Log(end // PAGE // 8)
    link.relay.log(log.area)
    link.add()
    head = give(link, Buffer(end - PAGE, 4 * PAGE, True), Buffer(end + PAGE, PAGE, True))
    assert complete(link, log, 5 * PAGE, head) == {end - PAGE}
    assert link.relay.statistics()["log_missed"] == 4
    link.relay.log((log.area[0], 0))
    head = give(link, Buffer(BUFFERS, PAGE, True))
    link.device.complete(head, length=PAGE)
    link.guest.wait_used()
    link.settled()
    assert log.take() == set()
    assert link.state.error is None
    os.close(log.fd)


@pytest.mark.parametrize("count", [1, 300])
def test_a_log_that_shrinks(make_link: MakeLink, log: Log, count: int) -> None:
    """The guest goes on; that pages were missed is told."""
    link = make_link(512)
    link.relay.log(log.area)
    link.add()
    heads = [link.guest.add(Buffer(BUFFERS + n * 8 * PAGE, PAGE, True)) for n in range(count)]
    link.guest.kick()
    link.given(count)
    link.settled()
    os.ftruncate(log.fd, 0)
    link.device.complete(*heads, length=9)
    assert link.guest.wait_used(count) == [(head, 9) for head in heads]
    link.settled()
    assert link.relay.statistics()["log_missed"] > 0
    assert link.relay.statistics()["relayed.0"] == count
    [head] = link.offer()
    link.given()
    link.device.put(head)
    link.device.publish()
    link.relay.remove(0)
    assert link.state.error is None
    assert link.guest.wait_used() == [(head, 0)]


def test_a_log_that_has_shrunk_by_the_time_of_removal(make_link: MakeLink, log: Log) -> None:
    link = make_link()
    link.add()
    [head] = link.offer()
    link.given()
    link.settled()
    link.device.put(head, 5)
    link.device.publish()
    link.relay.log(log.area)
    os.ftruncate(log.fd, 0)
    link.relay.remove(0)
    assert link.guest.collect() == [(head, 5)]
    assert select.select([link.guest.call_fd], [], [], 0)[0]
    assert link.state.error is None
    assert link.relay.log_missed == 1


def loop(link: Link) -> None:
    link.guest.describe(0, Buffer(BUFFERS, 0, True), DESC_F_NEXT, 1)
    link.guest.describe(1, Buffer(BUFFERS, 0, True), DESC_F_NEXT, 0)


def next_beyond(link: Link) -> None:
    link.guest.describe(0, Buffer(BUFFERS, 8, True), DESC_F_NEXT, 8)


def table_not_mapped(link: Link) -> None:
    link.guest.describe(0, Buffer(BASE + MEMORY - 8, 32), DESC_F_INDIRECT)


def table_empty(link: Link) -> None:
    link.guest.describe(0, Buffer(TABLE, 15), DESC_F_INDIRECT)


def table_in_table(link: Link) -> None:
    link.memory.write(TABLE, TABLE.to_bytes(8, "little") + b"\x20\0\0\0" + bytes([DESC_F_INDIRECT, 0, 1, 0]))
    link.guest.describe(0, Buffer(TABLE, 32), DESC_F_INDIRECT)


def beyond_the_end(link: Link) -> None:
    link.memory.write(
        link.guest.descriptors,
        (0xFFFFFFFFFFFFF000).to_bytes(8, "little") + b"\xff" * 4 + bytes([DESC_F_WRITE, 0, 0, 0]),
    )


@pytest.mark.parametrize(
    "spoil", [loop, next_beyond, table_not_mapped, table_empty, table_in_table, beyond_the_end]
)
def test_chains_that_cannot_be(make_link: MakeLink, log: Log, spoil: Callable[[Link], None]) -> None:
    """They end the marking, and nothing else."""
    link = make_link()
    link.relay.log(log.area)
    link.add()
    head = give(link, Buffer(BUFFERS, PAGE, True))
    spoil(link)
    assert complete(link, log, 0xFFFFFFFF, head) <= {BUFFERS}
    assert link.state.error is None
