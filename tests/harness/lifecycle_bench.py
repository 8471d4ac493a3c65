"""A lifecycle on stand-ins for ports and VFs, with a clock that is set by hand.

Owns what hook operations are tried on where no process is wanted; unit/test_lifecycle.py and
unit/test_arrival.py say what they lead to.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest

from libvirt_vdpa.arrival import Arrivals
from libvirt_vdpa.client import ControlError
from libvirt_vdpa.config import Config, PoolConfig
from libvirt_vdpa.inventory import Holder, Inventory
from libvirt_vdpa.lifecycle import Lifecycle, LifecycleError
from libvirt_vdpa.metadata import xml_folder
from libvirt_vdpa.ports import Record, State
from libvirt_vdpa.probe import Ability, ProbeError
from libvirt_vdpa.state import InterfaceState, render_state
from libvirt_vdpa.supervisor import Supervisor

DEMO = (xml_folder() / "vdpa-demo.xml").read_bytes()
SERVER = (xml_folder() / "vdpa-server.xml").read_bytes()
TWO_NICS = (xml_folder() / "vdpa-kvm.xml").read_bytes()
DEMO_UUID = "7664d0a0-0001-4000-8000-000000000001"
MAC = "52:54:00:76:64:01"
VF0, VF1 = "ifcvf,vfio-user=/vf0.sock", "ifcvf,vfio-user=/vf1.sock"
ABLE = Ability(0x1_3000_8020, 1, 256, 1500, frozenset(["hardware", "software"]))
#: A guest that uses some of what it was offered: VERSION_1 and MRG_RXBUF.
STATE = InterfaceState(MAC, offered=0x1_3000_8020, negotiated=0x1_0000_8000, queue_pairs=1, ring_size=256)


class StandInPort:
    """A port without a process."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.state = State.IDLE
        self.status: dict[str, object] = {"queue_pairs": 1, "front_end": False}
        self.answers = True

    async def query_status(self) -> dict[str, object]:
        if not self.answers:
            raise ControlError("no answer")
        return self.status


class StandInSupervisor:
    """Keeps ports in memory. `on_start` decides what a start does."""

    def __init__(self, inventory: Inventory) -> None:
        self.ports: dict[tuple[str, str], StandInPort] = {}
        self.released: list[str] = []
        self.on_start: Callable[[StandInPort], Awaitable[None]] | None = None
        self._inventory = inventory

    def of_domain(self, uuid: str) -> list[StandInPort]:
        return [port for port in self.ports.values() if port.record.uuid == uuid]

    def add(self, record: Record) -> StandInPort:
        self.ports[record.key] = StandInPort(record)
        return self.ports[record.key]

    async def start(self, port: StandInPort) -> None:
        port.state = State.STARTING
        if self.on_start is not None:
            await self.on_start(port)
        port.state = State.SERVING

    def guest_left(self, port: StandInPort) -> None:
        port.state = State.LINGERING

    async def release(self, port: StandInPort) -> None:
        await asyncio.sleep(0)
        record = port.record
        self.released.append(record.mac)
        self.ports.pop(record.key, None)
        self._inventory.give_back(record.device, Holder(record.domain, record.uuid, record.mac))


class StandInMigrations:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def incoming(self, uuid: str) -> None:
        self.told.append("incoming")

    def ended(self, uuid: str) -> None:
        self.told.append("ended")


class Bench:
    """A lifecycle with two VFs, which say what they can do, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.able: dict[str, Ability | str] = {}
        self.probed: list[str] = []
        self.on_probe: Callable[[str], Awaitable[None]] | None = None
        self.inventory = Inventory([PoolConfig("default", "ifcvf", 2)], clock=lambda: self.now)
        self.inventory.set_pool("default", [(f"ifcvf,vfio-user=/vf{n}.sock", 1) for n in range(2)])
        self.supervisor = StandInSupervisor(self.inventory)
        config = Config(run_folder=Path("/run/libvirt-vdpa"), hook_time_limit=1.0)
        self.refreshed = 0
        self.lifecycle = Lifecycle(
            config,
            self.inventory,
            cast(Supervisor, self.supervisor),
            self._count_refresh,
            Arrivals(self.inventory, self._probe, lambda: self.now),
        )
        self.migrations = self.lifecycle.migrations = StandInMigrations()

    async def _probe(self, device: str, limit: float) -> Ability:
        assert 0 < limit <= 1
        self.probed.append(device)
        if self.on_probe is not None:
            await self.on_probe(device)
        able = self.able.get(device, ABLE)
        if isinstance(able, str):
            raise ProbeError(able)
        return able

    async def _count_refresh(self) -> None:
        self.refreshed += 1

    def hook(self, *operations: str, xml: bytes = DEMO) -> str | None:
        """Carry out operations; the last one's replacement of the XML."""

        async def run() -> str | None:
            results = [await self.lifecycle.hook(operation, "a-domain", xml) for operation in operations]
            return results[-1]

        return asyncio.run(run())

    def refused(self, operation: str, xml: bytes = DEMO) -> str:
        with pytest.raises(LifecycleError) as refused:
            self.hook(operation, xml=xml)
        return str(refused.value)

    @property
    def states(self) -> list[State]:
        return [port.state for port in self.supervisor.ports.values()]

    @property
    def lent(self) -> int:
        return sum(vf.holder is not None for vf in self.inventory)

    @property
    def promised(self) -> list[str]:
        """MACs of the interfaces to which VFs are promised, in the order of the VFs."""
        holders = [self.inventory.promised(vf) for vf in self.inventory]
        return [holder.mac for holder in holders if holder is not None]

    @property
    def records(self) -> list[Record]:
        return [port.record for port in self.supervisor.ports.values()]

    @property
    def clean(self) -> bool:
        """Whether nothing is left but, maybe, promises."""
        return not self.supervisor.ports and not self.lent


def with_state(*states: InterfaceState, xml: bytes = DEMO) -> bytes:
    """A domain that brings what its guest uses."""
    return xml.replace(b"</metadata>", render_state(states).encode() + b"</metadata>")
