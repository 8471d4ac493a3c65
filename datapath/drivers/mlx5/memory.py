"""The memory that a ConnectX reaches: a guest's, by one key for all its addresses, and buffers of its own.

Owns registrations and keys. Whatever fails on the way leaves nothing behind.
"""

import mmap
from collections.abc import Sequence
from contextlib import ExitStack

from datapath.drivers.mlx5.abi import ffi
from datapath.drivers.mlx5.glue import Context, DevxObject, Glue, ProtectionDomain
from datapath.drivers.mlx5.memory_plan import KeyPlan, plan
from datapath.mlx5_mailbox import pack
from datapath.mlx5_prm import CREATE_MKEY_IN, KLM
from datapath.vdpa import MemoryRegion

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
        with ExitStack() as undo:
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


def _create_key(domain: Domain, planned: KeyPlan, keys: Sequence[int], hole: int) -> DevxObject:
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


class GuestMemory:
    """Guest memory that a device reaches by guest physical addresses, through one key."""

    def __init__(self, domain: Domain, regions: Sequence[MemoryRegion]) -> None:
        """Register regions, which stay mapped as long as this is not closed.

        :raise DeviceError: when they overlap or are too many, or cannot be registered.
        """
        planned = plan([(region.guest_address, region.size) for region in regions])
        glue = domain.glue
        with ExitStack() as undo:
            keys = []
            for region in regions:
                made = glue.register(domain.handle, region.address, region.size, region.guest_address)
                undo.callback(glue.deregister, made)
                keys.append(made.key)
            hole = 0
            if any(entry.region is None for entry in planned.entries):
                nothing = glue.alloc_null_mr(domain.handle)
                undo.callback(glue.deregister, nothing)
                hole = nothing.key
            indirect = _create_key(domain, planned, keys, hole)
            undo.callback(glue.destroy, indirect)
            self._undo = undo.pop_all()
        #: What a queue is given: the number of the key, and a low byte that is 0 of an indirect one.
        self.key = indirect.id << 8

    def close(self) -> None:
        """Take the memory back.

        :raise DeviceError: when a queue still uses it; what is in no use is given back.
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
        self._glue = domain.glue
        try:
            address = int(ffi.cast("uintptr_t", self._view))
            self._umem = domain.glue.register_umem(domain.context, address, size)
        except BaseException:
            self._release()
            raise
        self.id = self._umem.id

    def _release(self) -> None:
        ffi.release(self._view)
        self._memory.close()

    def close(self) -> None:
        """Take it back. The memory stays where the device does not let go of it.

        :raise DeviceError: when the device still uses it.
        """
        self._glue.deregister_umem(self._umem)
        self._release()
