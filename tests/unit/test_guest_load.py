"""What load.c says of what arrives, between two ends on one machine."""

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.compiled import compiled
from tests.harness.guest import LOAD_PORT
from tests.harness.guest_load import Load, What, read_load
from tests.harness.netns import NetworkNamespace, inside
from tests.harness.processes import HarnessError, Process

HERE, SIZE, MS, RATE = "127.0.0.1", 500, 200, 1000
#: load.c's `struct request` and `struct count`.
REQUEST, COUNT = struct.Struct("@IIIHxx"), struct.Struct("@QQQQ")
KINDS = ("stream-in", "stream-out", "datagrams-in", "datagrams-out", "echo")


@pytest.fixture
def network(tmp_path: Path) -> Iterator[NetworkNamespace]:
    """A namespace in which `load serve` waits."""
    with NetworkNamespace() as made:
        made.run("ip", "link", "set", "lo", "up")
        serve = [*made.prefix, str(compiled("load", "-static")), "serve", str(LOAD_PORT)]
        with Process(serve, tmp_path / "load.log") as process:
            process.wait_for("it to serve", lambda: f":{LOAD_PORT}" in made.run("ss", "-ltnH"))
            yield made


def drive(network: NetworkNamespace, what: What, rate: int = 0, port: int = LOAD_PORT) -> Load:
    words = ["drive", HERE, str(port), what, str(SIZE), str(MS), str(rate)]
    return read_load(network.run(str(compiled("load", "-static")), *words))


@pytest.mark.parametrize("what", ["stream-in", "stream-out"])
def test_a_stream_arrives(network: NetworkNamespace, what: What) -> None:
    found = drive(network, what)
    assert found.bytes >= found.count > 0
    assert found.bytes % SIZE == 0
    assert found.seconds >= 0


@pytest.mark.parametrize("what", ["datagrams-in", "datagrams-out"])
def test_datagrams_that_arrive_are_counted(network: NetworkNamespace, what: What) -> None:
    found = drive(network, what)
    assert found.bytes == found.count * SIZE > 0


def test_a_rate_is_not_exceeded(network: NetworkNamespace) -> None:
    assert 0 < drive(network, "datagrams-in", RATE).count <= RATE * MS / 1000 + 1


def test_an_echo_has_a_time(network: NetworkNamespace) -> None:
    found = drive(network, "echo")
    assert found.count > 0
    assert 0 < found.median_us <= found.most_us


class LossyEcho:
    """The other end of one echo, which loses the first datagrams, or all."""

    def __init__(self, network: NetworkNamespace, lost: int | None) -> None:
        self.port = LOAD_PORT + 1
        self._lost = lost
        self._listener = inside(network.path, lambda: socket.create_server((HERE, self.port)))
        self._datagrams = inside(network.path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._datagrams.bind((HERE, self.port))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        # Until the peer has what it came for or has given up, or this object is closed.
        with contextlib.suppress(OSError):
            control, _ = self._listener.accept()
            with control:
                control.recv(REQUEST.size, socket.MSG_WAITALL)
                control.sendall(b"\0")
                seen = 0
                while control not in select.select([control, self._datagrams], [], [])[0]:
                    data, peer = self._datagrams.recvfrom(SIZE)
                    seen += 1
                    if self._lost is not None and seen > self._lost:
                        self._datagrams.sendto(data, peer)
                control.sendall(bytes(COUNT.size))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # wakes the thread, which close alone would not
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        self._datagrams.close()


def test_an_echo_goes_on_until_one_comes_back(network: NetworkNamespace) -> None:
    """The first is waited for longer than the whole is to take."""
    with contextlib.closing(LossyEcho(network, lost=1)) as echo:
        found = drive(network, "echo", port=echo.port)
    assert found.count > 0
    assert found.median_us > 0


@pytest.mark.full
def test_an_echo_that_never_comes_back_is_an_error(network: NetworkNamespace) -> None:
    with (
        contextlib.closing(LossyEcho(network, lost=None)) as echo,
        pytest.raises(HarnessError, match="echoes: Connection timed out"),
    ):
        drive(network, "echo", port=echo.port)


def test_only_what_arrives_is_counted(network: NetworkNamespace) -> None:
    """The test is a peer that sends three datagrams, though it could send more."""

    def play() -> tuple[int, ...]:
        with (
            socket.create_connection((HERE, LOAD_PORT), timeout=10) as control,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        ):
            control.sendall(REQUEST.pack(KINDS.index("datagrams-in"), SIZE, MS, 0))
            assert control.recv(1) == b"\0"
            for _ in range(3):
                datagrams.sendto(bytes(SIZE), (HERE, LOAD_PORT))
            control.shutdown(socket.SHUT_WR)
            return COUNT.unpack(control.recv(COUNT.size, socket.MSG_WAITALL))

    count, size, first, last = inside(network.path, play)
    assert (count, size) == (3, 3 * SIZE)
    assert first <= last
