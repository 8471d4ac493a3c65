"""The options of a ConnectX: the field's names, ranges and defaults, and one line for each mistake."""

import os

import pytest

from datapath.drivers.mlx5.glue import Libraries
from datapath.drivers.mlx5.options import RANGES, EventMode, LatencyMode, Options
from datapath.vdpa import DeviceSpec, DeviceSpecError

PCI = "0000:01:00.2"


def parsed(**options: str) -> Options:
    return Options.parse(DeviceSpec("mlx5", {"pci": PCI, **options}))


def refusal(**options: str) -> str:
    with pytest.raises(DeviceSpecError) as error:
        Options.parse(DeviceSpec("mlx5", options))
    text = str(error.value)
    assert "\n" not in text
    return text.partition("'")[2].partition("'")[2]


def test_defaults() -> None:
    assert parsed() == Options(
        pci=PCI,
        ibdev=None,
        libraries=Libraries("libibverbs.so.1", "libmlx5.so.1"),
        event_mode=EventMode.FIXED_TIMER,
        event_us=0,
        no_traffic_time=16,
        event_core=None,
        hw_latency_mode=LatencyMode.DEFAULT,
        hw_max_latency_us=0,
        hw_max_pending_comp=0,
        queue_size=0,
        queues=0,
        max_conf_threads=0,
        promiscuous=False,
    )


def test_everything_said() -> None:
    core = min(os.sched_getaffinity(0))
    said = {
        "class": "vdpa",
        "libibverbs": "/opt/libibverbs.so",
        "libmlx5": "/opt/libmlx5.so",
        "event_mode": "2",
        "event_us": "30",
        "no_traffic_time": "0",
        "event_core": str(core),
        "hw_latency_mode": "1",
        "hw_max_latency_us": "4095",
        "hw_max_pending_comp": "0xffff",
        "queue_size": "256",
        "queues": "010",
        "max_conf_threads": "8",
    }
    options = parsed(**said)
    assert options.libraries == Libraries("/opt/libibverbs.so", "/opt/libmlx5.so")
    assert (options.event_mode, options.event_us, options.event_core) == (EventMode.INTERRUPTS, 30, core)
    assert (options.no_traffic_time, options.max_conf_threads) == (0, 8)
    assert options.hw_latency_mode is LatencyMode.FROM_FIRST
    assert (options.hw_max_latency_us, options.hw_max_pending_comp) == (4095, 65535)
    # As strtoul has it: a number that begins with 0 is octal.
    assert (options.queue_size, options.queues) == (256, 8)


def test_an_adaptive_timer_has_a_step() -> None:
    assert parsed(event_mode="0").event_us == 1
    assert parsed(event_mode="0", event_us="7").event_us == 7


@pytest.mark.parametrize("name", RANGES)
def test_ranges(name: str) -> None:
    _, highest, _ = RANGES[name]
    beside = {"queues": {"queue_size": "64"}, "queue_size": {"queues": "1"}}.get(name, {})
    assert getattr(parsed(**{**beside, name: str(highest)}), name) == highest
    told = refusal(pci=PCI, **{**beside, name: str(highest + 1)})
    assert told.startswith(f": {name}={highest + 1} is not from ")
    for text in ("-1", "", "many", "1.5", "0x", "08", " 1"):
        assert refusal(pci=PCI, **{**beside, name: text}) == f": {name}={text} is no number"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, " names no device; use mlx5,pci=0000:01:00.2 or mlx5,ibdev=mlx5_2"),
        (
            {"pci": PCI, "ibdev": "mlx5_2"},
            " names two devices; use mlx5,pci=0000:01:00.2 or mlx5,ibdev=mlx5_2",
        ),
        ({"pci": "1:0"}, ": pci=1:0 is no PCI address; use mlx5,pci=0000:01:00.2 or mlx5,ibdev=mlx5_2"),
        ({"pci": PCI, "class": "eth"}, ": class=eth: mlx5 is of class vdpa alone"),
        ({"pci": PCI, "class": "eth:vdpa"}, ": class=eth:vdpa: mlx5 is of class vdpa alone"),
        ({"pci": PCI, "queues": "2"}, ": queues and queue_size are given both or neither"),
        ({"pci": PCI, "queue_size": "64"}, ": queues and queue_size are given both or neither"),
        ({"pci": PCI, "queues": "2", "queue_size": "96"}, ": queue_size=96 is no power of two"),
    ],
)
def test_mistakes(options: dict[str, str], told: str) -> None:
    assert refusal(**options) == told


def test_what_there_is_not() -> None:
    assert refusal(pci=PCI, event_ms="1").startswith(": mlx5 takes no option 'event_ms'; use ")


def test_a_processor_that_is_not_there() -> None:
    core = max(os.sched_getaffinity(0)) + 1
    assert refusal(pci=PCI, event_core=str(core)).startswith(f": event_core={core} is not among ")
    assert refusal(pci=PCI, event_core="x") == ": event_core=x is no number"
