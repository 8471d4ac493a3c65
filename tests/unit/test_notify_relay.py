"""The notify relay: kicks in, doorbells out, and descriptors that are not what they should be."""

import mmap
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datapath.native._native import ffi
from datapath.native.relay import Doorbell, Relay
from tests.harness.processes import wait_for

RINGS = 4


@pytest.fixture
def relay() -> Iterator[Relay]:
    relay = Relay(RINGS)
    yield relay
    relay.close()


@pytest.fixture
def eventfds() -> Iterator[tuple[int, int]]:
    """A kick that blocks, as a front-end may give one, and a doorbell."""
    kick, doorbell = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
    yield kick, doorbell
    os.close(kick)
    os.close(doorbell)


class Register:
    """A mapped 16-bit register that shows whether it was written."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self.doorbell = Doorbell(address=int(ffi.cast("uintptr_t", ffi.from_buffer(self._page))) + 8)
        self.clear()

    def clear(self) -> None:
        self._page[:16] = b"\xff" * 16

    @property
    def written(self) -> int | None:
        """The value stored, if nothing but it was stored."""
        assert self._page[:8] + self._page[10:16] == b"\xff" * 14
        value = int.from_bytes(self._page[8:10], "little")
        return None if value == 0xFFFF else value


def rung(doorbell: int, seconds: float = 5.0) -> int:
    """Wait for the doorbell and return how often it was rung."""
    assert select.select([doorbell], [], [], seconds)[0], "the doorbell was not rung"
    return os.eventfd_read(doorbell)


def silent(doorbell: int) -> bool:
    return not select.select([doorbell], [], [], 0.02)[0]


def kicks(relay: Relay, ring: int) -> int:
    return relay.statistics()[f"kicks.{ring}"]


def errors(relay: Relay, ring: int) -> int:
    return relay.statistics()[f"kick_errors.{ring}"]


def test_a_kick_rings_the_doorbell(relay: Relay, eventfds: tuple[int, int]) -> None:
    kick, doorbell = eventfds
    relay.add(1, kick, Doorbell(fd=doorbell))
    for count in range(1, 4):
        os.eventfd_write(kick, 1)
        assert rung(doorbell) == 1
        assert kicks(relay, 1) == count
    assert kicks(relay, 0) == 0


def test_kicks_that_were_waiting_become_one(relay: Relay, eventfds: tuple[int, int]) -> None:
    kick, doorbell = eventfds
    os.eventfd_write(kick, 7)
    relay.add(0, kick, Doorbell(fd=doorbell))
    assert rung(doorbell) == 1
    assert silent(doorbell)


def test_a_mapped_register_takes_the_ring_number(relay: Relay, eventfds: tuple[int, int]) -> None:
    register = Register()
    relay.add(3, eventfds[0], register.doorbell)
    os.eventfd_write(eventfds[0], 1)
    wait_for("a store of 3", lambda: register.written == 3, 5)
    register.clear()
    relay.ring(3)
    assert register.written == 3
    assert kicks(relay, 3) == 1


def test_ring_once(relay: Relay, eventfds: tuple[int, int]) -> None:
    kick, doorbell = eventfds
    with pytest.raises(OSError, match="No such file"):
        relay.ring(0)
    relay.add(0, kick, Doorbell(fd=doorbell))
    relay.ring(0)
    assert rung(doorbell) == 1
    assert kicks(relay, 0) == 0, "nobody kicked"


def test_without_a_kick_the_doorbell_is_rung_by_time(relay: Relay, eventfds: tuple[int, int]) -> None:
    doorbell = eventfds[1]
    relay.add(0, None, Doorbell(fd=doorbell))
    relay.add(1, None, Doorbell(fd=doorbell))
    total, end = 0, time.monotonic() + 0.2
    while time.monotonic() < end:
        total += rung(doorbell)
    assert 20 <= total <= 450
    relay.remove(0)
    rung(doorbell)
    relay.remove(1)
    assert_silent_after_removal(doorbell)
    assert kicks(relay, 0) == 0


def assert_silent_after_removal(doorbell: int) -> None:
    if select.select([doorbell], [], [], 0)[0]:
        os.eventfd_read(doorbell)
    assert silent(doorbell)


def test_after_remove_neither_descriptor_is_used(relay: Relay, eventfds: tuple[int, int]) -> None:
    kick, doorbell = eventfds
    relay.add(0, kick, Doorbell(fd=doorbell))
    relay.remove(0)
    relay.remove(0)
    os.eventfd_write(kick, 1)
    assert silent(doorbell)
    assert os.eventfd_read(kick) == 1, "the relay still read the kick"


def test_a_ring_comes_back_with_other_descriptors(relay: Relay, eventfds: tuple[int, int]) -> None:
    kick, doorbell = eventfds
    register = Register()
    relay.add(0, kick, register.doorbell)
    with pytest.raises(OSError, match="busy"):
        relay.add(0, kick, register.doorbell)
    relay.remove(0)
    relay.add(0, kick, Doorbell(fd=doorbell))
    os.eventfd_write(kick, 1)
    assert rung(doorbell) == 1
    assert register.written is None
    assert kicks(relay, 0) == 1


def test_kicks_are_counted_in_their_eventfd_until_the_ring_goes(
    relay: Relay, eventfds: tuple[int, int]
) -> None:
    """To read one for each kick would cost whoever kicks."""
    kick, doorbell = eventfds
    relay.add(0, kick, Doorbell(fd=doorbell))
    for _ in range(3):
        os.eventfd_write(kick, 1)
        assert rung(doorbell) == 1
    assert os.eventfd_read(kick) == 3
    relay.remove(0)
    assert silent(doorbell), "nothing was left to hear"


def test_a_removal_forwards_what_was_not_heard_yet(relay: Relay, eventfds: tuple[int, int]) -> None:
    """However it meets a kick: the doorbell is rung after it, and nobody finds it a second time."""
    kick, doorbell = eventfds
    for round_ in range(1000):
        ring = round_ % RINGS
        relay.add(ring, kick, Doorbell(fd=doorbell))
        os.eventfd_write(kick, 1)
        relay.remove(ring)
        ready = select.select([kick, doorbell], [], [], 0)[0]
        assert ready == [doorbell]
        assert os.eventfd_read(doorbell) in (1, 2), "by the thread, and by the removal"


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def closed_socket() -> int:
    left, right = socket.socketpair()
    right.close()
    return left.detach()


def pipe_with_three_bytes() -> int:
    reader, writer = os.pipe()
    os.write(writer, b"abc")
    os.close(writer)
    return reader


@pytest.mark.parametrize("make", [closed_pipe, closed_socket, pipe_with_three_bytes])
def test_a_kick_that_is_no_eventfd_does_not_spin(
    make: Callable[[], int], relay: Relay, eventfds: tuple[int, int]
) -> None:
    kick, doorbell = eventfds
    bad = make()
    relay.add(0, bad, Doorbell(fd=doorbell))
    relay.add(1, kick, Doorbell(fd=doorbell))
    wait_for("the descriptor to be given up", lambda: errors(relay, 0) == 1, 5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    assert silent(doorbell)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 0.015
    os.eventfd_write(kick, 1)
    assert rung(doorbell) == 1, "the other ring suffers"
    relay.ring(0)
    assert rung(doorbell) == 1
    relay.remove(0)
    os.close(bad)


def test_descriptors_that_cannot_be_waited_for(
    relay: Relay, eventfds: tuple[int, int], tmp_path: Path
) -> None:
    with (tmp_path / "plain").open("w") as plain, pytest.raises(PermissionError):
        relay.add(0, plain.fileno(), Doorbell(fd=eventfds[1]))
    with Path("/dev/random").open("rb") as endless, pytest.raises(PermissionError):
        relay.add(0, endless.fileno(), Doorbell(fd=eventfds[1]))
    with pytest.raises(OSError, match="Bad file descriptor"):
        relay.add(0, 9999, Doorbell(fd=eventfds[1]))
    relay.add(0, eventfds[0], Doorbell(fd=eventfds[1]))


@pytest.mark.parametrize(
    ("ring", "doorbell"), [(RINGS, Doorbell(fd=0)), (0, Doorbell()), (0, Doorbell(address=0x1001))]
)
def test_rings_and_doorbells_that_cannot_be(
    ring: int, doorbell: Doorbell, relay: Relay, eventfds: tuple[int, int]
) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        relay.add(ring, eventfds[0], doorbell)


@pytest.mark.parametrize("blocking", [False, True])
def test_a_full_doorbell_does_not_block(blocking: bool, relay: Relay, eventfds: tuple[int, int]) -> None:
    """It is the device's, and so are its flags."""
    kick, doorbell = eventfds
    os.eventfd_write(doorbell, 0xFFFFFFFFFFFFFFFE)
    os.set_blocking(doorbell, blocking)
    relay.add(0, kick, Doorbell(fd=doorbell))
    os.eventfd_write(kick, 1)
    wait_for("the kick to be heard", lambda: kicks(relay, 0) == 1, 5)
    # In a thread, as what would block would do so for ever.
    remover = threading.Thread(target=relay.remove, args=(0,))
    remover.start()
    remover.join(5)
    stuck = remover.is_alive()
    os.eventfd_read(doorbell)
    remover.join()
    assert not stuck
    assert (kicks(relay, 0), errors(relay, 0)) == (1, 2), "by the kick, and by the removal"


def test_close_ends_the_thread_and_leaves_the_descriptors(eventfds: tuple[int, int]) -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before, fds = threads(), len(list(Path("/proc/self/fd").iterdir()))
    relay = Relay(1)
    assert threads() == before + 1
    relay.add(0, eventfds[0], Doorbell(fd=eventfds[1]))
    relay.close()
    relay.close()
    # It is joined, but stays in /proc for a moment.
    assert wait_for("the thread to go", lambda: threads() == before, 5)
    assert len(list(Path("/proc/self/fd").iterdir())) == fds
    os.eventfd_write(eventfds[0], 1)
    assert silent(eventfds[1])
    with pytest.raises(ValueError, match="closed"):
        relay.add(0, eventfds[0], Doorbell(fd=eventfds[1]))
