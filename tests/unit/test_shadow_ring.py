"""The shadow-ring relay: how it begins and ends, and its notifications."""

import mmap
import os
import resource
import select

import pytest

from datapath.native._native import ffi
from datapath.native.relay import Doorbell, ShadowState
from tests.harness.private_ring import PrivateRing
from tests.harness.processes import wait_for
from tests.harness.shadow_link import BASE, BUFFERS, MEMORY, PAGE, MakeLink, quiet, rung
from tests.harness.virtqueue import AVAIL_F_NO_INTERRUPT, USED_F_NO_NOTIFY, Buffer


@pytest.mark.parametrize("event_idx", [False, True])
def test_one_buffer_there_and_back(make_link: MakeLink, event_idx: bool) -> None:
    link = make_link(start=0xFFFE, event_idx=event_idx)
    link.add()
    for turn in range(5):
        link.device.set_avail_event(link.device.taken)
        [head] = link.offer()
        assert rung(link.device.doorbell_fd) == 1
        assert link.given() == [head]
        assert link.state == ShadowState(0xFFFE + turn + 1 & 0xFFFF, 0xFFFE + turn & 0xFFFF, 1, None)
        link.set_used_event(link.guest.seen)
        link.device.complete(head, length=100 + turn)
        assert link.guest.wait_used() == [(head, 100 + turn)]
        assert link.state.in_flight == 0
        link.settled()
    link.relay.remove(0)
    assert link.relay.statistics()["relayed.0"] == 5


@pytest.mark.parametrize("size", [1, 2, 8, 1024, 32768])
@pytest.mark.parametrize("event_idx", [False, True])
def test_rings_of_all_sizes_wrap_around(make_link: MakeLink, size: int, event_idx: bool) -> None:
    """All buffers at once, given back in another order, again and again."""
    link = make_link(size, start=0xFFFF - size // 2, event_idx=event_idx)
    link.add()
    for turn in range(3):
        heads = link.offer(size, 16)
        assert link.given(size) == heads
        link.set_used_event(link.guest.seen + size - 1)
        link.device.complete(*reversed(heads), length=turn)
        assert link.guest.wait_used(size) == [(head, turn) for head in reversed(heads)]
    link.relay.remove(0)
    assert link.state == ShadowState(link.guest.avail_index, link.guest.avail_index, 0, None)


@pytest.mark.parametrize("size", [8, 128, 1024])
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_guest_that_was_promised_the_order_has_it(make_link: MakeLink, size: int, event_idx: bool) -> None:
    """Whatever the device does: what comes too early waits, and is there again for the next device."""
    link = make_link(size, start=0xFFFF - size // 2, event_idx=event_idx)
    link.add(in_order=True)
    for turn in range(3):
        heads = link.offer(size, 16)
        assert link.given(size) == heads
        link.set_used_event(link.guest.seen + size - 1)
        link.device.complete(*reversed(heads[1:]), length=turn)
        link.device.complete(heads[0], length=turn)
        assert link.guest.wait_used(size) == [(head, turn) for head in heads], "in another order"
    heads = link.offer(3, 16)
    assert link.given(3) == heads
    link.device.complete(heads[2], length=9)
    link.relay.remove(0)
    assert link.state == ShadowState(link.guest.avail_index, link.guest.seen, 3, None)


def test_a_guest_that_was_promised_no_order_has_the_device_s(make_link: MakeLink) -> None:
    """Nothing waits for what the device has not completed yet."""
    link = make_link(start=0xFFFE)
    link.add(in_order=False)
    heads = link.offer(8)
    assert link.given(8) == heads
    link.device.complete(*reversed(heads[1:]), length=7)
    assert link.guest.wait_used(7) == [(head, 7) for head in reversed(heads[1:])]
    link.device.complete(heads[0], length=8)
    assert link.guest.wait_used() == [(heads[0], 8)]


def test_what_was_completed_waits_and_cannot_be_again(make_link: MakeLink) -> None:
    link = make_link()
    link.add(in_order=True)
    heads = link.offer(3)
    link.given(3)
    link.device.complete(heads[1], heads[1])
    assert link.broken() == "the device has completed what it was not given"


def test_without_a_kick_descriptor_the_ring_is_looked_at_by_time(make_link: MakeLink) -> None:
    link = make_link(polled=True)
    link.add()
    for _ in range(3):
        link.settled()
        head = link.guest.add(Buffer(BUFFERS, PAGE))
        assert link.given() == [head]
    assert link.relay.statistics()["kicks.0"] == 0


def test_what_waits_when_the_ring_is_added_is_given(make_link: MakeLink) -> None:
    link = make_link(start=5)
    heads = [link.guest.add(Buffer(BUFFERS, PAGE)) for _ in range(3)]
    link.add()
    assert link.given(3) == heads
    assert link.state.in_flight == 3


# Notifications


def test_the_doorbell_is_rung_when_the_device_wants_it(make_link: MakeLink) -> None:
    link = make_link()
    link.add()
    link.device.want_notifications(False)
    link.offer()
    link.given()
    link.settled()
    assert quiet(link.device.doorbell_fd)
    link.device.want_notifications(True)
    link.offer()
    assert rung(link.device.doorbell_fd) == 1


def test_the_doorbell_is_rung_when_the_device_wants_it_by_event_index(make_link: MakeLink) -> None:
    link = make_link(event_idx=True)
    link.device.set_avail_event(2)
    link.add()
    for _ in range(2):
        link.offer()
        link.given()
        link.settled()
    assert quiet(link.device.doorbell_fd)
    link.offer()
    assert rung(link.device.doorbell_fd) == 1
    link.offer()
    link.given()
    link.settled()
    assert quiet(link.device.doorbell_fd)


def test_the_guest_is_interrupted_when_it_wants_it(make_link: MakeLink) -> None:
    link = make_link()
    link.add()
    heads = link.offer(2)
    link.given(2)
    link.set_avail_flags(AVAIL_F_NO_INTERRUPT)
    link.device.complete(heads[0])
    link.settled()
    assert link.guest.collect() == [(heads[0], 0)]
    assert quiet(link.guest.call_fd)
    link.set_avail_flags(0)
    link.device.complete(heads[1])
    assert rung(link.guest.call_fd) == 1


def test_the_guest_is_interrupted_when_it_wants_it_by_event_index(make_link: MakeLink) -> None:
    link = make_link(event_idx=True, start=0xFFFD)
    link.add()
    heads = link.offer(5)
    link.given(5)
    link.set_used_event(0x7000)
    link.device.complete(heads[0])
    assert rung(link.guest.call_fd) == 1, "nobody knows what was interrupted for before"
    link.set_used_event(0xFFFD + 3)
    for head in heads[1:3]:
        link.device.complete(head)
        link.settled()
    assert quiet(link.guest.call_fd)
    link.device.complete(*heads[3:])
    assert rung(link.guest.call_fd) == 1


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_sleeping_relay_asks_for_notifications(make_link: MakeLink, event_idx: bool) -> None:
    """On both sides, whatever stood there before; and it does not while it works."""
    link = make_link(event_idx=event_idx, start=100)
    link.memory.write(link.guest.used, USED_F_NO_NOTIFY.to_bytes(2, "little"))
    link.add()
    link.settled()
    heads = link.offer(3)
    link.given(3)
    link.settled()
    link.device.complete(*heads)
    link.guest.wait_used(3)
    link.settled()
    if event_idx:
        assert (link.avail_event, link.device.used_event) == (103, 3)
        assert link.guest_flags == USED_F_NO_NOTIFY, "with event indices the flag means nothing"
    else:
        assert (link.guest_flags, link.device.interrupts_wanted) == (0, True)


def test_another_call_descriptor(make_link: MakeLink) -> None:
    link = make_link()
    link.add()
    heads = link.offer(3)
    link.given(3)
    other = os.eventfd(0, os.EFD_NONBLOCK)
    link.relay.set_call(0, other)
    link.device.complete(heads[0])
    assert rung(other) == 1
    link.relay.set_call(0, None)
    link.device.complete(heads[1])
    wait_for("the completion", lambda: link.guest.used_index == 2, 5)
    assert quiet(other)
    os.close(other)
    link.relay.set_call(0, link.guest.call_fd)
    link.device.complete(heads[2])
    assert rung(link.guest.call_fd) == 1
    link.relay.remove(0)
    with pytest.raises(OSError, match="No such file"):
        link.relay.set_call(0, None)


def test_a_mapped_doorbell(make_link: MakeLink) -> None:
    link = make_link()
    page = mmap.mmap(-1, PAGE)
    page[:2] = b"\xff\xff"
    address = int(ffi.cast("uintptr_t", ffi.from_buffer(page)))
    link.add(doorbell=Doorbell(address=address))
    link.offer()
    wait_for("a store of 0", lambda: page[:2] == b"\0\0", 5)


@pytest.mark.parametrize("shadow", [False, True])
def test_a_mapped_doorbell_that_is_gone(make_link: MakeLink, shadow: bool) -> None:
    """The register of a function that was pulled out raises SIGBUS."""
    link = make_link()
    file = os.memfd_create("bar")
    os.ftruncate(file, PAGE)
    page = mmap.mmap(file, PAGE)
    doorbell = Doorbell(address=int(ffi.cast("uintptr_t", ffi.from_buffer(page))))
    if shadow:
        link.add(doorbell=doorbell)
    else:
        link.relay.add(0, link.guest.kick_fd, doorbell)
    os.ftruncate(file, 0)
    link.relay.ring(0)
    assert link.relay.statistics()["kick_errors.0"] == 1
    link.offer()
    wait_for("another error", lambda: link.relay.statistics()["kick_errors.0"] == 2, 5)
    os.close(file)


# Leaving


def test_hold_gives_no_more_and_completes_the_rest(make_link: MakeLink) -> None:
    link = make_link()
    link.add()
    first = link.offer(3)
    link.given(3)
    link.relay.hold(0)
    link.offer(2)
    link.device.complete(*first[:2])
    assert len(link.guest.wait_used(2)) == 2
    assert link.state == ShadowState(3, 2, 1, None)
    link.device.complete(first[2])
    assert link.guest.wait_used() == [(first[2], 0)]
    assert link.device.take() == []
    link.relay.remove(0)
    assert link.state == ShadowState(3, 3, 0, None)


@pytest.mark.parametrize("polled", [False, True])
def test_a_held_ring_with_heads_waiting_is_no_work(make_link: MakeLink, polled: bool) -> None:
    link = make_link(polled=polled)
    link.add()
    link.settled()
    link.relay.hold(0)
    link.offer(2)
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(5):
        assert quiet(link.device.doorbell_fd)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.05
    assert link.state == ShadowState(0, 0, 0, None)


@pytest.mark.parametrize("event_idx", [False, True])
def test_what_was_completed_last_is_carried_over_when_the_ring_is_removed(
    make_link: MakeLink, event_idx: bool
) -> None:
    link = make_link(256, start=0xFFC0, event_idx=event_idx)
    link.add()
    heads = link.offer(200)
    link.given(200)
    link.set_used_event(0xFFC0 + 189)
    for head in heads[:190]:
        link.device.put(head, 7)
    link.device.publish()
    link.relay.remove(0)
    assert select.select([link.guest.call_fd], [], [], 0)[0], "not interrupted by the time of its return"
    assert link.guest.collect() == [(head, 7) for head in heads[:190]]
    assert link.state == ShadowState(0xFFC0 + 200 & 0xFFFF, 0xFFC0 + 190 & 0xFFFF, 10, None)
    assert link.relay.statistics()["relayed.0"] == 190


def test_it_does_not_interrupt_a_guest_that_does_not_want_it_when_it_leaves(make_link: MakeLink) -> None:
    link = make_link()
    link.add()
    heads = link.offer(2)
    link.given(2)
    link.set_avail_flags(AVAIL_F_NO_INTERRUPT)
    for head in heads:
        link.device.put(head)
    link.device.publish()
    link.relay.remove(0)
    assert quiet(link.guest.call_fd)


def test_after_removal_nothing_is_used(make_link: MakeLink) -> None:
    link = make_link(polled=True)
    link.add()
    link.settled()
    link.relay.remove(0)
    link.relay.remove(0)
    link.relay.unmap(BASE, MEMORY)
    head = link.guest.add(Buffer(BUFFERS, PAGE))
    link.device.complete(head)
    assert quiet(link.guest.call_fd)
    assert os.eventfd_read(link.device.interrupt_fd) == 1
    assert (link.device.take(), link.guest.used_index, link.state.error) == ([], 0, None)


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_ring_is_left_asking_for_notifications(make_link: MakeLink, event_idx: bool) -> None:
    """The device that comes next may never write what it wants where the guest looks."""
    link = make_link(event_idx=event_idx)
    link.add()
    link.settled()
    link.relay.hold(0)
    link.memory.write(link.guest.used, USED_F_NO_NOTIFY.to_bytes(2, "little"))
    link.relay.remove(0)
    if not event_idx:
        assert link.guest_flags == 0
    else:
        assert link.avail_event == link.guest.avail_index


def test_a_ring_goes_on_in_another_shadow(make_link: MakeLink) -> None:
    """What the device had and did not complete is given again."""
    link = make_link(start=0xFFFE)
    link.add()
    heads = link.offer(6)
    link.given(6)
    link.device.complete(*heads[:2])
    link.guest.wait_used(2)
    link.relay.remove(0)
    assert link.state == ShadowState(4, 0, 4, None)
    link.device.close()
    link.device = PrivateRing(8)
    link.add()
    assert link.given(4) == heads[2:]
    link.device.complete(*heads[2:])
    assert [head for head, _ in link.guest.wait_used(4)] == heads[2:]


def test_what_cannot_be_given_again_is_told(make_link: MakeLink) -> None:
    """The next device begins at the used index: it would miss head 0 and get 1 a second time."""
    link = make_link()
    link.add()
    heads = link.offer(3)
    link.given(3)
    link.device.complete(heads[1])
    link.guest.wait_used()
    link.relay.remove(0)
    assert "out of order" in str(link.state.error)
