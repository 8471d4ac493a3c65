"""The framing of control sockets: JSON objects cut out of a byte stream."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.control import JsonStream, StreamError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
json_objects = st.dictionaries(st.text(), json_values, max_size=4)


@given(st.lists(json_objects, max_size=5), st.sampled_from(["", "\n", " \r\n"]), st.integers(1, 40))
def test_objects_come_out_however_the_bytes_are_cut(
    objects: list[dict[str, object]], separator: str, step: int
) -> None:
    data = separator.join(json.dumps(item) for item in objects).encode()
    stream = JsonStream()
    seen = [item for at in range(0, len(data), step) for item in stream.feed(data[at : at + step])]
    assert seen == objects


@pytest.mark.parametrize("garbage", [b"x", b"[1]", b'"a"', b"{]", b"{'a': 1}", b"\xff\xff", b'{"a":1} x'])
def test_what_is_no_object_is_refused(garbage: bytes) -> None:
    with pytest.raises(StreamError):
        list(JsonStream().feed(garbage))


def test_an_endless_command_is_refused() -> None:
    stream = JsonStream(limit=100)
    with pytest.raises(StreamError, match="longer than 100 bytes"):
        list(stream.feed(b'{"a": "' + b"x" * 200))


def test_deep_nesting_is_refused_without_a_crash() -> None:
    with pytest.raises(StreamError):
        list(JsonStream(limit=10**6).feed(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"))
