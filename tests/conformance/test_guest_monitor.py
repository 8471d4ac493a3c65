"""A guest's own second monitor: how it is found in a domain's XML, and a real QEMU behind it."""

import asyncio
import logging
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from libvirt_vdpa import monitor
from libvirt_vdpa.client import ControlClient
from libvirt_vdpa.hypervisor import HypervisorError
from libvirt_vdpa.monitor import GuestMonitors, find_monitor
from tests.harness.processes import Process

UUID = "7664d0a0-0001-4000-8000-000000000001"
PATH = "/var/lib/libvirt/qemu/a.monitor"


def domain(*arguments: str) -> str:
    """A domain's XML with these further arguments for QEMU."""
    children = "".join(f"<qemu:arg value='{argument}'/>" for argument in arguments)
    return (
        "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
        f"<name>a</name><qemu:commandline>{children}</qemu:commandline></domain>"
    )


SOCKET = f"path={PATH},server=on,wait=off"
OURS = ("-chardev", f"socket,id=vdpamon,{SOCKET}", "-mon", "chardev=vdpamon,mode=control")
ANOTHER = ("-chardev", f"socket,id=m,{SOCKET.replace('a.', 'b.')}", "-mon", "chardev=m,mode=control")


@pytest.mark.parametrize(
    ("xml", "path"),
    [
        (domain(*OURS), PATH),
        (domain(*OURS[2:], *OURS[:2]), PATH),
        (domain("-chardev", "socket,id=vdpamon,path=/a,,b,server", "-mon", "vdpamon,mode=control"), "/a,b"),
        # Beside the operator's own.
        (domain(*ANOTHER, *OURS), PATH),
        (domain("-qmp", "unix:/b,server=on,wait=off", *OURS), PATH),
        (domain("-qmp", "unix:/b", *OURS), PATH),
        (domain(*ANOTHER), None),
        (domain("-qmp", f"unix:{PATH},server=on,wait=off"), None),
        (domain(*OURS[:2], *ANOTHER), None),
        # A monitor for people, one that nobody reaches, half of one, and none.
        (domain(*OURS[:2], "-mon", "chardev=vdpamon,mode=readline"), None),
        (domain("-chardev", f"socket,id=vdpamon,path={PATH}", *OURS[2:]), None),
        (domain("-chardev", f"file,id=vdpamon,{SOCKET}", *OURS[2:]), None),
        (domain("-chardev", "socket,id=vdpamon,server=on", *OURS[2:]), None),
        (domain(*OURS[:2]), None),
        (domain(*OURS[2:]), None),
        (domain(), None),
        ("<domain/>", None),
        ("no domain", None),
    ],
)
def test_is_found(xml: str, path: str | None) -> None:
    assert find_monitor(xml) == path


class FakeLibvirt:
    """Knows the XML and executes commands as the passthrough does."""

    def __init__(self, xml: str) -> None:
        self.xml = xml
        self.commands: list[str] = []

    async def domain_xml(self, uuid: str) -> str:
        return self.xml

    async def monitor_command(self, uuid: str, command: str, arguments: Mapping[str, object]) -> object:
        self.commands.append(command)
        return {}


def start_qemu(folder: Path) -> Process:
    """A QEMU without a guest, and with a monitor in the folder."""
    path = folder / "monitor"
    path.unlink(missing_ok=True)
    command = ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-S"]
    process = Process([*command, "-qmp", f"unix:{path},server=on,wait=off"], folder / "log")
    process.wait_for("monitor", path.exists)
    return process


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Path]:
    """The path of a QEMU's monitor."""
    with start_qemu(tmp_path):
        yield tmp_path / "monitor"


class Host:
    def __init__(self, path: Path) -> None:
        self.events: list[str] = []
        self.libvirt = FakeLibvirt(domain(*(argument.replace(PATH, str(path)) for argument in OURS)))
        self.monitors = GuestMonitors(
            cast(Any, self.libvirt), lambda uuid, name, data: self.events.append(name)
        )

    async def reached(self) -> None:
        async with asyncio.timeout(10):
            while not self.monitors.has(UUID):
                await asyncio.sleep(0.01)


def test_events_and_commands(qemu: Path) -> None:
    async def run() -> None:
        host = Host(qemu)
        host.monitors.follow(UUID)
        await host.reached()
        answer = await host.monitors.execute(UUID, "query-status")
        assert isinstance(answer, dict)
        assert answer["running"] is False
        await host.monitors.execute(UUID, "cont")
        async with asyncio.timeout(10):
            while "RESUME" not in host.events:
                await asyncio.sleep(0.01)
        with pytest.raises(HypervisorError, match="QEMU refuses no-such-command"):
            await host.monitors.execute(UUID, "no-such-command", may_taint=True)
        assert host.libvirt.commands == []
        host.monitors.stop()

    asyncio.run(run())


def test_one_that_is_busy(
    qemu: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(monitor, "MONITOR_LIMIT", 0.1)
    monkeypatch.setattr(monitor, "RETRY_INTERVAL", 0.05)

    async def run() -> None:
        host = Host(qemu)
        async with ControlClient(qemu):  # the operator's
            host.monitors.follow(UUID)
            async with asyncio.timeout(10):
                while "; by libvirt meanwhile" not in caplog.text:
                    await asyncio.sleep(0.01)
            assert not host.monitors.has(UUID)
            # Through libvirt, where the domain may be tainted.
            with pytest.raises(HypervisorError, match="no monitor for us, or it is busy"):
                await host.monitors.execute(UUID, "announce-self")
            await host.monitors.execute(UUID, "announce-self", may_taint=True)
            assert host.libvirt.commands == ["announce-self"]
        await host.reached()
        host.monitors.stop()

    asyncio.run(run())


def test_one_that_fails_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For each cause, and anew for a domain that is started again."""
    monkeypatch.setattr(monitor, "MONITOR_LIMIT", 0.1)
    monkeypatch.setattr(monitor, "RETRY_INTERVAL", 0.05)

    async def fail(host: Host, process: Process, *commands: str) -> list[str]:
        """Have a QEMU that hangs execute these; what the log says."""
        caplog.clear()
        host.monitors.follow(UUID)
        await host.reached()
        process.signal(signal.SIGSTOP)
        for command in commands:
            await host.monitors.execute(UUID, command, may_taint=True)
        process.signal(signal.SIGCONT)
        host.monitors.leave(UUID)
        async with asyncio.timeout(10):
            while host.monitors.has(UUID):
                await asyncio.sleep(0.01)
        return [record.message for record in caplog.records if "libvirt is tried" in record.message]

    async def run() -> None:
        host = Host(tmp_path / "monitor")
        with start_qemu(tmp_path) as process:
            told = await fail(host, process, "query-status", "query-status", "stop", "query-status")
            assert [line.split(" within")[0].split()[-1] for line in told] == ["query-status", "stop"]
            assert await fail(host, process, "stop") == told[1:]
        assert host.libvirt.commands == ["query-status", "query-status", "stop", "query-status", "stop"]

    asyncio.run(run())


def test_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "RETRY_INTERVAL", 0.05)

    async def run() -> None:
        host = Host(tmp_path / "monitor")
        with start_qemu(tmp_path):
            host.monitors.follow(UUID)
            await host.reached()
        async with asyncio.timeout(10):
            while host.monitors.has(UUID):
                await asyncio.sleep(0.01)
        with start_qemu(tmp_path):
            await host.reached()
            host.monitors.leave(UUID)
            async with asyncio.timeout(10):
                while host.monitors.has(UUID):
                    await asyncio.sleep(0.01)

    asyncio.run(run())


def test_one_whose_following_failed_is_followed_anew(
    qemu: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        host = Host(qemu)
        with monkeypatch.context() as patch:
            patch.setattr(monitor, "find_monitor", lambda xml: 1 / 0)
            host.monitors.follow(UUID)
            async with asyncio.timeout(10):
                while f"monitor {UUID} failed" not in caplog.text:
                    await asyncio.sleep(0.01)
        assert "ZeroDivisionError" in caplog.text
        host.monitors.follow(UUID)
        await host.reached()
        host.monitors.stop()

    asyncio.run(run())
