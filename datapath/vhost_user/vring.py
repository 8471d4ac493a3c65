"""One ring as the front-end describes it, and its translation into what a VF needs to run it.

Owns the ring's eventfds and its two flags, started and enabled (QEMU docs/interop/vhost-user.rst, "Ring
states"). When a ring runs is decided in `backend.py`.
"""

from dataclasses import dataclass

from datapath import virtio
from datapath.descriptors import close_all, signal_eventfd
from datapath.vdpa import Ring, RingState
from datapath.vhost_user.memory import GuestMemory
from datapath.vhost_user.messages import ProtocolError, VringAddress

#: Alignment in bytes of the parts of a split ring (virtio 1.3 section 2.7) and of a packed one (section 2.8).
ALIGNMENT = {"descriptor table": 16, "available ring": 2, "used ring": 4}
PACKED_ALIGNMENT = {"descriptor ring": 16, "driver event area": 4, "device event area": 4}
#: Flag of SET_VRING_ADDR: writes to the used ring are to be logged. (A device logs all or nothing.)
VRING_F_LOG = 1


@dataclass
class Vring:
    """What is known of one ring. It starts stopped and disabled."""

    index: int
    #: Number of descriptors; 0 before SET_VRING_NUM.
    size: int = 0
    #: Next available entry, as the front-end set it or the VF left it; of a packed ring the place and wrap
    #: counter where buffers are fetched in bits 0 to 15, and where they are given back in bits 16 to 31
    #: (which DPDK's virtio-user leaves out; with us both are the same).
    base: int = 0
    address: VringAddress | None = None
    #: The eventfds; None when there is none. A started ring without a kick is polled.
    kick: int | None = None
    call: int | None = None
    error: int | None = None
    started: bool = False
    enabled: bool = False
    #: What the VF was given to run; None while it does not run the ring.
    placed: Ring | None = None
    #: Whether the VF has run it since it was started.
    has_run: bool = False

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"ring {self.index}"

    @property
    def given_up(self) -> bool:
        """Whether it has transmitted for a pair beyond the first that the guest has ceased to use."""
        return self.has_run and not self.enabled and self.index > 1 and self.index % 2 == 1

    @property
    def running(self) -> bool:
        """Whether the VF runs it."""
        return self.placed is not None

    @property
    def logged(self) -> bool:
        """Whether the front-end wants writes to the used ring logged."""
        return self.address is not None and bool(self.address.flags & VRING_F_LOG)

    def resize(self, size: int, largest: int, packed: bool) -> None:
        """Set the number of descriptors.

        :raise ProtocolError: when it is more than `largest`, or of a split ring and no power of two.
        """
        if not 1 <= size <= largest or (size & (size - 1) and not packed):
            kind = "number" if packed else "power of two"
            raise ProtocolError(f"{self.name}: size {size} is no {kind} from 1 to {largest}")
        self.size = size

    def rebase(self, base: int, packed: bool) -> None:
        """Set where the ring is to go on.

        :raise ProtocolError: when it is of a split ring and does not fit in 16 bits.
        """
        if base > 0xFFFF and not packed:
            raise ProtocolError(f"{self.name}: base {base:#x} is no index of a split ring")
        self.base = base

    def replace_fd(self, which: str, fd: int | None) -> None:
        """Take over the eventfd `which` ("kick", "call" or "error") and close the one before."""
        old = getattr(self, which)
        setattr(self, which, fd)
        if old is not None:
            close_all([old])

    def stopped(self, state: RingState, packed: bool) -> None:
        """The VF runs the ring no more, and left it so."""
        self.placed = None
        self.base = state.avail | (state.used << 16 if packed else 0)

    def translate(self, memory: GuestMemory, packed: bool) -> Ring:
        """The ring in guest physical addresses; a split one begins at the used index found in guest memory.

        What the front-end calls the base counts for less: a network ring's descriptors that were
        fetched but not completed are fetched again, and between a stop and a start QEMU itself may have
        completed some (DPDK lib/vhost/vhost_user.c, translate_ring_addresses, decides likewise). In a
        packed ring's memory stands no index: its base is all that is known.

        :raise ProtocolError: when the ring is incomplete, misaligned or outside the memory.
        """
        if self.address is None or not self.size:
            raise ProtocolError(f"{self.name}: started without {'an address' if self.size else 'a size'}")
        guest = []
        parts = (self.address.descriptors, self.address.avail, self.address.used)
        sizes = virtio.packed_ring_bytes(self.size) if packed else virtio.ring_bytes(self.size)
        alignments = PACKED_ALIGNMENT if packed else ALIGNMENT
        for (part, alignment), start, size in zip(alignments.items(), parts, sizes, strict=True):
            what = f"{self.name}: {part}"
            found = memory.guest_address(start, size, what)
            if found % alignment:
                raise ProtocolError(f"{what} at {found:#x} is not aligned to {alignment} bytes")
            guest.append(found)
        descriptors, avail, used = guest
        index = self.base & 0xFFFF if packed else _index(memory, used)
        state = RingState(index, index)
        return Ring(self.size, descriptors, avail, used, state, self.kick, self.call, packed)

    def progress(self, memory: GuestMemory) -> tuple[int, int] | None:
        """The indices in guest memory now, available then used; None unless it runs, or if it is packed.

        :raise ProtocolError: when the memory has gone.
        """
        if self.placed is None or self.placed.packed:
            return None
        return _index(memory, self.placed.avail), _index(memory, self.placed.used)

    def begin(self, placed: Ring) -> None:
        """The VF runs the ring now."""
        self.placed = placed
        self.has_run = True
        self.signal_call()

    def signal_call(self) -> None:
        """Interrupt the guest once: entries may have been used, while the ring had no eventfd or by a VF
        that was lost, of which nobody could tell it."""
        if self.call is not None:
            signal_eventfd(self.call)

    def signal_kick(self) -> None:
        """Have the ring looked at, as if the guest had kicked: a kick may have gone elsewhere."""
        if self.running and self.kick is not None:
            signal_eventfd(self.kick)

    def signal_error(self) -> None:
        """Tell the front-end, by the eventfd it gave for that, that the ring has failed."""
        if self.error is not None:
            signal_eventfd(self.error)

    def close(self) -> None:
        """Close the eventfds."""
        for which in ("kick", "call", "error"):
            self.replace_fd(which, None)


def _index(memory: GuestMemory, part: int) -> int:
    """The `idx` field of an available or used ring at a guest address (virtio 1.3 sections 2.7.6, 2.7.8)."""
    return int.from_bytes(memory.read(part + 2, 2), "little")
