"""The back-end under messages in any order and with any values.

Invariants: nothing but ProtocolError comes out; the device runs exactly the rings that the back-end says
run, each inside the memory that is mapped; and after `close` no descriptor, mapping or ring is left.
"""

import os
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from datapath.vdpa import DeviceError, DirtyBitmap
from datapath.vhost_user.backend import F_PROTOCOL_FEATURES, Backend
from datapath.vhost_user.messages import (
    LAYOUTS,
    LogArea,
    Message,
    ProtocolError,
    Region,
    Request,
    VringAddress,
    VringFd,
    VringState,
    decode_reply,
)
from datapath.vhost_user.protocol_features import PROTOCOL_FEATURES
from datapath.virtio import bit
from tests.harness.front_end import DRIVER_OK, USER, VIRTIO
from tests.harness.recording_device import RecordingDevice

SIZE = 0x8000

index = st.sampled_from([0, 1, 0, 1, 2, 255, 1 << 16])
places = st.sampled_from([0, 0x1000, 0x2000, 0x3000, 0x4000, 0x6000, SIZE, 2**64 - USER - 16]).map(
    USER.__add__
)
ring_fd = st.builds(VringFd, index.filter(lambda n: n < 256), st.booleans())
region = st.builds(
    Region,
    st.sampled_from([0, SIZE // 2, SIZE]),
    st.sampled_from([SIZE, SIZE // 2, 0, 2 * SIZE]),
    st.sampled_from([USER, USER + SIZE]),
    st.sampled_from([0, 0, 4096]),
)
features = st.sampled_from(
    [VIRTIO, VIRTIO | F_PROTOCOL_FEATURES, VIRTIO | bit(26) | F_PROTOCOL_FEATURES, 1, 0]
)
PAYLOADS: dict[int, st.SearchStrategy[Any]] = {
    Request.SET_FEATURES: features,
    Request.SET_PROTOCOL_FEATURES: st.sampled_from([PROTOCOL_FEATURES, 0, 1 << 15, 1 << 17]),
    Request.SET_MEM_TABLE: st.lists(region, max_size=3).map(tuple),
    Request.ADD_MEM_REG: region,
    Request.REM_MEM_REG: region,
    Request.SET_LOG_BASE: st.builds(
        LogArea, st.sampled_from([4096, 1, 0, 7, 2**40]), st.sampled_from([0, 0, 5, 2**63, 2**64 - 1])
    ),
    Request.SET_VRING_ADDR: st.builds(VringAddress, index, st.integers(0, 1), places, places, places, places),
    Request.SET_VRING_KICK: ring_fd,
    Request.SET_VRING_CALL: ring_fd,
    Request.SET_VRING_ERR: ring_fd,
    Request.SET_STATUS: st.sampled_from([0, 8, DRIVER_OK, 0x100]),
    Request.SEND_RARP: st.integers(0, 2**64 - 1),
    Request.NET_SET_MTU: st.sampled_from([0, 1500, 65535]),
}
#: Whatever they say, they are never answered with an error.
LOG_MESSAGES = (Request.SET_LOG_BASE, Request.SET_LOG_FD)
numbers = st.builds(VringState, index, st.sampled_from([0, 1, 16, 100, 1 << 20]))


@st.composite
def messages(draw: st.DrawFn) -> tuple[int, Any, bool]:
    request = draw(st.sampled_from([*LAYOUTS, 24, 99]))
    layout = LAYOUTS.get(request)
    plain = st.none() if layout is None or layout.payload.size == 0 else numbers
    return request, draw(PAYLOADS.get(request, plain)), draw(st.booleans())


def opening() -> list[tuple[int, Any, bool]]:
    """What makes it likely that rings run: a whole start, in QEMU's order."""
    start: list[tuple[int, Any, bool]] = [(Request.SET_PROTOCOL_FEATURES, PROTOCOL_FEATURES, False)]
    start += [(Request.SET_VRING_ENABLE, VringState(n, 1), False) for n in (0, 1)]
    start += [(Request.SET_FEATURES, VIRTIO | F_PROTOCOL_FEATURES, True)]
    start += [(Request.ADD_MEM_REG, Region(0, SIZE, USER, 0), True)]
    for n in (0, 1):
        at = USER + n * 0x4000
        start += [(Request.SET_VRING_NUM, VringState(n, 16), False)]
        start += [(Request.SET_VRING_ADDR, VringAddress(n, 0, at, at + 0x2000, at + 0x1000, 0), False)]
        start += [(Request.SET_VRING_KICK, VringFd(n, True), False)]
    return [*start, (Request.SET_STATUS, DRIVER_OK, False)]


def check(backend: Backend, device: RecordingDevice) -> None:
    assert {ring.index for ring in backend.rings if ring.running} == set(device.rings)
    for ring in device.rings.values():
        parts = (ring.descriptors, ring.avail, ring.used)
        assert all(
            any(r.guest_address <= part < r.guest_address + r.size for r in device.mapped) for part in parts
        )


class UnloggingDevice(RecordingDevice):
    """A device that cannot mark what it writes, and stops its rings to say so."""

    def start_logging(self, bitmap: DirtyBitmap) -> None:
        self.rings.clear()
        raise DeviceError("cannot")


@settings(max_examples=400)
@given(st.sampled_from([RecordingDevice, UnloggingDevice]), st.booleans(), st.lists(messages(), max_size=25))
def test_any_messages_in_any_order(
    kind: type[RecordingDevice], started: bool, sequence: list[tuple[int, Any, bool]]
) -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    device = kind()
    backend = Backend(device, report=lambda text: None)
    memory = os.memfd_create("guest")
    os.ftruncate(memory, SIZE)
    try:
        for request, payload, ack in [*(opening() if started else []), *sequence]:
            layout = LAYOUTS.get(request)
            count = max(layout.fds(payload)) if layout is not None else 0
            reply = backend.handle(Message(request, payload, ack, [os.dup(memory) for _ in range(count)]))
            if request in LOG_MESSAGES and reply is not None:
                assert decode_reply(request, reply) == 0
            check(backend, device)
    except ProtocolError:
        pass
    backend.close()
    check(backend, device)
    assert not device.rings
    assert not device.mapped
    device.close()
    os.close(memory)
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
