"""QEMU's monitor, for those inside the nested machine: on a virtio serial port rather than a socket.

By hand, since qemu.qmp speaks only over sockets, and importing it takes seconds under emulation.
"""

import json
import os
import select
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.harness.nested_hardware import MONITOR, cabled_function
from tests.harness.processes import HarnessError

#: Seconds that QEMU gets to answer, or for an event.
ANSWER_TIME = 30.0


class NestedMonitor:
    """The monitor of the machine that this process is inside; one at a time may have it."""

    def __init__(self) -> None:
        """
        :raise HarnessError: when there is no such port.
        """
        self._fd = os.open(_port(), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._received = b""
        self._commands = 0
        #: What has happened meanwhile and nobody has waited for yet, oldest first.
        self.events: list[dict[str, Any]] = []
        # Whoever had the port before has said it too; QEMU then only refuses it.
        self._answer("qmp_capabilities", {})

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Have QEMU do something.

        :raise HarnessError: when it refuses.
        """
        answer = self._answer(command, arguments or {})
        if "error" in answer:
            raise HarnessError(f"QEMU refused {command}: {answer['error']['desc']}")
        return answer["return"]

    def wait_for(self, event: str, seconds: float = ANSWER_TIME, **data: Any) -> dict[str, Any]:
        """Wait for an event whose data has all of `data`, or take one that has come already.

        :raise HarnessError: when it does not come in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            for come in self.events:
                if come["event"] == event and data.items() <= come.get("data", {}).items():
                    self.events.remove(come)
                    return come
            self.events.append(self._message(deadline, f"event {event}"))

    def unplug(self, number: int) -> None:
        """Ask this machine to let function `vf{number}` go, as an operator at the slot does; the event
        DEVICE_DELETED tells when it has."""
        self.execute("device_del", {"id": f"vf{number}"})

    def plug(self, number: int) -> None:
        """Plug function `vf{number}` in again."""
        self.execute("device_add", cabled_function(number))

    def _answer(self, command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        self._commands += 1
        # The process too, since what an earlier one has not read may still come.
        number = f"{os.getpid()}-{self._commands}"
        request = {"execute": command, "arguments": arguments, "id": number}
        os.write(self._fd, json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + ANSWER_TIME
        while (message := self._message(deadline, f"an answer to {command}")).get("id") != number:
            if "event" in message:
                self.events.append(message)
        return message

    def _message(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._fd], [], [], left)[0]:
                raise HarnessError(f"QEMU's monitor did not tell {what} in time")
            self._received += os.read(self._fd, 65536)
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Let another have it."""
        os.close(self._fd)


def _port() -> Path:
    """The port's device; which it is, only sysfs says where no udev makes links."""
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == MONITOR:
            return Path("/dev") / name.parent.name
    raise HarnessError(f"no virtio serial port {MONITOR}: not inside the nested machine?")
