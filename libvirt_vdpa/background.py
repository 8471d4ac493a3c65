"""Work that goes on by itself, in the event loop or beside it.

`Tasks` are those that nobody awaits: what they raise would otherwise be told when they are collected, if at
all. `in_background` is for what may never end, such as a write to sysfs, which waits for a driver to let go
of its function. asyncio's own threads are waited for when the loop closes and when Python ends. Ours are
not: one that the kernel keeps must not keep the daemon from ending.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class Tasks:
    """Tasks that nobody awaits, until they end or are stopped. Used in the event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Do something; what it raises is logged.

        :param name: what the log calls it.
        """
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(tell_failure)
        return task

    def stop(self) -> None:
        """Cancel them all."""
        for task in self._tasks:
            task.cancel()

    async def wait(self) -> None:
        """Wait until those that run now have ended, however."""
        if self._tasks:
            await asyncio.wait(self._tasks)


def tell_failure(task: asyncio.Task[Any]) -> None:
    """Log what a task that has ended raised, with where: nobody expected it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s failed", task.get_name(), exc_info=error)


async def in_background(name: str, work: Callable[[], Result]) -> Result:
    """Do something in a thread of its own, which goes on when nobody waits for it any more.

    :return: what `work` returns; what it raises is raised.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has closed meanwhile
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await done
