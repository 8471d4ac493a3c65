"""Who waits for a vfio-user device and is not let run until long after the deadline.

The clock alone can be late here: a thread that is stopped in a system call is told of what came meanwhile.
"""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from datapath.bus import vfio_user_channel
from datapath.bus.vfio_user_channel import Channel
from datapath.vdpa import DeviceError, DeviceLostError
from datapath.vfio_user import Command, HeaderFlag, Message
from tests.harness.scripted_device import ScriptedDevice

DEADLINE = 1.0
#: What nobody asked for, and more of it than is read at a time.
WORD = Message(1, 12, HeaderFlag.NO_REPLY).pack()
CHATTER = WORD * 1000
#: Looks at the clock in one wait: for ten times CHATTER.
MOST_LOOKS = 50


@pytest.fixture
def device(tmp_path: Path) -> Iterator[ScriptedDevice]:
    with ScriptedDevice(tmp_path / "vf.sock") as made:
        yield made


@pytest.fixture
def channel(device: ScriptedDevice) -> Iterator[Channel]:
    with closing(Channel(str(device.path), DEADLINE)) as made:
        yield made


class HoldUp:
    """Has the thread that waits for an answer be a minute late, from when something has happened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def until(self, happened: threading.Event, at_each_look: Callable[[], None] = lambda: None) -> None:
        """:param at_each_look: called whenever the thread looks at the clock from then on."""
        looks = itertools.count()

        def monotonic() -> float:
            if (look := next(looks)) == 0:
                return 0.0
            assert happened.wait(5)
            assert look < MOST_LOOKS, "it goes on for ever"
            at_each_look()
            return DEADLINE + 60

        self._monkeypatch.setattr(vfio_user_channel, "time", SimpleNamespace(monotonic=monotonic))


@pytest.fixture
def hold_up(monkeypatch: pytest.MonkeyPatch) -> HoldUp:
    return HoldUp(monkeypatch)


def test_what_has_come_is_found(device: ScriptedDevice, channel: Channel, hold_up: HoldUp) -> None:
    answered = threading.Event()

    def answer(message: Message) -> None:
        device.send(CHATTER + message.reply(b"as asked").pack())
        answered.set()

    device.answers[Command.DEVICE_RESET] = answer
    hold_up.until(answered)
    assert channel.command_without_fds(Command.DEVICE_RESET) == b"as asked"


def test_what_has_not_come_is_not_waited_for(
    device: ScriptedDevice, channel: Channel, hold_up: HoldUp
) -> None:
    received = threading.Event()
    late: list[Message] = []

    def swallow(message: Message) -> None:
        late.append(message)
        device.send(CHATTER)
        received.set()

    device.answers[Command.DEVICE_RESET] = swallow
    hold_up.until(received)
    with pytest.raises(DeviceError, match="no answer to DEVICE_RESET"):
        channel.command(Command.DEVICE_RESET)
    device.send(late[0].reply().pack())
    assert channel.command_without_fds(Command.VERSION), "the late reply was not taken as such"


def test_a_device_that_goes_on_talking_is_not_heard_out(
    device: ScriptedDevice, channel: Channel, hold_up: HoldUp
) -> None:
    received = threading.Event()

    def talk(_message: Message) -> None:
        device.send(CHATTER)
        received.set()

    device.answers[Command.DEVICE_RESET] = talk
    hold_up.until(received, at_each_look=lambda: device.send(WORD))
    with pytest.raises(DeviceError, match="no answer to DEVICE_RESET"):
        channel.command(Command.DEVICE_RESET)


def test_a_hang_up_is_heard(device: ScriptedDevice, channel: Channel, hold_up: HoldUp) -> None:
    gone = threading.Event()

    def hang_up(_message: Message) -> None:
        device.hang_up()
        gone.set()

    device.answers[Command.DEVICE_RESET] = hang_up
    hold_up.until(gone)
    with pytest.raises(DeviceLostError, match="connection closed by the device"):
        channel.command(Command.DEVICE_RESET)
