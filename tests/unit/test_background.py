"""Work that nobody needs to wait for, in tasks and in threads."""

import asyncio
import subprocess
import sys
import threading

import pytest

from libvirt_vdpa.background import Tasks, in_background

#: Seconds after which a test fails rather than hangs.
DEADLINE = 10.0
#: A process whose thread never comes back.
KEPT = """
import asyncio, threading
from libvirt_vdpa.background import in_background

async def main():
    task = asyncio.create_task(in_background("kept", threading.Event().wait))
    await asyncio.wait({task}, timeout=0.01)
    task.cancel()

asyncio.run(main())
print("ended")
"""


def test_the_result_comes_back() -> None:
    def name() -> str:
        return threading.current_thread().name

    assert asyncio.run(in_background("worker", name)) == "worker"


def test_what_is_raised_comes_back() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"^no$"):
        asyncio.run(in_background("worker", fail))


def test_a_process_ends_although_its_thread_does_not() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KEPT], capture_output=True, text=True, timeout=DEADLINE, check=True
    )
    assert (done.stdout, done.stderr) == ("ended\n", "")


def test_one_that_comes_back_too_late_is_not_heard() -> None:
    let_go, has_ended = threading.Event(), threading.Event()

    def keep() -> None:
        let_go.wait(DEADLINE)
        has_ended.set()

    async def main() -> None:
        task = asyncio.create_task(in_background("late", keep))
        await asyncio.wait({task}, timeout=0.01)
        task.cancel()
        let_go.set()
        await asyncio.wait({task})
        assert task.cancelled()

    asyncio.run(main())
    assert has_ended.wait(DEADLINE)


def test_a_task_that_failed_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("no")

    async def main() -> None:
        tasks = Tasks()
        tasks.start(fail(), "trying")
        await tasks.wait()
        assert len(tasks) == 0

    asyncio.run(main())
    assert "trying failed" in caplog.text
    assert "ValueError: no" in caplog.text


def test_tasks_that_are_stopped_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        tasks = Tasks()
        task = tasks.start(asyncio.Event().wait(), "waiting")  # type: ignore[arg-type]
        await asyncio.sleep(0)
        tasks.stop()
        await tasks.wait()
        assert task.cancelled()

    asyncio.run(main())
    assert caplog.text == ""
