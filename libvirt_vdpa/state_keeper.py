"""Writes down, in a live domain's metadata, what its guest uses of its ports (state.py).

Written only when it differs from what is there, never while the domain migrates (libvirt would let us wait
until that is over), and again when libvirt was away or the domain busy. It is advice for a later migration:
nobody waits for it.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

from lxml import etree

from libvirt_vdpa.background import tell_failure
from libvirt_vdpa.client import ControlError
from libvirt_vdpa.hypervisor import Hypervisor, HypervisorError
from libvirt_vdpa.migration_figures import runs
from libvirt_vdpa.state import NAMESPACE, NOT_THE_GUESTS, InterfaceState, read_state, render_state
from libvirt_vdpa.supervisor import Port, Supervisor

logger = logging.getLogger(__name__)

#: Seconds for a guest's driver to settle, between two tries, and between two looks at all domains: a guest
#: that begins to use more queues changes no port's state.
SETTLE = 0.5
RETRY_INTERVAL = 3.0
LOOK_INTERVAL = 10.0

States = dict[str, InterfaceState]


class StateKeeper:
    """Keeps the state metadata of all domains with ports true. Used in the event loop."""

    def __init__(
        self, supervisor: Supervisor, hypervisor: Hypervisor, migrating: Callable[[str], bool]
    ) -> None:
        """Nothing is known to be written.

        :param migrating: whether a domain, by its UUID, is being migrated.
        """
        self._supervisor = supervisor
        self._hypervisor = hypervisor
        self._migrating = migrating
        #: UUID -> what its metadata say, as far as known.
        self._written: dict[str, States] = {}
        self._writers: dict[str, asyncio.Task[None]] = {}
        self._looker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look at all domains from time to time."""
        self._looker = asyncio.create_task(self._look_at_all(), name="states of domains")

    async def _look_at_all(self) -> None:
        while True:
            await asyncio.sleep(LOOK_INTERVAL)
            for uuid in {uuid for uuid, _ in self._supervisor.ports}:
                self.look(uuid)

    def stop(self) -> None:
        """Write nothing more."""
        if self._looker is not None:
            self._looker.cancel()
        for task in self._writers.values():
            task.cancel()

    def port_changed(self, port: Port) -> None:
        """Whatever happened to a port: what its guest uses may be something else."""
        self.look(port.record.uuid)

    def look(self, uuid: str) -> None:
        """See to a domain soon."""
        ports = self._supervisor.of_domain(uuid)
        if not ports:
            self._written.pop(uuid, None)
            if (writer := self._writers.pop(uuid, None)) is not None:
                writer.cancel()
        elif uuid not in self._writers and self._differs(uuid, ports):
            writer = asyncio.create_task(self._write(uuid), name=f"domain {uuid}: writing its metadata")
            writer.add_done_callback(tell_failure)
            self._writers[uuid] = writer

    def _differs(self, uuid: str, ports: list[Port]) -> bool:
        return any(runs(port) for port in ports) and self._wanted(uuid, ports) != self._written.get(uuid)

    def _wanted(self, uuid: str, ports: list[Port]) -> States:
        """What the metadata should say."""
        written = self._written.get(uuid, {})
        states = (state_of(port, written.get(port.record.mac)) for port in ports)
        return {state.mac: state for state in states if state is not None}

    async def _write(self, uuid: str) -> None:
        """Write until it is written."""
        complained = False
        try:
            await asyncio.sleep(SETTLE)
            while True:
                try:
                    if not self._migrating(uuid) and await self._write_once(uuid):
                        return
                except HypervisorError as error:
                    if not complained:
                        logger.info("domain %s: its metadata are not written yet: %s", uuid, error)
                    complained = True
                await asyncio.sleep(RETRY_INTERVAL)
        finally:
            if self._writers.get(uuid) is asyncio.current_task():
                del self._writers[uuid]

    async def _write_once(self, uuid: str) -> bool:
        """Whether the metadata say what they should."""
        # Features and rings are not in a port's events.
        try:
            for port in self._supervisor.of_domain(uuid):
                await port.query_status()
        except ControlError:
            return False
        if uuid not in self._written:
            self._written[uuid] = read(await self._hypervisor.domain_xml(uuid))
        wanted = self._wanted(uuid, self._supervisor.of_domain(uuid))
        if wanted == self._written[uuid]:
            return True
        if not wanted:
            return False
        await self._hypervisor.set_metadata(uuid, NAMESPACE, render_state(wanted.values()))
        self._written[uuid] = wanted
        logger.debug("domain %s: metadata: %s", uuid, wanted)
        return self._wanted(uuid, self._supervisor.of_domain(uuid)) == wanted


def read(xml: str) -> States:
    """What a domain's metadata say."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True)
    try:
        return read_state(etree.fromstring(xml.encode(), parser))
    except etree.XMLSyntaxError:
        return {}


def state_of(port: Port, before: InterfaceState | None) -> InterfaceState | None:
    """What a port's guest uses now; while nothing runs, what it used last, or None when nothing is known."""
    status: Mapping[str, object] = port.status
    offered = status.get("features_offered")
    if not isinstance(offered, int):
        return before
    acked, rings = status.get("features_acked"), status.get("rings")
    if not runs(port) or not isinstance(acked, int) or not isinstance(rings, list):
        return before or InterfaceState(port.record.mac, offered, None, 0, 0)
    used = [ring for ring in rings if ring.get("running")]
    return InterfaceState(
        mac=port.record.mac,
        offered=offered,
        negotiated=acked & ~NOT_THE_GUESTS,
        queue_pairs=max((ring["index"] // 2 + 1 for ring in used), default=0),
        ring_size=max((ring["size"] for ring in used), default=0),
    )
