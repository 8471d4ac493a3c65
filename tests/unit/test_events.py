"""Following libvirt: its test driver has one running domain, in this process and without a daemon."""

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path

import libvirt
import pytest

from libvirt_vdpa.events import DomainWatcher

URI = "test:///default"


class Recorder:
    """Notes with which running domains it was called."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[set[str]] = asyncio.Queue()
        #: What reconcile says.
        self.done = True

    def snapshot(self) -> Mapping[str, int]:
        return {"some-uuid": 1}

    async def reconcile(self, running: set[str], snapshot: Mapping[str, int]) -> bool:
        assert snapshot == {"some-uuid": 1}
        self.calls.put_nowait(running)
        return self.done


@pytest.fixture
def domain() -> Iterator[libvirt.virDomain]:
    # The test driver's state is shared in this process as long as a connection is open.
    connection = libvirt.open(URI)
    domain = connection.lookupByName("test")
    yield domain
    connection.close()


def test_reconciles_when_connected_and_when_a_domain_stops(domain: libvirt.virDomain) -> None:
    async def run() -> None:
        recorder = Recorder()
        watcher = DomainWatcher(URI, recorder, asyncio.get_running_loop())
        watcher.start()
        async with asyncio.timeout(10):
            assert await recorder.calls.get() == {domain.UUIDString()}
            domain.destroy()
            assert await recorder.calls.get() == set()
        watcher.stop()

    asyncio.run(run())


def test_looks_again_when_there_is_something_left(
    domain: libvirt.virDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libvirt_vdpa.events.LOOK_AGAIN_INTERVAL", 0.01)

    async def run() -> None:
        recorder = Recorder()
        recorder.done = False
        watcher = DomainWatcher(URI, recorder, asyncio.get_running_loop())
        watcher.start()
        async with asyncio.timeout(10):
            await recorder.calls.get()
            await recorder.calls.get()
        watcher.stop()

    asyncio.run(run())


def test_waits_for_a_libvirt_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("libvirt_vdpa.events.RECONNECT_INTERVAL", 0.01)
    definition = tmp_path / "node.xml"
    uri = f"test://{definition}"

    async def run() -> None:
        recorder = Recorder()
        watcher = DomainWatcher(uri, recorder, asyncio.get_running_loop())
        watcher.start()
        async with asyncio.timeout(10):
            while f"libvirt ({uri}): " not in caplog.text:
                await asyncio.sleep(0.01)
            assert recorder.calls.empty()
            # It is there now, whole at once: a libvirt with no domain.
            new = tmp_path / "new"
            new.write_text("<node/>")
            new.rename(definition)
            assert await recorder.calls.get() == set()
        watcher.stop()

    asyncio.run(run())
    # Not once for each of many tries.
    assert caplog.text.count("working by hooks alone until it is back") == 1
