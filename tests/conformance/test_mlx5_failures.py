"""A ConnectX whose firmware fails: at every command of a device's life, once or for good."""

import ctypes
import gc
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest

from datapath.drivers.mlx5 import device as driver
from datapath.drivers.mlx5.glue import DevxObject, Glue
from datapath.drivers.mlx5.workers import Workers
from datapath.emulation.mlx5 import LIBRARY
from datapath.vdpa import DeviceError, DeviceEvent, DeviceLostError, RingState, open_device
from tests.harness.dirty_log import DirtyLog
from tests.harness.driven_vf import BASE, MEMORY_SIZE, RX, TX, DrivenVf
from tests.harness.emulated_connectx import GIVEN_BACK, Card, Witness
from tests.harness.extra_memory import ExtraMemory
from tests.harness.processes import HarnessError, wait_for

#: Seconds that the firmware has to answer; 3 in production.
DEADLINE = 0.3
#: What is said of a firmware that does not answer.
HUNG = r"DeviceLostError mlx5,ibdev=mlx5_t\d+: its firmware has not answered within 0\.3 s\n"
#: Of one that does not when the device is closed, after its life.
UNTOLD = r"NoneType None\n"
#: Which of a life's commands fail by default, in hundredths of all.
SAMPLE = (0, 12, 25, 37, 50, 62, 75, 87, 100)


@pytest.fixture
def card() -> Iterator[Card]:
    with Card() as made:
        yield made


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> Witness:
    monkeypatch.setattr(driver, "Workers", partial(Workers, deadline=DEADLINE))
    return Witness(monkeypatch)


def holdings() -> tuple[int, int, int]:
    """Descriptors, threads and mappings of files and buffers that this process has at rest."""
    # Of a thread that has been joined the kernel may still know.
    tasks = Path("/proc/self/task")
    with suppress(HarnessError):
        wait_for("threads to end", lambda: len(list(tasks.iterdir())) == threading.active_count(), 1)
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = sum("memfd:" in line or "/dev/zero" in line for line in maps)
    descriptors, threads = (len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("fd", "task"))
    return descriptors, threads, mapped


class Life:
    """All that a port asks of its device, one after the other."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.vf: DrivenVf | None = None
        self.error: DeviceError | None = None
        self.log = DirtyLog(BASE, MEMORY_SIZE)
        self.extra = ExtraMemory(BASE + 0x40000000)
        self._number = 0

    def live(self, **options: int) -> None:
        """Until something fails, which is `error` then."""
        try:
            self._live(**options)
        except DeviceError as error:
            self.error = error.with_traceback(None)

    def _live(self, **options: int) -> None:
        vf = self.vf = DrivenVf(open_device(self.card.spec(**options)))
        device = vf.device
        vf.offer(64)
        vf.start()
        self.exchange()
        vf.states[RX] = device.stop_ring(RX)
        device.start_ring(RX, vf.ring(RX))
        device.start_logging(self.log.bitmap)
        self.exchange()
        device.map_memory(self.extra.region)
        self.exchange()
        device.set_call(TX, None)
        device.set_call(TX, vf.queues[TX].call_fd)
        vf.suspend()
        device.stop_logging()
        device.unmap_memory(self.extra.region)
        vf.start()
        self.exchange()
        vf.suspend()

    def exchange(self) -> None:
        """A frame each way."""
        assert self.vf is not None
        self._number += 1
        self.vf.transmit(self._number)
        self.card.cables[0].expect(self._number)
        self.card.cables[0].send(self._number)
        assert self.vf.receive(1) == [self._number]

    def start_again(self) -> None:
        """As a port's next front-end does; the rings stand where the guest sees them."""
        assert self.vf is not None
        self.vf.states = {
            index: RingState(queue.used_index, queue.used_index) for index, queue in enumerate(self.vf.queues)
        }
        self.vf.start()
        self.exchange()

    def close(self) -> None:
        if self.vf is not None:
            self.vf.close()
            self.vf = None
        self.log.close()
        self.extra.close()


def count_commands(card: Card, witness: Witness) -> int:
    """Of a life without failures."""
    witness.take()
    lives_well(card, witness)
    number = witness.commands
    witness.take()
    return number


def lives_well(card: Card, witness: Witness) -> None:
    """A life without failures, which leaves nothing."""
    with closing(Life(card)) as life:
        life.live()
    assert life.error is None
    assert witness.alive == []


def fails_once(card: Card, witness: Witness, number: int, resumes: int) -> None:
    """The n-th command fails: it is told, nothing is left, and all goes on."""
    before = holdings()
    card.configure(fail=number, resumes=resumes)
    with closing(Life(card)) as life:
        life.live()
        check_one_line(life.error)
        if life.vf is not None and life.error is not None and not isinstance(life.error, DeviceLostError):
            goes_on(life, life.vf)
    assert_gone(witness)
    card.configure(resumes=resumes)
    lives_well(card, witness)
    life.error = None
    card.cables[0].drain()
    assert holdings() == before


def goes_on(life: "Life", vf: DrivenVf) -> None:
    """After a failure: what runs still is told exactly, and all rings can be started."""
    for index, state in vf.device.suspend().items():
        used = vf.queues[index].used_index
        assert state == RingState(used, used)
    vf.device.stop_logging()
    life.start_again()


def dies(card: Card, witness: Witness, number: int, resumes: int) -> None:
    """All commands from the n-th on fail: it is told, and nothing is left."""
    before = holdings()
    card.configure(dead=number, resumes=resumes)
    with closing(Life(card)) as life:
        life.live()
        check_one_line(life.error)
        if life.vf is not None and life.error is not None:
            for call in ("start", "suspend"):
                with suppress(DeviceError):
                    getattr(life.vf, call)()
            life.vf.device.statistics()
    assert_gone(witness)
    life.error = None
    card.cables[0].drain()
    assert holdings() == before


def check_one_line(error: DeviceError | None) -> None:
    if error is not None:
        text = str(error)
        assert text.startswith("mlx5,ibdev=mlx5_t")
        assert "\n" not in text


def assert_gone(witness: Witness) -> None:
    """Nothing is left but what the firmware did not take back, which goes with the context."""
    assert witness.failed, "no command failed"
    if not set(witness.failed) & set(GIVEN_BACK.values()):
        assert witness.alive == []
    assert witness.calls.count("open") == witness.calls.count("close")
    witness.alive.clear()
    witness.failed.clear()
    witness.take()


Fail = Callable[[Card, Witness, int, int], None]


@pytest.mark.parametrize("percent", SAMPLE)
@pytest.mark.parametrize("fail", [fails_once, dies])
def test_a_command_fails(fail: Fail, percent: int, card: Card, witness: Witness) -> None:
    number = 1 + (count_commands(card, witness) - 1) * percent // 100
    fail(card, witness, number, 1)


@pytest.mark.full
@pytest.mark.parametrize("resumes", [0, 1])
@pytest.mark.parametrize("fail", [fails_once, dies])
def test_every_command_fails(fail: Fail, resumes: int, card: Card, witness: Witness) -> None:
    card.configure(resumes=resumes)
    for number in range(1, count_commands(card, witness) + 1):
        fail(card, witness, number, resumes)


# A firmware that dies by itself, or answers no more


def die(hangs: bool) -> None:
    ctypes.CDLL(str(LIBRARY)).mlx5_emulation_die(int(hangs))


def test_a_death_is_told_once(card: Card, witness: Witness) -> None:
    with closing(DrivenVf(open_device(card.spec()))) as vf:
        vf.start()
        vf.offer(8)
        card.cables[0].send(1)
        assert vf.receive(1) == [1]
        die(hangs=False)
        assert vf.wait_event() is DeviceEvent.LOST
        assert vf.wait_event(0.1) is None, "said more than once"
        for call in (vf.suspend, vf.start, lambda: vf.device.map_memory(vf.region)):
            with pytest.raises(DeviceLostError, match="the device is gone"):
                call()
        assert vf.device.statistics()["kicks.0"] == 1
    assert witness.calls.count("close") == 1


HANGS = """
import sys, time
from functools import partial
from datapath.drivers.mlx5 import device as driver
from datapath.drivers.mlx5.glue import DevxObject, Glue
from datapath.drivers.mlx5.workers import Workers
from tests.conformance.test_mlx5_failures import DEADLINE, Life
from tests.harness.emulated_connectx import Card
driver.Workers = partial(Workers, deadline=DEADLINE)
with Card(hang=int(sys.argv[1])) as card:
    life = Life(card)
    life.live()
    if life.vf is not None:
        vf = life.vf
        for call in (vf.start, vf.suspend, vf.device.stop_logging):
            try:
                call()
            except driver.DeviceLostError:
                continue
        vf.device.statistics()
    life.close()
    print(type(life.error).__name__, life.error)
"""


def hangs(number: int) -> str:
    """From the n-th command on none is answered, in a process that ends all the same; what it said."""
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(number)], capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(("percent", "told"), [(0, HUNG), (40, HUNG), (60, HUNG), (95, UNTOLD)])
def test_a_firmware_that_hangs(percent: int, told: str, card: Card, witness: Witness) -> None:
    number = 1 + (count_commands(card, witness) - 1) * percent // 100
    assert re.fullmatch(told, hangs(number))


@pytest.mark.full
def test_a_firmware_that_hangs_at_every_command(card: Card, witness: Witness) -> None:
    for number in range(1, count_commands(card, witness) + 1):
        assert re.fullmatch(f"{HUNG}|{UNTOLD}", hangs(number)), number


def test_a_queue_that_is_not_given_back_is_tried_again(
    card: Card, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its index is taken for good: no start succeeds any more."""
    real = Glue.destroy
    failures: list[DeviceError] = []

    def destroy(glue: Glue, what: DevxObject) -> None:
        if failures:
            raise failures.pop()
        real(glue, what)

    monkeypatch.setattr(Glue, "destroy", destroy)
    with closing(Life(card)) as life:
        vf = life.vf = DrivenVf(open_device(card.spec()))
        vf.offer(8)
        vf.start()
        life.exchange()
        failures.append(DeviceError("it is kept"))
        with pytest.raises(DeviceError, match="it is kept"):
            vf.device.map_memory(life.extra.region)
        life.start_again()
    assert witness.alive == []
