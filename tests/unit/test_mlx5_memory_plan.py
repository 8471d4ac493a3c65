"""How an indirect memory key is planned: every address leads where it should, within the device's limits."""

import bisect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.drivers.mlx5.memory_plan import (
    LARGEST_ENTRY,
    LEAST_SIZE,
    MOST_ENTRIES,
    NEAR,
    KeyPlan,
    Span,
    plan,
    spans,
)
from datapath.mlx5_prm import AccessMode
from datapath.vdpa import DeviceError

MIB, GIB = 1 << 20, 1 << 30


@st.composite
def memory(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Regions in any order, with holes or none, whole pages or not."""
    unit = draw(st.sampled_from([1, 512, 4096, 2 * MIB, GIB]))
    address, regions = unit * draw(st.integers(0, 8)), []
    for hole, size in draw(
        st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=8)
    ):
        address += unit * hole
        regions.append((address, unit * size))
        address += unit * size
    return draw(st.permutations(regions))


def owner(regions: list[tuple[int, int]], address: int) -> int | None:
    """Which region has an address."""
    return next((n for n, (at, size) in enumerate(regions) if at <= address < at + size), None)


def found(key: KeyPlan, address: int) -> Span:
    """The entry by which a device translates an address."""
    if key.mode is AccessMode.KLM_FIXED_SIZE:
        return key.entries[(address - key.start) >> key.log_page_size]
    return key.entries[bisect.bisect([entry.address for entry in key.entries], address) - 1]


@given(memory())
def test_every_address_leads_to_its_region(regions: list[tuple[int, int]]) -> None:
    key = plan(regions)
    assert key.start == min(at for at, _ in regions)
    assert key.start + key.size == max(at + size for at, size in regions)
    for at, size in regions:
        for address in {at, at + size // 2, at + size - 1, at - 1, at + size}:
            if key.start <= address < key.start + key.size:
                entry = found(key, address)
                assert entry.address <= address < entry.end
                assert entry.region == owner(regions, address)


@given(memory())
def test_entries_are_what_a_device_takes(regions: list[tuple[int, int]]) -> None:
    key = plan(regions)
    assert sum(entry.size for entry in key.entries) == key.size
    assert len(key.entries) <= MOST_ENTRIES
    assert all(0 < entry.size <= LARGEST_ENTRY for entry in key.entries)
    if key.mode is AccessMode.KLM_FIXED_SIZE:
        assert {entry.size for entry in key.entries} == {1 << key.log_page_size}
        assert 1 << key.log_page_size >= LEAST_SIZE
    else:
        assert key.log_page_size == 0


@given(memory())
def test_a_cache_line_of_entries_is_preferred(regions: list[tuple[int, int]]) -> None:
    """A key has more than that only where there are more pieces."""
    pieces = sum(-(-span.size // LARGEST_ENTRY) for span in spans(regions))
    assert (len(plan(regions).entries) <= NEAR) == (pieces <= NEAR)


@pytest.mark.parametrize(
    ("regions", "mode", "log_page_size", "entries"),
    [
        ([(0, 256 * MIB)], AccessMode.KLM_FIXED_SIZE, 28, 1),
        ([(0, 4 * MIB), (16 * MIB, 4 * MIB)], AccessMode.KLM, 0, 3),
        # A PC of 8 GiB: what begins at 4 GiB leaves a hole of 1 GiB after 3.
        ([(0, 3 * GIB), (4 * GIB, 5 * GIB)], AccessMode.KLM_FIXED_SIZE, 30, 9),
        ([(0, 8 * GIB)], AccessMode.KLM_FIXED_SIZE, 31, 4),
        ([(0, 0xA0000), (0xC0000, 0x7FF40000)], AccessMode.KLM, 0, 3),
        ([(0, 512)], AccessMode.KLM, 0, 1),
        # Pages here and there: one size of 4 KiB would take more entries than there may be.
        ([(n * 5000 * 4096, 4096) for n in range(6)], AccessMode.KLM, 0, 11),
    ],
)
def test_memories(regions: list[tuple[int, int]], mode: AccessMode, log_page_size: int, entries: int) -> None:
    """The first two are what DPDK's driver was seen to make."""
    key = plan(regions)
    assert (key.mode, key.log_page_size, len(key.entries)) == (mode, log_page_size, entries)


def test_the_largest_that_goes() -> None:
    assert len(plan([(n * 3 * 4096, 4096) for n in range(MOST_ENTRIES // 2)]).entries) == MOST_ENTRIES - 1
    with pytest.raises(DeviceError) as error:
        plan([(n * 3 * 4096, 4096) for n in range(MOST_ENTRIES // 2 + 1)])
    assert str(error.value) == "guest memory is in 4079 pieces: a memory key holds 4078"


@pytest.mark.parametrize("regions", [[], [(0, 0)], [(0, 8192), (4096, 4096)], [(0, 4096), (0, 4096)]])
def test_no_memory(regions: list[tuple[int, int]]) -> None:
    with pytest.raises(DeviceError):
        plan(regions)
