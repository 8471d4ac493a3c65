"""The vDPA driver for any modern virtio-net PCI function, of whatever vendor.

Virtio defines neither how to stop a queue nor where it would go on (virtio 1.3 section 3.3 knows only the
reset of the whole device), so this driver needs nothing but what every function has: it stops by a reset,
takes the position from the guest's used ring, and has the rings shadowed wherever they begin but at 0.

A reset drops what the function has fetched. The driver first gives it a moment to send what it has; frames
that arrive just then are lost, as they would be on any wire, and their buffers are offered again.
"""

import contextlib
from collections.abc import Collection

from datapath.bus.function import PciFunction
from datapath.bus.pci import MODERN_NET, PciIds
from datapath.drivers import packed_rings
from datapath.drivers.dirty_logging import LogRegisters
from datapath.drivers.virtio_net import VirtioNetDevice, take_hold
from datapath.drivers.virtio_net_features import BESIDE, common, mac_offered, mtu_offered
from datapath.drivers.virtio_registers import wait_until
from datapath.features import Column, Row, Way, no, partly, yes
from datapath.vdpa import DeviceError, DeviceSpec, LogMode, Ring, RingState
from datapath.virtio import PCI_TRANSITIONAL_NET, PCI_VENDOR

#: A guest announces itself when its front-end tells it to, and says by the control queue that it has.
ANNOUNCED = "tests/e2e/test_plain_virtio.py::test_a_guest_announces_itself"
#: Shows one without: the port was told to keep the bit back.
UNANNOUNCED = "tests/conformance/test_port_announce.py::test_a_guest_that_cannot_is_announced[virtio]"

RINGS = "tests/conformance/test_packed_rings.py"
SHADOW = "tests/unit/test_shadow_ring.py"

FEATURES = Column(
    "virtio",
    "any modern virtio-net PCI function",
    {
        **common("virtio"),
        Row.MAC: yes(
            ANNOUNCED,
            mac_offered("virtio"),
            note="the guest's is the domain's; a function that filters wants the same",
        ),
        Row.CTRL_VQ: yes(
            ANNOUNCED, note="the front-end serves it; the function's own is never set up", way=Way.PROMISED
        ),
        Row.GUEST_ANNOUNCE: yes(ANNOUNCED, UNANNOUNCED, way=Way.PROMISED),
        Row.MQ: no("more pairs want VIRTIO_NET_CTRL_MQ on the function's own control queue"),
        Row.LOG_ALL: yes(
            "tests/conformance/test_shadow_rings.py::test_what_the_function_and_the_relay_write_is_marked",
            note="by the relay: virtio has no dirty log",
            way=Way.PROMISED,
        ),
        Row.MTU: partly("as with ifcvf; no guest was seen to use it with this driver", mtu_offered("virtio")),
        Row.PERF_DOC: no("docs/performance.md measures the driver ifcvf"),
        Row.IN_ORDER: yes(
            f"{RINGS}::test_frames_pass[False-True]",
            f"{RINGS}::test_frames_pass[True-False]",
            f"{RINGS}::test_frames_pass[True-True]",
            f"{RINGS}::test_what_is_offered",
            f"{SHADOW}::test_a_guest_that_was_promised_the_order_has_it",
            f"{SHADOW}::test_a_guest_that_was_promised_no_order_has_the_device_s",
            note="by the function; where rings are shadowed, by the relay",
        ),
        Row.PACKED: partly(
            "where the port is told to offer them, and then no dirty log; virtio has no register by which a"
            " function could go on with a ring, so a guest that was paused has to begin anew",
            f"{RINGS}::test_frames_pass[True-True]",
            f"{RINGS}::test_what_is_offered",
        ),
        Row.LINUX_VFIO: yes(
            "tests/nested/test_port_over_vfio.py::test_a_front_end_passes_frames_both_ways",
            "tests/nested/test_virtio_over_vfio.py::test_frames_pass_both_ways",
        ),
    },
    BESIDE,
)

#: Seconds that the function has to send what it was given, before it is reset.
DRAIN_TIME = 0.05


class VirtioPciDevice(VirtioNetDevice):
    """A virtio-net function, idle or running."""

    FEATURES = FEATURES
    HAS_RING_STATE = False
    SERVES_LEGACY = False
    MAX_PAIRS = 1  # more want VIRTIO_NET_CTRL_MQ on the function's own control queue (section 5.1.6.5.5)

    def __init__(self, name: str, function: PciFunction, log_mode: LogMode = LogMode.AUTO) -> None:
        """Take a function over.

        :raise DeviceError: when it is no modern virtio-net function, lacks what the driver needs, or is to
            log by itself.
        """
        ids = PciIds.of(function.config_space())
        if not ids.is_virtio_net:
            raise DeviceError(
                f"{name}: {ids} is not a virtio network function; those are"
                f" {PCI_VENDOR:04x}:{MODERN_NET:04x} and {PCI_VENDOR:04x}:{PCI_TRANSITIONAL_NET:04x}"
            )
        super().__init__(name, function, log_mode)

    def _check_registers(self) -> None:
        pass  # virtio's own are enough

    def _log_registers(self) -> LogRegisters | None:
        return None

    def _use_rings(self, rings: Collection[int]) -> None:
        pass  # there is but one pair

    def _restore_ring(self, index: int, state: RingState) -> None:
        assert state in (RingState(0, 0), packed_rings.START), "a ring that begins elsewhere is shadowed"

    def _quiesce(self, rings: Collection[int]) -> None:
        sending = [index for index in rings if index % 2]
        with contextlib.suppress(DeviceError):  # what is left then will be sent again
            wait_until(lambda: not any(map(self._has_work, sending)), DRAIN_TIME, lambda: "frames are left")
        self._registers.reset()

    def _has_work(self, index: int) -> bool:
        """Whether the function may be about to send something of a transmit ring."""
        if self._paths.shadowed:
            return self._paths.in_flight(index) > 0
        ring = self._rings[index]
        if ring.packed:
            return packed_rings.has_work(self._guest, ring)
        return self._guest.read16(ring.avail + 2) != self._guest.read16(ring.used + 2)

    def _used_index(self, index: int, ring: Ring) -> int:
        return self._guest_used(ring)


def open_device(
    spec: DeviceSpec, log_mode: LogMode = LogMode.AUTO, _mac: bytes | None = None
) -> VirtioPciDevice:
    """Take hold of the function that a device string names: `virtio,pci=ADDRESS` or `virtio,vfio-user=PATH`.

    :raise DeviceSpecError: for other options.
    :raise DeviceError: when the function cannot be had, or is no modern virtio-net function.
    """
    return take_hold(VirtioPciDevice, spec, log_mode)
