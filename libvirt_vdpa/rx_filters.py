"""Follows what guests want to receive, and has their ports filter so.

A guest's driver sets promiscuous mode, addresses and VLANs by the control queue, which QEMU serves; no
back-end hears of it. QEMU tells by NIC_RX_FILTER_CHANGED, once until query-rx-filter is asked for (QEMU
qapi/net.json). So it is asked after each such event, when a port's rings begin to run (a reset is told by no
event), and when a way to QEMU has been found, for events may have been missed.

Whether a guest may have a say is the operator's: `<interface trustGuestRxFilters='yes'>` in the domain's
XML, as for macvtap. libvirt 9.0 takes the attribute with any type of interface, and does nothing with it
here but ask QEMU for itself. The XML is read before each question; while libvirt is away, what it last
said counts. A port whose guest is not trusted any more has its filter taken away. We ask through libvirt
only where the guest has no monitor of its own for us (monitor.py), since that taints the domain; and never
while it migrates, for libvirt would have to wait.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from datapath.rx_filter import MAX_MACS, VLANS, RxFilter, RxFilterError, Scope
from libvirt_vdpa.background import Tasks
from libvirt_vdpa.client import CommandRefusedError, ControlError
from libvirt_vdpa.guest_nic import Execute, Key, find_interface
from libvirt_vdpa.hypervisor import HypervisorError
from libvirt_vdpa.migration_figures import part, runs
from libvirt_vdpa.monitor import find_monitor
from libvirt_vdpa.ports import State
from libvirt_vdpa.supervisor import Port

logger = logging.getLogger(__name__)

#: QEMU's event.
CHANGED = "NIC_RX_FILTER_CHANGED"
#: Seconds between two tries to ask a QEMU that could not be asked, and at least between any two questions: a
#: guest may change its mind as often as it likes.
RETRY_INTERVAL = 1.0
PAUSE = 0.1
#: RxState of query-rx-filter -> ours.
SCOPES = {"none": Scope.NONE, "normal": Scope.LISTED, "all": Scope.ALL}


@dataclass(frozen=True)
class Nic:
    """What a running domain's XML says of a NIC whose guest has a say."""

    #: QEMU's name of it.
    alias: str
    #: Whether QEMU can be asked by a monitor of our own.
    own_monitor: bool


class RxFilters:
    """The receive filters of all guests' NICs. Used in the event loop."""

    def __init__(
        self,
        domain_xml: Callable[[str], Awaitable[str]],
        execute: Execute,
        migrating: Callable[[str], bool],
    ) -> None:
        """Nothing is known yet.

        :param domain_xml: a running domain's XML, by UUID; raises HypervisorError.
        :param migrating: whether a domain, by its UUID, is being migrated.
        """
        self._domain_xml = domain_xml
        self._execute = execute
        self._migrating = migrating
        #: Ports whose rings run and whose VFs can filter.
        self._running: dict[Key, Port] = {}
        #: Those of them that have been told a filter, by this daemon.
        self._told: set[Key] = set()
        #: Their NICs, as libvirt last said; None where the operator does not trust the guest.
        self._nics: dict[Key, Nic | None] = {}
        #: Those whose QEMU is to be asked, and those that somebody asks for.
        self._due: set[Key] = set()
        self._asking: set[Key] = set()
        self._tasks = Tasks()

    def port_changed(self, port: Port) -> None:
        """Whatever happened to a port: its guest may have begun to run, or have left."""
        key = port.record.key
        if port.state is State.GONE:
            self._nics.pop(key, None)
        if not runs(port) or port.status.get("rx_filter", {}) is None:
            self._running.pop(key, None)
            self._told.discard(key)  # a port forgets its filter when its rings stop
            self._due.discard(key)
        elif self._running.get(key) is not port:
            self._running[key] = port
            self._look(key)

    def monitor_event(self, uuid: str, name: str, data: Mapping[str, object]) -> None:
        """An event of a domain's QEMU, by whichever way."""
        if name != CHANGED:
            return
        for key in self._running:
            nic = self._nics.get(key)
            if key[0] == uuid and (nic is None or data.get("name", nic.alias) == nic.alias):
                self._look(key)

    def way_found(self, uuid: str) -> None:
        """A domain's QEMU can be asked again, or for the first time."""
        for key in self._running:
            if key[0] == uuid:
                self._look(key)

    def stop(self) -> None:
        """Leave all filters as they are."""
        self._tasks.stop()

    def _look(self, key: Key) -> None:
        self._due.add(key)
        if key not in self._asking:
            self._asking.add(key)
            self._tasks.start(self._settle(key), f"{self._running[key].record.label}: what its guest wants")

    async def _settle(self, key: Key) -> None:
        """Ask QEMU and tell the port until nothing has changed since."""
        complained = False
        try:
            while key in self._due:
                self._due.discard(key)
                try:
                    await self._ask(self._running[key])
                except (HypervisorError, ControlError) as error:
                    if key not in self._running:
                        return
                    if not complained:
                        logger.warning("%s: what its guest wants: %s", self._running[key].record.label, error)
                    complained = True
                    if isinstance(error, CommandRefusedError):
                        continue  # by the port, which will not do it the next time either
                    self._due.add(key)
                    await asyncio.sleep(RETRY_INTERVAL)
                else:
                    complained = False
                    await asyncio.sleep(PAUSE)
        finally:
            self._asking.discard(key)

    async def _ask(self, port: Port) -> None:
        """Ask QEMU once, and tell the port.

        :raise HypervisorError: when QEMU cannot be asked now.
        :raise ControlError: when the port does not do it.
        """
        record = port.record
        wanted = None
        if (nic := await self._nic_of(port)) is not None:
            may_taint = not nic.own_monitor and not self._migrating(record.uuid)
            answer = await self._execute(record.uuid, "query-rx-filter", {"name": nic.alias}, may_taint)
            wanted = filter_of(answer).describe()
        if self._running.get(record.key) is port and (wanted is not None or self._may_filter(port)):
            self._told.add(record.key)
            await port.ask("set-rx-filter", {"filter": wanted})

    async def _nic_of(self, port: Port) -> Nic | None:
        """What a port's NIC is now, None when the guest is not trusted; or when the port has left meanwhile.

        :raise HypervisorError: when libvirt has never said.
        """
        record = port.record
        try:
            nic = find_trusted(await self._domain_xml(record.uuid), record.mac)
        except HypervisorError:
            if record.key not in self._nics:
                raise
            nic = self._nics[record.key]
        if self._running.get(record.key) is not port:
            return None
        self._nics[record.key] = nic
        return nic

    def _may_filter(self, port: Port) -> bool:
        """Whether a port may have a filter, of this daemon or, as it tells itself, of one before."""
        return port.record.key in self._told or part(port, "rx_filter").get("wanted") is not None


def find_trusted(xml: str, mac: str) -> Nic | None:
    """A running domain's NIC; None when the operator does not trust the guest with its filter.

    :raise HypervisorError: when the domain has no such NIC.
    """
    alias, element = find_interface(xml, mac)
    trusted = element.get("trustGuestRxFilters") == "yes"
    return Nic(alias, own_monitor=find_monitor(xml) is not None) if trusted else None


def filter_of(answer: object) -> RxFilter:
    """The filter that query-rx-filter tells of one NIC (RxFilterInfo of QEMU qapi/net.json).

    Broadcasts always pass: its "broadcast-allowed" is false where they are (seen with QEMU 7.2), and hardly a
    driver asks to be spared them.

    :raise HypervisorError: when it is none.
    """
    match answer:
        case [
            {
                "promiscuous": bool(promiscuous),
                "unicast": str(unicast),
                "multicast": str(multicast),
                "vlan": str(vlan),
                "unicast-overflow": bool(too_many),
                "multicast-overflow": bool(too_many_groups),
                "main-mac": str(main),
                "unicast-table": [*macs],
                "multicast-table": [*groups],
                "vlan-table": [*vlans],
            }
        ]:
            listed = [main, *macs, *groups]
            every_vlan = len(vlans) == len(VLANS)
            try:
                return RxFilter.parse(
                    {
                        "promiscuous": promiscuous,
                        "broadcast": True,
                        "unicast": scope(unicast, too_many or len(listed) > MAX_MACS),
                        "multicast": scope(multicast, too_many_groups or len(listed) > MAX_MACS),
                        "vlan": scope(vlan, every_vlan),
                        "macs": listed[:MAX_MACS],
                        "vlans": [] if every_vlan else vlans,
                    }
                )
            except (KeyError, TypeError, RxFilterError) as error:
                raise HypervisorError(f"QEMU tells of a filter: {error}") from None
    raise HypervisorError("QEMU tells of no filter for the NIC")


def scope(state: str, unlisted: bool) -> str:
    """What passes of a kind, in our words.

    :param unlisted: whether the list does not say all that the guest wants: then all that comes passes.
    :raise KeyError: for a state that QEMU has not.
    """
    found = SCOPES[state]
    return (Scope.ALL if found is Scope.LISTED and unlisted else found).value
