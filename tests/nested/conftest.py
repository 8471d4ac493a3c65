"""The tests in this folder run inside the nested machine, which has VFIO and an IOMMU; `./test --nested` runs
only them.

Outside, pytest collects them, boots one machine for all, and replays what the pytest inside reports
(tests/harness/nested_tier.py). Modules and this file are imported on both sides, fixtures run inside only. A
test may take 300 s inside, or as many as its marker `nested_seconds(…)` says. Python is slow there: starting
one takes a second, importing pytest or lxml several; so tests call our code rather than start our programs
where that proves the same.

To try things by hand: `.venv/bin/python -m tests.harness.nested_machine -- COMMAND…`.

The machine (tests/harness/nested_hardware.py has the names) is QEMU's q35 with an Intel IOMMU that remaps DMA
and interrupts, under Debian's stock kernel, as root on this machine's own files:

- `FUNCTIONS`, 0000:01:00.0 and 0000:02:00.0: virtio NICs as VFs are, modern and with all their DMA through
  the IOMMU, each in an IOMMU group of its own, bound to virtio-pci at boot;
- `WIRES`: interfaces w1 and w2, up, the other ends of those functions' cables: what the function sends
  comes in on the interface, and the other way round. A frame that the other end has no buffer for waits;
  one for a function that is not plugged in, or is reset, is lost. Nothing else is on the cables (no IPv6);
- `SHARED_GROUP`, 0000:03:00.0 and .1: two such NICs, unconnected, in one IOMMU group with the root port above
  them;
- `PHYSICAL_FUNCTION`, 0000:04:00.0: an NVMe controller with `TOTAL_VFS` VFs (sriov_numvfs), which nobody
  can drive; they stand in for a NIC's;
- QEMU's own monitor (fixture `monitor`), to unplug a function and plug it in again;
- loaded modules: vfio-pci, vfio_iommu_type1, tun and what else the machine's `MODULES` says; modprobe finds
  the rest.

Whoever binds a function to another driver gives it back before the next module's tests.
"""

from collections.abc import Iterator

import pytest

from tests.harness.nested_monitor import NestedMonitor


@pytest.fixture
def monitor() -> Iterator[NestedMonitor]:
    """QEMU's monitor, of the machine that the test is inside."""
    made = NestedMonitor()
    yield made
    made.close()
