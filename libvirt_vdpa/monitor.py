"""QMP to guests' own second monitors, where the domain's XML has one for us.

    <qemu:arg value='-chardev'/><qemu:arg value='socket,id=vdpamon,path=PATH,server=on,wait=off'/>
    <qemu:arg value='-mon'/><qemu:arg value='chardev=vdpamon,mode=control'/>

It tells of a migration, and ends one, even when libvirt is away or busy. A QMP chardev serves one client at
a time and lets others wait: ours is known by its id, all others are the operator's, and we would keep his
tools out. Whatever is done here has a deadline, and who finds the monitor busy or absent goes to libvirt
instead.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence

from lxml import etree

from libvirt_vdpa.background import tell_failure
from libvirt_vdpa.client import CommandRefusedError, ControlClient, ControlError
from libvirt_vdpa.domain import QEMU_NAMESPACE
from libvirt_vdpa.hypervisor import Hypervisor, HypervisorError

logger = logging.getLogger(__name__)

#: Id of the chardev that is for us.
CHARDEV = "vdpamon"
#: Seconds for connecting to a monitor and for each command, and between two tries to connect.
MONITOR_LIMIT = 2.0
RETRY_INTERVAL = 2.0
#: What a socket chardev may say about being a server that waits for nobody.
ON = ("on", "yes", "true", "")

#: UUID, name and data of an event.
Heard = Callable[[str, str, Mapping[str, object]], None]


class GuestMonitors:
    """Connections to the monitors of this host's guests. Used in the event loop."""

    def __init__(
        self, hypervisor: Hypervisor, heard: Heard, found: Callable[[str], None] = lambda uuid: None
    ) -> None:
        """Nothing is followed yet.

        :param heard: called for each event of a guest's QEMU.
        :param found: called with a UUID when its monitor is ours; what came before was told to nobody.
        """
        self._hypervisor = hypervisor
        self._heard = heard
        self._found = found
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._clients: dict[str, ControlClient] = {}
        #: What has been said of monitors that failed: once for a domain is enough, whoever tries how often.
        self._told: dict[str, set[str]] = {}

    def follow(self, uuid: str) -> None:
        """A domain with ports runs: find its monitor and stay with it."""
        if uuid not in self._followers:
            self._told[uuid] = set()
            task = asyncio.create_task(self._follow(uuid), name=f"monitor {uuid}")
            task.add_done_callback(lambda ended: self._left(uuid, ended))
            self._followers[uuid] = task

    def leave(self, uuid: str) -> None:
        """The domain has ended. Idempotent."""
        self._told.pop(uuid, None)
        if (task := self._followers.pop(uuid, None)) is not None:
            task.cancel()

    def stop(self) -> None:
        """Leave all."""
        for uuid in list(self._followers):
            self.leave(uuid)

    def has(self, uuid: str) -> bool:
        """Whether we are connected to a domain's own monitor."""
        return uuid in self._clients

    async def execute(
        self, uuid: str, command: str, arguments: Mapping[str, object] | None = None, may_taint: bool = False
    ) -> object:
        """Have a domain's QEMU execute a command.

        :param may_taint: through libvirt if need be, which taints the domain.
        :raise HypervisorError: when QEMU refuses, cannot be reached, or only with a taint.
        """
        if (client := self._clients.get(uuid)) is not None:
            try:
                return await client.execute(command, arguments)
            except CommandRefusedError as error:
                raise HypervisorError(f"QEMU refuses {command}: {error}") from None
            except ControlError as error:
                if may_taint:
                    self._tell(uuid, str(error))
        if not may_taint:
            raise HypervisorError(f"{command}: the domain has no monitor for us, or it is busy")
        return await self._hypervisor.monitor_command(uuid, command, arguments or {})

    def _tell(self, uuid: str, failure: str) -> None:
        """Log that libvirt has to do what a monitor has failed to, unless that has been said."""
        told = self._told.get(uuid, set())
        if failure not in told:
            logger.warning("%s; libvirt is tried", failure)
        told.add(failure)

    def _left(self, uuid: str, task: asyncio.Task[None]) -> None:
        """A follower has ended: because there is no monitor, or it failed and makes room for another."""
        tell_failure(task)
        if self._followers.get(uuid) is task and (task.cancelled() or task.exception() is not None):
            del self._followers[uuid]

    async def _follow(self, uuid: str) -> None:
        path = await self._find(uuid)
        complained = False
        while path:
            client = ControlClient(path, MONITOR_LIMIT)
            try:
                await client.connect()
                client.listen(lambda name, data: self._heard(uuid, name, data))
                self._clients[uuid] = client
                logger.info("domain %s: its QEMU is followed on %s", uuid, path)
                complained = False
                self._found(uuid)
                await client.closed()
            except ControlError as error:
                if not complained:
                    logger.info("domain %s: its own monitor: %s; by libvirt meanwhile", uuid, error)
                complained = True
            finally:
                if self._clients.get(uuid) is client:
                    del self._clients[uuid]
                await client.close()
            await asyncio.sleep(RETRY_INTERVAL)

    async def _find(self, uuid: str) -> str | None:
        """Where a domain's monitor for us is; None when it has none."""
        while True:
            try:
                return find_monitor(await self._hypervisor.domain_xml(uuid))
            except HypervisorError as error:
                logger.debug("domain %s: %s", uuid, error)
            await asyncio.sleep(RETRY_INTERVAL)


def find_monitor(xml: str) -> str | None:
    """Path of the monitor that a domain's XML has QEMU make for us; None without one."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True)
    try:
        root = etree.fromstring(xml.encode(), parser)
    except etree.XMLSyntaxError:
        return None
    arguments = [
        str(element.get("value", ""))
        for element in root.iterfind(f"{{{QEMU_NAMESPACE}}}commandline/{{{QEMU_NAMESPACE}}}arg")
    ]
    path, controlled = None, False
    for option, value in itertools.pairwise(arguments):
        kind, given = value.partition(",")[0], parts(value)
        if option == "-chardev" and kind == "socket" and given.get("id") == CHARDEV and serves(given):
            path = given.get("path")
        if option == "-mon" and given.get("mode") == "control":
            controlled = controlled or CHARDEV in (kind, given.get("chardev"))
    return path if controlled else None


def parts(text: str) -> dict[str, str]:
    """QEMU's NAME=VALUE,NAME…; a doubled comma belongs to a value."""
    found: Sequence[str] = text.replace(",,", "\0").split(",")
    return {
        name: value.replace("\0", ",") for name, _, value in (part.partition("=") for part in found) if name
    }


def serves(given: Mapping[str, str]) -> bool:
    """Whether QEMU makes the socket of a chardev."""
    return given.get("server") in ON
