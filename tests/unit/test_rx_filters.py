"""When QEMU is asked what a guest wants to receive, and what its port is told."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from datapath.rx_filter import MAX_MACS
from libvirt_vdpa import rx_filters
from libvirt_vdpa.client import CommandRefusedError
from libvirt_vdpa.hypervisor import HypervisorError
from libvirt_vdpa.ports import State
from libvirt_vdpa.rx_filters import Nic, RxFilters, filter_of, find_trusted

UUID = "7664d0a0-0001-4000-8000-000000000001"
MAC = "52:54:00:76:64:01"
GROUP = "01:00:5e:00:00:01"
QEMU = "xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'"
XML = f"""<domain {QEMU}><devices>
    <interface type='vhostuser'><mac address='52:54:00:76:64:09'/><alias name='net0'/></interface>
    <interface type='vhostuser'{{trust}}><mac address='{MAC}'/><alias name='ua-own'/></interface>
    </devices>{{monitor}}</domain>"""
TRUST = " trustGuestRxFilters='yes'"
MONITOR = "".join(
    [
        "<q:commandline>",
        *(
            f"<q:arg value='{word}'/>"
            for word in (
                "-chardev",
                "socket,id=vdpamon,path=/m,server=on",
                "-mon",
                "chardev=vdpamon,mode=control",
            )
        ),
        "</q:commandline>",
    ]
)

#: What QEMU 7.2 has said of a Linux guest.
ANSWER: dict[str, object] = {
    "name": "ua-own",
    "promiscuous": False,
    "broadcast-allowed": False,
    "unicast": "normal",
    "multicast": "normal",
    "vlan": "normal",
    "unicast-overflow": False,
    "multicast-overflow": False,
    "main-mac": MAC,
    "unicast-table": [],
    "multicast-table": ["33:33:00:00:00:01", GROUP],
    "vlan-table": [0],
}
WANTED = {
    "promiscuous": False,
    "broadcast": True,
    "unicast": "listed",
    "multicast": "listed",
    "vlan": "listed",
    "macs": [MAC, "33:33:00:00:00:01", GROUP],
    "vlans": [0],
}


class Host:
    """A domain with one port, whose QEMU counts how often it is asked."""

    def __init__(self, *, trust: str = TRUST, monitor: str = MONITOR) -> None:
        self.state = State.SERVING
        self.record = SimpleNamespace(uuid=UUID, mac=MAC, key=(UUID, MAC), label="a")
        self.status: dict[str, object] = {
            "state": "connected",
            "rx_filter": {"wanted": None, "problem": None},
        }
        self._monitor = monitor
        self.trust(trust)
        #: Whether libvirt is.
        self.away = False
        #: Called while libvirt is asked for the XML.
        self.at_xml: Callable[[], None] = lambda: None
        self.answer: object = [ANSWER]
        self.asked: list[bool] = []
        self.told: list[object] = []
        self.migrating = False
        self.fails = 0
        self.refuses = False
        #: Called while QEMU is being asked.
        self.meanwhile: Callable[[], None] = lambda: None
        self.filters = RxFilters(self._domain_xml, self._execute, lambda _uuid: self.migrating)

    def trust(self, attribute: str) -> None:
        """The operator writes so much of trust into the XML."""
        self.xml = XML.format(trust=attribute, monitor=self._monitor)

    async def _domain_xml(self, _uuid: str) -> str:
        await asyncio.sleep(0)
        self.at_xml()
        if self.away:
            raise HypervisorError("libvirt is not there")
        return self.xml

    async def _execute(
        self, uuid: str, command: str, arguments: Mapping[str, object], may_taint: bool
    ) -> object:
        assert (uuid, command, arguments) == (UUID, "query-rx-filter", {"name": "ua-own"})
        self.asked.append(may_taint)
        await asyncio.sleep(0)
        self.meanwhile()
        if self.fails:
            self.fails -= 1
            raise HypervisorError("busy")
        return self.answer

    async def ask(self, command: str, arguments: Mapping[str, object]) -> object:
        assert command == "set-rx-filter"
        if self.refuses:
            raise CommandRefusedError("no")
        self.told.append(arguments["filter"])
        return {}

    def becomes(self, state: str) -> None:
        self.status["state"] = state
        self.filters.port_changed(cast(Any, self))

    def changed(self, **data: object) -> None:
        self.filters.monitor_event(UUID, "NIC_RX_FILTER_CHANGED", data)

    async def settled(self) -> None:
        async with asyncio.timeout(5):
            while self.filters._asking:
                await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rx_filters, "RETRY_INTERVAL", 0.002)
    monkeypatch.setattr(rx_filters, "PAUSE", 0.001)


def run(test: Callable[[Host], Awaitable[None]], **what: str) -> None:
    async def whole() -> None:
        host = Host(**what)
        try:
            await test(host)
        finally:
            host.filters.stop()

    asyncio.run(whole())


def test_qemu_is_asked_when_rings_begin_to_run() -> None:
    async def test(host: Host) -> None:
        host.becomes("connected")
        await host.settled()
        assert not host.asked
        for times in (1, 2):
            host.becomes("running")
            host.becomes("running")  # whatever has changed: it goes on
            await host.settled()
            assert len(host.asked) == times
            host.becomes("connected")
        assert host.told == [WANTED, WANTED]

    run(test)


def test_qemu_is_asked_after_its_event() -> None:
    async def test(host: Host) -> None:
        host.changed(name="ua-own")
        host.becomes("running")
        await host.settled()
        assert len(host.asked) == 1
        host.answer = [{**ANSWER, "promiscuous": True}]
        host.changed(name="net0")  # another NIC of this guest
        host.filters.monitor_event(UUID, "RESUME", {})
        host.filters.monitor_event("other", "NIC_RX_FILTER_CHANGED", {"name": "ua-own"})
        await host.settled()
        assert len(host.asked) == 1
        host.changed(name="ua-own")
        await host.settled()
        assert host.told == [WANTED, {**WANTED, "promiscuous": True}]
        host.changed(path="/machine/peripheral/ua-own/virtio-backend")  # a NIC without a name is meant
        host.filters.way_found(UUID)
        host.filters.way_found("other")
        await host.settled()
        assert len(host.asked) == 3

    run(test)


def test_what_changes_meanwhile_is_asked_for_again() -> None:
    async def test(host: Host) -> None:
        def change() -> None:
            host.meanwhile = lambda: None
            host.changed(name="ua-own")

        host.meanwhile = change
        host.becomes("running")
        await host.settled()
        assert len(host.asked) == 2

    run(test)


def test_a_busy_qemu_is_asked_again() -> None:
    async def test(host: Host) -> None:
        host.fails = 3
        host.becomes("running")
        await host.settled()
        assert len(host.asked) == 4
        assert host.told == [WANTED]

    run(test)


def test_rings_that_have_stopped_want_nothing() -> None:
    async def test(host: Host) -> None:
        host.meanwhile = lambda: host.becomes("connected")
        host.becomes("running")
        await host.settled()
        assert not host.told
        host.fails = 1000
        host.becomes("running")
        await host.settled()
        host.changed(name="ua-own")
        await host.settled()
        assert len(host.asked) == 2

    run(test)


def test_a_port_that_refuses_is_not_asked_for_ever() -> None:
    async def test(host: Host) -> None:
        host.refuses = True
        host.becomes("running")
        await host.settled()
        assert len(host.asked) == 1

    run(test)


def test_nobody_is_asked_for_a_vf_without_filter() -> None:
    """It might taint the domain, for nothing."""

    async def test(host: Host) -> None:
        host.status["rx_filter"] = None
        host.becomes("running")
        host.changed(name="ua-own")
        await host.settled()
        assert not host.asked

    run(test)


@pytest.mark.parametrize("trust", ["", " trustGuestRxFilters='no'"])
def test_nor_for_a_guest_that_is_not_trusted(trust: str) -> None:
    async def test(host: Host) -> None:
        host.becomes("running")
        await host.settled()
        assert not host.asked

    run(test, trust=trust)


def test_trust_that_is_withdrawn_takes_the_filter_away() -> None:
    async def test(host: Host) -> None:
        host.becomes("running")
        await host.settled()
        host.trust("")
        for _ in range(2):
            host.changed(name="ua-own")
            await host.settled()
        assert len(host.asked) == 1
        assert host.told[:2] == [WANTED, None]
        host.trust(TRUST)
        host.changed(name="ua-own")
        await host.settled()
        assert host.told[-1] == WANTED

    run(test)


@pytest.mark.parametrize(("wanted", "told"), [(WANTED, [None]), (None, [])])
def test_a_filter_of_the_daemon_before_is_taken_away(wanted: object, told: list[object]) -> None:
    """A port has kept it; the guest was trusted then."""

    async def test(host: Host) -> None:
        host.status["rx_filter"] = {"wanted": wanted, "problem": None}
        host.becomes("running")
        await host.settled()
        assert not host.asked
        assert host.told == told

    run(test, trust="")


def test_while_libvirt_is_away_its_last_word_counts() -> None:
    async def test(host: Host) -> None:
        host.becomes("running")
        await host.settled()
        host.away = True
        host.changed(name="ua-own")
        await host.settled()
        assert host.told == [WANTED, WANTED]

    run(test)


def test_a_domain_that_goes_while_its_xml_is_read_leaves_nothing() -> None:
    """What it was counts for none that comes after it, even when libvirt cannot be asked then."""

    async def test(host: Host) -> None:
        def end() -> None:
            host.state = State.GONE
            host.becomes("connected")

        host.at_xml = end
        host.becomes("running")
        await host.settled()
        assert not host.asked
        host.at_xml, host.away, host.state = lambda: None, True, State.SERVING
        host.becomes("running")
        await asyncio.sleep(0.01)
        assert not host.asked
        host.away = False
        await host.settled()
        assert len(host.asked) == 1

    run(test)


@pytest.mark.parametrize(("monitor", "may_taint"), [(MONITOR, False), ("", True)])
def test_libvirt_is_asked_where_there_is_no_other_way(monitor: str, may_taint: bool) -> None:
    async def test(host: Host) -> None:
        host.becomes("running")
        await host.settled()
        host.migrating = True
        host.changed(name="ua-own")
        await host.settled()
        assert host.asked == [may_taint, False]

    run(test, monitor=monitor)


def test_what_the_xml_says_of_a_nic() -> None:
    trusted = XML.format(trust=TRUST, monitor="")
    assert find_trusted(trusted, MAC) == Nic("ua-own", own_monitor=False)
    assert find_trusted(XML.format(trust=TRUST, monitor=MONITOR), MAC) == Nic("ua-own", own_monitor=True)
    assert find_trusted(trusted, "52:54:00:76:64:09") is None
    with pytest.raises(HypervisorError, match="has no NIC"):
        find_trusted(trusted, "52:54:00:76:64:08")
    with pytest.raises(HypervisorError, match="the domain's XML"):
        find_trusted("<domain", MAC)


MANY = [f"02:00:00:00:{number // 256:02x}:{number % 256:02x}" for number in range(MAX_MACS)]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {}),
        ({"promiscuous": True}, {"promiscuous": True}),
        ({"unicast": "all", "multicast": "none"}, {"unicast": "all", "multicast": "none"}),
        ({"multicast-overflow": True}, {"multicast": "all"}),
        ({"unicast-overflow": True}, {"unicast": "all"}),
        ({"unicast-overflow": True, "unicast": "none"}, {"unicast": "none"}),
        ({"vlan": "all", "vlan-table": []}, {"vlan": "all", "vlans": []}),
        # Without CTRL_VLAN every one is in the table.
        ({"vlan-table": list(range(4096))}, {"vlan": "all", "vlans": []}),
        (
            {"unicast-table": MANY, "multicast-table": []},
            {"unicast": "all", "multicast": "all", "macs": [MAC, *MANY[:-1]]},
        ),
    ],
)
def test_what_qemu_says(said: dict[str, object], expected: dict[str, object]) -> None:
    assert filter_of([{**ANSWER, **said}]).describe() == {**WANTED, **expected}


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        [ANSWER, ANSWER],
        [{**ANSWER, "promiscuous": 1}],
        [{**ANSWER, "vlan": "some"}],
        [{**ANSWER, "main-mac": "no"}],
        [{**ANSWER, "vlan-table": [{}]}],
        [{key: value for key, value in ANSWER.items() if key != "main-mac"}],
    ],
)
def test_what_is_no_answer(answer: object) -> None:
    with pytest.raises(HypervisorError, match="QEMU tells of"):
        filter_of(answer)
