"""The driver's objects on the emulated ConnectX: memory in pieces behind one key, and the life of a queue."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from datapath.drivers.mlx5.glue import CommandError, Glue
from datapath.drivers.mlx5.memory import Buffer as DeviceBuffer
from datapath.drivers.mlx5.virtqueue import Counters, VirtioNetQueue
from datapath.mlx5_prm import QueueState
from datapath.vdpa import DeviceError, RingState
from tests.harness.mlx5_world import (
    LOW,
    SIZE,
    TX,
    World,
    guest_memory,
    open_world,
)
from tests.harness.processes import wait_for
from tests.harness.virtqueue import Virtqueue

#: Makes a device with options of the emulation.
Make = Callable[..., World]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    opened: list[World] = []

    def made(**options: int) -> World:
        chosen = ",".join(f"{name}={value}" for name, value in {"latency_us": 0, **options}.items())
        monkeypatch.setenv("MLX5_EMULATION", chosen)
        opened.append(open_world())
        return opened[-1]

    yield made
    for world in opened:
        world.glue.close(world.context)


@pytest.fixture
def world(make: Make) -> World:
    return make()


def sent(virtqueue: Virtqueue, count: int) -> None:
    wait_for(f"{count} frames sent", lambda: virtqueue.used_index == count, 5.0)


def test_what_the_device_can_do(make: Make) -> None:
    capable = make(pairs=4, resumes=1).capable
    assert (capable.queue_pairs, capable.resumes, capable.counts, capable.silent) == (4, True, True, True)
    assert capable.features == 0x114C60180B
    assert all(umem.of(256) > 0 for umem in capable.umems)


def test_frames_leave_memory_in_pieces(world: World) -> None:
    virtqueue = Virtqueue(world.memory, LOW)
    counters = Counters(world.domain)
    world.around = replace(world.around, counters=counters.number)
    queue = world.queue(virtqueue)
    assert (queue.state, queue.number > 0) == (QueueState.INIT, True)
    queue.run()
    for _ in range(3):
        world.send(virtqueue)
    sent(virtqueue, 3)
    assert queue.suspend() == RingState(3, 3)
    assert counters.read()["completed_desc"] == 3
    with pytest.raises(DeviceError):
        counters.close()
    queue.close()
    counters.close()


def test_a_frame_in_a_hole_breaks_its_queue(world: World) -> None:
    virtqueue = Virtqueue(world.memory, LOW)
    queue = world.queue(virtqueue)
    queue.run()
    world.send(virtqueue, LOW + SIZE + 4096)

    def broken() -> bool:
        try:
            queue.ring_state()
        except DeviceError as error:
            return "queue 1 has met an error of type" in str(error)
        return False

    wait_for("the queue to break", broken, 5.0)
    assert queue.state is QueueState.ERROR
    queue.close()


def test_a_queue_goes_on_where_it_stood(make: Make) -> None:
    """By being made anew, as this device cannot resume."""
    world = make(resumes=0)
    virtqueue = Virtqueue(world.memory, LOW)
    queue = world.queue(virtqueue)
    queue.run()
    world.send(virtqueue)
    sent(virtqueue, 1)
    stood = queue.suspend()
    with pytest.raises(DeviceError, match="queue 1 cannot run: it is SUSPENDED"):
        queue.run()
    queue.close()
    again = world.queue(virtqueue, stood.avail)
    again.run()
    world.send(virtqueue)
    sent(virtqueue, 2)
    assert again.suspend() == RingState(2, 2)
    again.close()


def test_a_queue_that_resumes(make: Make) -> None:
    world = make(resumes=1)
    virtqueue = Virtqueue(world.memory, LOW)
    queue = world.queue(virtqueue)
    queue.run()
    assert queue.suspend() == RingState(0, 0)
    queue.run()
    world.send(virtqueue)
    sent(virtqueue, 1)
    queue.close()


def test_only_a_running_queue_is_suspended(world: World) -> None:
    queue = world.queue(Virtqueue(world.memory, LOW))
    with pytest.raises(DeviceError, match="queue 1 cannot be suspended: it is INIT"):
        queue.suspend()
    queue.close()


def test_what_is_refused_beforehand(world: World) -> None:
    ring = world.ring(Virtqueue(world.memory, LOW))
    with pytest.raises(DeviceError, match="packed rings are not served"):
        VirtioNetQueue(world.domain, world.capable, TX, replace(ring, packed=True), world.around)
    telling = replace(world.capable, silent=False)
    with pytest.raises(DeviceError, match="no queues that tell nothing"):
        VirtioNetQueue(world.domain, telling, TX, ring, world.around)


def test_memory_in_use_is_not_given_back(world: World) -> None:
    queue = world.queue(Virtqueue(world.memory, LOW))
    with pytest.raises(DeviceError):
        world.guest.close()
    queue.close()


def test_a_queue_that_is_not_made_leaves_nothing(world: World) -> None:
    """Its protection domain can be given back afterwards, with all that it was made of."""
    ring = world.ring(Virtqueue(world.memory, LOW))
    strange = replace(world.around, tis=0xABCDEF)
    with pytest.raises(CommandError, match="CREATE_GENERAL_OBJECT: "):
        VirtioNetQueue(world.domain, world.capable, TX, ring, strange)
    world.guest.close()
    world.domain.close()


def test_whatever_fails_leaves_nothing(make: Make) -> None:
    """Memory and a queue, with each command failing in turn: the domain is empty after it."""
    device = make()
    device.guest.close()
    failed = 0
    for victim in PAIRS:
        for number in range(1, 5):
            failed += _fails(device, victim, number)
    # 2 regions, 1 hole, a key and a queue, 3 UMEMs.
    assert failed == 2 + 1 + 2 + 3
    device.domain.close()


#: What makes something -> what gives it back.
PAIRS = {
    "register": "deregister",
    "alloc_null_mr": "deregister",
    "create": "destroy",
    "register_umem": "deregister_umem",
}


def _count(world: World, patch: pytest.MonkeyPatch, alive: list[object]) -> None:
    """Keep `alive` what has been made and not been given back."""
    for make, give_back in PAIRS.items():
        real_make, real_back = getattr(Glue, make), getattr(Glue, give_back)

        def made(*given: object, real: Callable[..., object] = real_make) -> object:
            alive.append(real(world.glue, *given))
            return alive[-1]

        def back(what: object, real: Callable[..., None] = real_back) -> None:
            real(world.glue, what)
            alive.remove(what)

        patch.setattr(world.glue, make, made)
        patch.setattr(world.glue, give_back, back)


def _fails(world: World, victim: str, number: int) -> bool:
    """Have the n-th of a call fail, which leaves nothing; whether there was one."""
    alive: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        _count(world, patch, alive)
        failed = _fails_so(world, victim, number)
    assert alive == []
    return failed


def _fails_so(world: World, victim: str, number: int) -> bool:
    real, calls = getattr(world.glue, victim), 0

    def failing(*given: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number:
            raise DeviceError("it fails")
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.glue, victim, failing)
        guest = None
        try:
            guest = guest_memory(world.domain, world.memory)
            world.around = replace(world.around, key=guest.key())
            world.queue(Virtqueue(world.memory, LOW)).close()
        except DeviceError:
            return True
        finally:
            if guest is not None:
                guest.close()
    return False


def test_buffers_are_the_devices(world: World) -> None:
    buffer = DeviceBuffer(world.domain, 8192)
    assert (buffer.size, buffer.id > 0) == (8192, True)
    buffer.close()
