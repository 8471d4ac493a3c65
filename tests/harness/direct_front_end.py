"""A front-end without a socket, for tests of the back-end's state machine."""

from typing import Any

from datapath.vhost_user.backend import F_LOG_ALL, F_PROTOCOL_FEATURES, Backend
from datapath.vhost_user.messages import Message, Request, decode_reply
from datapath.vhost_user.protocol_features import PROTOCOL_FEATURES
from datapath.vhost_user.timing import Timing
from tests.harness.front_end import VIRTIO, FrontEnd, duplicates
from tests.harness.recording_device import RecordingDevice


class DirectFrontEnd(FrontEnd):
    """A front-end whose messages go straight into a back-end."""

    def __init__(self, protocol: int = PROTOCOL_FEATURES, negotiated: int | None = None) -> None:
        super().__init__(protocol)
        self.device = RecordingDevice(queue_pairs=self.pairs)
        self.reports: list[str] = []
        self.announced: list[bytes] = []
        self.timing = Timing()
        self.backend = Backend(
            self.device,
            report=self.reports.append,
            announce=self.announced.append,
            negotiated=negotiated,
            timing=self.timing,
        )

    def tell(self, request: int, payload: Any = None, *fds: int) -> Any:
        reply = self.backend.handle(Message(request, payload, self.need_reply, duplicates(fds)))
        return None if reply is None else decode_reply(request, reply)

    def set_used_index(self, index: int, used: int) -> None:
        """As if `used` buffers had been completed on a ring."""
        self.memory.write(self.queues[index].used + 2, used.to_bytes(2, "little"))

    def close(self) -> None:
        self.backend.close()
        self.device.close()
        super().close()

    def switch_logging(self, on: bool) -> None:
        """As QEMU does when it begins, or gives up, to save or move a running guest."""
        self.tell(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES | (F_LOG_ALL if on else 0))
        for index in (0, 1):
            self.tell(Request.SET_VRING_ADDR, self.address(index, flags=int(on)))
