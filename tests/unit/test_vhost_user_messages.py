"""The vhost-user codec: every message both ways, and whatever is malformed refused with one error."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.vhost_user.messages import (
    HEADER,
    LAYOUTS,
    MAX_FDS,
    MAX_PAYLOAD,
    Decoder,
    LogArea,
    Message,
    ProtocolError,
    Region,
    Request,
    VringAddress,
    VringFd,
    VringState,
    decode_reply,
    encode_reply,
    encode_request,
)

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
states = st.builds(VringState, u32, u32)
regions = st.builds(Region, u64, u64, u64, u64)
polled_rings = st.builds(VringFd, st.integers(0, 255), st.just(False))
EMPTY = st.none()

#: A payload without descriptors for each request that may come without.
PAYLOADS: dict[Request, st.SearchStrategy[Any]] = {
    Request.GET_FEATURES: EMPTY,
    Request.SET_FEATURES: u64,
    Request.SET_OWNER: EMPTY,
    Request.RESET_OWNER: EMPTY,
    Request.SET_MEM_TABLE: st.just(()),
    Request.SET_LOG_BASE: st.builds(LogArea, u64, u64),
    Request.SET_VRING_NUM: states,
    Request.SET_VRING_ADDR: st.builds(VringAddress, u32, u32, u64, u64, u64, u64),
    Request.SET_VRING_BASE: states,
    Request.GET_VRING_BASE: states,
    Request.SET_VRING_KICK: polled_rings,
    Request.SET_VRING_CALL: polled_rings,
    Request.SET_VRING_ERR: polled_rings,
    Request.GET_PROTOCOL_FEATURES: EMPTY,
    Request.SET_PROTOCOL_FEATURES: u64,
    Request.GET_QUEUE_NUM: EMPTY,
    Request.SET_VRING_ENABLE: states,
    Request.SEND_RARP: u64,
    Request.NET_SET_MTU: u64,
    Request.GET_MAX_MEM_SLOTS: EMPTY,
    Request.REM_MEM_REG: regions,
    Request.SET_STATUS: u64,
    Request.GET_STATUS: EMPTY,
}
#: With how many descriptors the others come, and a payload for that.
WITH_FDS: dict[Request, tuple[int, Any]] = {
    Request.SET_MEM_TABLE: (2, (Region(0, 4096, 0x1000, 0), Region(0x10000, 4096, 0x9000, 4096))),
    Request.SET_LOG_BASE: (1, LogArea(4096, 0)),
    Request.SET_LOG_FD: (1, None),
    Request.SET_VRING_KICK: (1, VringFd(0, True)),
    Request.SET_VRING_CALL: (1, VringFd(1, True)),
    Request.SET_VRING_ERR: (1, VringFd(255, True)),
    Request.SET_BACKEND_REQ_FD: (1, None),
    Request.ADD_MEM_REG: (1, Region(0, 4096, 0, 0)),
    Request.REM_MEM_REG: (1, Region(0, 4096, 0, 0)),
}


def decode(data: bytes, fds: list[int] | None = None, step: int = HEADER.size + MAX_PAYLOAD) -> Message:
    """One message from bytes that arrive `step` at a time."""
    decoder = Decoder()
    found: list[Message] = []
    arriving = list(fds or [])
    for begin in range(0, len(data), step):
        assert not found
        found += decoder.feed(data[begin : begin + step], arriving)
        arriving = []
    assert decoder.idle
    (message,) = found
    return message


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """More descriptors than any message takes; closed by the test or here."""
    made = [os.eventfd(0) for _ in range(MAX_FDS + 1)]
    yield made
    for fd in made:
        try:
            os.close(fd)
        except OSError:
            continue


def test_every_request_served_is_tried_here() -> None:
    assert set(PAYLOADS) | set(WITH_FDS) == set(LAYOUTS)


@given(st.data(), st.sampled_from(sorted(PAYLOADS)), st.booleans(), st.integers(1, 300))
def test_a_request_survives_the_wire(data: st.DataObject, request: Request, ack: bool, step: int) -> None:
    message = Message(request, data.draw(PAYLOADS[request]), need_reply=ack)
    assert decode(encode_request(message), step=step) == message


@pytest.mark.parametrize("request_id", WITH_FDS, ids=lambda request: request.name)
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_descriptors_are_counted(request_id: Request, extra: int, fds: list[int]) -> None:
    count, payload = WITH_FDS[request_id]
    data = encode_request(Message(request_id, payload))
    given_fds = fds[: count + extra]
    tolerated = {Request.REM_MEM_REG: (0, 1), Request.SET_LOG_BASE: (0, 1)}.get(request_id, (count,))
    if len(given_fds) in tolerated:
        assert decode(data, given_fds).fds == given_fds
    else:
        with pytest.raises(ProtocolError, match=f"{len(given_fds)} descriptors instead of"):
            decode(data, given_fds)


SIZES = [
    (request, layout.payload.size + change)
    for request, layout in LAYOUTS.items()
    for change in (-1, 1)
    if layout.payload.size is not None and layout.payload.size + change >= 0
]


@pytest.mark.parametrize(("request_id", "size"), [*SIZES, (Request.SET_MEM_TABLE, 7)])
def test_wrong_lengths_are_refused(request_id: int, size: int) -> None:
    with pytest.raises(ProtocolError, match=f"of {size} bytes"):
        decode(HEADER.pack(request_id, 1, size) + bytes(size))


@pytest.mark.parametrize("flags", [0, 2, 3, 0x5, 0xD])
def test_only_version_1_requests_are_taken(flags: int) -> None:
    with pytest.raises(ProtocolError, match="no version 1 request"):
        decode(HEADER.pack(Request.GET_FEATURES, flags, 0))


@pytest.mark.parametrize("size", [MAX_PAYLOAD + 1, 2**32 - 1])
def test_a_huge_payload_is_refused_by_its_header(size: int) -> None:
    decoder = Decoder()
    with pytest.raises(ProtocolError, match=f"payload of {size} bytes"):
        list(decoder.feed(HEADER.pack(99, 1, size)))


def test_a_table_that_claims_more_regions_than_it_has_is_refused() -> None:
    body = (9).to_bytes(4, "little") + bytes(4)
    with pytest.raises(ProtocolError, match="claims 9 regions"):
        decode(HEADER.pack(Request.SET_MEM_TABLE, 1, len(body)) + body)


def test_too_many_descriptors_are_refused_and_closed(fds: list[int]) -> None:
    decoder = Decoder()
    with pytest.raises(ProtocolError, match=f"more than {MAX_FDS} descriptors"):
        list(decoder.feed(b"\1", fds))
    decoder.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_message_closes_what_nobody_took(fds: list[int]) -> None:
    message = Message(Request.SET_LOG_FD, fds=fds[:2])
    taken = message.take_fd()
    message.close()
    os.fstat(taken)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds[1])


def test_unknown_requests_keep_their_bytes() -> None:
    message = decode(HEADER.pack(200, 9, 3) + b"abc")
    assert (message.request, message.payload, message.need_reply) == (200, b"abc", True)


@given(st.lists(st.binary(max_size=400), max_size=5))
def test_garbage_raises_nothing_else(chunks: list[bytes]) -> None:
    """Whatever arrives, the decoder yields messages or raises ProtocolError."""
    decoder = Decoder()
    try:
        for chunk in chunks:
            list(decoder.feed(chunk))
    except ProtocolError:
        pass


KICK = encode_request(Message(Request.SET_VRING_KICK, VringFd(0, True)))
OWNER = encode_request(Message(Request.SET_OWNER))


@given(st.integers(1, 200))
def test_messages_come_one_after_another_however_they_arrive(step: int) -> None:
    data, decoder = 3 * OWNER, Decoder()
    found: list[Message] = []
    for begin in range(0, len(data), step):
        found += decoder.feed(data[begin : begin + step])
    assert found == 3 * [Message(Request.SET_OWNER)]
    assert decoder.idle


def test_descriptors_are_those_of_the_message_that_begins_last(fds: list[int]) -> None:
    decoder = Decoder()
    first, second = decoder.feed(OWNER + KICK, fds[:1])
    assert (first.fds, second.fds) == ([], fds[:1])
    (third,) = decoder.feed(OWNER + KICK[:5], fds[1:2])
    assert third.fds == []
    fourth, fifth = decoder.feed(KICK[5:] + KICK, fds[2:3])
    assert (fourth.fds, fifth.fds) == (fds[1:2], fds[2:3])


def test_what_comes_before_a_malformed_message_is_carried_out(fds: list[int]) -> None:
    decoder = Decoder()
    messages = decoder.feed(OWNER + HEADER.pack(99, 0, 0) + KICK, fds[:1])
    assert next(messages) == Message(Request.SET_OWNER)
    with pytest.raises(ProtocolError, match="no version 1 request"):
        next(messages)
    decoder.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds[0])


def test_replies_have_their_requests_form() -> None:
    assert decode_reply(Request.GET_FEATURES, encode_reply(Request.GET_FEATURES, 5)) == 5
    state = VringState(1, 77)
    assert decode_reply(Request.GET_VRING_BASE, encode_reply(Request.GET_VRING_BASE, state)) == state
    assert encode_reply(Request.SET_VRING_NUM, 1) == HEADER.pack(8, 5, 8) + (1).to_bytes(8, "little")
    assert encode_reply(200, 1) == HEADER.pack(200, 5, 8) + (1).to_bytes(8, "little")
