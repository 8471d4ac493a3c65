"""The kernel VFIO bus on a function, an IOMMU and a kernel that are not ours."""

import os
import select
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from datapath.bus import vfio_container
from datapath.bus.sysfs import function as host_function
from datapath.bus.vfio import VfioFunction
from datapath.drivers.dma_addresses import DmaAddresses
from datapath.drivers.hardware_log import HardwareLog
from datapath.drivers.virtio_registers import VirtioRegisters
from datapath.pci import COMMAND, REVISION_AND_CLASS, VENDOR, PciCommand
from datapath.vdpa import DeviceError, DeviceLostError, MemoryRegion
from datapath.vfio import Irq, Region
from datapath.virtio import NET_HEADER_SIZE, Status
from tests.harness.dirty_log import OddLog
from tests.harness.guest import CHECKOUT
from tests.harness.host_pci import KernelLog, begin_removal, bind, bound, cut_off, exists, give_back, rescan
from tests.harness.nested_hardware import FUNCTIONS, SHARED_GROUP, WIRES
from tests.harness.processes import run, wait_for
from tests.harness.raw_nic import VECTOR, RawTransmitter, SharedMemory
from tests.harness.wire import Wire, frame

FIRST, SECOND = FUNCTIONS
#: The root port above the first.
BRIDGE = "0000:00:02.0"
BASE = 0x1_0000_0000
PARAMETERS = Path("/sys/module/vfio_iommu_type1/parameters")


@pytest.fixture(scope="module", autouse=True)
def functions() -> Iterator[None]:
    """Both functions are VFIO's for as long as this module's tests run."""
    with bound(FIRST), bound(SECOND):
        yield


@pytest.fixture
def function() -> Iterator[VfioFunction]:
    opened = VfioFunction(FIRST)
    yield opened
    opened.close()


@pytest.fixture
def transmitter(function: VfioFunction) -> Iterator[RawTransmitter]:
    raw = RawTransmitter(function, BASE)
    yield raw
    raw.close()


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    shared = SharedMemory(BASE)
    yield shared
    shared.close()


@pytest.fixture
def kernel_log() -> Iterator[KernelLog]:
    log = KernelLog()
    yield log
    log.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    """The other end of the first function's cable."""
    interface = Wire(None, "w1")
    yield interface
    interface.close()


def readable(fd: int, seconds: float = 0.0) -> bool:
    return bool(select.select([fd], [], [], seconds)[0])


# Registers


def test_configuration_space(function: VfioFunction) -> None:
    ids = host_function(FIRST).ids
    assert function.read(Region.CONFIG, VENDOR, 4) == ids.vendor | ids.device << 16
    assert struct.unpack_from("<HH", function.config_space()) == (ids.vendor, ids.device)
    assert function.region(Region.BAR0).size == 0


def test_registers_of_each_width(function: VfioFunction) -> None:
    function.enable()
    registers = VirtioRegisters(function)
    registers.reset()
    assert registers.num_queues == 3
    assert registers.max_queue_size(0) == 256
    assert registers.device_features() >> 32 & 3 == 3  # VERSION_1, ACCESS_PLATFORM
    registers.add_status(Status.ACKNOWLEDGE)
    assert registers.status == Status.ACKNOWLEDGE


def test_a_function_that_does_not_decode_its_registers(function: VfioFunction) -> None:
    function.enable()
    registers = VirtioRegisters(function)
    command = function.read(Region.CONFIG, COMMAND, 2)
    function.write(Region.CONFIG, COMMAND, 2, command & ~PciCommand.MEMORY)
    with pytest.raises(
        DeviceError, match=rf"^pci={FIRST}: reading BAR4\+0x14: Input/output error$"
    ) as raised:
        _ = registers.status
    assert not isinstance(raised.value, DeviceLostError)


def test_reset(function: VfioFunction, memory: SharedMemory) -> None:
    function.dma_map(memory.region)
    function.enable()
    registers = VirtioRegisters(function)
    registers.add_status(Status.ACKNOWLEDGE)
    function.reset()
    assert registers.status == 0
    assert function.read(Region.CONFIG, COMMAND, 2) & PciCommand.MASTER
    with pytest.raises(DeviceError, match="overlaps"):
        function.dma_map(memory.region)  # memory stays mapped


def test_a_closed_function_can_be_had_again(function: VfioFunction) -> None:
    function.close()
    with closing(VfioFunction(FIRST)) as again:
        assert again.irq_count(Irq.MSIX) == 4


# Interrupts


def test_interrupts(transmitter: RawTransmitter) -> None:
    transmitter.send(1)
    assert len(transmitter.queue.wait_used()) == 1
    assert not readable(transmitter.config_fd)


def test_another_eventfd_while_the_queue_runs(transmitter: RawTransmitter) -> None:
    other = os.eventfd(0, os.EFD_NONBLOCK)
    transmitter.function.set_eventfds(Irq.MSIX, VECTOR, [other])
    transmitter.send(1)
    assert readable(other, 5.0)
    assert not readable(transmitter.queue.call_fd)
    os.close(other)


def test_no_interrupt_without_an_eventfd_or_when_disabled(transmitter: RawTransmitter) -> None:
    def completed_without_interrupt(number: int) -> None:
        transmitter.send(number)
        wait_for("the frame to be sent", lambda: transmitter.queue.used_index == number, 5.0)
        assert not readable(transmitter.queue.call_fd)

    function = transmitter.function
    function.set_eventfds(Irq.MSIX, VECTOR, [None])
    completed_without_interrupt(1)
    function.disable_irqs(Irq.MSIX)
    completed_without_interrupt(2)
    function.disable_irqs(Irq.MSIX)
    function.set_eventfds(Irq.MSIX, 0, [transmitter.config_fd, None, transmitter.queue.call_fd])
    transmitter.send(3)
    assert readable(transmitter.queue.call_fd, 5.0)


def test_more_vectors_than_there_are(function: VfioFunction) -> None:
    with pytest.raises(DeviceError, match="5 MSIX interrupts are needed, the function has 4"):
        function.set_eventfds(Irq.MSIX, 0, [None] * 5)


# Memory


def test_memory_in_two_address_spaces() -> None:
    """Two functions, the same DMA address, each its own memory behind it."""
    with ExitStack() as stack:
        wires = [stack.enter_context(closing(Wire(None, name))) for name in WIRES]
        opened = [stack.enter_context(closing(VfioFunction(address))) for address in FUNCTIONS]
        transmitters = [stack.enter_context(closing(RawTransmitter(function, BASE))) for function in opened]
        for number, (wire, transmitter) in enumerate(zip(wires, transmitters, strict=True), 41):
            transmitter.send(number)
            wire.expect(number)


def test_memory_outside_what_is_mapped(transmitter: RawTransmitter, kernel_log: KernelLog) -> None:
    transmitter.send(0, address=0x2_0000_0000)
    line = kernel_log.expect("DMAR", "[01:00.0]", "fault addr 0x200000000")
    assert "Read" in line


def test_memory_that_has_been_taken_away(
    transmitter: RawTransmitter, kernel_log: KernelLog, wire: Wire
) -> None:
    more = SharedMemory(0x3_0000_0000)
    more.memfd.write(more.region.guest_address, bytes(NET_HEADER_SIZE) + frame(1))
    function = transmitter.function
    function.dma_map(more.region)
    transmitter.send(0, address=more.region.guest_address)
    wire.expect(1)
    assert not kernel_log.find("DMAR", "fault addr")

    function.dma_unmap(more.region)
    transmitter.send(0, address=more.region.guest_address)
    kernel_log.expect("DMAR", "[01:00.0]", "fault addr 0x300000000")
    transmitter.send(2)
    wire.expect(2)  # and not 1 before it

    function.dma_map(more.region)  # the range is free again
    more.close()


def test_rings_that_have_been_taken_away(transmitter: RawTransmitter, kernel_log: KernelLog) -> None:
    transmitter.send(1)
    transmitter.queue.wait_used()
    transmitter.function.dma_unmap(transmitter.memory.region)
    transmitter.send(2)
    kernel_log.expect("DMAR", "[01:00.0]", "fault addr 0x10000")
    assert transmitter.queue.used_index == 1


@pytest.mark.parametrize(
    ("at", "size", "told"),
    [
        (BASE + 0x1000, 0x1000, r"overlaps what is mapped: 0x100000000\+0x200000$"),
        (BASE - 0x1000, 0x2000, r"overlaps what is mapped: 0x100000000\+0x200000$"),
        (0x2_0000_0800, 0x1000, "the IOMMU needs multiples of 4096 bytes"),
        (0x2_0000_0000, 0x800, "the IOMMU needs multiples of 4096 bytes"),
        (0xFEE0_0000, 0x1000, "the host's IOMMU maps only 0x0-0xfedfffff, 0xfef00000-0x7fffffffff"),
        (0xFEDF_F000, 0x2000, "the host's IOMMU maps only "),
        (1 << 39, 0x1000, "the host's IOMMU maps only "),
        (0x2_0000_0000, 0, "Invalid argument"),
    ],
)
def test_what_cannot_be_mapped(
    function: VfioFunction, memory: SharedMemory, at: int, size: int, told: str
) -> None:
    function.dma_map(memory.region)
    region = MemoryRegion(at, size, memory.region.fd, 0, memory.region.address)
    with pytest.raises(DeviceError, match=rf"^pci={FIRST}: memory {at:#x}\+{size:#x}: .*{told}"):
        function.dma_map(region)


def test_the_ranges_that_can_be_mapped(function: VfioFunction, memory: SharedMemory) -> None:
    assert function.iova_ranges() == ((0, 0xFEDFFFFF), (0xFEF00000, 0x7FFFFFFFFF))
    for first, last in function.iova_ranges():
        for at in (first, last + 1 - 0x1000):
            function.dma_map(MemoryRegion(at, 0x1000, memory.region.fd, 0, memory.region.address))


def test_a_dirty_log_that_ends_within_a_page_of_a_sealed_file(
    function: VfioFunction, memory: SharedMemory
) -> None:
    """As QEMU's does; this function marks nothing in it, but it could."""
    odd, addresses = OddLog(2 * 4096 + 8), DmaAddresses(function)
    function.dma_map(memory.region)
    for _ in range(2):
        log = HardwareLog(function, addresses, odd.bitmap)
        first, end = log.span
        assert (end - first, log.memory.size) == (odd.bitmap.size, 3 * 4096)
        with pytest.raises(DeviceError, match="overlaps what is mapped"):
            function.dma_map(
                MemoryRegion(end // 4096 * 4096, 0x1000, memory.region.fd, 0, memory.region.address)
            )
        log.close()
    odd.close()


def test_memory_that_is_not_there(function: VfioFunction, memory: SharedMemory) -> None:
    region = MemoryRegion(BASE, 0x1000, -1, 0, 0x1000)
    with pytest.raises(DeviceError, match="the pages at 0x1000 here cannot be had, or not for writing"):
        function.dma_map(region)
    os.ftruncate(memory.region.fd, 0x1000)
    with pytest.raises(DeviceError, match="cannot be had"):
        function.dma_map(memory.region)


def test_as_many_mappings_as_the_kernel_allows(memory: SharedMemory) -> None:
    limit = PARAMETERS / "dma_entry_limit"
    before = limit.read_text()
    limit.write_text("3")
    try:
        function = VfioFunction(FIRST)
    finally:
        limit.write_text(before)
    pages = [
        MemoryRegion(BASE + 0x1000 * page, 0x1000, memory.region.fd, 0, memory.region.address)
        for page in range(4)
    ]
    with closing(function):
        for page in pages[:3]:
            function.dma_map(page)
        with pytest.raises(
            DeviceError, match=r"4 mappings are needed, the kernel allows 3 \(dma_entry_limit"
        ):
            function.dma_map(pages[3])
        function.dma_unmap(pages[0])
        function.dma_map(pages[3])


def test_memory_in_more_pieces_than_the_kernel_allows(
    memory: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vfio_container, "PIECE", memory.region.size // 4)
    limit = PARAMETERS / "dma_entry_limit"
    before = limit.read_text()
    limit.write_text("3")
    try:
        function = VfioFunction(FIRST)
    finally:
        limit.write_text(before)
    with closing(function):
        with pytest.raises(DeviceError, match="4 mappings are needed, the kernel allows 3"):
            function.dma_map(memory.region)
        # Nothing of it is left: neither its addresses nor its mappings are taken.
        for page in range(3):
            at = BASE + 0x1000 * page
            function.dma_map(MemoryRegion(at, 0x1000, memory.region.fd, 0, memory.region.address))


def test_memory_in_pieces_that_is_taken_away(
    transmitter: RawTransmitter, kernel_log: KernelLog, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = SharedMemory(0x3_0000_0000)
    last = more.region.guest_address + more.region.size - 0x1000
    more.memfd.write(last, bytes(NET_HEADER_SIZE) + frame(1))
    monkeypatch.setattr(vfio_container, "PIECE", more.region.size // 4)
    function = transmitter.function
    for _ in range(2):
        function.dma_map(more.region)
        transmitter.send(0, address=last)
        wire.expect(1)
        assert not kernel_log.find("DMAR", "fault addr")
        function.dma_unmap(more.region)
    transmitter.send(0, address=more.region.guest_address)
    kernel_log.expect("DMAR", "[01:00.0]", "fault addr 0x300000000")
    more.close()


#: Maps two megabytes, half of one at a time, when one may be locked, and when two may.
MAP_TWO_MEGABYTES = f"""
import resource
from datapath.bus import vfio_container
from datapath.bus.vfio import VfioFunction
from datapath.vdpa import DeviceError
from tests.harness.raw_nic import SharedMemory
vfio_container.PIECE = 1 << 19
function = VfioFunction("{FIRST}")
memory = SharedMemory({BASE:#x})
for limit in (1 << 20, 2 << 20):
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, 2 << 20))
    try:
        function.dma_map(memory.region)
        print("mapped")
    except DeviceError as error:
        print(error)
"""


def test_locked_memory_of_a_process_without_privilege() -> None:
    dropped = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
    printed = run([*dropped, sys.executable, "-c", MAP_TWO_MEGABYTES], cwd=CHECKOUT).stdout.splitlines()
    assert printed == [
        f"pci={FIRST}: memory 0x100000000+0x200000: 2097152 bytes of locked memory are needed, RLIMIT_MEMLOCK"
        " allows 1048576; raise it (LimitMEMLOCK= of systemd), or run with CAP_IPC_LOCK",
        "mapped",
    ]


# Who has it


def test_a_function_that_another_has(function: VfioFunction) -> None:
    with pytest.raises(DeviceError, match=r"another process has it \(/dev/vfio/\d+ is open\)$"):
        VfioFunction(FIRST)


def test_a_function_that_is_not_bound_to_vfio() -> None:
    give_back(FIRST)
    try:
        with pytest.raises(DeviceError, match=f"it is bound to virtio-pci, .*: run virt-vdpa bind {FIRST}$"):
            VfioFunction(FIRST)
    finally:
        bind(FIRST, "vfio-pci")


def test_a_group_that_is_shared() -> None:
    ours, others = SHARED_GROUP
    with bound(ours):
        with pytest.raises(DeviceError, match=rf"uses: {others} \(bound to virtio-pci\); the group"):
            VfioFunction(ours)
        busy = pytest.raises(DeviceError, match="another process has it")
        with bound(others), closing(VfioFunction(ours)), busy:
            VfioFunction(others)
        Path("/sys/bus/pci/drivers/virtio-pci/unbind").write_text(others)
        try:
            with pytest.raises(DeviceError, match=f"no driver has it, .*: run virt-vdpa bind {others}$"):
                VfioFunction(others)
        finally:
            give_back(others)


# Removal


def test_removal_waits_until_the_function_is_closed(function: VfioFunction) -> None:
    assert not readable(function.lost_fd)
    removal = begin_removal(FIRST)
    try:
        assert readable(function.lost_fd, 5.0)
        assert function.read(Region.CONFIG, VENDOR, 2) == 0x1AF4  # still there, and removal waits
        assert host_function(FIRST).iommu_group is not None  # nor does who looks at it have to wait
        assert removal.poll() is None
        function.close()
        assert removal.wait(10.0) == 0
        assert not exists(FIRST)
        with pytest.raises(DeviceError, match=f"^{FIRST}: no such PCI function on this host$"):
            VfioFunction(FIRST)
    finally:
        function.close()
        removal.wait()
        rescan(FIRST)
        bind(FIRST, "vfio-pci")
    VfioFunction(FIRST).close()


def test_a_function_that_vanishes(function: VfioFunction) -> None:
    uses = (
        function.config_space,
        function.reset,
        lambda: function.read(Region.CONFIG, REVISION_AND_CLASS, 2),
    )
    with cut_off(BRIDGE):
        for use in uses:
            with pytest.raises(DeviceLostError, match=f"^pci={FIRST}: reads as ones: the function is gone$"):
                use()
    assert function.config_space()
