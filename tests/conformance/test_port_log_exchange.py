"""What goes wrong while a front-end begins or ends to log, over a real port: it is told afterwards. And a
port that takes over from one that was killed while it logged."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from datapath.vhost_user.backend import F_LOG_ALL, F_PROTOCOL_FEATURES
from datapath.vhost_user.messages import LogArea, Request, VringState
from tests.harness.dirty_log import PAGE, marked_pages
from tests.harness.emulated_nic import EmulatedNic, PortProcess
from tests.harness.front_end import BUFFERS, MEMORY_SIZE, VIRTIO, SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import wait_for
from tests.harness.traffic import RX, TX, offer_buffers, transmit
from tests.harness.wire import Wire

SIZE = MEMORY_SIZE // PAGE // 8
FEATURES = VIRTIO | F_PROTOCOL_FEATURES


@pytest.fixture
def nic(tmp_path: Path) -> Iterator[EmulatedNic]:
    with NetworkNamespace() as namespace, EmulatedNic(tmp_path / "nic", namespace, 1, "--keep") as running:
        yield running


@pytest.fixture
def port(nic: EmulatedNic, tmp_path: Path, log_mode: str) -> Iterator[PortProcess]:
    with PortProcess(tmp_path, nic.device(0), f"--log-mode={log_mode}") as running:
        yield running


@pytest.fixture
def front_end(front_end: SocketFrontEnd) -> SocketFrontEnd:
    """A front-end whose rings run, and that asks for an answer to everything."""
    front_end.start()
    front_end.need_reply = True
    return front_end


@pytest.fixture
def log() -> Iterator[int]:
    fd = os.memfd_create("log")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def marked(log: int) -> set[int]:
    """The addresses of the pages that are marked."""
    return marked_pages(os.pread(log, SIZE, 0))


def switch(peer: SocketFrontEnd, on: bool) -> list[int]:
    """The exchange but for SET_LOG_BASE; the answers."""
    answers = [peer.tell(Request.SET_FEATURES, FEATURES | (F_LOG_ALL if on else 0))]
    peer.tell(Request.GET_STATUS)
    return answers + [peer.tell(Request.SET_VRING_ADDR, peer.address(index, int(on))) for index in (RX, TX)]


def lost(port: PortProcess) -> bool:
    """Whether the port has told that its device is gone, and why the log is not to be relied on."""
    log = port.status()["log"]
    return "gone" in (log["problem"] or "")


def wait_end(port: PortProcess, peer: SocketFrontEnd) -> None:
    """Wait for both to end: the connection, and with its VF the port."""
    assert peer.ended()
    assert wait_for("its end", lambda: not port.running, 10)
    assert port.popen.returncode == 1
    assert "Traceback" not in port.log.read_text()


def test_a_device_that_dies_as_logging_begins(
    front_end: SocketFrontEnd, port: PortProcess, nic: EmulatedNic, log: int
) -> None:
    assert front_end.tell(Request.SET_LOG_BASE, LogArea(SIZE, 0), log) == 0
    nic.kill()
    assert wait_for("what was lost", lambda: lost(port), 10)
    assert switch(front_end, True) == [0, 0, 0]
    # Nothing follows: it ends by itself.
    wait_end(port, front_end)


def test_a_device_that_dies_as_logging_ends(
    front_end: SocketFrontEnd, port: PortProcess, nic: EmulatedNic, log: int
) -> None:
    front_end.tell(Request.SET_LOG_BASE, LogArea(SIZE, 0), log)
    assert switch(front_end, True) == [0, 0, 0]
    assert port.status()["log"]["problem"] is None
    nic.kill()
    assert switch(front_end, False) == [0, 0, 0]
    wait_end(port, front_end)


@pytest.mark.parametrize("on", [True, False], ids=["begins", "ends"])
def test_a_device_that_does_not_answer_while_logging(
    front_end: SocketFrontEnd, port: PortProcess, nic: EmulatedNic, log: int, on: bool
) -> None:
    """Every message is answered, however long the port waits for its VF; the connection ends afterwards."""
    front_end.tell(Request.SET_LOG_BASE, LogArea(SIZE, 0), log)
    if not on:
        assert switch(front_end, True) == [0, 0, 0]
    nic.signal(signal.SIGSTOP)
    try:
        assert switch(front_end, on) == [0, 0, 0]
        assert front_end.ended()
    finally:
        nic.signal(signal.SIGCONT)
    assert "no answer" in port.log.read_text()


def test_the_next_message_ends_the_exchange(
    front_end: SocketFrontEnd, port: PortProcess, nic: EmulatedNic, log: int
) -> None:
    front_end.tell(Request.SET_LOG_BASE, LogArea(SIZE, 0), log)
    nic.kill()
    assert switch(front_end, True) == [0, 0, 0]
    with pytest.raises(ConnectionError):
        front_end.tell(Request.GET_VRING_BASE, VringState(RX, 0))
    wait_end(port, front_end)
    # Whatever the device may have written counts.
    assert os.pread(log, SIZE, 0) == b"\xff" * SIZE


def test_a_front_end_that_leaves_in_the_exchange(
    front_end: SocketFrontEnd, port: PortProcess, nic: EmulatedNic, log: int
) -> None:
    front_end.tell(Request.SET_LOG_BASE, LogArea(SIZE, 0), log)
    nic.kill()
    assert wait_for("what was lost", lambda: lost(port), 10)
    front_end.socket.shutdown(socket.SHUT_RDWR)
    wait_end(port, front_end)


def test_how_writes_are_logged_is_told(
    front_end: SocketFrontEnd, port: PortProcess, log_mode: str, log: int
) -> None:
    assert port.status()["log"]["wanted"] is False
    small = SIZE // 2
    front_end.tell(Request.SET_LOG_BASE, LogArea(small, 0), log)
    switch(front_end, True)
    told = port.status()["log"]
    reason = f"the dirty log has {small} bytes, guest memory up to {MEMORY_SIZE:#x} needs {SIZE}"
    assert (told["wanted"], told["mode"], told["problem"]) == (True, log_mode, reason)
    front_end.tell(Request.SET_LOG_BASE, LogArea(SIZE, 0), log)
    assert port.status()["log"]["problem"] is None
    switch(front_end, False)
    told = port.status()["log"]
    assert (told["wanted"], told["mode"], told["problem"]) == (False, None, None)


def test_a_port_that_was_killed_under_load_leaves_nothing_unmarked(
    nic: EmulatedNic, tmp_path: Path, log_mode: str, log: int
) -> None:
    """Every page in which a frame has arrived is in the log, whoever was to mark it."""
    option = f"--log-mode={log_mode}"
    before = bytearray(MEMORY_SIZE)
    with closing(Wire(nic.namespace, "vf0")) as wire:
        with PortProcess(tmp_path, nic.device(0), option) as first:
            peer = SocketFrontEnd.dial(first.socket)
            peer.connect()
            peer.start()
            offer_buffers(peer, 200)
            peer.tell(Request.SET_LOG_BASE, LogArea(SIZE, 0), log)
            switch(peer, True)
            before[:] = peer.memory.read(0, MEMORY_SIZE)
            wire.send(*range(1000, 1050))
            wait_for("the load", lambda: peer.queues[RX].used_index > 20, 10)
            first.signal(signal.SIGSTOP)  # its VF goes on, and nobody marks what that writes
            wire.send(*range(1050, 1150))
            if log_mode == "software":
                wait_for("what is not marked", lambda: pages_written(before, peer) - marked(log), 10)
            first.kill()
        with PortProcess(tmp_path, nic.device(0), option) as second:
            peer.socket = SocketFrontEnd.dial(second.socket).socket
            peer.connect()
            peer.enable()
            peer.tell(Request.SET_FEATURES, FEATURES | F_LOG_ALL)
            peer.share_memory()
            for index, queue in enumerate(peer.queues):
                peer.set_up_ring(index, queue.used_index)
            peer.tell(Request.SET_LOG_BASE, LogArea(SIZE, 0), log)
            peer.driver_ok()
            transmit(peer, 5000)
            wire.expect(5000)
            peer.stop()
            assert pages_written(before, peer) - {BUFFERS} <= marked(log)
        peer.close()


def pages_written(before: bytearray, peer: SocketFrontEnd) -> set[int]:
    """The pages of guest memory that have changed, without those that only the guest writes: descriptors, the
    available rings."""
    now = peer.memory.read(0, MEMORY_SIZE)
    used = {queue.used // PAGE * PAGE for queue in peer.queues}
    changed = {at for at in range(0, MEMORY_SIZE, PAGE) if now[at : at + PAGE] != before[at : at + PAGE]}
    return {at for at in changed if at >= BUFFERS or at in used}
