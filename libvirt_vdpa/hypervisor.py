"""Calls into libvirt that somebody waits for, made so that nothing of ours hangs when libvirt does.

Each call is made in a thread of its own, with a deadline: setMetadata, for example, waits until a migration
of the domain has ended (seen with libvirt 9.0), and abortJob must not wait behind it. They are made as long
as events.py is connected to libvirt, by connections of their own (connections.py); otherwise every call
fails at once. So does one that libvirt has not answered the last time, until it has: otherwise each try would
leave a thread and a connection behind.
"""

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import libvirt
import libvirt_qemu

from libvirt_vdpa.background import in_background
from libvirt_vdpa.connections import Connections

T = TypeVar("T")
logger = logging.getLogger(__name__)

#: Seconds for a call that asks, and for one that changes something.
ASK_LIMIT = 2.0
CHANGE_LIMIT = 5.0
#: Prefix that libvirt gives to the namespace of the state element.
STATE_KEY = "vdpastate"
#: What does not work with a connection that may only read.
WRITERS = (
    "ending migrations, announcing by QEMU, following migrations by QEMU's events where the domain has no "
    "monitor for us, receive filters there, and writing down what guests negotiated"
)
#: `operation` of virDomainGetJobStats -> which side of a migration this host is.
SIDES = {
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "source",
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: "destination",
}
#: `operation` -> what it is called, where QEMU "migrates" for it.
OPERATIONS = {
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "migration",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE: "save",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT: "snapshot",
    libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP: "dump",
}
#: State and reason of a domain that a migration brings to this host (virDomainGetState); the first is also
#: that of one which leaves, while it is stopped.
INCOMING_STATES = (
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION),
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP),
)


class HypervisorError(Exception):
    """A call that failed, or did not return in time; the text is one line."""


class Hypervisor:
    """One libvirt, as far as it is there. Used in the event loop, but for `attach`."""

    def __init__(self) -> None:
        self._connections: Connections | None = None
        #: UUID and name of calls that nobody waits for any more -> set when libvirt has answered after all.
        self._overdue: dict[tuple[str, str], threading.Event] = {}
        #: Whether the connection may change something.
        self.writable = False

    def attach(self, connections: Connections | None, *, writable: bool = False) -> None:
        """Use these connections from now on, None when libvirt is lost. Called in the thread that notices."""
        before, self._connections = self._connections, connections
        self.writable = writable
        if before is not None:
            before.close()

    @property
    def connected(self) -> bool:
        """Whether libvirt is there, as far as known."""
        return self._connections is not None

    async def abort_job(self, uuid: str) -> None:
        """Cancel what is being done with a domain: its migration at the source.

        :raise HypervisorError: when that fails.
        """
        await self._call(uuid, "abortJob", lambda domain: domain.abortJob(), CHANGE_LIMIT)

    async def destroy_incoming(self, uuid: str) -> None:
        """End the QEMU of a domain that is being migrated to this host, and has not run here yet.

        :raise HypervisorError: when that fails, or the domain is anything but that.
        """
        await self._call(uuid, "destroy", destroy_incoming, CHANGE_LIMIT)

    async def set_metadata(self, uuid: str, namespace: str, element: str) -> None:
        """Put an element into the live domain's metadata, instead of the one of that namespace.

        :raise HypervisorError: when that fails.
        """

        def change(domain: libvirt.virDomain) -> int:
            return domain.setMetadata(
                libvirt.VIR_DOMAIN_METADATA_ELEMENT,
                element,
                STATE_KEY,
                namespace,
                libvirt.VIR_DOMAIN_AFFECT_LIVE,
            )

        await self._call(uuid, "setMetadata", change, CHANGE_LIMIT)

    async def domain_xml(self, uuid: str) -> str:
        """A running domain's XML.

        :raise HypervisorError: when that fails.
        """
        return await self._call(uuid, "getXMLDesc", lambda domain: domain.XMLDesc(0), ASK_LIMIT)

    async def job(self, uuid: str) -> dict[str, object]:
        """What is being done with a domain (virDomainGetJobStats); `side` says which side of a migration.

        :raise HypervisorError: when that fails.
        """
        return await self._call(uuid, "getJobStats", job_of, ASK_LIMIT)

    async def monitor_command(self, uuid: str, command: str, arguments: Mapping[str, object]) -> object:
        """Have QEMU execute a QMP command. The domain is tainted by it (custom-monitor).

        :raise HypervisorError: when that fails, or QEMU refuses.
        """
        text = json.dumps({"execute": command, "arguments": arguments})

        def execute(domain: libvirt.virDomain) -> str:
            return str(libvirt_qemu.qemuMonitorCommand(domain, text, 0))

        answer = json.loads(await self._call(uuid, command, execute, CHANGE_LIMIT))
        if "error" in answer:
            raise HypervisorError(f"QEMU refuses {command}: {answer['error'].get('desc')}")
        return answer.get("return")

    async def _call(self, uuid: str, name: str, call: Callable[[libvirt.virDomain], T], limit: float) -> T:
        connections = self._connections
        if connections is None:
            raise HypervisorError(f"libvirt is not there for {name}")
        self._overdue = {key: answered for key, answered in self._overdue.items() if not answered.is_set()}
        if (uuid, name) in self._overdue:
            raise HypervisorError(f"libvirt has not answered an earlier {name} yet")
        answered = threading.Event()

        def work() -> T:
            try:
                with connections.one() as connection:
                    return call(connection.lookupByUUIDString(uuid))
            finally:
                answered.set()

        try:
            async with asyncio.timeout(limit):
                return await in_background(f"libvirt {name}", work)
        except TimeoutError:
            raise HypervisorError(f"libvirt has not answered {name} within {limit:g} s") from None
        except libvirt.libvirtError as error:
            raise HypervisorError(f"libvirt: {name}: {' '.join(str(error).split())}") from None
        finally:
            if not answered.is_set():
                self._overdue[uuid, name] = answered


def destroy_incoming(domain: libvirt.virDomain) -> None:
    """Destroy a domain whose guest still runs elsewhere: this must never hit one that runs here.

    :raise HypervisorError: when it is not such a domain.
    """
    # Its state last, again: the guest may have begun to run while the job was asked for.
    if not waits(domain) or job_of(domain).get("side") != "destination" or not waits(domain):
        raise HypervisorError("the domain does not wait for a migration to this host")
    try:
        domain.destroy()
    except libvirt.libvirtError as error:
        # One that was still being started is gone by the time that libvirt looks for it again.
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise


def waits(domain: libvirt.virDomain) -> bool:
    """Whether a domain is paused by libvirt, for a migration."""
    state: Any = domain.state()  # the binding declares strings
    return tuple(state) in INCOMING_STATES


def job_of(domain: libvirt.virDomain) -> dict[str, object]:
    """Job statistics of a domain, empty when nothing is being done; `operation` by name, and its `side`.

    libvirt has none for a domain that arrives ("available only on the source host").

    :raise libvirt.libvirtError: when there are none for another reason.
    """
    try:
        figures: Any = domain.jobStats()  # the binding declares other types than it gives
    except libvirt.libvirtError as error:
        # Any other, of one that waits: it may as well be one that leaves, and libvirt busy.
        if error.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED and waits(domain):
            return {"side": "destination"}
        raise
    if figures.get("type") == libvirt.VIR_DOMAIN_JOB_NONE:
        return {}
    number = figures.get("operation", 0)
    return {**figures, "side": SIDES.get(number), "operation": OPERATIONS.get(number)}
