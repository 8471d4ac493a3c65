"""Who tells the network, at a destination, where the guest is now, and when.

QEMU announces by itself: its virtio-net asks a guest that can (GUEST_ANNOUNCE), otherwise it sends the port
SEND_RARP, and the port carries that out on its uplink. This owns what comes on top of that: the metadata's
`announce` and `announce-rounds`, and ports that were dead when QEMU's announcements fell.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

from libvirt_vdpa.background import Tasks
from libvirt_vdpa.client import ControlError
from libvirt_vdpa.hypervisor import HypervisorError
from libvirt_vdpa.supervisor import Port

logger = logging.getLogger(__name__)

#: Seconds after the arrival at which a port announces its guest: those of QEMU's five rounds
#: (migration/options.c: 50 ms at first, 100 ms more from one to the next).
ROUNDS = (0.0, 0.05, 0.2, 0.45, 0.8)
#: The same for announce-self (QEMU qapi/net.json, AnnounceParameters): milliseconds.
ANNOUNCE_TIMES = {"initial": 50, "max": 550, "step": 100}
#: Rounds of announce-self for a guest whose port was away, where it costs no taint.
LATE_ROUNDS = 5

#: UUID, command, arguments, whether the domain may be tainted by it -> QEMU's answer.
Execute = Callable[[str, str, Mapping[str, object], bool], Awaitable[object]]


def port_announces(announce: str) -> bool:
    """Whether, by that policy, the port announces on its own account when the guest arrives."""
    return announce == "rarp"


def port_may_announce(announce: str) -> bool:
    """Whether, by that policy, a port announces a guest whose first announcements it missed."""
    return announce in ("auto", "rarp")


def qemu_rounds(ports: Iterable[Port]) -> int:
    """Rounds of announce-self that the operator wants for a domain beside QEMU's own."""
    return max((port.record.announce_rounds for port in ports if port.record.announce != "off"), default=0)


class Announcer:
    """Carries the policy out; what it has begun goes on until `stop`."""

    def __init__(self, execute: Execute) -> None:
        """Nothing is announced yet.

        :param execute: has a domain's QEMU execute a command; raises HypervisorError.
        """
        self._execute = execute
        self._tasks = Tasks()

    def arrived(self, uuid: str, ports: Collection[Port]) -> None:
        """A guest has arrived at this host and goes on here."""
        for port in ports:
            if port_announces(port.record.announce):
                self._announce_by_port(port)
        if rounds := qemu_rounds(ports):
            self._announce_by_qemu(uuid, rounds, may_taint=True)

    def late(self, uuid: str, port: Port) -> None:
        """A port whose guest arrived without it carries its guest now."""
        logger.info("%s: announces again: the port was not there when the guest arrived", port.record.label)
        if port_may_announce(port.record.announce):
            self._announce_by_port(port)
        if port.record.announce != "off":
            wanted = port.record.announce_rounds
            self._announce_by_qemu(uuid, wanted or LATE_ROUNDS, may_taint=bool(wanted))

    def stop(self) -> None:
        """Announce nothing more."""
        self._tasks.stop()

    def _announce_by_port(self, port: Port) -> None:
        self._tasks.start(announce_by_port(port, ROUNDS), f"{port.record.label}: announcing")

    def _announce_by_qemu(self, uuid: str, rounds: int, *, may_taint: bool) -> None:
        work = announce_by_qemu(self._execute, uuid, rounds, may_taint=may_taint)
        self._tasks.start(work, f"domain {uuid}: announcing by QEMU")


async def announce_by_qemu(execute: Execute, uuid: str, rounds: int, *, may_taint: bool) -> None:
    """Have QEMU announce a guest; where nobody asked for that, it is a try."""
    try:
        await execute(uuid, "announce-self", {**ANNOUNCE_TIMES, "rounds": rounds}, may_taint)
    except HypervisorError as error:
        logger.log(logging.WARNING if may_taint else logging.DEBUG, "announce-self: %s", error)


async def announce_by_port(port: Port, times: Iterable[float]) -> None:
    """Have a port send RARP on its uplink at those times from now; a port that is away ends it."""
    begin = asyncio.get_running_loop().time()
    for moment in times:
        await asyncio.sleep(begin + moment - asyncio.get_running_loop().time())
        try:
            await port.ask("announce", {"mac": port.record.mac})
        except ControlError as error:
            logger.warning("%s: cannot announce: %s", port.record.label, error)
            return
