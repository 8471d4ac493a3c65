"""Guests that are about to come, from another host or from a file: which VFs they get, or why they cannot.

libvirt asks before it begins (`migrate`, `restore`), and may then never come: somebody else may refuse, and
no hook tells. So all that is done here expires by itself: VFs are promised, what is known of the guest is
kept as long as the promise. The VF that is promised has been opened and asked: that the guest can live with
it is better known before the guest has left where it is.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

from libvirt_vdpa.domain import DomainSpec, PortSpec
from libvirt_vdpa.inventory import PROMISE_LIMIT, Holder, Inventory, InventoryError, Vf, pci_address
from libvirt_vdpa.probe import Ability, Need, ProbeError, misfits, probe
from libvirt_vdpa.state import InterfaceState

logger = logging.getLogger(__name__)

#: Share of the time that is left which one VF may take to answer, as long as there are others to ask.
TRY_SHARE = 0.6

#: Asks a VF what it can do: device string, seconds that it may take. Raises ProbeError.
Prober = Callable[[str, float], Awaitable[Ability]]


class UnfitError(Exception):
    """A guest for which this host has no VF; the text says why."""

    def __init__(self, mac: str, text: str) -> None:
        super().__init__(text)
        self.mac = mac


@dataclass(frozen=True)
class Expected:
    """A guest that is about to come."""

    #: Whether it comes from another host; else from a file.
    migrating: bool
    #: What it uses, by MAC.
    states: Mapping[str, InterfaceState]
    #: When it is not expected any more, by the clock.
    expires: float


class Arrivals:
    """The guests that are expected now."""

    def __init__(
        self, inventory: Inventory, prober: Prober = probe, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Nobody is expected.

        :param clock: seconds; the inventory's.
        """
        self._inventory = inventory
        self._probe = prober
        self._clock = clock
        self._expected: dict[str, Expected] = {}

    async def expect(self, spec: DomainSpec, migrating: bool, limit: float) -> None:
        """Find a VF for each interface of a guest and promise it. What was promised before is void.

        :param limit: seconds that VFs may take to answer.
        :raise UnfitError: when there is none for an interface; nothing is promised then.
        """
        self._expected.pop(spec.uuid, None)
        self._inventory.retract(spec.uuid)
        deadline = self._clock() + limit
        try:
            found = [(await self._find(spec, wanted, deadline), wanted.mac) for wanted in spec.ports]
        except BaseException:
            self._inventory.retract(spec.uuid)
            raise
        # All from now on, however long the others took.
        for vf, mac in found:
            self._inventory.promise(vf, Holder(spec.name, spec.uuid, mac))
        now = self._clock()
        self._expected = {uuid: guest for uuid, guest in self._expected.items() if guest.expires > now}
        self._expected[spec.uuid] = Expected(migrating, spec.states, now + PROMISE_LIMIT)

    def take(self, uuid: str) -> Expected | None:
        """The guest, if it is expected: it comes now."""
        guest = self._expected.pop(uuid, None)
        return guest if guest is not None and guest.expires > self._clock() else None

    async def _find(self, spec: DomainSpec, wanted: PortSpec, deadline: float) -> Vf:
        """A VF that fits one interface, promised to it."""
        state = spec.states.get(wanted.mac)
        if state is None:
            text = "%s/%s: the domain does not say what its guest uses; the VF is compared with the XML alone"
            logger.warning(text, spec.name, wanted.mac)
        need, holder = need_of(wanted, state), Holder(spec.name, spec.uuid, wanted.mac)
        tried: dict[str, Misfit] = {}
        while untried := [vf for vf in self._free(wanted, holder, tried) if vf.device not in tried]:
            vf, left = untried[0], deadline - self._clock()
            if left <= 0:
                break
            # First, so that nobody else opens it meanwhile.
            self._inventory.promise(vf, holder)
            misfit = await self._try(vf, need, left if len(untried) == 1 else left * TRY_SHARE)
            if misfit is None:
                return vf
            logger.info("%s/%s: %s", spec.name, wanted.mac, misfit.text)
            tried[vf.device] = misfit
            self._inventory.retract(spec.uuid, wanted.mac)
        if not tried:
            raise UnfitError(wanted.mac, "no VF could be asked in time; see virtvdpad's log")
        best = min(tried.values(), key=lambda misfit: misfit.rank)
        others = f" (none of {len(tried)} free VFs of pool '{wanted.pool}' fits)" if len(tried) > 1 else ""
        raise UnfitError(wanted.mac, f"{best.text}{others}")

    def _free(self, wanted: PortSpec, holder: Holder, tried: Mapping[str, object]) -> list[Vf]:
        """The VFs that could be lent now; looked up each time, because they come and go meanwhile."""
        try:
            return list(
                self._inventory.candidates(
                    wanted.driver, wanted.pool, wanted.device, wanted.queue_pairs, holder
                )
            )
        except InventoryError as error:
            if tried:
                return []
            raise UnfitError(wanted.mac, str(error)) from None

    async def _try(self, vf: Vf, need: Need, limit: float) -> "Misfit | None":
        name = f"VF '{pci_address(vf.device) or vf.device}'"
        try:
            wrong = misfits(need, await self._probe(vf.device, limit))
        except ProbeError as error:
            return Misfit((1, 0), f"{name} cannot be used: {error}")
        text = f"{name} {'; it '.join(wrong)}; choose a host or pool whose VFs fit"
        return Misfit((0, len(wrong)), text) if wrong else None


@dataclass(frozen=True)
class Misfit:
    """Why a VF is not for a guest, and how far it is from that: the lowest is told."""

    rank: tuple[int, int]
    text: str


def need_of(wanted: PortSpec, state: InterfaceState | None) -> Need:
    """What an interface needs of its VF.

    Without a driver in the guest it is what the driver may have found when it looks again: what was offered.
    """
    need = Need(
        queues_attribute=wanted.queue_pairs,
        ring_attribute=wanted.queue_size,
        mtu=wanted.mtu,
        migration=wanted.migration,
    )
    if state is None:
        return need
    return replace(
        need,
        features=state.offered if state.negotiated is None else state.negotiated,
        negotiated=state.negotiated is not None,
        queue_pairs=state.queue_pairs,
        ring_size=state.ring_size,
    )
