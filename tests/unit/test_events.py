"""Following libvirt: its test driver has one running domain, in this process and without a daemon."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import libvirt
import pytest

from libvirt_vdpa.events import DomainWatcher
from libvirt_vdpa.hypervisor import Hypervisor, HypervisorError

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
    # What an earlier test has left of it.
    if domain.isActive():
        domain.destroy()
    domain.create()
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


def test_tells_what_happens_while_a_hook_keeps_a_domain(domain: libvirt.virDomain) -> None:
    async def run() -> None:
        recorder, listener = Recorder(), Listener()
        released = asyncio.Event()
        reconcile = recorder.reconcile

        async def wait(running: set[str], snapshot: Mapping[str, int]) -> bool:
            await reconcile(running, snapshot)
            await released.wait()
            return True

        recorder.reconcile = wait  # type: ignore[method-assign]
        watcher = DomainWatcher(URI, recorder, asyncio.get_running_loop(), None, listener)
        watcher.start()
        async with asyncio.timeout(10):
            await recorder.calls.get()
            domain.destroy()
            stopped, destroyed = (
                libvirt.VIR_DOMAIN_EVENT_STOPPED,
                libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED,
            )
            await listener.until("lifecycle", domain.UUIDString(), stopped, destroyed)
            assert recorder.calls.empty()
            # What has stopped meanwhile is looked at next.
            released.set()
            assert await recorder.calls.get() == set()
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


class Listener:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[tuple[object, ...]] = asyncio.Queue()

    async def until(self, *expected: object) -> None:
        """Wait until that is told; the test driver also tells what happened before the test."""
        async with asyncio.timeout(10):
            while await self.told.get() != expected:
                pass

    def libvirt_found(self, jobs: Mapping[str, Mapping[str, object] | None]) -> None:
        self.told.put_nowait(("found", dict(jobs)))

    def lifecycle_event(self, uuid: str, event: int, detail: int) -> None:
        self.told.put_nowait(("lifecycle", uuid, event, detail))

    def iteration_event(self, uuid: str, iteration: int) -> None:
        self.told.put_nowait(("iteration", uuid, iteration))

    def job_event(self, uuid: str, figures: Mapping[str, object]) -> None:
        self.told.put_nowait(("job", uuid, figures))

    def monitor_event(self, uuid: str, name: str, data: Mapping[str, object]) -> None:
        self.told.put_nowait(("monitor", uuid, name, data))


NAMESPACE = "urn:libvirt-vdpa:state:1.0"


def test_tells_what_happens_and_calls_libvirt(domain: libvirt.virDomain) -> None:
    uuid = domain.UUIDString()

    async def run() -> None:
        hypervisor, listener = Hypervisor(), Listener()
        with pytest.raises(HypervisorError, match="libvirt is not there for getXMLDesc"):
            await hypervisor.domain_xml(uuid)
        watcher = DomainWatcher(URI, Recorder(), asyncio.get_running_loop(), hypervisor, listener)
        watcher.start()
        async with asyncio.timeout(10):
            await listener.until("found", {uuid: None})
            assert hypervisor.writable
            await hypervisor.set_metadata(uuid, NAMESPACE, "<state/>")
            assert f"xmlns:vdpastate='{NAMESPACE}'".replace("'", '"') in await hypervisor.domain_xml(uuid)
            with pytest.raises(HypervisorError, match="does not wait for a migration to this host"):
                await hypervisor.destroy_incoming(uuid)
            domain.suspend()
            suspended = libvirt.VIR_DOMAIN_EVENT_SUSPENDED
            paused = libvirt.VIR_DOMAIN_EVENT_SUSPENDED_PAUSED
            await listener.until("lifecycle", uuid, suspended, paused)
            # Paused by its user: it must not be taken for one that arrives.
            with pytest.raises(HypervisorError, match="does not wait for a migration to this host"):
                await hypervisor.destroy_incoming(uuid)
            domain.destroy()
            with pytest.raises(HypervisorError, match="libvirt: abortJob: "):
                await hypervisor.abort_job(uuid)
        watcher.stop()
        async with asyncio.timeout(10):
            while hypervisor.connected:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_libvirt_that_may_only_be_read(
    domain: libvirt.virDomain, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_uri: str) -> libvirt.virConnect:
        raise libvirt.libvirtError("not for you")

    monkeypatch.setattr("libvirt_vdpa.events.libvirt.open", refuse)

    async def run() -> None:
        hypervisor, listener = Hypervisor(), Listener()
        watcher = DomainWatcher(URI, Recorder(), asyncio.get_running_loop(), hypervisor, listener)
        watcher.start()
        async with asyncio.timeout(10):
            uuid = domain.UUIDString()
            await listener.until("found", {uuid: None})
            assert not hypervisor.writable
            with pytest.raises(HypervisorError, match="libvirt: setMetadata: "):
                await hypervisor.set_metadata(uuid, NAMESPACE, "<state/>")
        watcher.stop()

    asyncio.run(run())
    (line,) = [line for line in caplog.messages if "can only be read" in line]
    assert "not for you; not possible: ending migrations, " in line


def test_a_call_that_hangs_keeps_nobody(domain: libvirt.virDomain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libvirt_vdpa.hypervisor.CHANGE_LIMIT", 0.05)
    released = threading.Event()

    used: list[libvirt.virConnect] = []
    real = libvirt.virDomain.XMLDesc

    def hang(domain: libvirt.virDomain, *_arguments: object) -> int:
        used.append(domain.connect())  # type: ignore[no-untyped-call]
        released.wait()
        return 0

    def note(domain: libvirt.virDomain, flags: int) -> str:
        used.append(domain.connect())  # type: ignore[no-untyped-call]
        return real(domain, flags)

    monkeypatch.setattr(libvirt.virDomain, "setMetadata", hang)
    monkeypatch.setattr(libvirt.virDomain, "XMLDesc", note)

    async def run() -> None:
        hypervisor, listener = Hypervisor(), Listener()
        watcher = DomainWatcher(URI, Recorder(), asyncio.get_running_loop(), hypervisor, listener)
        watcher.start()
        async with asyncio.timeout(10):
            uuid = domain.UUIDString()
            await listener.until("found", {uuid: None})
            with pytest.raises(HypervisorError, match=r"has not answered setMetadata within 0\.05 s"):
                await hypervisor.set_metadata(uuid, NAMESPACE, "<state/>")
            # No second one is made meanwhile.
            with pytest.raises(HypervisorError, match="has not answered an earlier setMetadata yet"):
                await hypervisor.set_metadata(uuid, NAMESPACE, "<state/>")
            # Others are answered, by another connection, and events come, while it still hangs.
            assert uuid in await hypervisor.domain_xml(uuid)
            assert uuid in await hypervisor.domain_xml(uuid)
            hanging, first, second = used
            assert hanging is not first, "libvirt may not send the second call before the first is answered"
            assert first is second, "one is opened for each call"
            domain.suspend()
            suspended = libvirt.VIR_DOMAIN_EVENT_SUSPENDED
            paused = libvirt.VIR_DOMAIN_EVENT_SUSPENDED_PAUSED
            await listener.until("lifecycle", uuid, suspended, paused)
            released.set()
            monkeypatch.undo()
            while True:
                with contextlib.suppress(HypervisorError):
                    await hypervisor.set_metadata(uuid, NAMESPACE, "<state/>")
                    break
                await asyncio.sleep(0.01)
        watcher.stop()

    asyncio.run(run())


def test_qemus_events_are_taken_apart() -> None:
    class Domain:
        def UUIDString(self) -> str:  # noqa: N802
            return "some-uuid"

    async def run() -> None:
        listener = Listener()
        watcher = DomainWatcher(URI, Recorder(), asyncio.get_running_loop(), None, listener)
        passed: Callable[..., None] = watcher._monitor_event
        passed(None, Domain(), "MIGRATION", 1, 2, '{"status":"active"}', None)
        passed(None, Domain(), "STOP", 1, 2, None, None)
        assert await listener.told.get() == ("monitor", "some-uuid", "MIGRATION", {"status": "active"})
        assert await listener.told.get() == ("monitor", "some-uuid", "STOP", {})

    asyncio.run(run())
