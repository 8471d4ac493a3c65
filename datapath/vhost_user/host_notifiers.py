"""Host notifiers: which rings' doorbells the guest writes to itself, so that its kicks pass no process.

The front-end is told the page of the VF's doorbell, and maps it in place of the ring's notify register
(VHOST_USER_BACKEND_VRING_HOST_NOTIFIER_MSG). It does that when it gets round to it, and so does it when the
page is taken back; nothing here waits for that (see `back_channel`). What holds instead:

- Given are only the pages of rings that the VF has run for REST on the guest's own memory, with no log
  wanted. They are taken back before that ends.
- A kick that fell into a page when it was the relay that needed it is made up for: from when the page is
  taken back until the front-end has confirmed that, and for a while after, the ring's own kick eventfd is
  signalled again and again, whereupon the relay looks at the ring.
- The relay goes on forwarding the kick eventfd of a ring that is given: a front-end that maps nothing, or
  later, loses nothing.
- Who refuses once is not asked again. QEMU (7.2 to 10 at least) refuses without page-per-vq, but has by then
  freed what it made for the page, and writes to that when the ring comes again.

Source: QEMU docs/interop/vhost-user.rst; hw/virtio/vhost-user.c for what QEMU does.
"""

import time
from collections.abc import Callable, Collection, Sequence

from datapath.vdpa import DeviceError, VdpaDevice
from datapath.vhost_user.back_channel import BackChannel, BackChannelError
from datapath.vhost_user.messages import VringArea
from datapath.vhost_user.vring import Vring

#: Seconds that a ring runs before its page is given, and that signals go on after one was taken back. QEMU
#: unmaps a page some 0.1 s later than it says (RCU), and aborts when the next one goes before that.
REST = 1.0
#: Seconds between two looks: while answers are due, and otherwise. Where no answer ever comes, and a page may
#: still be mapped, the ring is signalled at the latter for as long as the session lasts.
BUSY_INTERVAL = 0.01
REST_INTERVAL = 0.1
#: Seconds after which a front-end that has not answered is not waited for.
ANSWER_TIME = 5.0


class HostNotifiers:
    """The pages of one session; `deadline` says when to call `check`."""

    def __init__(
        self,
        device: VdpaDevice,
        rings: Sequence[Vring],
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._rings = rings
        self._report = report
        self._clock = clock
        self._channel: BackChannel | None = None
        #: Why no more pages are given; None while they are.
        self.refusal: str | None = None
        #: Rings that run on their own -> when they may be given.
        self._due: dict[int, float] = {}
        #: Rings whose pages have been given, and of those the ones that the front-end has.
        self._given: set[int] = set()
        self.confirmed: set[int] = set()
        #: Rings that were taken back -> until when they are signalled; None: until the front-end confirms.
        self._doubtful: dict[int, float | None] = {}
        #: When an answer is overdue; None while none is due.
        self._overdue: float | None = None
        self._next_look: float | None = None

    # What the session tells

    def connect(self, fd: int | None) -> None:
        """Take over the channel to the front-end, or none; an earlier one is closed.

        :raise ProtocolError: when it is no socket.
        """
        if self._channel is not None:
            self._lose_channel()
        self._channel = None if fd is None else BackChannel(fd)

    def settle(self, direct: Collection[int]) -> None:
        """Say which rings the VF runs on the guest's memory, with no log wanted; after each message."""
        if stale := self._given.difference(direct):
            self.take_back(stale)
        self._due = {index: self._due.get(index, self._clock() + REST) for index in direct}

    def take_back(self, indices: Collection[int] | None = None) -> None:
        """Rings, all if not said which, are about to stop or to be relayed; the others rest once more."""
        self._due.clear()
        taken = sorted(self._given if indices is None else indices)
        for index in taken:
            self._given.discard(index)
            self.confirmed.discard(index)
            self._doubtful[index] = None
            self._tell(VringArea(index, has_fd=False))
        if taken:
            self._plan(self._clock())

    @property
    def deadline(self) -> float | None:
        """When to call `check`; None for as long as the front-end says nothing."""
        if self._next_look is not None:
            return self._next_look
        return min((self._due[index] for index in self._ungiven()), default=None)

    def check(self) -> None:
        """Read answers, signal rings that may have missed a kick, give pages that are due."""
        now = self._clock()
        self._take_answers(now)
        for index, until in list(self._doubtful.items()):
            self._rings[index].signal_kick()
            if until is not None and now >= until:
                del self._doubtful[index]
        for index in self._ungiven():
            if now >= self._due[index]:
                self._give(index)
        self._plan(now)

    def close(self) -> None:
        """Close the channel."""
        self.connect(None)

    # Inside

    def _ungiven(self) -> list[int]:
        """Rings whose pages are still to be given."""
        if self._channel is None or self.refusal is not None:
            return []
        return [index for index in self._due if index not in self._given and index not in self._doubtful]

    def _give(self, index: int) -> None:
        try:
            notifier = self._device.notifier(index)
        except DeviceError:
            notifier = None  # a device that is lost tells at its next use
        if notifier is None:
            del self._due[index]
            return
        self._given.add(index)
        self._tell(VringArea(index, True, notifier.size, notifier.offset), notifier.fd)

    def _tell(self, area: VringArea, fd: int | None = None) -> None:
        if self._channel is None:
            return
        try:
            self._channel.tell_area(area, fd)
        except BackChannelError as error:
            self._refuse(f"its back channel cannot be used: {error}")
            self._lose_channel()
        else:
            self._overdue = self._clock() + ANSWER_TIME

    def _take_answers(self, now: float) -> None:
        if self._channel is None:
            return
        try:
            answers = self._channel.take_answers()
        except BackChannelError as error:
            self._refuse(f"its back channel cannot be used: {error}")
            self._lose_channel()
            return
        for area, agreed in answers:
            if not area.has_fd:
                self._doubtful[area.index] = now + REST
            elif not agreed:
                self._given.discard(area.index)
                self._refuse("its NIC needs page_per_vq for that")
            elif area.index in self._given:
                self.confirmed.add(area.index)
        if not self._channel.waiting:
            self._overdue = None
        elif self._overdue is not None and now >= self._overdue:
            self._refuse(f"it has not answered within {ANSWER_TIME:g} s")
            self._overdue = None

    def _refuse(self, reason: str) -> None:
        """Ask for no more pages."""
        if self.refusal is None:
            self.refusal = reason
            self._report(f"the front-end takes no host notifiers, kicks go through the relay: {reason}")

    def _lose_channel(self) -> None:
        """What is mapped stays mapped, for all that is known."""
        assert self._channel is not None
        self._channel.close()
        self._channel = None
        self._overdue = None

    def _plan(self, now: float) -> None:
        """Decide when to look next, apart from rings that are due."""
        if self._overdue is not None:
            self._next_look = now + BUSY_INTERVAL
        elif self._doubtful:
            self._next_look = now + REST_INTERVAL
        else:
            self._next_look = None
