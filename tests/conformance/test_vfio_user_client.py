"""The vfio-user bus against a device whose answers the test writes: limits, deadlines, malformed answers."""

import contextlib
import errno
import os
import select
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath.bus.vfio_user import VfioUserFunction
from datapath.bus.vfio_user_channel import MAX_WRITES
from datapath.native.relay import Doorbell, Relay
from datapath.vdpa import DeviceError, DeviceLostError, MemoryRegion
from datapath.vfio import Irq, Region, RegionFlag
from datapath.vfio_user import (
    Area,
    Capabilities,
    Command,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    HeaderFlag,
    IoFd,
    Message,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    RegionWrite,
    RegionWrites,
    SetIrqs,
    Version,
)
from tests.harness.processes import wait_for
from tests.harness.scripted_device import AREA, BAR_OFFSET, BAR_SIZE, Answer, ScriptedDevice

#: Short, so that a test of a missed deadline is; a device of these tests answers at once or never.
DEADLINE = 1.0
REGION_COMMANDS = (Command.REGION_READ, Command.REGION_WRITE, Command.REGION_WRITE_MULTI)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[ScriptedDevice]:
    with ScriptedDevice(tmp_path / "vf.sock") as device:
        yield device


@pytest.fixture
def function(device: ScriptedDevice) -> Iterator[VfioUserFunction]:
    function = VfioUserFunction(str(device.path), DEADLINE)
    yield function
    function.close()


@pytest.fixture
def memory() -> Iterator[MemoryRegion]:
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 0x10000)
    yield MemoryRegion(0x1_0000_0000, 0x10000, fd, 0, 0x7000_0000_0000)
    os.close(fd)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# Registers


def test_registers_are_read_and_written_in_one_access(
    device: ScriptedDevice, function: VfioUserFunction
) -> None:
    assert function.read(Region.BAR0, 0x10, 1) == 0x10
    assert function.read(Region.BAR0, 0x10, 2) == 0x1110
    assert function.read(Region.BAR0, 0x10, 4) == 0x13121110
    function.write(Region.BAR0, 0x16, 2, 0xABCD)
    function.read(Region.BAR0, 0x16, 2)
    (written,) = device.commands(Command.REGION_WRITE)
    assert RegionAccess.unpack(written.payload) == RegionAccess(0x16, Region.BAR0, 2, b"\xcd\xab")


@pytest.mark.parametrize(
    ("index", "offset", "width"),
    [
        (Region.BAR0, BAR_SIZE, 1),
        (Region.BAR0, BAR_SIZE - 2, 4),
        (Region.BAR0, 0, 8),
        (Region.BAR0, 2, 4),
        (Region.BAR0, 0, 3),
        (Region.BAR0, -4, 4),
        (Region.BAR2, 0, 4),
        (Region.CONFIG, 256, 1),
    ],
)
def test_accesses_outside_a_region_are_not_sent(
    index: Region, offset: int, width: int, device: ScriptedDevice, function: VfioUserFunction
) -> None:
    with pytest.raises(DeviceError, match=f"no {width}-byte register at {index.name}"):
        function.read(index, offset, width)
    assert not device.commands(Command.REGION_READ)


def test_config_space_and_enable(device: ScriptedDevice, function: VfioUserFunction) -> None:
    assert function.config_space() == bytes(range(256))
    assert len(device.commands(Command.REGION_READ)) == 1
    function.enable()
    function.reset()  # it waits for what was written before
    (written,) = device.commands(Command.REGION_WRITE)
    assert RegionAccess.unpack(written.payload) == RegionAccess(4, Region.CONFIG, 2, b"\x06\x05")


def test_regions(function: VfioUserFunction) -> None:
    assert (function.region(Region.BAR0).size, function.region(Region.BAR0).mappable) == (
        BAR_SIZE,
        ((AREA.offset, AREA.size),),
    )
    assert function.region(Region.BAR2).size == 0


# Interrupts


@pytest.mark.parametrize(
    ("fds", "most", "expected"),
    [
        ("vvv", 16, [(4, 3, 3)]),
        ("vvvvv", 2, [(4, 2, 2), (6, 2, 2), (8, 1, 1)]),
        ("v--vv-", 16, [(4, 1, 1), (5, 2, 0), (7, 2, 2), (9, 1, 0)]),
        ("-----", 2, [(4, 5, 0)]),
        ("vv", 0, [(4, 1, 1), (5, 1, 1)]),
    ],
)
def test_eventfds_are_sent_in_runs(
    fds: str, most: int, expected: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    with ScriptedDevice(tmp_path / "vf.sock", Capabilities(max_msg_fds=most)) as device:
        function = VfioUserFunction(str(device.path), DEADLINE)
        function.set_eventfds(Irq.MSIX, 4, [2 if fd == "v" else None for fd in fds])
        function.disable_irqs(Irq.MSIX)
        *sent, last = [
            (SetIrqs.unpack(message.payload), message.fds) for message in device.commands(Command.SET_IRQS)
        ]
        assert [(irqs.start, irqs.count, len(given)) for irqs, given in sent] == expected
        assert {(irqs.flags, irqs.index) for irqs, _ in sent} == {(0x24, Irq.MSIX)}
        assert last == (SetIrqs(0x21, Irq.MSIX), ())
        function.close()


def test_irq_count(function: VfioUserFunction) -> None:
    assert function.irq_count(Irq.MSIX) == 64


# Memory


def test_memory_is_mapped_by_descriptor(
    device: ScriptedDevice, function: VfioUserFunction, memory: MemoryRegion
) -> None:
    function.dma_map(memory)
    function.dma_unmap(memory)
    (mapped,) = device.commands(Command.DMA_MAP)
    assert DmaMap.unpack(mapped.payload) == DmaMap(3, 0, 0x1_0000_0000, 0x10000)
    assert os.fstat(mapped.fds[0]).st_ino == os.fstat(memory.fd).st_ino
    (unmapped,) = device.commands(Command.DMA_UNMAP)
    assert DmaUnmap.unpack(unmapped.payload) == DmaUnmap(0, 0x1_0000_0000, 0x10000)


def test_the_number_of_mappings_has_a_limit(tmp_path: Path, memory: MemoryRegion) -> None:
    with ScriptedDevice(tmp_path / "vf.sock", Capabilities(max_msg_fds=1, max_dma_maps=1)) as device:
        function = VfioUserFunction(str(device.path), DEADLINE)
        function.dma_map(memory)
        other = MemoryRegion(0, 0x1000, memory.fd, 0, 0)
        with pytest.raises(DeviceError, match="2 mappings are needed, the device allows 1"):
            function.dma_map(other)
        function.dma_unmap(memory)
        function.dma_map(other)
        function.close()


@pytest.mark.parametrize(
    ("address", "size", "offset"),
    [(0x1000, 0x1000, 0), (0, 0x3000, 0), (0, 0x2000, 0x1000), (0x200, 0x2000, 0)],
)
def test_mappings_are_aligned(address: int, size: int, offset: int, tmp_path: Path) -> None:
    with ScriptedDevice(tmp_path / "vf.sock", Capabilities(max_msg_fds=1, pgsizes=0x2000)) as device:
        function = VfioUserFunction(str(device.path), DEADLINE)
        with pytest.raises(DeviceError, match="the device needs multiples of 8192 bytes"):
            function.dma_map(MemoryRegion(address, size, 0, offset, 0))
        assert not device.commands(Command.DMA_MAP)
        function.close()


def test_a_refusal_names_device_command_and_reason(
    device: ScriptedDevice, function: VfioUserFunction, memory: MemoryRegion
) -> None:
    device.refuse(Command.DMA_MAP, errno.EEXIST)
    with pytest.raises(DeviceError, match=f"^vfio-user={device.path}: DMA_MAP refused: File exists$"):
        function.dma_map(memory)
    device.answers.pop(Command.DMA_MAP)
    function.dma_map(memory)


def test_a_mapping_that_is_not_waited_for_is_refused_where_it_is_finished(
    device: ScriptedDevice, function: VfioUserFunction, memory: MemoryRegion
) -> None:
    device.refuse(Command.DMA_MAP, errno.EEXIST)
    finish = function.dma_map_later(memory)
    assert function.read(Region.BAR0, 0x14, 1) == 0x14, "another command is not told of it"
    with function.together():
        function.write(Region.BAR0, 0x14, 1, 0)
    with pytest.raises(DeviceError, match="DMA_MAP refused: File exists"):
        finish()


def test_a_mapping_that_got_no_answer_is_not_waited_for_twice(
    device: ScriptedDevice, function: VfioUserFunction, memory: MemoryRegion
) -> None:
    device.answers[Command.DMA_MAP] = lambda _: None
    device.answers[Command.DEVICE_RESET] = lambda _: None
    finish = function.dma_map_later(memory)
    with pytest.raises(DeviceError, match="no answer to DEVICE_RESET"):
        function.reset()
    begin = time.monotonic()
    with pytest.raises(DeviceError, match="no answer to DMA_MAP"):
        finish()
    assert time.monotonic() - begin < DEADLINE


# Posted writes


def test_writes_are_not_answered(device: ScriptedDevice, function: VfioUserFunction) -> None:
    device.answers[Command.REGION_WRITE] = lambda _: pytest.fail("it was to be answered")
    for value in range(640):
        function.write(Region.BAR0, 0, 4, value)
    assert function.read(Region.BAR0, 0, 1) == 0
    written = [RegionAccess.unpack(one.payload).data for one in device.commands(Command.REGION_WRITE)]
    assert written == [value.to_bytes(4, "little") for value in range(640)], "in order, and before the read"


def test_a_write_after_a_missed_deadline_fails_at_once(
    device: ScriptedDevice, function: VfioUserFunction
) -> None:
    device.answers[Command.DEVICE_RESET] = lambda _: None
    with pytest.raises(DeviceError, match="no answer to DEVICE_RESET"):
        function.reset()
    with pytest.raises(DeviceError, match="no answer to DEVICE_RESET"):
        function.write(Region.BAR0, 0, 4, 1)
    assert not device.commands(Command.REGION_WRITE)


# What is done together


def test_what_is_done_together_keeps_its_order_and_is_waited_for_once(
    device: ScriptedDevice, function: VfioUserFunction
) -> None:
    """Nothing is answered before the last of it has come: whoever waited for one would wait for ever."""
    held: list[Message] = []

    def hold(message: Message) -> None:
        held.append(message)
        if len(held) == 4:
            answers = [device.register(message) for message in held if message.command == Command.REGION_READ]
            device.send(b"".join(answer.pack() for answer in answers))
            device.send(held[1].reply().pack())  # order is not what they are told apart by

    device.answers[Command.REGION_READ] = device.answers[Command.SET_IRQS] = hold
    with function.together():
        function.write(Region.BAR0, 8, 4, 1)
        first = function.read_later(Region.BAR0, 1, 1)
        function.set_eventfds(Irq.MSIX, 0, [2])
        second = function.read_later(Region.BAR0, 2, 2)
        function.write(Region.BAR0, 8, 4, 2)
        assert function.read(Region.BAR0, 4, 1) == 4
        assert (second(), first()) == (0x0302, 1)
    wanted = [Command.REGION_WRITE, Command.REGION_READ, Command.SET_IRQS, Command.REGION_READ]
    wanted += [Command.REGION_WRITE, Command.REGION_READ]
    assert [message.command for message in device.received[-6:]] == wanted


def test_writes_together_are_one_message_where_the_device_takes_that(tmp_path: Path) -> None:
    capabilities = Capabilities(max_msg_fds=1, write_multiple=True)
    with ScriptedDevice(tmp_path / "vf.sock", capabilities) as device:
        function = VfioUserFunction(str(device.path), DEADLINE)
        function.write(Region.BAR0, 0x16, 2, 1)
        with function.together():
            function.write(Region.BAR0, 0x16, 2, 0xABCD)
            function.write(Region.BAR0, 0x20, 4, 0x12345678)
            later = function.read_later(Region.BAR0, 0x14, 1)
            for value in range(MAX_WRITES + 1):
                function.write(Region.BAR0, 0x20, 4, value)
        assert later() == 0x14
        function.read(Region.BAR0, 0, 1)
        sent = [message for message in device.received if message.command in REGION_COMMANDS]
        function.close()
    assert [message.command for message in sent] == [
        Command.REGION_WRITE,
        Command.REGION_WRITE_MULTI,
        Command.REGION_READ,
        Command.REGION_WRITE_MULTI,
        Command.REGION_WRITE_MULTI,
        Command.REGION_READ,
    ]
    first, second, third = (RegionWrites.unpack(sent[at].payload).writes for at in (1, 3, 4))
    assert first == (
        RegionWrite(0x16, Region.BAR0, b"\xcd\xab"),
        RegionWrite(0x20, Region.BAR0, b"\x78\x56\x34\x12"),
    )
    assert [int.from_bytes(write.data, "little") for write in second + third] == list(range(MAX_WRITES + 1))
    assert not any(sent[at].wants_reply for at in (1, 3, 4))


def test_writes_together_have_left_at_the_end(device: ScriptedDevice, function: VfioUserFunction) -> None:
    with function.together():
        function.write(Region.BAR0, 8, 4, 1)
    wait_for("the write", lambda: device.commands(Command.REGION_WRITE), 5)


def test_refused_eventfds_are_told_at_the_end(device: ScriptedDevice, function: VfioUserFunction) -> None:
    device.refuse(Command.SET_IRQS, errno.EINVAL)
    with pytest.raises(DeviceError, match="SET_IRQS refused: Invalid argument"), function.together():
        function.set_eventfds(Irq.MSIX, 0, [2])
    assert function.read(Region.BAR0, 0, 1) == 0


def test_after_a_failure_answers_that_are_left_are_for_nobody(
    device: ScriptedDevice, function: VfioUserFunction
) -> None:
    with contextlib.suppress(ZeroDivisionError), function.together():
        function.read_later(Region.BAR0, 1, 1)
        function.set_eventfds(Irq.MSIX, 0, [2])  # sends what has been collected
        function.write(Region.BAR0, 8, 4, 1)
        raise ZeroDivisionError
    assert function.read(Region.BAR0, 2, 1) == 2
    assert not device.commands(Command.REGION_WRITE), "sent after the failure"


def test_who_is_silent_to_one_of_many_costs_one_deadline(
    device: ScriptedDevice, function: VfioUserFunction
) -> None:
    late: list[Message] = []
    device.answers[Command.REGION_READ] = late.append
    with function.together():
        values = [function.read_later(Region.BAR0, at, 1) for at in range(3)]
        with pytest.raises(DeviceError, match="no answer to REGION_READ"):
            values[1]()
    with pytest.raises(DeviceError, match="no answer to REGION_READ"):
        function.write(Region.BAR0, 8, 4, 1)
    device.send(b"".join(device.register(message).pack() for message in late))
    device.answers[Command.REGION_READ] = device.register
    assert function.read(Region.BAR0, 2, 1) == 2


# Doorbells


def eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK)


def ring(doorbell: Doorbell, queue: int) -> None:
    """Ring it once."""
    relay, kick = Relay(queue + 1), eventfd()
    relay.add(queue, kick, doorbell)
    relay.ring(queue)
    relay.close()
    os.close(kick)


def test_an_offered_eventfd_is_the_doorbell(device: ScriptedDevice, function: VfioUserFunction) -> None:
    fds = (eventfd(), eventfd())
    offered = RegionIoFds(Region.BAR0, (IoFd(0x1000, 2, 1), IoFd(0x1004, 2, 0)))
    device.answers[Command.GET_REGION_IO_FDS] = device.io_fds((offered, fds))
    doorbell = function.doorbell(Region.BAR0, 0x1000, 0)
    assert doorbell.address is None
    ring(doorbell, 0)
    assert os.eventfd_read(fds[1]) == 1
    ring(function.doorbell(Region.BAR0, 0x1004, 1), 1)
    assert os.eventfd_read(fds[0]) == 1
    assert len(device.commands(Command.GET_REGION_IO_FDS)) == 1
    for fd in fds:
        os.close(fd)


def test_eventfds_of_one_register_are_told_apart_by_the_value(
    device: ScriptedDevice, function: VfioUserFunction
) -> None:
    fds = tuple(eventfd() for _ in range(3))
    entries = [IoFd(0x1000, 2, n, flags=1, datamatch=n) for n in range(3)]
    entries.insert(0, IoFd(0x1000, 4, 0))  # of another width
    entries.insert(0, IoFd(0x1000, 2, 0, type=1))  # not an ioeventfd
    device.answers[Command.GET_REGION_IO_FDS] = device.io_fds((RegionIoFds(Region.BAR0, tuple(entries)), fds))
    for queue in range(3):
        ring(function.doorbell(Region.BAR0, 0x1000, queue), queue)
        assert os.eventfd_read(fds[queue]) == 1
    for fd in fds:
        os.close(fd)


def test_many_eventfds_are_asked_for_twice(device: ScriptedDevice, function: VfioUserFunction) -> None:
    """More entries than the client has room for at first: descriptors are shared to stay below the limit."""
    fd = eventfd()
    entries = tuple(IoFd(0x1000 + 4 * n, 2, 0) for n in range(40))
    device.answers[Command.GET_REGION_IO_FDS] = device.io_fds((RegionIoFds(Region.BAR0, entries), (fd,)))
    ring(function.doorbell(Region.BAR0, 0x1000 + 4 * 39, 39), 39)
    assert os.eventfd_read(fd) == 1
    assert len(device.commands(Command.GET_REGION_IO_FDS)) == 2
    os.close(fd)


def test_a_mapped_area_is_the_doorbell(device: ScriptedDevice, function: VfioUserFunction) -> None:
    os.pwrite(device.bar, b"\xff" * 16, BAR_OFFSET + AREA.offset)
    doorbell = function.doorbell(Region.BAR0, AREA.offset + 4, 3)
    assert doorbell.fd is None
    ring(doorbell, 3)
    expected = b"\xff" * 4 + b"\x03\x00" + b"\xff" * 10
    assert os.pread(device.bar, 16, BAR_OFFSET + AREA.offset) == expected
    assert function.doorbell(Region.BAR0, AREA.offset + 8, 4).address == (doorbell.address or 0) + 4


@pytest.mark.parametrize("offset", [0x0FFE, 0x1FFF, 0x2000])
def test_no_doorbell_is_an_error(offset: int, device: ScriptedDevice, function: VfioUserFunction) -> None:
    with pytest.raises(DeviceError, match=r"offers neither an eventfd .* nor a mappable area"):
        function.doorbell(Region.BAR0, offset, 0)


@pytest.mark.parametrize(
    ("area", "send_fd", "text"),
    [
        (Area(0x1000, 0x1000), False, "came without descriptor"),
        (Area(0x1000, 1 << 40), True, "cannot map BAR0"),
        (Area(0x1000, 1 << 63), True, "cannot map BAR0"),
        (Area(0x0800, 0x1000), True, "cannot map BAR0"),
    ],
)
def test_areas_that_cannot_be_mapped(
    area: Area, send_fd: bool, text: str, device: ScriptedDevice, function: VfioUserFunction
) -> None:
    info = RegionInfo(Region.BAR0, RegionFlag.MMAP, 1 << 63, 0, (area,))
    device.answers[Command.GET_REGION_INFO] = lambda message: message.reply(
        info.pack_reply(RegionInfo.unpack(message.payload).argsz), (device.bar,) if send_fd else ()
    )
    with pytest.raises(DeviceError, match=text):
        function.doorbell(Region.BAR0, 0x1000, 0)


# Silence, loss and nonsense


def test_a_silent_device_costs_one_deadline(device: ScriptedDevice, function: VfioUserFunction) -> None:
    late: list[Message] = []

    def swallow(message: Message) -> None:
        late.append(message)

    device.answers[Command.DEVICE_RESET] = swallow
    start = time.monotonic()
    with pytest.raises(DeviceError, match=r"vf.sock: no answer to DEVICE_RESET within 1 s"):
        function.reset()
    assert DEADLINE <= time.monotonic() - start < 10 * DEADLINE
    start = time.monotonic()
    for _ in range(20):
        with pytest.raises(DeviceError, match="no answer to DEVICE_RESET"):
            function.read(Region.BAR0, 0, 4)
    assert time.monotonic() - start < 10 * DEADLINE, "each command waits again"
    device.send(late[0].reply().pack())
    assert function.read(Region.BAR0, 0, 4) == 0x03020100, "the late reply was not taken as such"


def test_a_device_that_talks_of_other_things_misses_its_deadline_too(
    device: ScriptedDevice, function: VfioUserFunction
) -> None:
    chatter = Message(1, 12, HeaderFlag.NO_REPLY).pack() * 1000
    start = time.monotonic()

    def talk(_message: Message) -> None:
        while time.monotonic() - start < 20 * DEADLINE:
            device.send(chatter)

    device.answers[Command.DEVICE_RESET] = talk
    with pytest.raises(DeviceError, match="no answer to DEVICE_RESET"):
        function.reset()
    assert time.monotonic() - start < 10 * DEADLINE


def test_a_silent_listener(tmp_path: Path) -> None:
    with ScriptedDevice(tmp_path / "vf.sock") as device:
        device.answers[Command.VERSION] = lambda message: None
        before = open_fds()
        with pytest.raises(DeviceError, match=r"no answer to VERSION within 1 s"):
            VfioUserFunction(str(device.path), DEADLINE)
        assert open_fds() == before + 1, "more than the device's side of the connection"


def test_a_hang_up_is_seen_without_a_command(device: ScriptedDevice, function: VfioUserFunction) -> None:
    assert not select.select([function.lost_fd], [], [], 0)[0]
    device.hang_up()
    assert select.select([function.lost_fd], [], [], 5)[0]
    with pytest.raises(DeviceLostError, match=r"vf.sock: connection"):
        function.reset()
    with pytest.raises(DeviceLostError):
        function.read(Region.BAR0, 0, 4)


def test_data_alone_is_no_hang_up(device: ScriptedDevice, function: VfioUserFunction) -> None:
    device.send(Message(9, 11, payload=bytes(16)).pack())
    assert not select.select([function.lost_fd], [], [], 0.05)[0]


def test_commands_of_the_device_are_refused(device: ScriptedDevice, function: VfioUserFunction) -> None:
    dma_read = Message(7, 11, payload=struct.pack("=QQ", 0, 16))
    device.send(dma_read.pack())
    assert function.read(Region.BAR0, 0, 1) == 0
    assert dma_read.error(errno.ENOSYS) in device.received


@pytest.mark.parametrize(
    "nonsense",
    [
        bytes(16),
        struct.pack("=HHIII", 1, 9, 0xFFFFFFFF, 1, 0),
        struct.pack("=HHIII", 1, 9, 15, 1, 0),
        bytes(range(0x77, 0x87)),
    ],
)
def test_nonsense_ends_the_connection(
    nonsense: bytes, device: ScriptedDevice, function: VfioUserFunction
) -> None:
    device.answers[Command.DEVICE_RESET] = lambda message: nonsense
    with pytest.raises(DeviceLostError, match="is not vfio-user"):
        function.reset()
    assert select.select([function.lost_fd], [], [], 5)[0]


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.VERSION, b"\0\0\0\0{"),
        (Command.GET_INFO, bytes(15)),
        (Command.GET_REGION_INFO, bytes(31)),
        (Command.GET_IRQ_INFO, bytes(17)),
        (Command.REGION_READ, bytes(16)),
        (Command.GET_REGION_IO_FDS, struct.pack("=IIII", 16, 0, 0, 1) + IoFd(0x1000, 2, 5).pack()),
    ],
)
def test_malformed_answers_end_the_connection(command: Command, payload: bytes, tmp_path: Path) -> None:
    def use(function: VfioUserFunction) -> None:
        function.irq_count(Irq.MSIX)
        function.doorbell(Region.BAR0, 0x1000, 0)
        function.read(Region.BAR0, 0, 4)

    with ScriptedDevice(tmp_path / "vf.sock") as device:
        device.answers[command] = lambda message: message.reply(payload)
        with pytest.raises(DeviceLostError, match=f"malformed answer to {command.name}"):
            use(VfioUserFunction(str(device.path), DEADLINE))


@pytest.mark.parametrize("command", [Command.GET_REGION_INFO, Command.GET_REGION_IO_FDS])
def test_an_answer_that_keeps_growing_is_malformed(
    command: Command, device: ScriptedDevice, function: VfioUserFunction
) -> None:
    def grow(message: Message) -> Message:
        (argsz,) = struct.unpack_from("=I", message.payload)
        info = RegionInfo(Region.BAR0, RegionFlag.CAPS, argsz=argsz + 8)
        return message.reply(info.pack() if command == Command.GET_REGION_INFO else info.pack()[:16])

    device.answers[command] = grow
    with pytest.raises(DeviceLostError, match=f"malformed answer to {command.name}: .* bytes needed, after"):
        function.doorbell(Region.BAR0, 0x1000, 0)


def test_descriptors_that_nobody_asked_for_are_closed(
    device: ScriptedDevice, function: VfioUserFunction
) -> None:
    device.answers[Command.DEVICE_RESET] = lambda message: message.reply(fds=(0, 1, 2))
    device.answers[Command.DMA_UNMAP] = lambda message: Message(
        message.id, message.command, 0x21, errno.EINVAL, fds=(0, 1)
    )
    function.reset()
    before = open_fds()
    for _ in range(5):
        function.reset()
        with pytest.raises(DeviceError, match="DMA_UNMAP refused"):
            function.dma_unmap(MemoryRegion(0, 4096, 0, 0, 0))
    assert open_fds() == before


def answer_with(payload: bytes) -> Answer:
    return lambda message: message.reply(payload)


def test_other_versions_and_devices_are_refused(tmp_path: Path) -> None:
    for major, minor in ((1, 0), (0, 1)):
        with ScriptedDevice(tmp_path / f"{major}.sock") as device:
            device.answers[Command.VERSION] = answer_with(Version(major, minor).pack())
            with pytest.raises(DeviceError, match=f"speaks vfio-user {major}.{minor}, this side 0.0"):
                VfioUserFunction(str(device.path), DEADLINE)
    with ScriptedDevice(tmp_path / "ccw.sock") as device:
        device.answers[Command.GET_INFO] = lambda message: message.reply(DeviceInfo(1, 9, 5).pack())
        with pytest.raises(DeviceError, match="is not a PCI function"):
            VfioUserFunction(str(device.path), DEADLINE)


def test_close_gives_everything_back(device: ScriptedDevice) -> None:
    def mappings() -> int:
        return len([line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:bar" in line])

    before = open_fds()
    function = VfioUserFunction(str(device.path), DEADLINE)
    function.doorbell(Region.BAR0, AREA.offset, 0)
    assert mappings() == 1
    function.close()
    function.close()
    assert mappings() == 0
    # The device's side of the connection is in this process too.
    assert open_fds() == before + 1
