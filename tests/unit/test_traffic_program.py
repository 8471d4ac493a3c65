"""The traffic program accounts for every byte: what is done to it on the way is in its summary."""

import json
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.compiled import compiled
from tests.harness.guest_traffic import Summary, read_summary
from tests.harness.processes import Process, wait_for


class Meddler:
    """Passes a session's connections and the peer's datagrams on, less well than it should."""

    def __init__(self, to: int) -> None:
        self._to = ("127.0.0.1", to)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._datagrams.bind(("127.0.0.1", self.port))
        self._ways: dict[socket.socket, socket.socket] = {}
        self._stream_bytes = 0
        self._count = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            ready, _, _ = select.select([self._listener, self._datagrams, *self._ways], [], [], 0.05)
            for sock in ready:
                if sock is self._listener:
                    near, far = self._listener.accept()[0], socket.create_connection(self._to)
                    self._ways |= {near: far, far: near}
                elif sock is self._datagrams:
                    self._pass_datagram(bytearray(self._datagrams.recv(2048)))
                else:
                    self._pass_bytes(sock, bytearray(sock.recv(65536)))

    def _pass_datagram(self, datagram: bytearray) -> None:
        """Of the first four: one lost, one doubled, one altered, one as it was."""
        self._count += 1
        copies = {1: 0, 2: 2}.get(self._count, 1)
        if self._count == 3:
            datagram[-1] ^= 1
        for _ in range(copies):
            self._datagrams.sendto(datagram, self._to)

    def _pass_bytes(self, sock: socket.socket, content: bytearray) -> None:
        """One byte of the second connection's, the stream's, is altered on its way from the guest."""
        if not content:
            self._ways.pop(sock).shutdown(socket.SHUT_WR)
            return
        if list(self._ways).index(sock) == 3 and not self._stream_bytes:
            content[7] ^= 0x80
            self._stream_bytes += len(content)
        self._ways[sock].sendall(content)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        for sock in (self._listener, self._datagrams, *self._ways):
            sock.close()


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """The program as the guest runs it; its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    with Process([compiled("traffic", "-static"), "serve", str(port)], folder / "serve.log") as guest:
        guest.wait_for("its port", lambda: f":{port:04X} " in Path("/proc/net/tcp").read_text())
        yield port


def drive(folder: Path, port: int) -> Summary:
    """A session of some datagrams; its summary."""
    log = folder / "drive.log"
    words = ["drive", "127.0.0.1", str(port), "1000", "1000000"]
    with Process([compiled("traffic", "-static"), *words], log) as peer:
        wait_for("progress", lambda: log.read_text().count("progress") > 3, 10)
        peer.signal(signal.SIGTERM)
        assert peer.popen.wait(20) == 0, log.read_text()
    return read_summary(json.loads(log.read_text().splitlines()[-1])["summary"])


def test_all_that_was_sent_comes(tmp_path: Path) -> None:
    with served(tmp_path) as port:
        for _ in range(2):
            summary = drive(tmp_path, port)
            (tmp_path / "drive.log").unlink()
            assert summary.damage() == []
            assert min(summary.to_guest.sent, summary.from_guest.sent) > 100
            assert (summary.to_guest.lost, summary.from_guest.lost) == ((), ())
            assert min(summary.stream_to_guest.sent, summary.stream_from_guest.sent) > 100_000


def test_what_is_done_on_the_way_is_told(tmp_path: Path) -> None:
    with served(tmp_path) as port:
        meddler = Meddler(port)
        try:
            summary = drive(tmp_path, meddler.port)
        finally:
            meddler.close()
    # One was lost, and one altered so that it was lost as well.
    assert [lost.number for lost in summary.to_guest.lost] == [0, 2]
    assert summary.to_guest.lost_outside([]) == list(summary.to_guest.lost)
    assert summary.damage() == [
        "stream from the guest: 0 bytes lost, 1 altered",
        "datagrams to the guest: 1 doubled, 1 altered",
    ]


@pytest.mark.parametrize("words", [["drive"], ["drive", "nobody", "1", "1", "1"]])
def test_a_call_that_cannot_be(tmp_path: Path, words: list[str]) -> None:
    log = tmp_path / "log"
    with Process([compiled("traffic", "-static"), *words], log) as program:
        assert program.popen.wait(5) == 1
    assert log.read_text().startswith("traffic: ")
