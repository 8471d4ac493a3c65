"""The run-time configuration of a ConnectX: options of its device string, with the field's names.

Names, ranges and defaults are those of DPDK's drivers/vdpa/mlx5/mlx5_vdpa.c (doc/guides/vdpadevs/mlx5.rst).
What DPDK warns of and ignores is refused here. Ours alone are how the device is named (`pci` or `ibdev`),
where its libraries are, and `promiscuous`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from datapath.drivers.mlx5.glue import Libraries
from datapath.vdpa import DeviceSpec, DeviceSpecError


class EventMode(IntEnum):
    """When a queue's completions are looked for."""

    #: At times that adapt to the traffic.
    ADAPTIVE_TIMER = 0
    #: At fixed times, as long as there is traffic.
    FIXED_TIMER = 1
    #: When the device interrupts.
    INTERRUPTS = 2


class LatencyMode(IntEnum):
    """From when the device counts how long completions may wait: `queue_period_mode` of a queue."""

    DEFAULT = 0
    FROM_FIRST = 1
    FROM_LAST = 2


#: Option -> lowest and highest value, and the default.
RANGES: Mapping[str, tuple[int, int, int]] = {
    "event_mode": (EventMode.ADAPTIVE_TIMER, EventMode.INTERRUPTS, EventMode.FIXED_TIMER),
    "event_us": (0, 1_000_000, 0),
    "no_traffic_time": (0, 0xFFFF, 16),
    "hw_latency_mode": (LatencyMode.DEFAULT, LatencyMode.FROM_LAST, LatencyMode.DEFAULT),
    "hw_max_latency_us": (0, 0xFFF, 0),
    "hw_max_pending_comp": (0, 0xFFFF, 0),
    "queue_size": (1, 1024, 0),
    "queues": (1, 128, 0),
    "max_conf_threads": (0, 256, 0),
    "promiscuous": (0, 1, 0),
}
TEXTS = ("class", "pci", "ibdev", "libibverbs", "libmlx5", "event_core")
#: `event_us` where nothing is said: an adaptive timer needs a step.
ADAPTIVE_STEP = 1
#: Bases of a number as strtoul of base 0 has them.
NUMBER = re.compile(r"0[xX](?P<hex>[0-9a-fA-F]+)|(?P<octal>0[0-7]*)|(?P<decimal>[1-9][0-9]*)")
PCI_ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-1][0-9a-f]\.[0-7]")
USAGE = "use mlx5,pci=0000:01:00.2 or mlx5,ibdev=mlx5_2"


@dataclass(frozen=True)
class Options:
    """What is configured of a device."""

    #: Where its PCI function is; None when it is named otherwise.
    pci: str | None
    #: Its name among RDMA devices; None when it is named otherwise.
    ibdev: str | None
    libraries: Libraries
    event_mode: EventMode
    #: Step of an adaptive timer or period of a fixed one, in microseconds; 0 only yields the processor.
    event_us: int
    #: Times that nothing is found until the device is asked to interrupt.
    no_traffic_time: int
    #: Processor of the thread that looks; None: any.
    event_core: int | None
    hw_latency_mode: LatencyMode
    #: Microseconds that the device may hold completions back.
    hw_max_latency_us: int
    #: Completions that it may hold back.
    hw_max_pending_comp: int
    #: Descriptors of queues that are made beforehand, and pairs of them; 0: none are.
    queue_size: int
    queues: int
    #: Threads that configure; 0: it is done in one.
    max_conf_threads: int
    #: Whether the guest gets all that reaches the function, though its address is known.
    promiscuous: bool

    @classmethod
    def parse(cls, spec: DeviceSpec) -> "Options":
        """Take the options out of a device string.

        :raise DeviceSpecError: for one that there is not, or a value that makes no sense.
        """
        given = dict(spec.options)
        unknown = [name for name in given if name not in RANGES and name not in TEXTS]
        if unknown:
            raise DeviceSpecError(f"device '{spec}': mlx5 takes no option '{unknown[0]}'; {USAGE}")
        if given.get("class", "vdpa") != "vdpa":
            raise DeviceSpecError(f"device '{spec}': class={given['class']}: mlx5 is of class vdpa alone")
        pci, ibdev = _named(spec)
        numbers = {name: _number(spec, name, *limits) for name, limits in RANGES.items()}
        _check_beforehand(spec, numbers["queues"], numbers["queue_size"])
        mode = EventMode(numbers.pop("event_mode"))
        if mode is EventMode.ADAPTIVE_TIMER and not numbers["event_us"]:
            numbers["event_us"] = ADAPTIVE_STEP
        default = Libraries()
        return cls(
            pci=pci,
            ibdev=ibdev,
            libraries=Libraries(given.get("libibverbs", default.ibverbs), given.get("libmlx5", default.mlx5)),
            event_mode=mode,
            event_core=_core(spec),
            hw_latency_mode=LatencyMode(numbers.pop("hw_latency_mode")),
            promiscuous=bool(numbers.pop("promiscuous")),
            **numbers,
        )


def _named(spec: DeviceSpec) -> tuple[str | None, str | None]:
    """
    :raise DeviceSpecError: when the device is named not at all, twice, or by what is no address.
    """
    pci, ibdev = spec.options.get("pci"), spec.options.get("ibdev")
    if (pci is None) == (ibdev is None):
        which = "names no device;" if pci is None else "names two devices;"
        raise DeviceSpecError(f"device '{spec}' {which} {USAGE}")
    if pci is not None and not PCI_ADDRESS.fullmatch(pci):
        raise DeviceSpecError(f"device '{spec}': pci={pci} is no PCI address; {USAGE}")
    return pci, ibdev


def _to_number(spec: DeviceSpec, name: str) -> int:
    text = spec.options[name]
    found = NUMBER.fullmatch(text)
    if found is None:
        raise DeviceSpecError(f"device '{spec}': {name}={text} is no number")
    if found["hex"]:
        return int(found["hex"], 16)
    return int(found["octal"], 8) if found["octal"] else int(found["decimal"])


def _number(spec: DeviceSpec, name: str, lowest: int, highest: int, default: int) -> int:
    """
    :raise DeviceSpecError: for no number, or one out of its range.
    """
    if name not in spec.options:
        return default
    number = _to_number(spec, name)
    # The default is allowed too where it lies outside: 0 says that there is none.
    if number != default and not lowest <= number <= highest:
        raise DeviceSpecError(f"device '{spec}': {name}={number} is not from {lowest} to {highest}")
    return number


def _core(spec: DeviceSpec) -> int | None:
    """
    :raise DeviceSpecError: for a processor that this process may not run on.
    """
    if "event_core" not in spec.options:
        return None
    core = _to_number(spec, "event_core")
    allowed = sorted(os.sched_getaffinity(0))
    if core not in allowed:
        told = ", ".join(map(str, allowed))
        raise DeviceSpecError(f"device '{spec}': event_core={core} is not among the processors {told}")
    return core


def _check_beforehand(spec: DeviceSpec, queues: int, queue_size: int) -> None:
    """
    :raise DeviceSpecError: when one of the two is missing, or rings of that size cannot be.
    """
    if bool(queues) != bool(queue_size):
        raise DeviceSpecError(f"device '{spec}': queues and queue_size are given both or neither")
    if queue_size & (queue_size - 1):
        raise DeviceSpecError(f"device '{spec}': queue_size={queue_size} is no power of two")
