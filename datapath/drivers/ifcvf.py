"""The vDPA driver for IFCVF: virtio-net VFs of Intel FPGA and IPU cards.

An IFCVF is a modern virtio-net function (`virtio_net`) plus two things, which this module owns: the ids
that tell it apart, and registers in BAR 4 by which its rings are read and put back, and by which it marks
the pages that it writes.
Offsets and rules are those of DPDK's drivers/vdpa/ifc/base/ifcvf.[hc]; docs/drivers/ifcvf.md lists them.
"""

from collections.abc import Collection

from datapath.bus.function import PciFunction
from datapath.bus.pci import PciIds
from datapath.drivers.dirty_logging import LogRefusedError, LogRegisters
from datapath.drivers.virtio_net import VirtioNetDevice, take_hold
from datapath.drivers.virtio_net_features import BESIDE, common, mac_offered, mtu_offered
from datapath.drivers.virtio_registers import wait_until
from datapath.features import Column, Row, Way, no, partly, yes
from datapath.vdpa import DeviceError, DeviceSpec, LogMode, Ring, RingState
from datapath.vfio import Region

#: Network functions. The vendor and device ids are those of any virtio-net card: the subsystem decides.
IDS = frozenset(
    (
        PciIds(0x1AF4, 0x1041, 0x8086, 0x001A),  # N3000
        PciIds(0x1AF4, 0x1000, 0x8086, 0x0001),  # C5000X-PL, F2000X-PL
    )
)

#: A guest announces itself when its front-end tells it to, and says by the control queue that it has.
ANNOUNCED = "tests/e2e/test_migration.py::test_bridges_are_told[arp]"
#: Shows it without: the front-end was told to keep the bit back.
UNANNOUNCED = "tests/e2e/test_migration.py::test_bridges_are_told[rarp]"
LOGGED = "tests/conformance/test_ifcvf_logging.py::test_the_vf_marks_buffers_and_we_the_used_rings"

FEATURES = Column(
    "ifcvf",
    "virtio-net VFs of Intel FPGA and IPU cards",
    {
        **common("ifcvf"),
        Row.MAC: yes(
            ANNOUNCED,
            mac_offered("ifcvf"),
            note="the guest's is the domain's; a VF that filters wants the same",
        ),
        Row.CTRL_VQ: yes(
            ANNOUNCED, note="the front-end serves it; the VF's own is never set up", way=Way.PROMISED
        ),
        Row.GUEST_ANNOUNCE: yes(ANNOUNCED, UNANNOUNCED, way=Way.PROMISED),
        Row.MQ: yes(
            "tests/conformance/test_nic_queues.py::test_a_flow_comes_where_the_guest_sends_it",
            "tests/conformance/test_nic_queues.py::test_the_number_of_queues_changes_while_running",
            "tests/conformance/test_nic_queues.py::test_without_the_feature_there_is_one_pair",
            note="up to 32 pairs where the VF has them; shown with 4",
        ),
        Row.LOG_ALL: yes(
            LOGGED,
            "tests/conformance/test_port_logging.py::test_just_what_was_written_is_marked",
            note="by the VF, or by the relay",
            way=Way.PROMISED,
        ),
        Row.MTU: yes(
            "tests/e2e/test_mtu.py::test_guest_uses_the_mtu",
            "tests/e2e/test_mtu.py::test_more_than_the_vf_takes_is_refused",
            mtu_offered("ifcvf"),
            note="libvirt gives a guest what its <mtu> says; more than the VF carries is refused",
        ).but_emulated("it drops what is longer than its MTU"),
        Row.PERF_DOC: partly(
            "docs/performance.md: what the driver costs on an emulated VF; no card was at hand"
        ),
        Row.IN_ORDER: no("no IFCVF is known to offer it").but_emulated("it has it, for the driver virtio"),
        Row.PACKED: no("the registers that keep a ring's state are for split rings").but_emulated(
            "it has them, for the driver virtio"
        ),
        Row.LINUX_VFIO: partly(
            "no such card was at hand, and QEMU has none; the bus and what IFCVF has of virtio are shown"
            " with the driver virtio",
            "tests/nested/test_port_over_vfio.py::test_a_front_end_passes_frames_both_ways",
        ).but_emulated("it is reached by vfio-user"),
    },
    BESIDE,
)

#: Seconds that queues have to finish what they have fetched, once disabled. DPDK waits 0.1 s for each.
STOP_DEADLINE = 1.0


class LiveMigration:
    """Byte offsets in BAR 4, "LM" in DPDK's names."""

    BAR = Region.BAR4
    #: Dirty log: whether to keep one, and the DMA addresses where the bitmap begins and ends, low word first.
    LOGGING_CONTROL = 0x00
    LOG_BASE = 0x10
    LOG_END = 0x18
    #: Values of LOGGING_CONTROL. (3 is for the physical function.)
    LOGGING_OFF = 0
    LOGGING_ON = 1
    #: Ring state of the first pair: bits 15-0 next available index, bits 31-16 next used index.
    RING_STATE = 0x20
    #: From one queue pair to the next.
    PAIR_STRIDE = 0x40
    #: From a pair's receive queue to its transmit queue.
    RING_STRIDE = 4
    #: Number of queue pairs in use.
    MQ = 0x28

    @classmethod
    def ring_state(cls, index: int) -> int:
        return cls.RING_STATE + index // 2 * cls.PAIR_STRIDE + index % 2 * cls.RING_STRIDE


class IfcvfLog(LogRegisters):
    """The log of an IFCVF: it marks the buffers that it writes, and no used ring."""

    def __init__(self, function: PciFunction) -> None:
        self._function = function

    def check(self, base: int, end: int) -> None:
        try:
            self.switch_on(base, end)
            read = tuple(
                self._read(at) | self._read(at + 4) << 32
                for at in (LiveMigration.LOG_BASE, LiveMigration.LOG_END)
            )
        finally:
            self.switch_off()
            self._set_span(0, 0)
        if read != (base, end):
            raise DeviceError(
                f"{self._function.name}: its log registers read {read[0]:#x} and {read[1]:#x},"
                f" written were {base:#x} and {end:#x}"
            )

    def switch_on(self, base: int, end: int) -> None:
        self._set_span(base, end)
        self._set_control(LiveMigration.LOGGING_ON)

    def switch_off(self, *, wait: bool = True) -> None:
        self._set_control(LiveMigration.LOGGING_OFF, wait)

    def _set_control(self, value: int, wait: bool = True) -> None:
        self._write(LiveMigration.LOGGING_CONTROL, value)
        if not wait:
            return
        # It has arrived when this has come back; and nobody else tells of a function that refuses.
        read = self._read(LiveMigration.LOGGING_CONTROL)
        if read != value:
            raise LogRefusedError(
                f"{self._function.name}: its logging control reads {read:#x}, written was {value:#x}"
            )

    def _set_span(self, base: int, end: int) -> None:
        for at, address in ((LiveMigration.LOG_BASE, base), (LiveMigration.LOG_END, end)):
            self._write(at, address & 0xFFFFFFFF)
            self._write(at + 4, address >> 32)

    def _read(self, at: int) -> int:
        return self._function.read(LiveMigration.BAR, at, 4)

    def _write(self, at: int, value: int) -> None:
        self._function.write(LiveMigration.BAR, at, 4, value)


class IfcvfDevice(VirtioNetDevice):
    """An IFCVF VF, idle or running."""

    FEATURES = FEATURES
    HAS_RING_STATE = True
    SERVES_LEGACY = True
    MAX_PAIRS = 32  # IFCVF_MAX_QUEUES of DPDK

    def __init__(self, name: str, function: PciFunction, log_mode: LogMode = LogMode.AUTO) -> None:
        """Take a function over.

        :raise DeviceError: when it is no IFCVF, or lacks what the driver or the log mode needs.
        """
        ids = PciIds.of(function.config_space())
        if ids not in IDS:
            known = "; ".join(map(str, sorted(IDS)))
            raise DeviceError(f"{name}: {ids} is not an IFCVF network function; those are {known}")
        super().__init__(name, function, log_mode)

    def _check_registers(self) -> None:
        size = self._function.region(LiveMigration.BAR).size
        needed = LiveMigration.ring_state(2 * self.queue_pairs - 1) + 4
        if size < needed:
            raise DeviceError(
                f"{self.name}: BAR 4 has {size} bytes, the ring state of {self.queue_pairs} queue pairs"
                f" needs {needed}"
            )

    def _log_registers(self) -> LogRegisters | None:
        return IfcvfLog(self._function)

    def _use_rings(self, rings: Collection[int]) -> None:
        # Frames are spread over pairs that receive; others may be there to transmit what is left.
        receiving = [index for index in rings if index % 2 == 0]
        self._function.write(LiveMigration.BAR, LiveMigration.MQ, 4, max(receiving, default=0) // 2 + 1)

    def _restore_ring(self, index: int, state: RingState) -> None:
        # Both from the used index: what was fetched but not completed is fetched again.
        self._function.write(
            LiveMigration.BAR, LiveMigration.ring_state(index), 4, state.used | state.used << 16
        )

    def _quiesce(self, rings: Collection[int]) -> None:
        # A virtio driver may not disable a queue; for IFCVF it means: fetch no more, finish, publish.
        for index in rings:
            self._registers.enable_queue(index, False)
        waiting = sorted(rings)

        def all_stopped() -> bool:
            while waiting and not self._registers.queue_enabled(waiting[0]):
                del waiting[0]
            return not waiting

        wait_until(all_stopped, STOP_DEADLINE, lambda: f"{self.name}: queue {waiting[0]} does not stop")

    def _used_index(self, index: int, ring: Ring) -> int:
        return self._function.read(LiveMigration.BAR, LiveMigration.ring_state(index), 4) >> 16


def open_device(spec: DeviceSpec, log_mode: LogMode = LogMode.AUTO, _mac: bytes | None = None) -> IfcvfDevice:
    """Take hold of the VF that a device string names: `ifcvf,pci=ADDRESS` or `ifcvf,vfio-user=PATH`.

    :raise DeviceSpecError: for other options.
    :raise DeviceError: when the VF cannot be had, or is no IFCVF.
    """
    return take_hold(IfcvfDevice, spec, log_mode)
