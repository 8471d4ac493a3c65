"""The dirty log is right: under full load of a front-end that is not ours, guest memory is compared page by
page with what the log says was written.

DPDK's virtio-user drives the port through a proxy that begins and ends logging as QEMU does. Frames come in
at the uplink whose every 16 bytes tell when they were sent, so whatever is found in guest memory of a frame
sent after the log was complete was written by the device while it logged. Two things are shown of each case:
every page written is marked and no other; and a destination that copies what is marked, while all goes on,
has in the end what the device wrote here.
"""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.harness.dirty_pages import GuestPages, Traffic
from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.processes import wait_for
from tests.harness.testpmd import HEADER_OUT, Testpmd
from tests.harness.vhost_user_proxy import VhostUserProxy

pytestmark = pytest.mark.dpdk

#: Frames between two looks at the log, and looks while it is on.
ROUND, ROUNDS = 1500, 8
#: Frames that may be under way: what the TAP queues (1000), a burst, and as many as any ring has here.
UNDER_WAY = 1000 + 64 + 1024
#: Buffers are used in turn, not the last one first.
IN_TURN = "--mbcache=0"


@dataclass(frozen=True)
class Case:
    """A load: what testpmd does with its frames, its ring size and buffers, and the frames' lengths."""

    mode: str
    queue_size: int
    options: tuple[str, ...] = ()
    shortest: int = 1504
    longest: int = 1504

    @property
    def headers(self) -> bool:
        """Whether the device alone writes virtio's headers: a frame sent on gets another one in its place."""
        return self.mode == "rxonly"

    @property
    def partial(self) -> bool:
        """Whether a frame may be in some of its buffers, of which none is used, when rings stop.

        What no used entry tells of is not marked in software, and no guest reads it.
        """
        return "--enable-scatter" in self.options


CASES = {
    "small ring": Case("rxonly", 64),
    # Of all lengths: an entry of a used ring is otherwise as it was a turn before.
    "ring of several pages, both ways": Case("io", 1024, (), 64),
    "frames of all lengths in large buffers": Case("rxonly", 256, ("--mbuf-size=9000",), 64),
    "frames over several buffers": Case(
        "rxonly", 512, ("--mbuf-size=656", "--enable-scatter", "--max-pkt-len=1600"), 64
    ),
    "frames over several buffers, both ways": Case(
        "io", 256, ("--mbuf-size=656", "--enable-scatter", "--max-pkt-len=1600", "--tx-offloads=0x8000"), 64
    ),
    "transmit alone": Case("txonly", 512),
}


class Load:
    """A front-end at work behind the proxy, and what is seen of its memory."""

    def __init__(self, nic: EmulatedNic, folder: Path, case: Case, log_mode: str) -> None:
        self._close = ExitStack()
        self._nic = nic
        enter = self._close.enter_context
        try:
            self._start_port = partial(PortProcess, folder, nic.device(0))
            self._log_mode = log_mode
            self.port = enter(self._start_port(f"--log-mode={log_mode}"))
            self.proxy = enter(VhostUserProxy(folder / "proxy.sock", self.port.socket))
            self.peer = enter(
                Testpmd(
                    folder,
                    self.proxy.path,
                    case.mode,
                    queue_size=case.queue_size,
                    memory=96,
                    options=[IN_TURN, *case.options],
                )
            )
            self.proxy.wait_until_running()
            wire = enter(closing(nic.namespace.packet_socket("vf0")))
            self.traffic = enter(closing(Traffic(wire, HEADER_OUT, case.shortest, case.longest)))
            self.pages = enter(closing(GuestPages(self.proxy)))
        except BaseException:
            self._close.close()
            raise
        self._receives = case.mode != "txonly"
        self._transmits = case.mode in ("txonly", "io")
        self.work()

    def _moved(self) -> tuple[int, int]:
        seen = self._nic.query(0)
        return seen["rx_packets"], seen["tx_packets"]

    def work(self, frames: int = ROUND) -> None:
        """Wait until so many frames more have gone each way."""
        before = self._moved()

        def done() -> bool:
            received, transmitted = (now - then for now, then in zip(self._moved(), before, strict=True))
            return (received >= frames or not self._receives) and (
                transmitted >= frames or not self._transmits
            )

        wait_for("frames through the VF", done, 60)

    def replace_port(self, *, log_first: bool, log_mode: str | None = None) -> None:
        """Let the port die as it does when it crashes, and another one take its session over."""
        self.port.kill()
        mode = f"--log-mode={log_mode or self._log_mode}"
        self.port = self._close.enter_context(self._start_port(mode))
        self.proxy.reconnect(log_first=log_first)

    def receive_without_port(self) -> None:
        """Let frames arrive that the port does not see any more."""
        self.rest()
        received, _ = self._moved()
        self.port.signal(signal.SIGSTOP)
        self.traffic.rest(False)
        self.rest()
        assert self._moved()[0] > received

    def rest(self) -> None:
        """Send no more, and wait until all frames have arrived."""
        self.traffic.rest()
        seen = [self._moved()]

        def quiet() -> bool:
            seen.append(self._moved())
            return len(seen) > 5 and len(set(seen[-5:])) == 1

        wait_for("all frames to arrive", quiet, 30)

    def close(self) -> None:
        self._close.close()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def load(nic: EmulatedNic, case: Case, log_mode: str, tmp_path: Path) -> Iterator[Load]:
    with closing(Load(nic, tmp_path, case, log_mode)) as made:
        yield made


def log_under_load(load: Load, log_mode: str) -> int:
    """Begin a migration: log, copy all, then again and again what is marked. The first frame of then."""
    pages = load.pages
    load.proxy.start_logging(pages.log, pages.log_size)
    since = load.traffic.next
    assert load.port.status()["log"]["mode"] == log_mode
    pages.copy_all()
    for _ in range(ROUNDS):
        load.work()
        pages.take()
    return since


def end(load: Load, case: Case, log_mode: str) -> None:
    """Stop the rings, and copy what was marked last."""
    if case.partial and log_mode == "software":
        load.rest()
    load.proxy.stop_rings()
    load.pages.take()


def prove(load: Load, case: Case, log_mode: str) -> None:
    """Log while the load goes on, stop the rings, and compare; the rings do not run afterwards."""
    pages, rings = load.pages, load.pages.used_rings()
    earliest = load.traffic.next - UNDER_WAY
    since = log_under_load(load, log_mode)
    end(load, case, log_mode)
    marked, written = pages.marked_pages(), pages.written_since(since)
    assert written or case.mode == "txonly"
    assert not written - marked, "frames were written to pages that are not marked"
    changed = pages.changed_ring_pages(rings)
    assert changed
    assert not changed - marked, "a used ring has changed in pages that are not marked"
    unfounded = marked - pages.written_since(earliest) - pages.used_ring_pages()
    assert not unfounded, "pages are marked that nobody wrote"
    assert pages.differences(headers=case.headers) == []


def test_what_is_written_is_marked_and_nothing_else(load: Load, case: Case, log_mode: str) -> None:
    prove(load, case, log_mode)


@pytest.mark.parametrize("case", ["ring of several pages, both ways"], indirect=True)
def test_logging_is_switched_off_and_on_under_load(load: Load, case: Case, log_mode: str) -> None:
    pages = load.pages
    for _ in range(3):
        load.proxy.start_logging(pages.log, pages.log_size)
        load.work()
        assert pages.take()
        load.proxy.stop_logging()
        pages.take()
        load.work()
        assert pages.take() == 0, "pages are marked after logging"
    pages.forget_marked()
    prove(load, case, log_mode)


@pytest.mark.parametrize("case", ["ring of several pages, both ways"], indirect=True)
def test_another_log_takes_over_under_load(load: Load, case: Case, log_mode: str) -> None:
    since = log_under_load(load, log_mode)
    for _ in range(ROUNDS):
        load.pages.replace_log()
        load.work()
    end(load, case, log_mode)
    assert not load.pages.written_since(since) - load.pages.marked_pages()
    assert load.pages.differences(headers=case.headers) == []


@pytest.mark.parametrize("case", ["small ring", "ring of several pages, both ways"], indirect=True)
@pytest.mark.parametrize("log_first", [False, True], ids=["log last", "log first"])
def test_a_port_that_dies_while_it_logs_leaves_nothing_out(
    load: Load, case: Case, log_mode: str, log_first: bool
) -> None:
    """What its device wrote and nobody marked, the next port marks."""
    log_under_load(load, log_mode)
    for _ in range(3):
        load.replace_port(log_first=log_first)
        load.work()
        load.pages.take()
    end(load, case, log_mode)
    assert load.pages.differences(headers=case.headers) == []


@pytest.mark.parametrize("case", ["ring of several pages, both ways"], indirect=True)
@pytest.mark.parametrize("log_first", [False, True], ids=["log last", "log first"])
def test_frames_that_came_while_a_port_died_are_marked(
    load: Load, case: Case, log_mode: str, log_first: bool
) -> None:
    """Nobody has marked their buffers, or the used ring, and nothing is written there again."""
    log_under_load(load, log_mode)
    load.receive_without_port()
    load.replace_port(log_first=log_first)
    end(load, case, log_mode)
    assert load.pages.differences(headers=case.headers) == []


@pytest.mark.parametrize("log_mode", ["hardware"], indirect=True)
@pytest.mark.parametrize("case", ["ring of several pages, both ways"], indirect=True)
def test_used_rings_that_a_dead_port_did_not_mark_are_marked(load: Load, case: Case, log_mode: str) -> None:
    """A relay marks of them what it writes itself, so what the VF wrote there before must be marked first."""
    log_under_load(load, log_mode)
    load.receive_without_port()
    load.replace_port(log_first=True, log_mode="software")
    end(load, case, log_mode)
    assert load.pages.differences(headers=case.headers) == []
