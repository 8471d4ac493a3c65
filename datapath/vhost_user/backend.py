"""The vhost-user back-end of one connection: a state machine without I/O that drives a vDPA device.

It takes typed messages and returns the bytes of the reply, if one is due. Which message is served, and
what must have been negotiated first, is the table `RULES`; when a ring runs is `Backend._settle`, and
nowhere else:

    a ring runs  <=>  it is started (its kick has come, and no GET_VRING_BASE since)  and enabled
                      and features are set, and, where STATUS was negotiated, DRIVER_OK is,
                      and, if it is packed, the same is so of the first pair's rings

What fails while the front-end begins or ends to log is kept until it is done with that: `log_exchange.py`.

A disabled transmit ring is not drained: the VF cannot consume what it does not run, so the guest's packets
wait in the ring until it is enabled. (The specification has network back-ends drop them.) Only those of queue
pairs beyond the first run on, once they have run, beside rings that are enabled: a guest that changes over to
fewer pairs still puts packets there, and Linux's TCP sends none again that it believes to be in a queue.

Source: QEMU docs/interop/vhost-user.rst. Owns one connection's negotiated state, its memory and rings; the
device outlives it. Sockets are `port.py`'s.
"""

import contextlib
import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datapath import virtio
from datapath.descriptors import close_all
from datapath.vdpa import DeviceError, DeviceLostError, VdpaDevice
from datapath.vhost_user import memory as guest_memory
from datapath.vhost_user.host_notifiers import HostNotifiers
from datapath.vhost_user.log import DirtyLog
from datapath.vhost_user.log_exchange import LogExchange
from datapath.vhost_user.marking import LogStatus, Marking
from datapath.vhost_user.memory import GuestMemory
from datapath.vhost_user.messages import (
    EXPECT_REPLY,
    LAYOUTS,
    Message,
    ProtocolError,
    ProtocolFeature,
    Region,
    Request,
    encode_reply,
    request_name,
)
from datapath.vhost_user.protocol_features import PROTOCOL_FEATURES
from datapath.vhost_user.timing import Timing
from datapath.vhost_user.vring import VRING_F_LOG, Vring

F_PROTOCOL_FEATURES = virtio.bit(virtio.Feature.VHOST_USER_F_PROTOCOL_FEATURES)
F_VERSION_1 = virtio.bit(virtio.Feature.F_VERSION_1)
F_RING_PACKED = virtio.bit(virtio.Feature.F_RING_PACKED)
F_LOG_ALL = virtio.bit(virtio.Feature.VHOST_F_LOG_ALL)
#: Bits of the feature word that are vhost's and no virtio device's.
VHOST_FEATURES = F_PROTOCOL_FEATURES | F_LOG_ALL
#: Offered with host notifiers only, and what they need besides: pages go over the back channel, with answers.
NOTIFIER_FEATURES = virtio.bit(ProtocolFeature.BACKEND_SEND_FD) | virtio.bit(ProtocolFeature.HOST_NOTIFIER)
NOTIFIER_NEEDS = (
    NOTIFIER_FEATURES | virtio.bit(ProtocolFeature.BACKEND_REQ) | virtio.bit(ProtocolFeature.REPLY_ACK)
)
#: Smallest MTU that IPv4 allows (RFC 791), in bytes; also virtio's (virtio 1.3 section 5.1.4.1).
MIN_MTU = 68


class Backend:
    """One front-end's session with a device.

    `handle` raises `ProtocolError` for what the front-end did wrong and `DeviceError` for what the
    device could not do; after either only `close` is of use.
    """

    def __init__(
        self,
        device: VdpaDevice,
        offer: int = (1 << 64) - 1,
        report: Callable[[str], None] = print,
        *,
        announce: Callable[[bytes], None] = lambda mac: None,
        negotiated: int | None = None,
        timing: Timing | None = None,
        host_notifiers: bool = False,
    ) -> None:
        """Begin with nothing negotiated.

        :param offer: mask of the virtio features to offer, of those that the device has.
        :param report: told, in a line, what an operator should know.
        :param announce: told the address of a guest that has moved here, before or after its rings run.
        :param negotiated: what a guest that moves here has accepted, see `former`.
        :param timing: where what is done is timed.
        :param host_notifiers: whether to offer the guest the device's doorbells.
        """
        self.device = device
        self.offered = device.features & offer | F_PROTOCOL_FEATURES
        self.acked: int | None = None
        #: What a guest that moved here had accepted, for a front-end that has forgotten it. One that starts
        #: rings with features of its own has not, and from then on they are the guest's of now.
        self.former = negotiated
        self._forgetful = False
        self.offered_protocol = PROTOCOL_FEATURES | (NOTIFIER_FEATURES if host_notifiers else 0)
        self.protocol_features = 0
        self.status = 0
        self.memory = GuestMemory()
        #: Regions that were removed last; one may come back.
        self._removed: deque[Region] = deque(maxlen=guest_memory.MAX_SLOTS)
        self.rings = [Vring(index) for index in range(2 * device.queue_pairs)]
        self.exchange = LogExchange()
        self._report = report
        self._announce = announce
        self._timing = timing or Timing()
        self._marking = Marking(device, self.memory, self._timing, report)
        self.notifiers = HostNotifiers(device, self.rings, report)

    @property
    def log_status(self) -> LogStatus:
        """How the device's writes are logged now; what has failed in the log exchange is told at once."""
        status = self._marking.describe(self.running)
        if self.exchange.failure is not None:
            status = dataclasses.replace(status, problem=str(self.exchange.failure))
        return status

    @property
    def running(self) -> bool:
        """Whether the device runs any ring."""
        return any(ring.running for ring in self.rings)

    @property
    def packed(self) -> bool:
        """Whether the guest's rings are packed ones."""
        return bool((self.acked or 0) & F_RING_PACKED)

    def negotiated(self, feature: ProtocolFeature) -> bool:
        """Whether the front-end accepted a protocol feature."""
        return bool(self.protocol_features & virtio.bit(feature))

    def handle(self, message: Message) -> bytes | None:
        """Carry a message out and return its reply, or None where none is due.

        Takes the message's descriptors.

        :raise ProtocolError: when the front-end broke the protocol.
        :raise DeviceError: when the device failed.
        """
        try:
            begins = self._begins_log_exchange(message)
            with self._timing.message(message.request), self.exchange.message(message.request, begins):
                rule = RULES.get(message.request)
                if rule is None or not (rule.needs is None or self.negotiated(rule.needs)):
                    return self._refuse(message)
                answer = self._carry_out(rule, message)
            if LAYOUTS[message.request].reply is None or answer is None:
                return self._acknowledge(message, answer or 0)
            return encode_reply(message.request, answer)
        finally:
            message.close()

    def _carry_out(self, rule: "Rule", message: Message) -> Any:
        """The handler's answer, or that all is well: what fails in the log exchange is kept for its end."""
        answer = 0 if message.request == Request.SET_LOG_BASE else None
        try:
            answer = rule.handler(self, message)
            if self.exchange.failure is None:
                self._settle_log()
                self._settle()
                self._settle_notifiers()
        except (ProtocolError, DeviceError) as error:
            if not self.exchange.defer(error):
                raise
            self._report(f"{request_name(message.request)} is answered all the same: {error}")
        return answer

    def _begins_log_exchange(self, message: Message) -> bool:
        """Whether a message switches logging: gives a log, or changes a flag of what has been started."""
        if message.request in (Request.SET_LOG_BASE, Request.SET_LOG_FD):
            return True
        if message.request == Request.SET_FEATURES:
            switched = (message.payload ^ (self.acked or 0)) & F_LOG_ALL
            return bool(switched) and any(ring.started for ring in self.rings)
        if message.request == Request.SET_VRING_ADDR and message.payload.index < len(self.rings):
            ring: Vring = self.rings[message.payload.index]
            changed: bool = ring.logged != bool(message.payload.flags & VRING_F_LOG)
            return ring.started and changed
        return False

    def _refuse(self, message: Message) -> bytes | None:
        """A message that is not served: said where it can be, else ignored, as the specification wants."""
        layout = LAYOUTS.get(message.request)
        if message.request in EXPECT_REPLY or (layout is not None and layout.reply is not None):
            name = request_name(message.request)
            raise ProtocolError(f"{name} waits for a reply, but what it belongs to was not negotiated")
        return self._acknowledge(message, 1)

    def _acknowledge(self, message: Message, result: int) -> bytes | None:
        if not (message.need_reply and self.negotiated(ProtocolFeature.REPLY_ACK)):
            return None
        return encode_reply(message.request, result)

    def signal_error(self) -> None:
        """Tell the front-end by its error eventfds that the rings have failed."""
        for ring in self.rings:
            ring.signal_error()

    def close(self) -> None:
        """Stop the rings, take guest memory from the device and release whatever the front-end gave."""
        steps: list[Callable[[], None]] = [self._suspend, self._marking.end]
        steps += [partial(self.device.unmap_memory, mapping.memory) for mapping in self.memory]
        for step in steps:
            try:
                step()
            except DeviceLostError:
                break  # with the device its mappings have gone; the port tells
            except DeviceError as error:
                self._report(str(error))
        self.memory.close()
        for ring in self.rings:
            ring.close()
        self._marking.close()
        self.notifiers.close()

    # When rings run

    def _settle(self) -> None:
        """Make the device run exactly the rings that are to run."""
        wanted = self._to_run()
        running = [ring for ring in self.rings if ring.running]
        if not wanted:
            self._suspend()
        elif not running:
            self._start(wanted)
        elif wanted != running:
            self.notifiers.take_back()
            for ring in running:
                if ring not in wanted:
                    with self._marking.covered(), self._timing.device():
                        ring.stopped(self.device.stop_ring(ring.index), self.packed)
                    self._marking.rings_stopped()
            for ring in wanted:
                if not ring.running:
                    placed = ring.translate(self.memory, self.packed)
                    self._marking.rings_begin({ring.index: placed})
                    with self._marking.covered(), self._timing.device():
                        self.device.start_ring(ring.index, placed)
                    ring.begin(placed)

    def _to_run(self) -> list[Vring]:
        """The rings that are to run; a transmit ring of a pair that the guest has given up goes on.

        Packed ones run from when both of the first pair are to: no index stands in their memory by which a
        function that had to begin anew for one could go on with the other.
        """
        ready = [ring for ring in self.rings if self._may_run() and ring.started]
        enabled = [ring for ring in ready if ring.enabled]
        if not enabled or (self.packed and self.rings[:2] != enabled[:2]):
            return []
        return [ring for ring in ready if ring.enabled or ring.given_up]

    def _may_run(self) -> bool:
        if self.acked is None:
            return False
        return not self.negotiated(ProtocolFeature.STATUS) or bool(self.status & virtio.Status.DRIVER_OK)

    def _start(self, rings: Sequence[Vring]) -> None:
        assert self.acked is not None
        placed = {ring.index: ring.translate(self.memory, self.packed) for ring in rings}
        self._marking.rings_begin(placed)
        with self._marking.covered(), self._timing.starting_rings():
            self.device.start(self.acked & ~VHOST_FEATURES, placed)
        for ring in rings:
            ring.begin(placed[ring.index])
        if not self._forgetful:
            self.former = None

    def _suspend(self) -> None:
        """Stop every ring that runs and note where it stands."""
        running = [ring for ring in self.rings if ring.running]
        if not running:
            return
        self.notifiers.take_back()
        for ring in running:  # on failure too: the device runs them no more
            ring.placed = None
        with self._marking.covered(), self._timing.stopping_rings():
            states = self.device.suspend()
        self._marking.rings_stopped()
        for ring in running:
            if ring.index in states:  # it has not failed, and stopped, before
                ring.stopped(states[ring.index], self.packed)

    def _settle_log(self) -> None:
        if self._marking.wanted:
            self.notifiers.take_back()  # the relay may need to see kicks from here on
        if not self._marking.settle(self.running):
            self._suspend()  # the device may have stopped them, or not; `_settle` starts them anew

    def _settle_notifiers(self) -> None:
        """Let the guest kick those rings that the device runs all by itself."""
        able = self.protocol_features & NOTIFIER_NEEDS == NOTIFIER_NEEDS
        # A guest of virtio 0.95 writes to another register, which is in no function's BAR.
        able &= bool((self.acked or 0) & F_VERSION_1)
        direct = able and not (self._marking.wanted or self.device.shadowed)
        self.notifiers.settle([ring.index for ring in self.rings if direct and ring.running])

    # Features

    def _get_features(self, _message: Message) -> int:
        return self.offered

    def _set_features(self, message: Message) -> None:
        features = self._remembered(message.payload)
        if unknown := features & ~self.offered:
            names = ", ".join(virtio.feature_names(unknown))
            raise ProtocolError(f"features {names} were not offered")
        if self.running and self.acked is not None and (features ^ self.acked) & ~VHOST_FEATURES:
            raise ProtocolError("features changed while rings run")
        started = any(ring.started for ring in self.rings)
        self._marking.want(bool(features & F_LOG_ALL), first=self.acked is None, started=started)
        self.acked = features
        if not self.running:
            self.device.prepare(features & ~VHOST_FEATURES)
        if not features & F_PROTOCOL_FEATURES:
            for ring in self.rings:
                ring.enabled = True

    def _remembered(self, features: int) -> int:
        """What the guest accepted, where its front-end has lost that: QEMU does (7.2, at least) when the
        back-end was away while the guest's state arrived, and sends hardly any feature from then on, none of
        the VF's. Whoever sends one remembers: with fewer than before it is another driver in the guest."""
        former = self.former or 0
        self._forgetful = bool(former) and not features & ~VHOST_FEATURES & ~self.device.promised
        if not self._forgetful:
            return features
        if self.acked is None:
            self._report(
                "the front-end has forgotten what the guest accepted; it is taken from its former host"
            )
        return former & ~VHOST_FEATURES | features & VHOST_FEATURES

    def _get_protocol_features(self, _message: Message) -> int:
        return self.offered_protocol

    def _set_protocol_features(self, message: Message) -> None:
        if unknown := message.payload & ~self.offered_protocol:
            raise ProtocolError(f"protocol features {unknown:#x} were not offered")
        self.protocol_features = message.payload

    def _get_queue_num(self, _message: Message) -> int:
        return self.device.queue_pairs

    def _set_status(self, message: Message) -> None:
        if message.payload > 0xFF:
            raise ProtocolError(f"device status {message.payload:#x} has more than 8 bits")
        self.status = message.payload

    def _get_status(self, _message: Message) -> int:
        return self.status

    def _net_set_mtu(self, message: Message) -> int:
        largest = self.device.max_mtu
        if message.payload < MIN_MTU or (largest is not None and message.payload > largest):
            self._report(f"MTU {message.payload} refused: {self.device.name} takes {MIN_MTU} to {largest}")
            return 1
        return 0

    # Memory

    def _set_mem_table(self, message: Message) -> None:
        regions: Sequence[Region] = message.payload
        if len({region.guest_address for region in regions}) < len(regions):
            raise ProtocolError("memory table: two regions overlap at one guest address")
        outdated = self.memory.outdated(regions, message.fds)
        if outdated:
            self._suspend()  # rings may lie in what goes; _settle starts those that do not
        for mapping in outdated:
            self._forget(mapping)
        for region in regions:
            fd = message.take_fd()
            if self.memory.holds(region, fd):
                close_all([fd])
            else:
                self._learn(region, fd)

    def _get_max_mem_slots(self, _message: Message) -> int:
        return guest_memory.MAX_SLOTS

    # QEMU before 8.1 tells of a region once for each queue pair, and takes it back as often.

    def _add_mem_reg(self, message: Message) -> None:
        if message.fds and self.memory.holds(message.payload, message.fds[0]):
            return
        if len(self.memory) >= guest_memory.MAX_SLOTS:
            raise ProtocolError(f"more than {guest_memory.MAX_SLOTS} memory regions")
        self._learn(message.payload, message.take_fd())
        with contextlib.suppress(ValueError):
            self._removed.remove(message.payload)

    def _rem_mem_reg(self, message: Message) -> None:
        if message.payload in self._removed:  # QEMU (7.2, at least) says so once for each queue pair
            return
        mapping = self.memory.find(message.payload)
        self._suspend()
        self._forget(mapping)
        self._removed.append(message.payload)

    def _learn(self, region: Region, fd: int) -> None:
        mapping = self.memory.add(region, fd)
        try:
            with self._timing.memory():
                self.device.map_memory(mapping.memory)
        except DeviceError:
            self.memory.remove(mapping)
            raise

    def _forget(self, mapping: guest_memory.Mapping) -> None:
        with self._timing.memory():
            self.device.unmap_memory(mapping.memory)
        self.memory.remove(mapping)

    # Rings

    def _ring(self, index: int) -> Vring:
        if index >= len(self.rings):
            raise ProtocolError(f"ring {index}: {self.device.name} has rings 0 to {len(self.rings) - 1}")
        return self.rings[index]

    def _idle_ring(self, message: Message) -> Vring:
        ring = self._ring(message.payload.index)
        if ring.running:
            raise ProtocolError(f"{request_name(message.request)}: {ring.name} is running")
        return ring

    def _set_vring_num(self, message: Message) -> None:
        ring = self._idle_ring(message)
        ring.resize(message.payload.num, self.device.max_queue_size, self.packed)

    def _set_vring_base(self, message: Message) -> None:
        self._idle_ring(message).rebase(message.payload.num, self.packed)

    def _set_vring_addr(self, message: Message) -> None:
        address = message.payload
        ring = self._ring(address.index)
        if ring.running and ring.address is not None:
            # Logging is switched by sending the same addresses with another flag.
            places = [(a.descriptors, a.avail, a.used) for a in (ring.address, address)]
            if places[0] != places[1]:
                raise ProtocolError(f"{ring.name} is running: its addresses cannot change")
        ring.address = address
        if ring.size and len(self.memory):
            ring.translate(self.memory, self.packed)  # a bad address is told here, where it was given

    def _get_vring_base(self, message: Message) -> Any:
        ring = self._ring(message.payload.index)
        ring.started = ring.has_run = False
        self._settle()
        ring.address = None  # a later start names its own; these may point at memory that has gone
        return type(message.payload)(ring.index, ring.base)

    def _set_vring_kick(self, message: Message) -> None:
        ring = self._ring(message.payload.index)
        if ring.running:  # restarted by _settle with the new eventfd
            ring.started = False
            self._settle()
        ring.replace_fd("kick", message.take_fd() if message.payload.has_fd else None)
        ring.started = True

    def _set_vring_call(self, message: Message) -> None:
        ring = self._ring(message.payload.index)
        fd = message.take_fd() if message.payload.has_fd else None
        try:
            if ring.running:
                self.device.set_call(ring.index, fd)
        finally:
            ring.replace_fd("call", fd)
        if ring.running:
            ring.signal_call()

    def _set_vring_err(self, message: Message) -> None:
        ring = self._ring(message.payload.index)
        ring.replace_fd("error", message.take_fd() if message.payload.has_fd else None)

    def _set_vring_enable(self, message: Message) -> None:
        if message.payload.num > 1:
            raise ProtocolError(f"SET_VRING_ENABLE: {message.payload.num} is neither 0 nor 1")
        self._ring(message.payload.index).enabled = bool(message.payload.num)

    # The rest

    def _set_log_base(self, message: Message) -> int | None:
        """Accept whatever comes: see `LogExchange`. Without LOG_SHMFD there is neither log nor reply."""
        if not self.negotiated(ProtocolFeature.LOG_SHMFD):
            return None
        self._marking.give(DirtyLog(message.take_fd(), message.payload) if message.fds else None)
        return 0

    def _send_rarp(self, message: Message) -> None:
        self._announce(message.payload.to_bytes(8, sys.byteorder)[:6])

    def _set_backend_req_fd(self, message: Message) -> None:
        self.notifiers.connect(message.take_fd())

    def _accept(self, _message: Message) -> None:
        """Nothing to do: SET_OWNER marks a session that the connection marks already; RESET_OWNER is
        deprecated and the specification wants it ignored; the log's eventfd is for tools of old."""


@dataclass(frozen=True)
class Rule:
    """How a request is served."""

    handler: Callable[[Backend, Message], Any]
    #: The protocol feature it belongs to.
    needs: ProtocolFeature | None = None


RULES: Mapping[int, Rule] = {
    Request.GET_FEATURES: Rule(Backend._get_features),
    Request.SET_FEATURES: Rule(Backend._set_features),
    Request.SET_OWNER: Rule(Backend._accept),
    Request.RESET_OWNER: Rule(Backend._accept),
    Request.GET_PROTOCOL_FEATURES: Rule(Backend._get_protocol_features),
    Request.SET_PROTOCOL_FEATURES: Rule(Backend._set_protocol_features),
    Request.GET_QUEUE_NUM: Rule(Backend._get_queue_num, needs=ProtocolFeature.MQ),
    Request.SET_STATUS: Rule(Backend._set_status, needs=ProtocolFeature.STATUS),
    Request.GET_STATUS: Rule(Backend._get_status, needs=ProtocolFeature.STATUS),
    Request.NET_SET_MTU: Rule(Backend._net_set_mtu, needs=ProtocolFeature.NET_MTU),
    Request.SET_MEM_TABLE: Rule(Backend._set_mem_table),
    Request.GET_MAX_MEM_SLOTS: Rule(Backend._get_max_mem_slots, needs=ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Rule(Backend._add_mem_reg, needs=ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.REM_MEM_REG: Rule(Backend._rem_mem_reg, needs=ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.SET_VRING_NUM: Rule(Backend._set_vring_num),
    Request.SET_VRING_ADDR: Rule(Backend._set_vring_addr),
    Request.SET_VRING_BASE: Rule(Backend._set_vring_base),
    Request.GET_VRING_BASE: Rule(Backend._get_vring_base),
    Request.SET_VRING_KICK: Rule(Backend._set_vring_kick),
    Request.SET_VRING_CALL: Rule(Backend._set_vring_call),
    Request.SET_VRING_ERR: Rule(Backend._set_vring_err),
    Request.SET_VRING_ENABLE: Rule(Backend._set_vring_enable),
    Request.SET_LOG_BASE: Rule(Backend._set_log_base),
    Request.SET_LOG_FD: Rule(Backend._accept),
    Request.SEND_RARP: Rule(Backend._send_rarp, needs=ProtocolFeature.RARP),
    Request.SET_BACKEND_REQ_FD: Rule(Backend._set_backend_req_fd, needs=ProtocolFeature.BACKEND_REQ),
}
