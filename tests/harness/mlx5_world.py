"""An open ConnectX, the emulated one, with what its driver makes queues of: for tests of the driver's parts.

`World` is the device; guest memory lies in two pieces of this process.
"""

import mmap
from dataclasses import dataclass

from datapath.drivers.mlx5._abi import ffi
from datapath.drivers.mlx5.capabilities import Capabilities, capabilities
from datapath.drivers.mlx5.glue import Context, Glue, Libraries
from datapath.drivers.mlx5.memory import Domain, GuestMemory
from datapath.drivers.mlx5.virtqueue import Surroundings, VirtioNetQueue
from datapath.emulation.mlx5 import LIBRARY
from datapath.mlx5_mailbox import pack
from datapath.mlx5_prm import ALLOC_TRANSPORT_DOMAIN_IN, CREATE_TIS_IN
from datapath.vdpa import DeviceError, MemoryRegion, Ring, RingState
from datapath.virtio import Feature
from tests.harness.virtqueue import Buffer, Virtqueue

TX = 1
SIZE = 1 << 21
#: Where the guest has its two regions: rings in the first, frames in the second, and a hole between them.
LOW, HIGH = 0x100000, 0x4000000
FRAME = bytes(12) + bytes.fromhex("020000000002 020000000001 88b5") + bytes(50)
VERSION_1 = 1 << Feature.F_VERSION_1


class PiecewiseMemory:
    """Guest memory in two regions of this process."""

    def __init__(self) -> None:
        self.pieces = {LOW: mmap.mmap(-1, SIZE), HIGH: mmap.mmap(-1, SIZE)}

    def _at(self, address: int) -> tuple[mmap.mmap, int]:
        base = HIGH if address >= HIGH else LOW
        return self.pieces[base], address - base

    def read(self, address: int, size: int) -> bytes:
        piece, offset = self._at(address)
        return piece[offset : offset + size]

    def write(self, address: int, data: bytes) -> None:
        piece, offset = self._at(address)
        piece[offset : offset + len(data)] = data

    @property
    def regions(self) -> list[MemoryRegion]:
        """Not in the order of their addresses."""
        return [
            MemoryRegion(base, SIZE, -1, 0, int(ffi.cast("uintptr_t", ffi.from_buffer(piece))))
            for base, piece in reversed(self.pieces.items())
        ]


def guest_memory(domain: Domain, memory: PiecewiseMemory) -> GuestMemory:
    """All of it registered, and a key made.

    :raise DeviceError: when that fails; nothing is left then.
    """
    guest = GuestMemory(domain)
    try:
        for region in memory.regions:
            guest.add(region)
        guest.key()
    except DeviceError:
        guest.close()
        raise
    return guest


@dataclass
class World:
    """An open device, and what a queue is made with."""

    glue: Glue
    context: Context
    domain: Domain
    capable: Capabilities
    memory: PiecewiseMemory
    guest: GuestMemory
    around: Surroundings
    doorbell: mmap.mmap

    def ring(self, virtqueue: Virtqueue, start: int = 0) -> Ring:
        return Ring(
            size=256,
            descriptors=virtqueue.descriptors,
            avail=virtqueue.avail,
            used=virtqueue.used,
            state=RingState(start, start),
            kick=None,
            call=None,
        )

    def queue(self, virtqueue: Virtqueue, start: int = 0) -> VirtioNetQueue:
        return VirtioNetQueue(self.domain, self.capable, TX, self.ring(virtqueue, start), self.around)

    def send(self, virtqueue: Virtqueue, address: int = HIGH) -> None:
        if address >= HIGH:
            self.memory.write(address, FRAME)
        virtqueue.add(Buffer(address, len(FRAME)))
        with memoryview(self.doorbell) as view, view.cast("I") as cells:
            cells[0] = TX


def open_world() -> World:
    """Open the device; the environment has its options.

    :raise DeviceError: when it cannot be opened.
    """
    glue = Glue(Libraries(str(LIBRARY), str(LIBRARY)), "mlx5,ibdev=mlx5_0")
    context = glue.open(glue.devices()[0])
    domain = Domain(glue, context)
    memory = PiecewiseMemory()
    guest = guest_memory(domain, memory)
    transport = glue.create(context, pack(ALLOC_TRANSPORT_DOMAIN_IN))
    tis = glue.create(context, pack(CREATE_TIS_IN, transport_domain=transport.id))
    page = glue.alloc_var(context)
    doorbell = mmap.mmap(glue.command_fd(context), page.size, offset=page.offset)
    around = Surroundings(VERSION_1, guest.key(), tis.id, event_qp=None)
    capable = capabilities(glue, context)
    return World(glue, context, domain, capable, memory, guest, around, doorbell)
