"""The hook and peers, streams and answers that it cannot rely on. What libvirt sees is one line and the exit
code of the operation: a running guest is killed when `reconnect` fails.

The hook with a real daemon is test_daemon.py's.
"""

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from libvirt_vdpa.metadata import xml_folder
from tests.harness.daemon_host import HOOK

XML = (xml_folder() / "vdpa-demo.xml").read_bytes()
GREETING = b'{"QMP": {}}\n'
YES = b'{"return": {}}\n'


class Peer:
    """Something that listens where the daemon should, and says the same whatever it is asked."""

    def __init__(self, answer: bytes) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vdpa-", dir="/tmp")
        self.path = Path(self._folder.name) / "s"
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            with connection:
                connection.sendall(self._answer)
                while connection.recv(65536):
                    pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        self._folder.cleanup()


def call(
    operation: str, path: Path | str, shell: str = 'exec "$@"', xml: bytes = XML
) -> subprocess.CompletedProcess[bytes]:
    """The hook, started by a line of shell that may do things to its streams."""
    return subprocess.run(
        ["sh", "-c", shell, "sh", str(HOOK), "a", operation, "begin", "-"],
        input=xml,
        capture_output=True,
        env={"LIBVIRT_VDPA_SOCKET": str(path), "LC_ALL": "C", "PATH": os.environ["PATH"]},
        timeout=30,
    )


def limits(limit: str) -> bytes:
    """A daemon's answers up to its time limit, and its agreement."""
    return GREETING + YES + b'{"return": {"hook-time-limit": ' + limit.encode() + b"}}\n" + YES


ODD = {
    "null-limit": limits("null"),
    "list-limit": limits("[]"),
    "endless-limit": limits("1e999"),
    "no-number-limit": limits("NaN"),
    "long-limit": limits("1e12"),
    "negative-limit": limits("-1"),
    "huge-limit": limits("1" + 400 * "0"),
    "nested": GREETING + 100_000 * b"[" + b"\n",
    "no-object": b"17\n",
    "no-json": b"hello\n",
    "no-text": b"\xff\xfe\n",
    "no-answer": GREETING + b"{}\n",
    "odd-error": GREETING + YES + YES + b'{"error": {"desc": "\\ud800"}}\n',
}


@pytest.fixture(params=ODD)
def odd(request: pytest.FixtureRequest) -> Iterator[Peer]:
    peer = Peer(ODD[request.param])
    yield peer
    peer.close()


@pytest.mark.parametrize(("operation", "code"), [("prepare", 1), ("reconnect", 0)])
def test_an_odd_peer_is_told_of_in_one_line(odd: Peer, operation: str, code: int) -> None:
    done = call(operation, odd.path)
    assert (done.returncode, done.stdout) == (code, b"")
    assert done.stderr.startswith(b"libvirt-vdpa: ")
    assert done.stderr.count(b"\n") == 1
    assert b"failed inside the hook" not in done.stderr


def test_a_peer_that_only_tells_of_events_is_left() -> None:
    events = json.dumps({"event": "E"}).encode() + b"\n"
    peer = Peer(GREETING + YES + b'{"return": {"hook-time-limit": 0.2}}\n' + 100_000 * events)
    try:
        done = call("prepare", peer.path)
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"did not answer within 0.2 s" in done.stderr
    finally:
        peer.close()


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2</dev/null", ">&- 2>&-"])
@pytest.mark.parametrize(("operation", "code"), [("prepare", 1), ("reconnect", 0)])
def test_nobody_to_tell(stderr: str, operation: str, code: int) -> None:
    done = call(operation, "/no/such/socket", f'exec "$@" {stderr}')
    assert (done.returncode, done.stdout) == (code, b"")


@pytest.mark.parametrize(("operation", "code"), [("prepare", 1), ("reconnect", 0), ("no-such", 0)])
def test_what_nobody_has_thought_of_is_one_line(operation: str, code: int) -> None:
    # No libvirt hands over an XML that cannot be read.
    done = call(operation, "/no/such/socket", 'exec "$@" 0>/dev/null')
    assert (done.returncode, done.stdout) == (code, b"")
    said = f"{operation} failed inside the hook: OSError: [Errno 9] Bad file descriptor"
    assert done.stderr.decode() == f"libvirt-vdpa: {said}\n"


REPLACEMENT = "<domain>é</domain>"


def with_replacement(xml: str) -> Peer:
    """A daemon that wants the domain's XML replaced."""
    answer = {"return": {"xml": json.loads(xml)}}
    return Peer(GREETING + YES + YES + json.dumps(answer).encode() + b"\n")


@pytest.mark.parametrize(
    ("operation", "printed"),
    [("migrate", REPLACEMENT), ("restore", REPLACEMENT), ("prepare", ""), ("reconnect", "")],
)
def test_xml_is_printed_where_libvirt_takes_it(operation: str, printed: str) -> None:
    peer = with_replacement(json.dumps(REPLACEMENT))
    try:
        done = call(operation, peer.path)
        assert (done.returncode, done.stdout, done.stderr) == (0, printed.encode(), b"")
    finally:
        peer.close()


@pytest.mark.parametrize("stdout", [">&-", ">/dev/full"])
def test_xml_that_cannot_be_handed_over_is_a_refusal(stdout: str) -> None:
    peer = with_replacement(json.dumps(REPLACEMENT))
    try:
        done = call("migrate", peer.path, f'exec "$@" {stdout}')
        assert done.returncode == 1
        assert b"migrate of domain 'a': the XML for this host cannot be handed over" in done.stderr
    finally:
        peer.close()


@pytest.mark.parametrize("xml", ["17", "null", "[]"])
def test_xml_that_is_no_text_is_not_printed(xml: str) -> None:
    peer = with_replacement(xml)
    try:
        done = call("migrate", peer.path)
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"does not speak QMP as virtvdpad does" in done.stderr
    finally:
        peer.close()


def test_a_domain_of_others_costs_no_imports() -> None:
    command = ["/usr/bin/python3", "-IS", "-X", "importtime", str(HOOK), "a", "prepare", "begin", "-"]
    plain = ["/usr/bin/python3", "-IS", "-X", "importtime", "-c", ""]
    imports = [
        {
            line.rpartition(b"|")[2].strip()
            for line in subprocess.run(words, input=b"<domain/>", capture_output=True).stderr.splitlines()
        }
        for words in (command, plain)
    ]
    assert imports[0] <= imports[1]
