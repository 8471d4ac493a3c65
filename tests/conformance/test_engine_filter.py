"""The receive filter of the packet engine: what it keeps from the driver, and what it lets through."""

from dataclasses import replace

import pytest

from datapath.rx_filter import MAX_MACS, RxFilter, Scope
from tests.harness.filters import FRAMES, OTHER, OTHER_VLAN, OWN, WANTED, frame
from tests.harness.nic_engine import HEADER, RX, Bench, bench, wait_for


def passing(b: Bench, wanted: RxFilter | None) -> set[str]:
    """What of all those frames a guest gets, and that the rest is counted as filtered."""
    b.engine.set_filter(wanted)
    before = b.engine.count(RX)
    got: set[str] = set()
    for data in FRAMES.values():
        b.wire.send(data)

    def all_seen() -> bool:
        now = b.engine.count(RX)
        return now.packets + now.filtered == before.packets + before.filtered + len(FRAMES)

    wait_for(all_seen, "a decision on each frame")
    delivered = b.engine.count(RX).packets - before.packets
    while len(got) < delivered:
        for head, length in b.rx.wait_used():
            at = int.from_bytes(b.memory.read(b.rx.descriptors + 16 * head, 8), "little")
            data = b.memory.read(at + HEADER, length - HEADER)
            got.add(next(name for name, sent in FRAMES.items() if sent == data))
            b.offer(2048)
    assert b.engine.count(RX).dropped == before.dropped
    return got


ALL = set(FRAMES)
ADMITTED = {"own", "group", "broadcast", "vlan", "no vlan"}


@pytest.mark.parametrize(
    ("wanted", "admitted"),
    [
        (None, ALL),
        (WANTED, ADMITTED),
        (replace(WANTED, promiscuous=True), ALL),
        (replace(WANTED, multicast=Scope.ALL), ADMITTED | {"other group"}),
        (replace(WANTED, multicast=Scope.NONE), ADMITTED - {"group"}),
        (replace(WANTED, unicast=Scope.ALL), ADMITTED | {"other", "other on vlan"}),
        (replace(WANTED, unicast=Scope.NONE), {"group", "broadcast"}),
        (replace(WANTED, broadcast=False), ADMITTED - {"broadcast"}),
        (replace(WANTED, vlan=Scope.ALL), ADMITTED | {"other vlan", "broadcast on other vlan"}),
        (replace(WANTED, vlan=Scope.NONE), ADMITTED - {"vlan"}),
        (
            replace(WANTED, macs=(OTHER,), vlans=(OTHER_VLAN,)),
            {"other", "broadcast", "broadcast on other vlan"},
        ),
    ],
)
def test_what_passes(wanted: RxFilter | None, admitted: set[str]) -> None:
    with bench() as b:
        b.run()
        b.offer(*[2048] * 32)
        assert passing(b, wanted) == admitted


def test_a_filter_may_be_full() -> None:
    """The last address counts as the first, and each VLAN is its own."""
    macs = tuple(bytes.fromhex("0200") + number.to_bytes(4, "big") for number in range(MAX_MACS - 1))
    with bench() as b:
        b.run()
        b.offer(*[2048] * 32)
        full = replace(WANTED, macs=(*macs, OWN), vlans=tuple(set(range(4096)) - {OTHER_VLAN}))
        assert passing(b, full) == ADMITTED - {"group"}


def test_a_filtered_frame_takes_no_buffer() -> None:
    with bench() as b:
        b.run()
        b.engine.set_filter(WANTED)
        b.wire.send(frame(OTHER))
        b.wire.send(bytes(3))  # no whole address
        wait_for(lambda: b.engine.count(RX).filtered == 2, "two filtered frames")
        b.offer(2048)
        b.wire.send(frame(OWN))
        assert b.rx.wait_used() == [(0, HEADER + 60)]


def test_a_frame_that_waits_for_a_buffer_is_looked_at_again() -> None:
    with bench() as b:
        b.run()
        b.wire.send(frame(OTHER))
        b.wire.send(frame(OWN))
        b.engine.set_filter(WANTED)
        b.offer(2048)
        assert b.rx.wait_used() == [(0, HEADER + 60)]
        assert b.engine.count(RX).filtered == 1
