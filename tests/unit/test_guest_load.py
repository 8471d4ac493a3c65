"""What load.c says of what arrives, between two ends on one machine."""

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.compiled import compiled
from tests.harness.guest import LOAD_PORT
from tests.harness.guest_load import Load, What, read_load
from tests.harness.netns import NetworkNamespace, inside
from tests.harness.processes import Process

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


def drive(network: NetworkNamespace, what: What, rate: int = 0) -> Load:
    words = ["drive", HERE, str(LOAD_PORT), what, str(SIZE), str(MS), str(rate)]
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
