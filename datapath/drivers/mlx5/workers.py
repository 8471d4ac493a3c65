"""Threads that talk to the firmware, so that who wants something of it does not wait for ever.

A command is a system call that returns when the firmware has answered; where that has died, the kernel gives
up after a minute (MLX5_CMD_TIMEOUT_MSEC in Linux' drivers/net/ethernet/mellanox/mlx5/core/cmd.c), with a
guest standing still all the while. So commands are given in threads that are left behind when they come to
nothing.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from datapath.drivers.mlx5.glue import Glue

#: Seconds that the firmware has for each thing that it is told.
DEADLINE = 3.0
#: Seconds between two calls of whoever is called meanwhile.
MEANWHILE = 0.1

Result = TypeVar("Result")


class _Batch:
    """Tasks that were given together, and what has become of them."""

    def __init__(self, tasks: Sequence[Callable[[], object]]) -> None:
        self.results: list[object] = [None] * len(tasks)
        self.errors: list[BaseException] = []
        #: How many are not done yet.
        self.left = len(tasks)
        self._tasks = tasks
        self._lock = threading.Lock()
        self.done = threading.Event()

    def do(self, number: int) -> None:
        try:
            self.results[number] = self._tasks[number]()
        except BaseException as error:  # it is raised where the batch was given
            self.errors.append(error)
        with self._lock:
            self.left -= 1
            if not self.left:
                self.done.set()


class Workers:
    """Up to `count` threads, started when there is something for them."""

    def __init__(self, glue: Glue, count: int, deadline: float = DEADLINE) -> None:
        """
        :param glue: takes no more calls once the firmware has been given up.
        :param count: 0 is 1: what they are given is done one after the other.
        :param deadline: seconds that the firmware has for a task.
        """
        self._glue = glue
        self._count = max(1, count)
        #: Seconds that the firmware has for a task.
        self.deadline = deadline
        self._waiting: queue.SimpleQueue[tuple[_Batch, int] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def run(
        self,
        *tasks: Callable[[], Result],
        more: float = 0.0,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Result]:
        """Do all of this, several at a time; returns when all is done, with the results.

        :param more: seconds that one may take beyond the deadline.
        :param meanwhile: called again and again until then.
        :raise DeviceLostError: when none has been done for so long, or the firmware was given up before.
        :raise Exception: what a task has raised, the first of those that did.
        """
        self._glue.check_alive()
        if not tasks:
            return []
        while len(self._threads) < min(self._count, len(tasks)):
            # A daemon: the process does not wait at its end for one that hangs in the kernel.
            thread = threading.Thread(target=self._work, name="mlx5", daemon=True)
            thread.start()
            self._threads.append(thread)
        batch = _Batch(tasks)
        for number in range(len(tasks)):
            self._waiting.put((batch, number))
        self._wait(batch, self.deadline + more, meanwhile)
        if batch.errors:
            raise batch.errors[0]
        return batch.results  # type: ignore[return-value]  # each is what its task returned

    def _wait(self, batch: _Batch, seconds: float, meanwhile: Callable[[], None]) -> None:
        left, until = batch.left, time.monotonic() + seconds
        while not batch.done.wait(MEANWHILE):
            meanwhile()
            if batch.left < left:
                left, until = batch.left, time.monotonic() + seconds
            elif time.monotonic() >= until:
                self._glue.give_up(f"its firmware has not answered within {round(seconds, 1):g} s")
                self._glue.check_alive()

    def close(self) -> None:
        """End the threads that have nothing to do."""
        for _ in self._threads:
            self._waiting.put(None)
        if not self._glue.given_up:
            for thread in self._threads:
                thread.join()
        self._threads.clear()

    def _work(self) -> None:
        while (next_one := self._waiting.get()) is not None:
            batch, number = next_one
            if not self._glue.given_up:
                batch.do(number)
