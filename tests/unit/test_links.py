"""Who wants which link, and when QEMU is told."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from libvirt_vdpa import links
from libvirt_vdpa.hypervisor import HypervisorError
from libvirt_vdpa.links import Links, find_nic
from libvirt_vdpa.ports import State

UUID = "7664d0a0-0001-4000-8000-000000000001"
MAC = "52:54:00:76:64:01"
XML = """<domain><devices>
    <interface type='vhostuser'><mac address='52:54:00:76:64:09'/><alias name='net0'/></interface>
    <interface type='vhostuser'><mac address='52:54:00:76:64:01'/>{link}<alias name='ua-own'/></interface>
    </devices></domain>"""


class Host:
    """A domain with one port, whose QEMU notes what it is told."""

    def __init__(self, *, link_up: bool = True, link_cut: bool = False, arriving: bool = False) -> None:
        self.state = State.SERVING
        self.record = SimpleNamespace(
            uuid=UUID,
            mac=MAC,
            key=(UUID, MAC),
            label="a",
            link_up=link_up,
            link_cut=link_cut,
            arriving=arriving,
        )
        self.status: dict[str, object] = {"front_end": True, "state": "running", "link": "up"}
        self.told: list[bool] = []
        self.migrating = False
        self.fails = 0
        #: Called while QEMU is being told.
        self.meanwhile: Callable[[], None] = lambda: None
        self.links = Links(self._domain_xml, self._execute, lambda _uuid: self.migrating)

    def note_link(self, link_up: bool, *, cut: bool) -> None:
        self.record.link_up, self.record.link_cut = link_up, cut

    async def _domain_xml(self, _uuid: str) -> str:
        return XML.format(link="" if self.record.link_up else "<link state='down'/>")

    async def _execute(
        self, uuid: str, command: str, arguments: Mapping[str, object], may_taint: bool
    ) -> object:
        assert (uuid, command, arguments["name"]) == (UUID, "set_link", "ua-own")
        await asyncio.sleep(0)
        self.meanwhile()
        if self.fails:
            self.fails -= 1
            raise HypervisorError("busy")
        self.told.append(bool(arguments["up"]))
        return {}

    def begins(self) -> None:
        """The port is started by this daemon, and QEMU has yet to come."""
        self.state = State.STARTING
        self.changes(front_end=False)
        self.state = State.SERVING
        self.status["front_end"] = True

    def changes(self, **status: object) -> None:
        self.status.update(status)
        self.links.port_changed(cast(Any, self))

    async def settles(self, *told: bool) -> None:
        """What QEMU has been told so far, once nothing is under way."""
        async with asyncio.timeout(5):
            while self.links._workers:
                await asyncio.sleep(0.001)
        assert self.told == list(told)

    async def waits(self) -> None:
        """Let a few tries pass."""
        await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "RETRY_INTERVAL", 0.002)


def run(test: Callable[[Host], Awaitable[None]], **record: bool) -> None:
    async def whole() -> None:
        host = Host(**record)
        try:
            await test(host)
        finally:
            host.links.stop()

    asyncio.run(whole())


def test_a_guest_follows_its_vf() -> None:
    async def test(host: Host) -> None:
        host.changes()
        await host.settles()
        host.changes(link="down")
        await host.settles(False)
        assert host.record.link_cut
        host.changes(link="up")
        await host.settles(False, True)
        assert not host.record.link_cut

    run(test)


def test_a_vf_that_does_not_say_has_a_link() -> None:
    async def test(host: Host) -> None:
        host.changes(link=None)
        await host.settles()

    run(test)


def test_the_operators_down_wins() -> None:
    async def test(host: Host) -> None:
        host.begins()
        for link in ("up", "down", "up"):
            host.changes(link=link)
        await host.settles()
        assert not host.record.link_cut

    run(test, link_up=False)


def test_the_operators_down_is_said_again_by_a_restarted_daemon() -> None:
    """QEMU may have come back to the port meanwhile, and plugged the link in."""

    async def test(host: Host) -> None:
        host.changes()
        await host.settles(False)

    run(test, link_up=False)


def test_a_guest_whose_link_is_not_known_is_told_by_a_restarted_daemon() -> None:
    async def test(host: Host) -> None:
        host.migrating = True
        host.changes(state="connected")
        host.record.arriving = False  # the guest is here, and this daemon ends
        host.links.stop()
        host.migrating = False
        host.links = Links(host._domain_xml, host._execute, lambda _uuid: host.migrating)
        host.changes()
        await host.settles(True)
        assert not host.record.link_cut

    run(test, arriving=True)


@pytest.mark.parametrize(("link_up", "link"), [(False, "up"), (True, "down")])
def test_qemu_that_comes_back_is_told_again(link_up: bool, link: str) -> None:
    async def test(host: Host) -> None:
        host.begins()
        host.changes(link=link)
        first = [False] if link_up else []
        await host.settles(*first)
        host.changes(front_end=False)
        assert not host.record.link_cut
        host.changes(front_end=True)
        await host.settles(*first, False)

    run(test, link_up=link_up)


def test_qemu_that_comes_back_plugs_the_link_in_by_itself() -> None:
    async def test(host: Host) -> None:
        host.changes(link="down")
        await host.settles(False)
        host.changes(front_end=False)
        host.changes(link="up", front_end=True)
        await host.settles(False)

    run(test)


def test_qemu_that_comes_back_while_it_is_told_is_told_once_more() -> None:
    async def test(host: Host) -> None:
        def comes_back() -> None:
            host.meanwhile = lambda: None
            host.changes(front_end=False)
            host.changes(front_end=True)

        host.meanwhile = comes_back
        host.changes(link="down")
        await host.settles(False, False)

    run(test)


def test_nothing_is_told_during_a_migration() -> None:
    async def test(host: Host) -> None:
        host.migrating = True
        host.changes(link="down")
        await host.waits()
        assert host.told == []
        host.migrating = False
        await host.settles(False)

    run(test)


def test_a_link_that_is_back_before_qemu_could_be_told_is_not_mentioned() -> None:
    async def test(host: Host) -> None:
        host.migrating = True
        host.changes(link="down")
        await host.waits()
        host.changes(link="up")
        await host.settles()

    run(test)


def test_qemu_that_cannot_be_told_is_told_later() -> None:
    async def test(host: Host) -> None:
        host.fails = 3
        host.changes(link="down")
        await host.settles(False)

    run(test)


@pytest.mark.parametrize("link", ["up", "down"])
def test_a_restarted_daemon_goes_on(link: str) -> None:
    async def test(host: Host) -> None:
        host.changes(link=link)
        await host.settles(link == "up")
        assert host.record.link_cut == (link == "down")

    run(test, link_cut=True)


async def arrive(host: Host, **status: object) -> None:
    """Let a guest come from another host."""
    host.migrating = True
    host.changes(state="connected")
    await host.waits()
    assert host.told == []
    host.migrating = host.record.arriving = False
    host.changes(**status)


def test_a_guest_that_comes_and_uses_its_vf_needs_no_word() -> None:
    async def test(host: Host) -> None:
        await arrive(host, state="running")
        await host.settles()
        assert not host.record.link_cut
        host.changes(link="down")
        await host.settles(False)

    run(test, arriving=True)


def test_a_guest_that_comes_and_does_not_use_its_vf_may_have_seen_no_link() -> None:
    async def test(host: Host) -> None:
        await arrive(host)
        await host.settles(True)

    run(test, arriving=True)


def test_a_guest_that_comes_to_a_vf_without_a_link() -> None:
    async def test(host: Host) -> None:
        await arrive(host, state="running", link="down")
        await host.settles(False)
        assert host.record.link_cut

    run(test, arriving=True)


def test_qemu_that_comes_anew_for_a_guest_that_has_come_needs_no_word() -> None:
    async def test(host: Host) -> None:
        await arrive(host)
        host.changes(front_end=False)
        host.changes(front_end=True)
        await host.settles()

    run(test, arriving=True)


def test_a_port_that_is_gone_is_forgotten() -> None:
    async def test(host: Host) -> None:
        host.fails = 1000
        host.changes(link="down")
        await host.waits()
        host.state = State.GONE
        host.changes()
        assert not host.links._seen
        await host.settles()

    run(test)


@pytest.mark.parametrize(
    ("xml", "text"), [("<domain>", "XML"), (XML.format(link="").replace(MAC, "x"), f"no NIC {MAC}")]
)
def test_a_nic_that_is_not_there_is_an_error(xml: str, text: str) -> None:
    with pytest.raises(HypervisorError, match=text):
        find_nic(xml, MAC)
