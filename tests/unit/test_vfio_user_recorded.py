"""The vfio-user codec judged by bytes that foreign programs exchanged: QEMU's client, libvfio-user.

Everything that a foreign server accepted must decode, and encode again to the very same bytes. What
QEMU and libvfio-user say in particular is checked field by field below.
"""

import errno
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import pytest

from datapath.vfio import DeviceFlag, DmaFlag, Irq, IrqFlag, Region, RegionFlag, SetIrqsFlag
from datapath.vfio_user import (
    Area,
    Command,
    Decoder,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    IoFd,
    IrqInfo,
    Message,
    ProtocolError,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    SetIrqs,
    Version,
)
from tests.harness.recordings import Recorded, Recording, recording, recordings

RECORDINGS = recordings("vfio_user")
QEMU = "vfio_user/qemu_client"
SAMPLE = "vfio_user/libvfio_user_sample"
TESTS = "vfio_user/libvfio_user_tests"


class Payload(Protocol):
    """What every typed payload can do."""

    def pack(self) -> bytes: ...


@dataclass(frozen=True)
class Exchange:
    """A command and its reply; `fds` are descriptor counts."""

    command: Message
    reply: Message


#: What a command's payload decodes to; VERSION, whose JSON may be written in many ways, stands apart.
COMMANDS: Mapping[int, Callable[[bytes], Payload]] = {
    Command.DMA_MAP: DmaMap.unpack,
    Command.DMA_UNMAP: DmaUnmap.unpack,
    Command.GET_INFO: DeviceInfo.unpack,
    Command.GET_REGION_INFO: RegionInfo.unpack,
    Command.GET_REGION_IO_FDS: RegionIoFds.unpack,
    Command.GET_IRQ_INFO: IrqInfo.unpack,
    Command.SET_IRQS: SetIrqs.unpack,
    Command.REGION_READ: RegionAccess.unpack,
    Command.REGION_WRITE: RegionAccess.unpack,
}
#: The commands whose reply has no payload.
BARE_REPLIES = {Command.DMA_MAP, Command.SET_IRQS, Command.DEVICE_RESET}


def decode(message: Recorded) -> Message:
    """One recorded message through the decoder, which gets its first byte and the rest apart."""
    decoder = Decoder()
    assert decoder.feed(message.data[:1], tuple(range(message.fds))) == []
    found = decoder.feed(message.data[1:])
    assert len(found) == 1
    return found[0]


def exchanges(source: Recording) -> Iterator[Exchange]:
    """The commands with their replies. Pipelined commands are matched by number, as a client does it."""
    waiting: list[Message] = []
    for recorded in source.messages:
        message = decode(recorded)
        if not message.is_reply:
            waiting.append(message)
            continue
        command = next(c for c in waiting if (c.id, c.command) == (message.id, message.command))
        waiting.remove(command)
        yield Exchange(command, message)
    assert not waiting


def accepted(source: Recording) -> Iterator[Exchange]:
    """The exchanges of commands known here that the foreign server did not refuse."""
    for exchange in exchanges(source):
        if exchange.command.command in set(Command) and not exchange.reply.is_error:
            yield exchange


def of(name: str, command: Command) -> list[Exchange]:
    """The accepted exchanges of one kind in one recording."""
    return [exchange for exchange in accepted(recording(name)) if exchange.command.command == command]


def repacked(reply: Message) -> bytes:
    """A reply's payload, decoded and encoded again."""
    if reply.command in BARE_REPLIES:
        assert not reply.payload
        return b""
    payload = COMMANDS[reply.command](reply.payload)
    if isinstance(payload, RegionInfo) and payload.areas is not None:
        return payload.pack_reply(payload.full_size)
    return payload.pack()


@pytest.mark.parametrize("source", RECORDINGS, ids=lambda source: source.name)
def test_every_message_is_framed_and_written_as_it_was_sent(source: Recording) -> None:
    for recorded in source.messages:
        message = decode(recorded)
        assert message.pack() == recorded.data
        assert len(message.fds) == recorded.fds


@pytest.mark.parametrize("source", RECORDINGS, ids=lambda source: source.name)
def test_a_stream_of_messages_is_cut_at_their_ends(source: Recording) -> None:
    decoder = Decoder()
    messages = decoder.feed(b"".join(recorded.data for recorded in source.messages))
    assert [message.pack() for message in messages] == [recorded.data for recorded in source.messages]


@pytest.mark.parametrize("name", [QEMU, SAMPLE])
def test_commands_that_the_server_took_are_written_identically(name: str) -> None:
    seen = set()
    for exchange in accepted(recording(name)):
        command = exchange.command
        if command.command in COMMANDS:
            packed = COMMANDS[command.command](command.payload).pack()
            # libvfio-user's client pads GET_REGION_INFO to the size of the reply that it hopes for.
            assert packed + bytes(len(command.payload) - len(packed)) == command.payload
            seen.add(command.command)
    assert seen >= set(COMMANDS) - {Command.GET_REGION_IO_FDS}


@pytest.mark.parametrize("name", [QEMU, SAMPLE])
def test_replies_of_the_server_are_written_identically(name: str) -> None:
    for exchange in accepted(recording(name)):
        if exchange.command.command != Command.VERSION:
            assert repacked(exchange.reply) == exchange.reply.payload


def test_whatever_libvfio_user_takes_decodes() -> None:
    for exchange in accepted(recording(TESTS)):
        if exchange.command.command in COMMANDS:
            COMMANDS[exchange.command.command](exchange.command.payload)


def test_what_does_not_decode_libvfio_user_refuses_too() -> None:
    refused = []
    for exchange in exchanges(recording(TESTS)):
        unpack = COMMANDS.get(exchange.command.command)
        try:
            if unpack is not None:
                unpack(exchange.command.payload)
        except ProtocolError:
            refused.append(exchange.reply)
    assert len(refused) >= 4
    assert all(reply.is_error and reply.errno == errno.EINVAL for reply in refused)


def test_versions_and_capabilities() -> None:
    (qemu,) = of(QEMU, Command.VERSION)
    asked, answered = Version.unpack(qemu.command.payload), Version.unpack(qemu.reply.payload)
    assert (asked.major, asked.minor, asked.capabilities.max_msg_fds) == (0, 0, 16)
    assert (answered.major, answered.minor, answered.capabilities.max_msg_fds) == (0, 0, 8)
    assert asked.capabilities.max_data_xfer_size == answered.capabilities.max_data_xfer_size == 1 << 20
    assert len(Message(0, Command.VERSION).reply(Version().pack()).pack()) <= len(qemu.command.pack())

    (sample,) = of(SAMPLE, Command.VERSION)
    asked = Version.unpack(sample.command.payload)
    assert (asked.minor, asked.capabilities.max_msg_fds, asked.capabilities.max_data_xfer_size) == (
        2,
        32,
        1024,
    )


def test_device_and_interrupts_of_libvfio_user() -> None:
    (info,) = of(SAMPLE, Command.GET_INFO)
    assert DeviceInfo.unpack(info.reply.payload) == DeviceInfo(DeviceFlag.PCI | DeviceFlag.RESET, 9, 5)
    counts = {
        irq.index: irq.count
        for irq in (IrqInfo.unpack(x.reply.payload) for x in of(SAMPLE, Command.GET_IRQ_INFO))
    }
    assert counts == {Irq.INTX: 1, Irq.MSI: 0, Irq.MSIX: 0, Irq.ERR: 1, Irq.REQ: 1}
    (errors,) = of(QEMU, Command.GET_IRQ_INFO)
    assert IrqInfo.unpack(errors.command.payload) == IrqInfo(Irq.ERR)
    assert IrqInfo.unpack(errors.reply.payload) == IrqInfo(Irq.ERR, IrqFlag.EVENTFD, 1)


def test_a_partly_mappable_region_is_asked_for_twice() -> None:
    first, second = (
        x
        for x in of(QEMU, Command.GET_REGION_INFO)
        if RegionInfo.unpack(x.command.payload).index == Region.BAR1
    )
    access = RegionFlag.READ | RegionFlag.WRITE | RegionFlag.MMAP
    needed = RegionInfo.unpack(first.reply.payload)
    assert (needed.argsz, needed.flags, needed.size, needed.areas) == (80, access, 0x4000, None)
    assert RegionInfo.unpack(second.command.payload).argsz == needed.argsz
    whole = RegionInfo.unpack(second.reply.payload)
    assert whole.flags == access | RegionFlag.CAPS
    assert whole.areas == (Area(0, 0x1000), Area(0x2000, 0x1000))
    assert len(second.reply.fds) == 1
    # Our own device tells the same client the same.
    ours = RegionInfo(Region.BAR1, access, 0x4000, 0, whole.areas)
    assert ours.pack_reply(RegionInfo.LAYOUT.size) == first.reply.payload
    assert ours.pack_reply(needed.argsz) == second.reply.payload


def test_qemu_maps_ram_with_a_descriptor_and_rom_without() -> None:
    maps = [(DmaMap.unpack(x.command.payload), len(x.command.fds)) for x in of(QEMU, Command.DMA_MAP)]
    both = DmaFlag.READ | DmaFlag.WRITE
    assert maps[0] == (DmaMap(both, 0, 0, 128 << 20), 1)
    assert maps[1] == (DmaMap(DmaFlag.READ, 0, 0xFFFC0000, 256 << 10), 0)
    assert {(m.flags, fds) for m, fds in maps} == {(both, 1), (DmaFlag.READ, 0)}
    first = DmaUnmap.unpack(of(QEMU, Command.DMA_UNMAP)[0].command.payload)
    assert first == DmaUnmap(0, 0, 128 << 20)


def test_qemu_reads_all_of_configuration_space_first() -> None:
    first = of(QEMU, Command.REGION_READ)[0]
    assert RegionAccess.unpack(first.command.payload) == RegionAccess(0, Region.CONFIG, 256)
    config = RegionAccess.unpack(first.reply.payload)
    assert config.data[:4] == bytes.fromhex("addeefbe")  # the sample's vendor and device
    assert len(config.data) == config.count == 256
    write = of(QEMU, Command.REGION_WRITE)[0]
    assert RegionAccess.unpack(write.command.payload) == RegionAccess(
        0x30, Region.CONFIG, 4, b"\0\xf8\xff\xff"
    )
    assert RegionAccess.unpack(write.reply.payload) == RegionAccess(0x30, Region.CONFIG, 4)


def test_qemu_assigns_and_disables_interrupts() -> None:
    calls = [(SetIrqs.unpack(x.command.payload), len(x.command.fds)) for x in of(QEMU, Command.SET_IRQS)]
    assign = SetIrqsFlag.DATA_EVENTFD | SetIrqsFlag.ACTION_TRIGGER
    disable = SetIrqsFlag.DATA_NONE | SetIrqsFlag.ACTION_TRIGGER
    assert (SetIrqs(assign, Irq.INTX, 0, 1), 1) in calls
    assert (SetIrqs(assign, Irq.ERR, 0, 1), 1) in calls
    assert (SetIrqs(disable, Irq.INTX, 0, 0), 0) in calls


def test_an_error_reply_is_a_header() -> None:
    refused = next(x for x in exchanges(recording(SAMPLE)) if x.reply.is_error)
    assert RegionAccess.unpack(refused.command.payload).region == 0xDEADBEEF
    assert refused.command.error(errno.EINVAL) == refused.reply


def test_ioeventfds_of_libvfio_user() -> None:
    """Its entries are 48 bytes, the specification's 40: eight for shadow memory in the middle."""
    replies = [x.reply for x in of(TESTS, Command.GET_REGION_IO_FDS)]
    infos = [(RegionIoFds.unpack(reply.payload), len(reply.fds)) for reply in replies]
    full = [(info, fds) for info, fds in infos if info.entries and info.index == Region.BAR2]
    assert {(info.count, fds) for info, fds in full} == {(6, 6), (8, 7)}
    for info, fds in full:
        assert len(info.entries) == info.count
        assert {(entry.size, entry.type) for entry in info.entries} == {(8, IoFd.IOEVENTFD)}
        assert {entry.offset for entry in info.entries} == {8 * n for n in range(info.count)}
        assert {entry.fd_index for entry in info.entries} == set(range(fds))
    without_room = next(info for info, fds in infos if info.count and not fds)
    assert (without_room.count, without_room.entries, without_room.argsz) == (6, (), 16 + 6 * 48)


def test_ioeventfds_may_lack_a_descriptor() -> None:
    """libvfio-user names descriptor -1 for one that it does not have, so a client must look first."""
    replies = [x.reply for x in of(TESTS, Command.GET_REGION_IO_FDS)]
    found = next(r for r in replies if r.fds and RegionIoFds.unpack(r.payload).index == Region.BAR0)
    indices = [entry.fd_index for entry in RegionIoFds.unpack(found.payload).entries]
    assert indices == [0, IoFd.NO_FD, 0, IoFd.NO_FD, 1]
