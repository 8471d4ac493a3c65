"""Which doorbells of a virtio function are pages of their own, by what its capabilities say."""

import os
from dataclasses import dataclass

import pytest

from datapath.drivers.virtio_registers import VirtioRegisters
from datapath.native.relay import Doorbell
from datapath.vdpa import HostNotifier
from datapath.vfio import Region
from datapath.virtio import PciCapability
from tests.harness.fake_function import FakeFunction, virtio_capability

PAGE = 4096
AT = 0x2000


@dataclass
class PagedFunction(FakeFunction):
    """A function that lets everything be mapped, its notify structure being somewhere in BAR 1."""

    def doorbell(self, index: Region, offset: int, value: int) -> Doorbell:
        return Doorbell(fd=self._doorbells[value])

    def page(self, index: Region, offset: int) -> HostNotifier | None:
        assert (index, offset % PAGE) == (Region.BAR1, 0)
        return HostNotifier(7, offset, PAGE)


def pages(offset: int, length: int, multiplier: int) -> list[int | None]:
    """Where the doorbell's page of each queue is, of a function with four queues."""
    function = PagedFunction(bar_sizes={Region.BAR0: 0x2000, Region.BAR1: 0x10000, Region.CONFIG: 256})
    try:
        notify = virtio_capability(PciCapability.NOTIFY, 1, offset, length, 0x64, multiplier)
        function.config[0x50 : 0x50 + len(notify)] = notify
        registers = VirtioRegisters(function)
        found = [registers.notifier(queue) for queue in range(4)]
        assert all(page is None or page.size == PAGE for page in found)
        return [None if page is None else page.offset for page in found]
    finally:
        function.close()


LAYOUTS: dict[str, tuple[tuple[int, int, int], list[int | None]]] = {
    "a page each": ((AT, 4 * PAGE, PAGE), [AT, AT + PAGE, AT + 2 * PAGE, AT + 3 * PAGE]),
    "two pages each": ((AT, 8 * PAGE, 2 * PAGE), [AT, AT + 2 * PAGE, AT + 4 * PAGE, AT + 6 * PAGE]),
    "the last one is cut off": ((AT, 4 * PAGE - 2, PAGE), [AT, AT + PAGE, AT + 2 * PAGE, None]),
    "several in a page": ((AT, PAGE, 4), [None] * 4),
    "not at the beginning": ((AT + 16, 5 * PAGE, PAGE), [None] * 4),
    "one for all": ((AT, PAGE, 0), [None] * 4),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_pages(case: str) -> None:
    assert os.sysconf("SC_PAGESIZE") == PAGE
    layout, expected = LAYOUTS[case]
    assert pages(*layout) == expected
