"""Work that may never end, off the event loop: a write to sysfs waits for a driver to let go of its function.

asyncio's own threads are waited for when the loop closes and when Python ends. Ours are not: one that the
kernel keeps must not keep the daemon from ending.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


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
