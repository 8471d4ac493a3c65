"""libvirt's hook operations -> what happens to a domain's ports.

OPERATIONS is the table. libvirt calls (docs/hooks.rst): prepare, start, started at a start; stopped,
release at an end, also after a start that failed; reconnect for each running domain after its own
restart; restore before the prepare of a saved domain; migrate before the prepare at a destination. Nothing
is allocated in these two, because no release follows a refusal: arrival.py promises.

Nothing here calls libvirt: it waits for us.
"""

import asyncio
import itertools
import logging
import weakref
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Protocol

from libvirt_vdpa.arrival import Arrivals, Expected, UnfitError
from libvirt_vdpa.client import ControlError
from libvirt_vdpa.config import Config
from libvirt_vdpa.domain import (
    DomainError,
    DomainSpec,
    PortSpec,
    domain_identity,
    is_ours,
    parse_domain,
    with_local_paths,
)
from libvirt_vdpa.inventory import Holder, Inventory, InventoryError, Vf, too_many_queues
from libvirt_vdpa.ports import Record, State, control_path
from libvirt_vdpa.state import InterfaceState
from libvirt_vdpa.supervisor import SILENT, Port, PortError, Supervisor

logger = logging.getLogger(__name__)

#: Share of a hook's time limit in which we answer, so that our reason comes before its own.
ANSWER_SHARE = 0.8
#: Share of it in which VFs are asked what they can do, after the pools have been looked through.
PROBE_SHARE = 0.5
#: Bytes of a domain's name that go into the name of a log: with the MAC it must fit into 255 (NAME_MAX).
LOG_NAME_BYTES = 200
#: What is logged of a VF.
WITHOUT_UPLINK = (
    "VF '%s' has no uplink: its guest must announce itself after a migration; set uplink of its pool"
)
#: Seconds that a port has to reach a QEMU that already runs, and between looks whether it has.
CONNECTED_LIMIT = 5.0
CONNECTED_INTERVAL = 0.02


class LifecycleError(Exception):
    """An operation that is refused; the text is one line for libvirt's user."""


class Migrations(Protocol):
    """Who follows migrations, and is told here of those that only hooks tell of. Neither call waits."""

    def incoming(self, uuid: str) -> None:
        """A domain's ports are made, and its guest is to come to them from another host."""

    def ended(self, uuid: str) -> None:
        """QEMU is gone, or the ports are: whatever was going on with the domain here is over."""


class Lifecycle:
    """Carries out hook operations, one at a time for each domain."""

    def __init__(
        self,
        config: Config,
        inventory: Inventory,
        supervisor: Supervisor,
        refresh: Callable[[], Awaitable[None]],
        arrivals: Arrivals | None = None,
    ) -> None:
        """Nothing is under way.

        :param refresh: has the inventory know which VFs there are now; awaited before one is lent.
        :param arrivals: who looks after guests that are expected; made here unless given.
        """
        self._config = config
        self._inventory = inventory
        self._supervisor = supervisor
        self._refresh = refresh
        self._arrivals = arrivals or Arrivals(inventory)
        #: Whom to tell of migrations; set by whoever has both.
        self.migrations: Migrations | None = None
        #: Device strings of VFs of which it has been told that their guests cannot be announced.
        self._without_uplink: set[str] = set()
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        #: UUID of a domain that has ports, or an operation under way -> number of the last operation on
        #: it, to see whether anything happened since.
        self._last_operation: dict[str, int] = {}
        self._numbers = itertools.count()

    async def hook(self, operation: str, name: str, xml: bytes) -> str | None:
        """Carry out a hook's operation; one that is unknown, or of a foreign domain, does nothing.

        Cancelled, it undoes what it has begun: whoever asked is gone.

        :return: XML that libvirt is to go on with in place of the domain's, in `migrate` and `restore`.
        :raise LifecycleError: when libvirt must be told that it cannot be.
        """
        handler = OPERATIONS.get(operation)
        if handler is None or not is_ours(xml):
            return None
        uuid = domain_identity(xml)[1]
        number = self._last_operation[uuid] = next(self._numbers)
        limit = self._config.hook_time_limit * ANSWER_SHARE
        logger.info("domain '%s': %s", name, operation)
        try:
            async with asyncio.timeout(limit), self._exclusive(uuid):
                return await handler(self, name, xml)
        except TimeoutError:
            text = f"domain '{name}': {operation} took longer than {limit:g} s; see virtvdpad's log"
            raise LifecycleError(text) from None
        except (LifecycleError, DomainError) as error:
            logger.error("%s: %s", operation, error)
            raise LifecycleError(str(error)) from None
        finally:
            self._forget(uuid, number)

    def snapshot(self) -> Mapping[str, int]:
        """Domains that have ports, and where each stands: for a later `reconcile`."""
        domains = {uuid for uuid, _ in self._supervisor.ports}
        return {uuid: self._last_operation.get(uuid, -1) for uuid in domains}

    async def reconcile(self, running: Collection[str], snapshot: Mapping[str, int]) -> bool:
        """Release the ports of domains that do not run and whose end no hook has told us.

        :param running: UUIDs of the domains that ran at some time after `snapshot` was taken.
        :return: whether that is done; False when a QEMU still uses such a port.
        """
        done = True
        for uuid, number in snapshot.items():
            if uuid in running:
                continue
            async with self._exclusive(uuid):
                if self._last_operation.get(uuid, -1) == number:
                    done &= await self._release_unused(uuid)
                    self._forget(uuid, number)
        return done

    def _forget(self, uuid: str, number: int) -> None:
        """Keep nothing of a domain without ports, unless another operation on it has begun."""
        if self._last_operation.get(uuid) == number and not self._supervisor.of_domain(uuid):
            del self._last_operation[uuid]

    async def _release_unused(self, uuid: str) -> bool:
        """Release a domain's ports that no QEMU uses; whether those were all."""
        done = True
        for port in self._supervisor.of_domain(uuid):
            if await has_front_end(port):
                logger.warning(
                    "%s: libvirt does not run the domain, but QEMU is connected", port.record.label
                )
                done = False
            else:
                logger.info("%s: the domain does not run; the port is released", port.record.label)
                await self._supervisor.release(port)
        if done:
            self._ended(uuid)
        return done

    def _ended(self, uuid: str) -> None:
        """Whatever was going on with a domain is over."""
        if self.migrations is not None:
            self.migrations.ended(uuid)

    def _exclusive(self, uuid: str) -> asyncio.Lock:
        """The lock of a domain; it exists as long as somebody uses it."""
        return self._locks.setdefault(uuid, asyncio.Lock())

    # The operations

    async def _prepare(self, name: str, xml: bytes) -> None:
        spec = parse_domain(xml, self._config.run_folder)
        expected = self._arrivals.take(spec.uuid)
        await self._end_leftovers(spec)
        await self._refresh()
        made: list[Port] = []
        try:
            for wanted in spec.ports:
                state = expected.states.get(wanted.mac) if expected is not None else None
                made.append(self._make_port(spec, wanted, state, expected))
            await all_of(
                self._start_port(spec, wanted, port)
                for wanted, port in zip(spec.ports, made, strict=True)
                if wanted.role == "listen"
            )
        except BaseException:
            self._inventory.retract(spec.uuid)
            # For a cancellation as well: a failed prepare leaves nothing behind.
            await asyncio.shield(all_of(self._supervisor.release(port) for port in made))
            raise
        if any(port.record.arriving for port in made) and self.migrations is not None:
            self.migrations.incoming(spec.uuid)

    async def _start(self, name: str, xml: bytes) -> None:
        """QEMU will make the sockets of server mode next, and wait on them until we connect."""
        spec = parse_domain(xml, self._config.run_folder)
        for wanted in spec.ports:
            port = self._port(spec, wanted)
            if port.state is State.IDLE:
                await self._start_port(spec, wanted, port)

    async def _started(self, name: str, xml: bytes) -> None:
        """QEMU runs, so somebody connected to every socket of its own; make sure that it was us."""
        spec = parse_domain(xml, self._config.run_folder)
        for wanted in spec.ports:
            if wanted.role == "connect":
                await self._connected(spec, wanted)

    async def _connected(self, spec: DomainSpec, wanted: PortSpec) -> None:
        port = self._port(spec, wanted)
        try:
            async with asyncio.timeout(CONNECTED_LIMIT):
                while not await has_front_end(port):
                    await asyncio.sleep(CONNECTED_INTERVAL)
        except TimeoutError:
            text = f"the port has not reached QEMU on {wanted.socket_path} within {CONNECTED_LIMIT:g} s"
            raise refusal(spec, wanted.mac, text) from None

    async def _stopped(self, name: str, xml: bytes) -> None:
        uuid = domain_identity(xml)[1]
        for port in self._supervisor.of_domain(uuid):
            self._supervisor.guest_left(port)
        self._ended(uuid)

    async def _release(self, name: str, xml: bytes) -> None:
        uuid = domain_identity(xml)[1]
        try:
            await all_of(self._supervisor.release(port) for port in self._supervisor.of_domain(uuid))
        finally:
            self._ended(uuid)

    async def _restore(self, name: str, xml: bytes) -> str | None:
        """A guest that was saved is to run on. Only promise: `prepare` follows, or nothing."""
        return await self._expect(xml, migrating=False)

    async def _reconnect(self, name: str, xml: bytes) -> None:
        """The domain runs, and may be migrating: nothing that is there is touched. Whatever port it lacks is
        made, with any VF of the pool, and offers no more than the guest knows."""
        spec = parse_domain(xml, self._config.run_folder)
        await self._refresh()
        for wanted in spec.ports:
            port = self._supervisor.ports.get((spec.uuid, wanted.mac)) or self._make_port(
                spec, wanted, spec.states.get(wanted.mac)
            )
            if port.state is State.IDLE:
                await self._start_port(spec, wanted, port)

    async def _migrate(self, name: str, xml: bytes) -> str | None:
        """A guest is to come from another host. Only promise: `prepare` follows, unless somebody refuses."""
        return await self._expect(xml, migrating=True)

    async def _expect(self, xml: bytes, migrating: bool) -> str | None:
        """Refuse a guest that no VF of this host fits; the domain's XML where it must be another here."""
        local = with_local_paths(xml, self._config.run_folder)
        spec = parse_domain(xml if local is None else local, self._config.run_folder)
        await self._refresh()
        try:
            await self._arrivals.expect(spec, migrating, self._config.hook_time_limit * PROBE_SHARE)
        except UnfitError as error:
            raise refusal(spec, error.mac, str(error)) from None
        return None if local is None else local.decode()

    # What they are made of

    async def _end_leftovers(self, spec: DomainSpec) -> None:
        """A domain that is about to start needs no port that it may still have."""
        for port in self._supervisor.of_domain(spec.uuid):
            if await has_front_end(port):
                text = f"its port is still connected to a running QEMU (port process {port.record.pid})"
                raise refusal(spec, port.record.mac, text)
            logger.warning("%s: left over from an earlier start; released", port.record.label)
            await self._supervisor.release(port)

    def _make_port(
        self,
        spec: DomainSpec,
        wanted: PortSpec,
        state: InterfaceState | None,
        expected: Expected | None = None,
    ) -> Port:
        """Lend a VF and make the port that holds it, without a process.

        :param state: what the guest that is to use it, and runs already, knows of its VF.
        :param expected: the guest, when it is yet to come.
        """
        holder = Holder(spec.name, spec.uuid, wanted.mac)
        arriving = expected is not None and expected.migrating
        try:
            vf = self._inventory.lend(wanted.driver, wanted.pool, wanted.device, wanted.queue_pairs, holder)
        except InventoryError as error:
            raise refusal(spec, wanted.mac, str(error)) from None
        record = Record(
            domain=spec.name,
            uuid=spec.uuid,
            mac=wanted.mac,
            device=device_for(vf, wanted),
            pool=vf.pool,
            role=wanted.role,
            socket=str(wanted.socket_path),
            control=str(control_path(self._config.run_folder, spec.uuid, wanted.mac)),
            log=str(self._config.log_folder / log_name(spec.name, wanted.mac)),
            features=state.offered | (state.negotiated or 0) if state is not None else None,
            negotiated=state.negotiated if state is not None and expected is not None else None,
            arriving=arriving,
            link_up=wanted.link_up,
            # What it sees is not known until it has been looked at here, by this daemon or one after it.
            link_cut=arriving,
            reconnect=wanted.reconnect,
            log_mode=wanted.migration,
            host_notifiers="auto" if wanted.page_per_vq else "off",
            announce=wanted.announce,
            announce_rounds=wanted.announce_rounds,
            uplink=self._uplink(vf, wanted),
        )
        try:
            return self._supervisor.add(record)
        except PortError as error:
            self._inventory.give_back(vf.device, holder)
            raise refusal(spec, wanted.mac, str(error)) from None

    def _uplink(self, vf: Vf, wanted: PortSpec) -> str | None:
        """A VF's uplink; told once where there is none and its guest may need one."""
        needed = wanted.announce not in SILENT
        if vf.uplink is None and needed and vf.device not in self._without_uplink:
            self._without_uplink.add(vf.device)
            logger.warning(WITHOUT_UPLINK, vf.device)
        return vf.uplink

    async def _start_port(self, spec: DomainSpec, wanted: PortSpec, port: Port) -> None:
        try:
            await self._supervisor.start(port)
        except PortError as error:
            raise refusal(spec, wanted.mac, str(error)) from None
        # Known only now for a VF that no pool describes.
        queue_pairs = port.status.get("queue_pairs")
        if isinstance(queue_pairs, int) and wanted.queue_pairs > queue_pairs:
            raise refusal(spec, wanted.mac, too_many_queues(wanted.queue_pairs, queue_pairs))
        size = port.status.get("max_queue_size")
        if isinstance(size, int) and wanted.queue_size > size:
            text = f"<driver> asks for rings of {wanted.queue_size}: the VF's have at most {size} descriptors"
            raise refusal(spec, wanted.mac, text)
        mtu = port.status.get("max_mtu")
        if isinstance(mtu, int) and wanted.mtu > mtu:
            text = f"MTU {wanted.mtu}: the VF carries packets of at most {mtu} bytes; lower it"
            raise refusal(spec, wanted.mac, text)

    def _port(self, spec: DomainSpec, wanted: PortSpec) -> Port:
        port = self._supervisor.ports.get((spec.uuid, wanted.mac))
        if port is None:
            raise refusal(
                spec, wanted.mac, "it was not prepared; was virtvdpad started in between? Start again"
            )
        return port


Handler = Callable[[Lifecycle, str, bytes], Awaitable[str | None]]
#: Hook operation -> what carries it out: given the domain's name and XML.
OPERATIONS: dict[str, Handler] = {
    "prepare": Lifecycle._prepare,
    "start": Lifecycle._start,
    "started": Lifecycle._started,
    "stopped": Lifecycle._stopped,
    "release": Lifecycle._release,
    "restore": Lifecycle._restore,
    "reconnect": Lifecycle._reconnect,
    "migrate": Lifecycle._migrate,
}


def device_for(vf: Vf, wanted: PortSpec) -> str:
    """The device string for a guest. One that is trusted with what it receives gets all that reaches its VF,
    where the driver would let through no more than frames to its address."""
    said = vf.driver != "mlx5" or ",promiscuous=" in vf.device
    return f"{vf.device},promiscuous=1" if wanted.trusted and not said else vf.device


def holder_of(record: Record) -> Holder:
    """The port as the inventory knows it."""
    return Holder(record.domain, record.uuid, record.mac)


def log_name(domain: str, mac: str) -> str:
    """Name of a port's log. Domain names may be of any length and hold whatever XML can."""
    name = domain.replace("/", "_").encode()[:LOG_NAME_BYTES].decode(errors="ignore")
    return f"{name}-{mac}.log"


def refusal(spec: DomainSpec, mac: str, text: str) -> LifecycleError:
    """A refusal that names domain and interface."""
    return LifecycleError(f"domain '{spec.name}': interface {mac}: {text}")


async def has_front_end(port: Port) -> bool:
    """Whether QEMU is connected to a port; not when its process does not answer."""
    try:
        return bool((await port.query_status()).get("front_end"))
    except ControlError:
        return False


async def all_of(work: Iterable[Awaitable[None]]) -> None:
    """Wait for all, then raise the first failure: so none of them runs on behind our back."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
