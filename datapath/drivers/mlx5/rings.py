"""The rings of a ConnectX: which run, and all that each of them runs by.

A ring that runs has a virtqueue of the firmware's, an event queue by which that tells of completions, a
place among the completions that a thread looks for, and one in the relay of kicks. One that has stopped
keeps its queue as long as nothing else is to be made in its place: where the device can, it runs on
(`Capabilities.resumes`).

Queues are set up and stopped side by side, by the workers.
"""

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from datapath.drivers.mlx5._abi import ffi
from datapath.drivers.mlx5.capabilities import Capabilities
from datapath.drivers.mlx5.dirty_log import DirtyLog
from datapath.drivers.mlx5.event_queue import EventQueue
from datapath.drivers.mlx5.memory import Domain
from datapath.drivers.mlx5.options import Options
from datapath.drivers.mlx5.receivers import Receivers, TransportDomain
from datapath.drivers.mlx5.undo import Undo
from datapath.drivers.mlx5.virtqueue import Counters, Surroundings, VirtioNetQueue
from datapath.drivers.mlx5.workers import Workers
from datapath.mlx5_prm import QueueState
from datapath.native.completions import Completions
from datapath.native.relay import Doorbell, Relay
from datapath.vdpa import DeviceError, HostNotifier, Ring, RingState
from datapath.virtio import Feature, bit

#: Descriptors of the queue that is never started.
PLACEHOLDER_SIZE = 64


@dataclass
class Path:
    """A ring and its queue."""

    ring: Ring
    queue: VirtioNetQueue
    around: Surroundings
    #: Tells its errors from those of the queues that the ring had before.
    generation: int
    #: Where it marks what it writes.
    log: DirtyLog | None = None
    #: Where it stood when it was stopped; None while it runs.
    stood: RingState | None = None


class Rings:
    """All rings of an open device."""

    def __init__(
        self, domain: Domain, capable: Capabilities, options: Options, workers: Workers, mac: bytes | None
    ) -> None:
        """
        :param mac: the guest's; None: all that reaches the function is received.
        :raise DeviceError: when the device does not make what rings need.
        :raise OSError: when descriptors or threads have run out.
        """
        self._domain = domain
        self._glue = domain.glue
        self._capable = capable
        self._options = options
        self._workers = workers
        self._running: dict[int, Path] = {}
        self._stopped: dict[int, Path] = {}
        self._events: dict[int, EventQueue] = {}
        #: Those that a queue has told something by.
        self._used_events: set[int] = set()
        self._counters: dict[int, Counters] = {}
        #: Rings that frames are spread over.
        self._led_to: list[int] = []
        self._generation = 0
        count = 2 * capable.queue_pairs
        with Undo() as undo:
            self._undo = undo
            workers.run(self._open)
            (placeholder,) = workers.run(self._make_placeholder)
            self._receivers = Receivers(domain, capable, workers, self._transport, mac, placeholder)
            undo.callback(self._receivers.close)
            self._relay = Relay(count)
            undo.callback(self._relay.close)
            self._completions = self._look_for_completions(count)
            undo.callback(self._completions.close)
            beforehand = range(2 * min(options.queues, capable.queue_pairs))
            undo.callback(self._close_parts)
            workers.run(*(partial(self._make_beforehand, index) for index in beforehand))
            self._undo = undo.pop_all()

    # Opening

    def _open(self) -> None:
        """Doorbells, channels and their like."""
        glue, context, undo = self._glue, self._domain.context, self._undo
        self._uar = glue.alloc_uar(context)
        undo.callback(glue.free_uar, self._uar)
        page = glue.alloc_var(context)
        undo.callback(glue.free_var, page)
        self._page = HostNotifier(glue.command_fd(context), page.offset, page.size)
        mapped = mmap.mmap(self._page.fd, page.size, offset=page.offset)
        undo.callback(mapped.close)
        view = ffi.from_buffer(mapped)
        undo.callback(ffi.release, view)
        self._doorbell = int(ffi.cast("uintptr_t", view)) + self._capable.doorbell_offset % page.size
        #: Tells of queues that have met an error, by `cookie`.
        self.errors = glue.create_event_channel(context)
        undo.callback(glue.destroy_event_channel, self.errors)
        self._channel = glue.create_event_channel(context)
        undo.callback(glue.destroy_event_channel, self._channel)
        self._transport = TransportDomain(self._domain, self._capable.lag_ports)
        undo.callback(self._transport.close)
        self._event_queue_number = glue.event_queue_number(context)

    def _make_placeholder(self) -> VirtioNetQueue:
        """The queue that stands in the receive table for none."""
        index = 2 * self._capable.queue_pairs
        ring = Ring(PLACEHOLDER_SIZE, 0, 0, 0, RingState(0, 0), None, None)
        around = Surroundings(features=0, key=0, tis=self._transport.tis(0), event_qp=None)
        if not self._capable.silent:
            events = self._make_event_queue(index, ring.size)
            self._undo.callback(events.close)
            around = replace(around, event_qp=events.number)
        queue = VirtioNetQueue(self._domain, self._capable, index, ring, around)
        self._undo.callback(queue.close)
        return queue

    def _look_for_completions(self, count: int) -> Completions:
        options = self._options
        return Completions(
            count,
            mode=options.event_mode,
            event_us=options.event_us,
            no_traffic_time=options.no_traffic_time,
            core=options.event_core,
            channel_fd=self._channel.fd,
            uar=self._uar.address,
        )

    def _make_beforehand(self, index: int) -> None:
        """What of a ring can be made before there is one."""
        self._events[index] = self._make_event_queue(index, self._options.queue_size)
        self._need_counters(index)

    def _close_parts(self) -> None:
        """Give back what rings keep for as long as the device is open."""
        with Undo() as undo:
            for counters in self._counters.values():
                undo.callback(counters.close)
            for events in self._events.values():
                undo.callback(events.close)

    # Running

    @property
    def running(self) -> dict[int, Ring]:
        """The rings that run."""
        return {index: path.ring for index, path in self._running.items()}

    def start(self, rings: Mapping[int, Ring], features: int, key: int, log: DirtyLog | None) -> None:
        """Run rings, beside those that do; each is notified once, as entries may be waiting already.

        :param features: those that the guest has accepted.
        :param key: of the guest's memory.
        :param log: where they mark what they write.
        :raise DeviceError: when one does not start; call `halt` then.
        :raise OSError: when an eventfd is none.
        """
        self._close_stopped(
            index for index, ring in rings.items() if not self._can_resume(index, ring, features, key)
        )
        self._generation += 1
        self._workers.run(
            *(partial(self._bring_up, index, ring, features, key, log) for index, ring in rings.items())
        )
        self._lead_frames()
        for index in rings:
            self._connect(index)

    def _can_resume(self, index: int, ring: Ring, features: int, key: int) -> bool:
        """Whether the queue that a ring had can run on."""
        path = self._stopped.get(index)
        if path is None or not self._capable.resumes or path.queue.state is not QueueState.SUSPENDED:
            return False
        same_ring = replace(path.ring, state=ring.state, kick=ring.kick, call=ring.call) == ring
        same_around = (path.around.features, path.around.key) == (features, key)
        tells = path.around.event_qp is not None
        return same_ring and same_around and path.stood == ring.state and tells is self._must_tell(ring)

    def _bring_up(self, index: int, ring: Ring, features: int, key: int, log: DirtyLog | None) -> None:
        """Have a ring's queue run: the one that it had, or another."""
        path = self._stopped.pop(index, None)
        if path is None:
            around = self._surroundings(index, ring, features, key)
            queue = VirtioNetQueue(self._domain, self._capable, index, ring, around)
            path = Path(ring, queue, around, self._generation)
        self._running[index] = path
        path.ring, path.stood = ring, None
        if path.generation == self._generation:
            path.queue.report_errors(self.errors, _cookie(path.generation, index))
        if log is not path.log:
            self._switch_log(path, log)
        path.queue.run()

    def _surroundings(self, index: int, ring: Ring, features: int, key: int) -> Surroundings:
        options = self._options
        return Surroundings(
            features=features,
            key=key,
            tis=self._transport.tis(index // 2),
            event_qp=self._event_queue(index, ring).number if self._must_tell(ring) else None,
            counters=self._need_counters(index),
            latency_mode=options.hw_latency_mode,
            max_latency_us=options.hw_max_latency_us,
            max_pending=options.hw_max_pending_comp,
        )

    def _must_tell(self, ring: Ring) -> bool:
        """Whether a ring's queue is to tell what it has completed."""
        return ring.call is not None or not self._capable.silent

    def _event_queue(self, index: int, ring: Ring) -> EventQueue:
        """The event queue of a ring: the one that it had, as new, or another."""
        events = self._events.get(index)
        if events is not None and events.size < ring.size:
            del self._events[index]
            events.close()
            events = None
        if events is None:
            events = self._events[index] = self._make_event_queue(index, ring.size)
        elif index in self._used_events:
            events.reset()
        self._used_events.add(index)
        return events

    def _make_event_queue(self, index: int, size: int) -> EventQueue:
        return EventQueue(
            self._domain,
            self._capable,
            self._uar,
            self._channel,
            self._event_queue_number,
            index,
            size,
        )

    def _need_counters(self, index: int) -> int:
        if not self._capable.counts:
            return 0
        if index not in self._counters:
            self._counters[index] = Counters(self._domain)
        return self._counters[index].number

    def _connect(self, index: int) -> None:
        """Let a ring's kicks through, and its interrupts."""
        path = self._running[index]
        if path.around.event_qp is not None:
            self._completions.add(index, self._events[index].source, path.ring.call)
        self._relay.add(index, path.ring.kick, Doorbell(address=self._doorbell))
        self._relay.ring(index)

    def _lead_frames(self) -> None:
        """Spread received frames over the rings that run and receive."""
        receiving = sorted(index for index in self._running if index % 2 == 0)
        if receiving and not self._running[receiving[0]].around.features & bit(Feature.NET_F_MQ):
            del receiving[1:]  # the guest looks at no other (virtio 1.3 section 5.1.2)
        queues = [self._running[index].queue for index in receiving]
        numbers = [queue.number for queue in queues]
        if numbers != self._led_to:
            self._workers.run(partial(self._receivers.lead_to, queues))
            self._led_to = numbers

    def set_call(self, index: int, call: int | None) -> bool:
        """Interrupt the guest of a running ring by another eventfd.

        :return: False when its queue tells nothing, and would have to.
        """
        path = self._running[index]
        if call is not None and path.around.event_qp is None:
            return False
        if path.around.event_qp is not None:
            self._completions.set_call(index, call)
        path.ring = replace(path.ring, call=call)
        return True

    # Stopping

    def stop(self, indices: Iterable[int]) -> dict[int, RingState]:
        """Stop rings and return where they stand; nothing of them is in flight on return.

        :raise DeviceError: when one does not stop; call `halt` then.
        """
        stopping = list(indices)
        for index in stopping:
            self._relay.remove(index)
        going_on = [index for index in self._running if index % 2 == 0 and index not in stopping]
        if going_on and any(index % 2 == 0 for index in stopping):
            self._lead_away(stopping)
        states = self._workers.run(*(partial(self._suspend, self._running[index]) for index in stopping))
        for index in stopping:
            self._settle_stopped(index)
        return dict(zip(stopping, states, strict=True))

    def _lead_away(self, stopping: list[int]) -> None:
        """Have frames go to those that run on."""
        leaving = {index: self._running.pop(index) for index in stopping}
        try:
            self._lead_frames()
        finally:
            self._running.update(leaving)

    def _suspend(self, path: Path) -> RingState:
        try:
            state = path.queue.suspend()
        except DeviceError:
            state, _ = path.queue.look()
            if path.queue.state is not QueueState.ERROR:  # such a one stands still by itself
                raise
        # What was fetched but not completed is fetched again: the used index counts for both.
        used = state.used
        path.stood = RingState(used, used)
        return path.stood

    def _settle_stopped(self, index: int) -> None:
        """A ring runs no more: interrupt its guest for what was completed last, and mark its used ring."""
        path = self._running.pop(index)
        if path.around.event_qp is not None:
            self._completions.remove(index)
        if path.log is not None:
            path.log.mark_used(path.ring)
        self._stopped[index] = path

    def halt(self) -> None:
        """Make sure that nothing runs, and keep no queue.

        :raise DeviceLostError: when the firmware does not do even that.
        """
        halted = list(self._running.values())
        for index in list(self._running):
            self._relay.remove(index)
            self._settle_stopped(index)
        try:
            self.forget_stopped()
        finally:
            for path in halted:  # which may have been written to the end
                if path.log is not None:
                    path.log.mark_used(path.ring)

    def forget_stopped(self) -> None:
        """Close all queues that do not run: none uses the guest's memory any more.

        :raise DeviceError: when the device does not let go of one.
        """
        self._close_stopped(list(self._stopped))

    def _close_stopped(self, indices: Iterable[int]) -> None:
        """Close queues that do not run; what the device does not let go of is kept, and tried again."""
        closing = [index for index in indices if index in self._stopped]
        if any(self._stopped[index].queue.number in self._led_to for index in closing):
            self._lead_frames()
        self._workers.run(*(partial(self._close_one, index) for index in closing))

    def _close_one(self, index: int) -> None:
        self._stopped[index].queue.close()
        del self._stopped[index]

    # Errors

    def failed(self, cookie: int) -> tuple[int, int] | None:
        """Which ring an event of the channel `errors` is about, and the type of its queue's error.

        None when the queue it was about is no more.

        :raise CommandError: when the firmware does not tell.
        """
        generation, index = cookie >> 32, cookie & 0xFFFFFFFF
        path = self._running.get(index)
        if path is None or path.generation != generation:
            return None
        ((_, error_type),) = self._workers.run(path.queue.look)
        return index, error_type

    def renew(self, index: int, ring: Ring | None = None) -> None:
        """Make the queue of a running ring anew, where it stands: it has met an error, or is to tell.

        :param ring: what else of the ring is different then.
        :raise DeviceError: when it does not start; call `halt` then.
        :raise OSError: when an eventfd is none.
        """
        path = self._running[index]
        self._relay.remove(index)
        ((state, _),) = self._workers.run(path.queue.look)
        if path.queue.state is QueueState.READY:
            (state,) = self._workers.run(partial(self._suspend, path))
        self._settle_stopped(index)
        self._close_stopped([index])
        ring = replace(ring or path.ring, state=RingState(state.used, state.used))
        self.start({index: ring}, path.around.features, path.around.key, path.log)

    # Logging

    def log(self, log: DirtyLog | None) -> None:
        """Have all rings that run mark what they write there; None: nowhere.

        :raise CommandError: when the firmware refuses.
        """
        paths = [path for path in self._running.values() if path.log is not log]
        self._workers.run(*(partial(self._switch_log, path, log) for path in paths))
        # Of those that do not run each is told when it starts; until then it may hold no key of a log.
        self._close_stopped([index for index, path in self._stopped.items() if path.log is not log])

    def _switch_log(self, path: Path, log: DirtyLog | None) -> None:
        if log is None:
            path.queue.stop_logging()
        else:
            log.switch_on(path.queue)
        path.log = log

    # What is told

    @property
    def broken_fd(self) -> int:
        """Readable when an event queue has failed: interrupts may be missing (see `Completions`)."""
        return self._completions.broken_fd

    @property
    def notifier(self) -> HostNotifier | None:
        """The page of all doorbells, where they are at its beginning."""
        return self._page if self._capable.doorbell_offset % self._page.size == 0 else None

    def statistics(self) -> dict[str, int]:
        """What relay and completions count; see `Relay.statistics` and `Completions.statistics`."""
        return self._relay.statistics() | self._completions.statistics()

    def counters(self) -> dict[int, dict[str, int]]:
        """What the firmware counts of each ring that has run.

        :raise CommandError: when it does not tell.
        """
        indices = sorted(self._counters)
        told = self._workers.run(*(self._counters[index].read for index in indices))
        return dict(zip(indices, told, strict=True))

    def close(self) -> None:
        """Give everything back; none runs any more.

        :raise DeviceError: when the device does not let go of something; what it does is given back.
        """
        self._undo.callback(self.halt)
        self._undo.close()


def _cookie(generation: int, index: int) -> int:
    return generation << 32 | index
