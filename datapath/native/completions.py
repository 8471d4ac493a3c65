"""The completions of a ConnectX' virtqueues as a Python object: the device's messages in, interrupts out.

Python only adds and removes queues; completions.c looks at them. Owns no descriptor and no memory that it is
given. Everything must stay as it was given until the queue is removed.
"""

import os
from typing import TYPE_CHECKING, NamedTuple

from datapath.native._native import ffi, lib

if TYPE_CHECKING:
    from _cffi_backend import FFI


class CompletionSource(NamedTuple):
    """A completion queue that is collapsed, and its receiver; addresses in this process."""

    #: Of the queue's only entry.
    entry: int
    #: Of the queue's doorbell record: consumer index, and how it is armed.
    cq_record: int
    #: Of the receiver's doorbell record: how many receives are posted.
    qp_record: int
    #: The firmware's number of the queue.
    number: int
    #: Receives that are posted, a power of two up to 32768.
    size: int


class Completions:
    """One thread that finds what the queues of a device have completed, and interrupts the guest."""

    def __init__(
        self,
        queues: int,
        *,
        mode: int,
        event_us: int,
        no_traffic_time: int,
        core: int | None,
        channel_fd: int,
        uar: int,
    ) -> None:
        """Start the thread, for queues 0 to `queues` - 1; it sleeps until one is added.

        :param mode: 0: look after a time that adapts; 1: after a fixed time; 2: on the device's events alone.
        :param event_us: microseconds; the step of mode 0, or the time of mode 1, 0: only yield.
        :param no_traffic_time: looks in a row that may find nothing until the device is asked for an event.
        :param core: processor of the thread; None: any.
        :param channel_fd: event channel on which the cookie of a queue is its number; made non-blocking.
        :param uar: address of the device's page to arm queues by.
        :raise OSError: when descriptors or threads have run out, or there is no such mode or processor.
        """
        self._queues = queues
        setup = {
            "queues": queues,
            "mode": mode,
            "event_us": event_us,
            "no_traffic_time": no_traffic_time,
            "core": -1 if core is None else core,
            "channel_fd": channel_fd,
            "page": ffi.cast("void *", uar),
        }
        opened = ffi.new("struct completions **")
        _check(lib.completions_open(ffi.new("struct completions_setup *", setup), opened))
        self._completions: FFI.CData | None = opened[0]
        #: Eventfd, readable when a queue's receiver has to be reset (its `event_errors` have grown), or
        #: the channel or the page has failed: the device is gone. Read it to take it back.
        self.broken_fd: int = lib.completions_broken_fd(self._completions)

    def add(self, index: int, source: CompletionSource, call: int | None) -> None:
        """Look at a queue from now on, from where its records say that it stands.

        The guest is interrupted once at first: a port that was killed may owe it that.

        :param call: eventfd that interrupts the guest; None: it is not interrupted.
        :raise OSError: when there is one of this number, or there cannot be such a one.
        """
        fields = {
            "entry": ffi.cast("void *", source.entry),
            "cq_record": ffi.cast("void *", source.cq_record),
            "qp_record": ffi.cast("void *", source.qp_record),
            "number": source.number,
            "size": source.size,
        }
        given = ffi.new("struct completion_source *", fields)
        _check(lib.completions_add(self._open(), index, given, _fd(call)))

    def set_call(self, index: int, call: int | None) -> None:
        """Interrupt the guest by another eventfd; on return the former one is not in use.

        It is interrupted at once if something was completed while there was none.

        :raise OSError: when no queue has this number.
        """
        _check(lib.completions_set_call(self._open(), index, _fd(call)))

    def remove(self, index: int) -> None:
        """Look no more; on return nothing that was given with the queue is in use. Idempotent.

        The guest is interrupted once more in any case: the device's message about what a queue has completed
        last may come after the queue was stopped.
        """
        lib.completions_remove(self._open(), index)

    def statistics(self) -> dict[str, int]:
        """Count since the thread was started.

        `completions.N`: messages of the device that a queue has completed something; `event_errors.N`:
        how often one of them was found to have failed; `interrupts.N`: of the guest.
        """
        result: dict[str, int] = {}
        for index in range(self._queues):
            count = lib.completions_count(self._open(), index)
            result[f"completions.{index}"] = count.completions
            result[f"event_errors.{index}"] = count.errors
            result[f"interrupts.{index}"] = count.interrupts
        return result

    def close(self) -> None:
        """End the thread; queues are let go as they are. Idempotent."""
        if self._completions is not None:
            lib.completions_close(self._completions)
            self._completions = None

    def _open(self) -> "FFI.CData":
        if self._completions is None:
            raise ValueError("completions are closed")
        return self._completions


def _fd(fd: int | None) -> int:
    return -1 if fd is None else fd


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
