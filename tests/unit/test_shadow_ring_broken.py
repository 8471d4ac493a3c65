"""The shadow-ring relay among those who break the rules: guests, devices, memory and descriptors."""

import mmap
import os
from collections.abc import Callable

import pytest

from datapath.native._native import ffi
from datapath.native.relay import Doorbell
from tests.harness.processes import wait_for
from tests.harness.shadow_link import BASE, MEMORY, PAGE, RING, Link, MakeLink, quiet, rung
from tests.harness.virtqueue import MemfdMemory


def test_rings_that_cannot_be(make_link: MakeLink) -> None:
    link = make_link()
    wrong: list[dict[str, object]] = [
        {"size": 0},
        {"size": 3},
        {"size": 0x8001},
        {"descriptors": RING + 8},
        {"avail": RING + 1},
        {"used": RING + 2},
        {"private_avail": 0},
        {"private_used": link.device.used_address + 2},
        {"doorbell": Doorbell()},
        {"interrupt": -1},
    ]
    for changes in wrong:
        with pytest.raises(OSError, match="Invalid argument"):
            link.add(**changes)
    with open("/dev/random", "rb") as endless, pytest.raises(PermissionError):
        link.add(interrupt=endless.fileno())
    with pytest.raises(OSError, match="Bad file descriptor"):
        link.add(interrupt=9999)
    with pytest.raises(OSError, match="No such file"):
        link.relay.state(0)
    link.add()
    with pytest.raises(OSError, match="busy"):
        link.add()
    link.offer()
    link.given()


def test_memory_that_cannot_be(make_link: MakeLink) -> None:
    link = make_link()
    for address, size in [(BASE, 0), (1 << 63, (1 << 63) + 1), (BASE + PAGE, PAGE), (BASE - PAGE, PAGE + 1)]:
        with pytest.raises(OSError, match=r"Invalid argument|File exists"):
            link.relay.map(address, size, link.address)
    with pytest.raises(OSError, match="No such file"):
        link.relay.unmap(BASE, MEMORY - PAGE)
    # Neither pages nor alignment are asked for.
    link.relay.map(0x1001, 3, link.address)
    link.relay.unmap(0x1001, 3)


@pytest.mark.parametrize("split", ["descriptors", "avail", "used"])
def test_a_ring_that_is_not_in_one_piece(make_link: MakeLink, split: str) -> None:
    link = make_link()
    link.relay.unmap(BASE, MEMORY)
    link.map(getattr(link.guest, split) + 4)
    link.add()
    assert "not in one mapping" in link.broken()


def test_guest_memory_that_was_unmapped_or_moved(make_link: MakeLink) -> None:
    link = make_link()
    link.add()
    link.offer()
    link.given()
    link.settled()
    link.relay.unmap(BASE, MEMORY)
    moved = MemfdMemory(MEMORY, BASE)
    view = mmap.mmap(moved.fd, MEMORY)
    moved.write(BASE, link.memory.read(BASE, MEMORY))
    link.relay.map(BASE, MEMORY, int(ffi.cast("uintptr_t", ffi.from_buffer(view))))
    link.device.complete(0)
    rung(link.guest.call_fd)
    assert moved.read(link.guest.used + 2, 2) == b"\1\0"
    link.relay.unmap(BASE, MEMORY)
    link.guest.kick()
    assert "not in one mapping" in link.broken()
    moved.close()


def spoil_index(link: Link) -> None:
    link.guest.set_avail_index(link.guest.avail_index + 9)


def spoil_index_a_little(link: Link) -> None:
    """Ahead by what the ring holds, but some of it is in flight."""
    link.guest.set_avail_index(link.guest.avail_index + 7)


def spoil_head(link: Link) -> None:
    link.guest.publish(8)


def offer_twice(link: Link) -> None:
    link.guest.publish(0)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_index, "ahead"),
        (spoil_index_a_little, "ahead"),
        (spoil_head, "beyond the descriptor table"),
        (offer_twice, "available twice"),
    ],
)
def test_a_guest_that_breaks_the_rules(
    make_link: MakeLink, spoil: Callable[[Link], None], reason: str
) -> None:
    link = make_link(start=3)
    link.add()
    link.offer(2)
    assert link.given(2) == [0, 1]
    spoil(link)
    link.guest.kick()
    assert reason in link.broken()
    assert link.device.take() == []
    assert_stands_still(link)


def assert_stands_still(link: Link) -> None:
    """Nothing moves, and neither descriptor keeps the thread busy."""
    used = link.guest.used_index
    link.guest.kick()
    link.device.interrupt()
    assert quiet(link.relay.broken_fd)
    assert os.eventfd_read(link.guest.kick_fd) >= 1
    assert os.eventfd_read(link.device.interrupt_fd) >= 1
    reason = link.state.error
    link.relay.remove(0)
    assert (link.guest.used_index, link.state.error) == (used, reason)


@pytest.mark.parametrize(
    ("heads", "good"),
    [([8], 0), ([0xFFFF0000], 0), ([3], 0), ([0, 0], 1), ([1, 0, 1], 2), ([0, 1, 2, 0], 0)],
    ids=["beyond", "beyond-by-16-bits", "not-given", "twice", "twice-later", "too-many"],
)
def test_a_device_that_breaks_the_rules(make_link: MakeLink, heads: list[int], good: int) -> None:
    """The guest sees what came before, and never what is wrong."""
    link = make_link(start=0xFFFF)
    link.add()
    link.offer(3)
    link.given(3)
    link.device.complete(*heads)
    assert "the device has completed" in link.broken()
    assert [head for head, _ in link.guest.collect()] == heads[:good]
    assert_stands_still(link)


def test_a_used_index_that_goes_back(make_link: MakeLink) -> None:
    link = make_link()
    link.add()
    link.offer()
    link.given()
    link.device.used_index = 0xFFFF
    link.device.publish()
    link.device.interrupt()
    assert "more than it was given" in link.broken()


def test_one_broken_ring_leaves_the_other_alone(make_link: MakeLink) -> None:
    link = make_link()
    link.add()
    kick, doorbell = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
    link.relay.add(1, kick, Doorbell(fd=doorbell))
    spoil_head(link)
    link.guest.kick()
    link.broken()
    os.eventfd_write(kick, 1)
    assert rung(doorbell) == 1
    link.relay.remove(1)
    os.close(kick)
    os.close(doorbell)


def test_an_interrupt_descriptor_that_fails(make_link: MakeLink) -> None:
    link = make_link()
    reader, writer = os.pipe()
    link.add(interrupt=reader)
    os.close(writer)
    assert "interrupt descriptor" in link.broken()
    link.relay.remove(0)
    os.close(reader)


@pytest.mark.parametrize("blocking", [False, True])
def test_a_full_call_descriptor_does_not_block(make_link: MakeLink, blocking: bool) -> None:
    link = make_link()
    link.add()
    heads = link.offer(2)
    link.given(2)
    os.eventfd_write(link.guest.call_fd, 0xFFFFFFFFFFFFFFFE)
    os.set_blocking(link.guest.call_fd, blocking)
    link.device.complete(heads[0])
    wait_for("the error", lambda: link.relay.statistics()["kick_errors.0"] == 1, 5)
    link.device.complete(heads[1])
    wait_for("the other completion", lambda: link.guest.used_index == 2, 5)


@pytest.mark.parametrize("part", ["guest", "private"])
def test_memory_that_shrinks(make_link: MakeLink, part: str) -> None:
    link = make_link()
    link.add()
    heads = link.offer(2)
    link.given(2)
    link.settled()
    os.ftruncate(link.memory.fd if part == "guest" else link.device.fd, 0)
    link.guest.kick()
    assert "memory has gone" in link.broken()
    link.relay.remove(0)
    assert link.state.in_flight == len(heads)


def test_memory_that_has_shrunk_by_the_time_of_removal(make_link: MakeLink) -> None:
    link = make_link()
    link.add()
    link.settled()
    os.ftruncate(link.memory.fd, 0)
    link.relay.remove(0)
    assert "memory has gone" in str(link.state.error)


def test_a_relay_that_is_closed_with_rings(make_link: MakeLink) -> None:
    link = make_link()
    link.add()
    link.offer()
    link.relay.close()
