"""DPDK's mlx5 vDPA driver on an emulated ConnectX whose commands fail: each of them, or all from one on.

Where the driver does not get over it by its own fault, that is said here.
"""

import signal
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.harness.dpdk_front_end import PROTOCOL, Cable, DpdkFrontEnd
from tests.harness.dpdk_vdpa import DpdkVdpa
from tests.harness.processes import HarnessError

pytestmark = pytest.mark.dpdk

#: Commands until a device is probed, until a first guest has come and gone, and until the process has ended.
PROBED, GONE, ENDED = 8, 107, 113
#: Those that the driver tries again while it probes, the first for 12.7 seconds: they take the doorbell page
#: and the UAR.
TRIED_AGAIN = (4, 8)
#: That which registers guest memory. The driver reads the key of a region that it has not got, at NULL.
KILLS = 9
#: Those that destroy flows, TIRs, the RQT and queues. The driver takes them for done: the object that is left
#: holds those that it needs, down to a queue whose number the next guest is to have.
FORGOTTEN = range(71, 88)
#: Which always run: of every part of a life.
SAMPLE = {*range(1, ENDED + 1, 16), KILLS}


def sweep(numbers: Iterable[int]) -> list[object]:
    """Numbers of commands as parameters of a test."""
    return [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.full) for n in sorted(numbers)]


def live(peer: DpdkVdpa, cable: Cable, number: int) -> None:
    """A guest comes, passes numbered frames, is logged and goes.

    :raise ConnectionError: when it is not served.
    :raise HarnessError: when a frame does not pass.
    :raise TimeoutError: when the driver hangs: it does not answer the guest's front-end.
    """
    with closing(DpdkFrontEnd.dial(peer.socket, PROTOCOL)) as guest:
        guest.begin()
        guest.offer(16)
        guest.transmit(number)
        assert cable.receive(1) == [number]
        cable.send(number + 1)
        assert list(guest.receive(1)) == [number + 1]
        peer.counters(0)
        guest.start_logging()
        guest.stop()


def forget(peer: DpdkVdpa) -> None:
    """Wait until all is given back that was made for a guest: it is before another one is heard."""
    with closing(DpdkFrontEnd.dial(peer.socket, PROTOCOL)) as guest:
        guest.connect()


def test_the_number_of_commands(tmp_path: Path) -> None:
    with Cable() as cable, DpdkVdpa(tmp_path, options={"latency_us": 0}, cable=cable.fd) as peer:
        peer.answer(0)
        assert peer.commands() == PROBED
        live(peer, cable, 1)
        forget(peer)
        assert peer.commands() == GONE
        assert peer.finish() == 0
        assert peer.commands() == ENDED


@pytest.mark.parametrize("number", sweep(range(1, PROBED + 1)))
@pytest.mark.parametrize("kind", ["fail", "dead"])
def test_probing_fails(tmp_path: Path, kind: str, number: int) -> None:
    """The driver says so and ends, or tries again."""
    with DpdkVdpa(tmp_path, options={"latency_us": 0, kind: number}) as peer:
        with suppress(HarnessError):
            peer.answer(0)
        probed = kind == "fail" and number in TRIED_AGAIN
        assert bool(peer.answers()) == probed
        assert peer.finish() == (0 if probed else 1)


@pytest.mark.parametrize("kind", ["fail", "dead"])
def test_memory_that_cannot_be_registered_kills_the_driver(tmp_path: Path, kind: str) -> None:
    with Cable() as cable, DpdkVdpa(tmp_path, options={"latency_us": 0, kind: KILLS}, cable=cable.fd) as peer:
        peer.answer(0)
        with pytest.raises(ConnectionError):
            live(peer, cable, 1)
        assert peer.finish() == -signal.SIGSEGV


@pytest.mark.parametrize(
    "number", sweep(n for n in range(PROBED + 1, GONE + 1) if n not in {KILLS, *FORGOTTEN})
)
def test_one_command_fails(tmp_path: Path, number: int) -> None:
    """Whether the first guest is served or not, the next one is, and the driver ends in order."""
    options = {"latency_us": 0, "fail": number}
    with Cable(patience=0.5) as cable, DpdkVdpa(tmp_path, options=options, cable=cable.fd) as peer:
        peer.answer(0)
        with suppress(ConnectionError, HarnessError):
            live(peer, cable, 1)
        forget(peer)
        assert peer.commands() >= number
        cable.take_all()
        live(peer, cable, 11)
        assert peer.finish() == 0


@pytest.mark.parametrize("number", sweep(FORGOTTEN))
def test_what_is_not_destroyed_keeps_the_next_guest_out(tmp_path: Path, number: int) -> None:
    """The driver lives, and ends in order."""
    options = {"latency_us": 0, "fail": number}
    with Cable(patience=0.5) as cable, DpdkVdpa(tmp_path, options=options, cable=cable.fd) as peer:
        peer.answer(0)
        live(peer, cable, 1)
        forget(peer)
        with pytest.raises(HarnessError):
            live(peer, cable, 11)
        forget(peer)
        assert "DevX create VIRTQ failed" in peer.log.read_text()
        assert peer.finish() == 0


@pytest.mark.parametrize("number", sweep(range(GONE + 1, ENDED + 1)))
def test_a_command_fails_while_it_ends(tmp_path: Path, number: int) -> None:
    options = {"latency_us": 0, "fail": number}
    with Cable() as cable, DpdkVdpa(tmp_path, options=options, cable=cable.fd) as peer:
        peer.answer(0)
        live(peer, cable, 1)
        assert peer.finish() == 0
        assert peer.commands() == ENDED


@pytest.mark.parametrize("number", sweep({*range(PROBED + 1, ENDED + 1)} - {KILLS}))
def test_the_device_dies(tmp_path: Path, number: int) -> None:
    """The driver does not hang: it hears the next guest, whom it cannot serve, and ends in order."""
    options = {"latency_us": 0, "dead": number}
    with Cable(patience=0.5) as cable, DpdkVdpa(tmp_path, options=options, cable=cable.fd) as peer:
        peer.answer(0)
        with suppress(ConnectionError, HarnessError):
            live(peer, cable, 1)
        forget(peer)
        assert peer.finish() == 0
        assert peer.commands() >= number
