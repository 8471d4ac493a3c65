"""Has guests see whether their VF has a link.

A port tells the link of its VF. QEMU takes no word of it from a back-end, so it is told by QMP's set_link:
through the guest's own second monitor (monitor.py), else through libvirt, which taints the domain. libvirt
itself cannot: 9.0 changes nothing of a vhostuser interface that is in use (virDomainUpdateDeviceFlags and
with it `virsh domif-setlink`: "unable to change config on 'vhostuser' network type").

Who wants what is kept apart: the operator says in the domain's XML whether there is to be a link
(`<link state=…/>`, Record.link_up), the VF whether there is one. The guest sees one when both say so; that
it sees none because of the VF, Record.link_cut says, for a daemon that is restarted meanwhile. QEMU plugs a
link in whenever its back-end comes back, also one that the operator has taken down: it is then taken down
again. QEMU stops a ring whose link is down, so nothing is done while the domain migrates; with the guest
goes what it saw, and one that comes here and does not use its VF is told, whatever it saw.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from libvirt_vdpa.background import tell_failure
from libvirt_vdpa.domain import attribute_of
from libvirt_vdpa.guest_nic import Execute, Key, find_interface
from libvirt_vdpa.hypervisor import HypervisorError
from libvirt_vdpa.migration_figures import connected, runs
from libvirt_vdpa.ports import State
from libvirt_vdpa.supervisor import Port

logger = logging.getLogger(__name__)

#: Seconds between two tries to tell a QEMU that could not be told, or was not to be.
RETRY_INTERVAL = 1.0
#: As many looks whether a guest that has come uses its VF: Migrations has had QEMU come anew by then, where
#: it knows that this is needed, and that taints nothing.
ARRIVAL_LOOKS = 5


class Links:
    """The links of all guests' NICs. Used in the event loop."""

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
        #: What a guest sees, as far as known, or will when QEMU has come back to the port.
        self._seen: dict[Key, bool | None] = {}
        #: Ports that have begun here: QEMU has come to them for the first time since, or is to.
        self._begun: set[Key] = set()
        #: Ports whose guests have come, or are about to.
        self._arrivals: set[Key] = set()
        self._workers: dict[Key, asyncio.Task[None]] = {}

    def port_changed(self, port: Port) -> None:
        """Whatever happened to a port: its guest may have to see another link."""
        key = port.record.key
        if port.state is State.GONE:
            self._seen.pop(key, None)
            self._begun.discard(key)
            self._arrivals.discard(key)
            if (worker := self._workers.pop(key, None)) is not None:
                worker.cancel()
        elif port.state is State.STARTING:
            self._begun.add(key)
        elif connected(port):
            if key not in self._seen:
                self._meet(port)
            self._look(port)
        elif key in self._seen:
            self._seen[key] = True
            self._arrivals.discard(key)
            port.note_link(port.record.link_up, cut=False)

    def _meet(self, port: Port) -> None:
        """Work out what the guest of a port sees that QEMU is connected to."""
        record = port.record
        if record.arriving:
            self._arrivals.add(record.key)
            port.note_link(record.link_up, cut=True)  # not to be forgotten by a daemon that is restarted
        # What the XML says of the beginning, libvirt has seen to; QEMU may have come back to a port that was
        # found here, and plugged the link in.
        unplugged_again = not record.link_up and record.key not in self._begun
        unknown = record.link_cut or record.arriving or unplugged_again
        self._seen[record.key] = None if unknown else record.link_up

    def stop(self) -> None:
        """Leave all links as they are."""
        for worker in self._workers.values():
            worker.cancel()

    def _look(self, port: Port) -> None:
        key = port.record.key
        if key not in self._workers and self._differs(port):
            worker = asyncio.create_task(self._settle(port), name=f"{port.record.label}: its guest's link")
            worker.add_done_callback(tell_failure)
            self._workers[key] = worker

    def _differs(self, port: Port) -> bool:
        """Whether QEMU is there and has to be told."""
        return connected(port) and self._seen.get(port.record.key) is not wanted(port)

    async def _settle(self, port: Port) -> None:
        """Tell QEMU until the guest sees what it is to see."""
        complained = False
        try:
            while self._differs(port):
                try:
                    if not self._migrating(port.record.uuid):
                        if not await self._came_with_a_link(port):
                            await self._tell(port)
                        continue
                except HypervisorError as error:
                    if not complained:
                        logger.warning("%s: its guest's link: %s", port.record.label, error)
                    complained = True
                await asyncio.sleep(RETRY_INTERVAL)
        finally:
            if self._workers.get(port.record.key) is asyncio.current_task():
                del self._workers[port.record.key]

    async def _came_with_a_link(self, port: Port) -> bool:
        """Whether a guest that has come, and is to see a link, does: its rings run then."""
        key = port.record.key
        for _ in range(ARRIVAL_LOOKS):
            if key not in self._arrivals or not wanted(port):
                return False
            if runs(port):
                self._arrivals.discard(key)
                self._seen[key] = True
                port.note_link(port.record.link_up, cut=False)
                return True
            await asyncio.sleep(RETRY_INTERVAL)
        self._arrivals.discard(key)
        return False

    async def _tell(self, port: Port) -> None:
        """Tell QEMU once.

        :raise HypervisorError: when libvirt does not know the NIC, or QEMU cannot be told.
        """
        record = port.record
        alias, link_up = find_nic(await self._domain_xml(record.uuid), record.mac)
        port.note_link(link_up, cut=port.record.link_cut)
        up = wanted(port)
        if not up:
            port.note_link(link_up, cut=link_up)  # before: a daemon that dies now is to know
        self._seen[record.key] = None
        await self._execute(record.uuid, "set_link", {"name": alias, "up": up}, may_taint=True)
        if self._seen.get(record.key, False) is None:  # QEMU has not left and come back meanwhile
            self._seen[record.key] = up
            port.note_link(link_up, cut=link_up and not up)
            logger.info("%s: its guest's link is %s", record.label, "up" if up else "down")


def wanted(port: Port) -> bool:
    """Whether a port's guest is to see a link, as operator and VF have it; a VF that does not say has one."""
    return port.record.link_up and port.status.get("link") != "down"


def find_nic(xml: str, mac: str) -> tuple[str, bool]:
    """QEMU's name of a running domain's NIC, and whether the operator lets it have a link.

    :raise HypervisorError: when the domain has no such NIC.
    """
    alias, element = find_interface(xml, mac)
    return alias, attribute_of(element, "link", "state") != "down"
