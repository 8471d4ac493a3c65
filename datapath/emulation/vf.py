"""One emulated VF, put together: TAP, packet engine, register model, vfio-user socket."""

import contextlib
import errno
import os
import selectors
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from datapath.emulation.echo import Echo
from datapath.emulation.engine import Engine, QueueCounters
from datapath.emulation.ifcvf import Ifcvf
from datapath.emulation.server import Session, VfServer
from datapath.emulation.tap import Tap
from datapath.emulation.virtio_net import FEATURES, NetSpec
from datapath.rx_filter import RxFilter

DRIVER = "ifcvf"
#: Largest packet without its Ethernet header, in bytes, if nothing else is said (RFC 894).
MTU = 1500
#: Bytes of an Ethernet frame before its packet.
ETHERNET_HEADER = 14

Log = Callable[[str], None]


@dataclass(frozen=True)
class VfSpec:
    """What a VF is to be."""

    socket: Path
    mac: bytes
    tap: str
    #: Bridge to put the TAP into.
    bridge: str | None = None
    #: Whether doorbells are memory to be mapped, or eventfds.
    mapped_doorbells: bool = False
    #: Receive descriptors to fetch ahead of use, as hardware may.
    prefetch: int = 0
    #: Whether frames that nobody receives wait in the TAP, rather than being lost.
    keep: bool = False
    #: Largest packet without its Ethernet header, in bytes; of the TAP as well.
    mtu: int = MTU
    queue_pairs: int = 1
    #: Whether there is no TAP, and what is sent comes back.
    echo: bool = False
    #: Feature mask to offer.
    features: int = FEATURES


def _total(counters: Sequence[QueueCounters]) -> QueueCounters:
    """The sum over several queues."""
    return QueueCounters(*(sum(numbers) for numbers in zip(*map(astuple, counters), strict=True)))


def _uplink(spec: VfSpec) -> Tap | Echo:
    if spec.echo:
        return Echo(spec.queue_pairs)
    return Tap(spec.tap, spec.mtu, spec.bridge, spec.queue_pairs)


class Vf:
    """One VF: everything from its TAP to its socket."""

    def __init__(self, spec: VfSpec, selector: selectors.BaseSelector, log: Log) -> None:
        """Make it and serve it.

        :raise TapError: when its TAP cannot be had.
        :raise OSError: when its socket cannot be had.
        """
        self._spec = spec
        self._log = log
        with contextlib.ExitStack() as undo:
            self._tap = _uplink(spec)
            undo.callback(self._tap.close)
            self._engine = Engine(self._tap, spec.prefetch, spec.keep, spec.mtu)
            undo.callback(self._engine.close)
            self._device = Ifcvf(self._engine, NetSpec(spec.mac, spec.mtu, spec.features))
            selector.register(self._engine.fault_fd, selectors.EVENT_READ, self._fault)
            undo.callback(selector.unregister, self._engine.fault_fd)
            self._server = VfServer(
                selector,
                spec.socket,
                lambda client_fd: Session(self._device, self._engine, spec.mapped_doorbells, client_fd),
                log,
            )
            undo.callback(self._server.close)
            self._resources = undo.pop_all()

    def close(self) -> None:
        """Disconnect the client and give everything back."""
        self._resources.close()

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out."""
        self._device.net.set_link(up)

    def send(self, frame: bytes) -> None:
        """Transmit a frame that comes from no ring.

        :raise ValueError: when it is no Ethernet frame that the wire takes.
        :raise OSError: when the cable is out, or the TAP takes no more.
        """
        mtu = self._spec.mtu
        if not ETHERNET_HEADER <= len(frame) <= ETHERNET_HEADER + mtu:
            raise ValueError(f"{len(frame)} bytes are no frame for an MTU of {mtu}")
        if not self._device.net.link_up:
            raise OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))
        self._tap.send(frame)

    def set_rx_filter(self, wanted: RxFilter | None) -> None:
        """Which of the frames that come the client gets, as long as it has the VF; None: all.

        :raise ValueError: when nobody has the VF, or its frames come from itself.
        """
        if self._spec.echo:
            raise ValueError("a VF that echoes has no frames of others to filter")
        if not self._server.attached:
            raise ValueError("nobody has the VF")
        self._engine.set_filter(wanted)

    def describe(self) -> dict[str, object]:
        """What query-devices tells about it."""
        counters = [self._engine.count(index) for index in range(2 * self._engine.pairs)]
        receive, transmit = _total(counters[0::2]), _total(counters[1::2])
        return {
            "socket": str(self._spec.socket),
            "mac": self._spec.mac.hex(":"),
            "tap": self._spec.tap,
            "driver": DRIVER,
            "queue_pairs": self._engine.pairs,
            "queue_pairs_in_use": self._tap.used_pairs,
            "mtu": self._spec.mtu,
            "state": self._state(),
            "failure": self._device.net.failure,
            "rx_packets": receive.packets,
            "rx_bytes": receive.bytes,
            "rx_dropped": receive.dropped,
            "rx_filtered": receive.filtered,
            "rx_filter": self._engine.filter.describe() if self._engine.filter is not None else None,
            "tx_packets": transmit.packets,
            "tx_bytes": transmit.bytes,
            "tx_dropped": transmit.dropped,
            "kicks": receive.kicks + transmit.kicks,
            "interrupts": receive.interrupts + transmit.interrupts,
        }

    def _state(self) -> str:
        if self._device.net.failure is not None:
            return "broken"
        if not self._device.net.link_up:
            return "stopped"
        if self._device.net.running:
            return "running"
        return "attached" if self._server.attached else "idle"

    def _fault(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):  # a reset, handled a moment ago, has taken it
            os.eventfd_read(self._engine.fault_fd)
        reason = self._engine.fault()
        if reason is not None:
            self._log(f"stopped, needs a reset: {reason}")
            self._device.net.fail(reason)
