"""The memory that a ConnectX reaches: a guest's, by one key for all its addresses, and buffers of its own.

Owns registrations and keys. Whatever fails on the way leaves nothing behind.
"""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from datapath.drivers.mlx5._abi import ffi
from datapath.drivers.mlx5.glue import Context, DevxObject, Glue, ProtectionDomain, Region
from datapath.drivers.mlx5.memory_plan import KeyPlan, Span, plan, spans
from datapath.drivers.mlx5.undo import Undo
from datapath.mlx5_mailbox import pack
from datapath.mlx5_prm import CREATE_MKEY_IN, KLM, AccessMode
from datapath.vdpa import DeviceError, MemoryRegion

#: `qpn` of a key that is not of one QP alone.
EVERY_QP = 0xFFFFFF
#: Entries of a key come in cache lines of 64 bytes.
ENTRIES_TOGETHER = 4


class Domain:
    """A protection domain of an open device: keys and queues work together within one."""

    def __init__(self, glue: Glue, context: Context) -> None:
        """
        :raise DeviceError: when there is none to be had.
        """
        self.glue = glue
        self.context = context
        #: Memory that the device has not let go of: it stays where it is until the device is closed.
        self.kept: list[object] = []
        with Undo() as undo:
            self.handle: ProtectionDomain = glue.alloc_pd(context)
            undo.callback(glue.dealloc_pd, self.handle)
            #: What the firmware knows it by.
            self.number = glue.pd_number(self.handle)
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Give it back.

        :raise DeviceError: when something in it is still in use.
        """
        self._undo.close()


def create_key(domain: Domain, planned: KeyPlan, keys: Sequence[int], hole: int) -> DevxObject:
    """
    :param keys: the keys of the regions that were planned for.
    :param hole: the key of memory that is not there.
    :raise CommandError: when the firmware does not make it.
    """
    entries = b"".join(
        pack(
            KLM,
            byte_count=entry.size,
            mkey=hole if entry.region is None else keys[entry.region],
            address=entry.address,
        )
        for entry in planned.entries
    )
    padded = -(-len(planned.entries) // ENTRIES_TOGETHER) * ENTRIES_TOGETHER
    mailbox = pack(
        CREATE_MKEY_IN,
        access_mode=planned.mode,
        log_page_size=planned.log_page_size,
        lr=1,
        lw=1,
        qpn=EVERY_QP,
        pd=domain.number,
        start_addr=planned.start,
        len=planned.size,
        translations_octword_size=padded,
        translations_octword_actual_size=padded,
    )
    return domain.glue.create(domain.context, mailbox + entries.ljust(padded * KLM.size, b"\0"))


@contextmanager
def _naming(glue: Glue) -> Iterator[None]:
    """Say of which device memory cannot be used as it is."""
    try:
        yield
    except DeviceError as error:
        raise DeviceError(f"{glue.name}: {error}") from None


class GuestMemory:
    """Guest memory that a device reaches by guest physical addresses, through one key."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._registered: list[tuple[MemoryRegion, Region]] = []
        self._key: int | None = None
        self._undo_key = ExitStack()

    def add(self, region: MemoryRegion) -> None:
        """Register a region, which stays mapped until it is removed. The key until now does not reach it.

        :raise DeviceError: when it overlaps another, or cannot be registered.
        """
        glue = self._domain.glue
        with _naming(glue):
            spans([(other.guest_address, other.size) for other in (*self.regions, region)])
        made = glue.register(self._domain.handle, region.address, region.size, region.guest_address)
        self._registered.append((region, made))

    def remove(self, region: MemoryRegion) -> None:
        """Take a region back; what uses the key has been closed before.

        :raise DeviceError: when it is in use, or is none of ours.
        """
        for number, (other, made) in enumerate(self._registered):
            if other == region:
                self.forget_key()
                self._domain.glue.deregister(made)
                del self._registered[number]
                return
        raise DeviceError(f"{self._domain.glue.name}: guest memory {region.guest_address:#x} is not mapped")

    @property
    def regions(self) -> list[MemoryRegion]:
        return [region for region, _ in self._registered]

    def key(self) -> int:
        """What a queue is given to reach all regions: the number of the key, and a low byte of 0.

        :raise DeviceError: when there is no memory, it is in too many pieces, or no key is made.
        """
        if self._key is None:
            self._key = self._make_key() << 8
        return self._key

    def _make_key(self) -> int:
        glue = self._domain.glue
        with _naming(glue):
            planned = plan([(region.guest_address, region.size) for region in self.regions])
        with Undo() as undo:
            hole = 0
            if any(entry.region is None for entry in planned.entries):
                nothing = glue.alloc_null_mr(self._domain.handle)
                undo.callback(glue.deregister, nothing)
                hole = nothing.key
            indirect = create_key(self._domain, planned, [made.key for _, made in self._registered], hole)
            undo.callback(glue.destroy, indirect)
            self._undo_key = undo.pop_all()
        return indirect.id

    def forget_key(self) -> None:
        """Have another key made when it is asked for; what uses this one has been closed before.

        :raise DeviceError: when it is in use.
        """
        self._key = None
        self._undo_key.close()

    def close(self) -> None:
        """Take all memory back.

        :raise DeviceError: when a queue still uses it; what is in no use is given back.
        """
        with Undo() as undo:
            for _, made in self._registered:
                undo.callback(self._domain.glue.deregister, made)
            self._registered.clear()
            undo.callback(self.forget_key)


class HostMemory:
    """Memory of this process that a device reaches by its addresses here, through a key of its own.

    DPDK's drivers/vdpa/mlx5/mlx5_vdpa_lm.c reaches a dirty bitmap so.
    """

    def __init__(self, domain: Domain, address: int, size: int) -> None:
        """
        :raise DeviceError: when it cannot be registered.
        """
        glue = domain.glue
        with Undo() as undo:
            made = glue.register(domain.handle, address, size, address)
            undo.callback(glue.deregister, made)
            planned = KeyPlan(address, size, AccessMode.KLM, 0, (Span(address, size, 0),))
            indirect = create_key(domain, planned, [made.key], 0)
            undo.callback(glue.destroy, indirect)
            self._undo = undo.pop_all()
        #: What a queue is given.
        self.key = indirect.id << 8

    def close(self) -> None:
        """Take it back.

        :raise DeviceError: when a queue still uses it.
        """
        self._undo.close()


class Buffer:
    """Zeroed memory of this process, whole pages of it, that is the device's to work with (a UMEM)."""

    def __init__(self, domain: Domain, size: int) -> None:
        """
        :param size: bytes.
        :raise DeviceError: when the device does not take it.
        """
        self.size = size
        self._memory = mmap.mmap(-1, size)
        self._view = ffi.from_buffer(self._memory)
        self._domain = domain
        try:
            #: Where it is in this process.
            self.address = int(ffi.cast("uintptr_t", self._view))
            self._umem = domain.glue.register_umem(domain.context, self.address, size)
        except BaseException:
            self._release()
            raise
        self.id = self._umem.id

    def _release(self) -> None:
        ffi.release(self._view)
        self._memory.close()

    def read(self, offset: int, size: int) -> bytes:
        """What is there."""
        return self._memory[offset : offset + size]

    def write(self, offset: int, data: bytes) -> None:
        """Put something there."""
        self._memory[offset : offset + len(data)] = data

    def close(self) -> None:
        """Take it back. The memory stays where the device does not let go of it.

        :raise DeviceError: when the device still uses it.
        """
        try:
            self._domain.glue.deregister_umem(self._umem)
        except DeviceError:
            self._domain.kept.append(self._memory)
            raise
        self._release()
