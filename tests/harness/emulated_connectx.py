"""The emulated ConnectX under its driver, in the test's own process, with a cable for each of its pairs.

Owns cables and device strings. What goes wrong is an option of the emulation, or done to the cables' guest.
"""

import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from datapath.drivers.mlx5.glue import Glue
from datapath.emulation.mlx5 import LIBRARY
from datapath.mlx5_mailbox import get
from datapath.mlx5_prm import COMMAND_IN, Opcode
from datapath.vdpa import DeviceError, DeviceSpec
from tests.harness.closeable import Closeable
from tests.harness.wire import frame, number_of

#: Datagrams of a frame that a cable may hold: as long a queue as a TAP's.
CABLE_BYTES = 1 << 20


class Cable(Closeable):
    """The cable of a pair; the test has the far end."""

    def __init__(self) -> None:
        self.near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.near.setblocking(False)
        self._far.settimeout(5)
        for end in (self.near, self._far):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CABLE_BYTES)

    def send(self, *numbers: int) -> None:
        """Send numbered frames to the guest."""
        for number in numbers:
            self.send_bytes(frame(number))

    def send_bytes(self, data: bytes) -> None:
        """Send a frame of any kind."""
        self._far.send(data)

    def expect(self, *numbers: int) -> None:
        """Wait for numbered frames from the guest, in that order.

        :raise TimeoutError: when one does not come.
        """
        for number in numbers:
            data = self._far.recv(2048)
            assert data == frame(number), f"frame {number_of(data)} instead of {number}"

    def drain(self, seconds: float = 0.0) -> list[int]:
        """The numbers of the frames that have come, until there is none for so long."""
        numbers = []
        while select.select([self._far], [], [], seconds)[0]:
            number = number_of(self._far.recv(2048))
            assert number is not None
            numbers.append(number)
        return numbers

    def close(self) -> None:
        self.near.close()
        self._far.close()


class Card(Closeable):
    """What the next device that is opened in this process will be."""

    def __init__(self, pairs: int = 1, **options: int) -> None:
        """
        :param options: see datapath/emulation/mlx5/options.h; commands take no time unless they are to.
        """
        self.cables = [Cable() for _ in range(pairs)]
        #: Of its RDMA device: of this process alone, for the name says who holds the device.
        self.name = f"mlx5_t{os.getpid()}"
        self.pairs = pairs
        self.configure(**options)

    def configure(self, **options: int) -> None:
        """Choose options anew, for the device that is opened next."""
        ends = ":".join(str(cable.near.fileno()) for cable in self.cables)
        chosen = {"latency_us": 0, **options, "name": self.name, "pairs": self.pairs, "uplink": ends}
        os.environ["MLX5_EMULATION"] = ",".join(f"{name}={value}" for name, value in chosen.items())

    def spec(self, **options: int | str) -> DeviceSpec:
        """The device string, with options of the driver."""
        chosen = {"ibdev": self.name, "libibverbs": LIBRARY, "libmlx5": LIBRARY, **options}
        return DeviceSpec("mlx5", {name: str(value) for name, value in chosen.items()})

    def close(self) -> None:
        os.environ.pop("MLX5_EMULATION", None)
        for cable in self.cables:
            cable.close()


def opcode_of(mailbox: bytes) -> str:
    """What a command is called."""
    return Opcode(get(COMMAND_IN, mailbox, "opcode")).name


#: Call of the glue that makes something -> the one that gives it back.
GIVEN_BACK = {
    "open": "close",
    "alloc_pd": "dealloc_pd",
    "register": "deregister",
    "alloc_null_mr": "deregister",
    "register_umem": "deregister_umem",
    "create": "destroy",
    "alloc_uar": "free_uar",
    "alloc_var": "free_var",
    "create_event_channel": "destroy_event_channel",
    "create_domain": "destroy_domain",
    "create_root_table": "destroy_table",
    "create_matcher": "destroy_matcher",
    "create_tir_action": "destroy_action",
    "create_rule": "destroy_rule",
}


#: Calls that the firmware hears nothing of, as the emulation counts.
NO_COMMANDS = {
    *("open", "close", "free_uar", "free_var", "create_event_channel", "destroy_event_channel"),
    *("create_domain", "create_root_table", "create_matcher", "create_tir_action", "create_rule"),
    *("destroy_domain", "destroy_table", "destroy_matcher", "destroy_action", "destroy_rule"),
}


class Witness:
    """Sees what is told to devices from now on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        #: Names of calls, or of commands where they are mailboxes.
        self.calls: list[str] = []
        #: What was made and has not been given back.
        self.alive: list[Any] = []
        #: Those of the calls that have failed.
        self.failed: list[str] = []
        for make in GIVEN_BACK:
            patch.setattr(Glue, make, self._making(make, getattr(Glue, make)))
        for back in set(GIVEN_BACK.values()):
            patch.setattr(Glue, back, self._giving_back(back, getattr(Glue, back)))
        for name in ("modify", "query", "command"):
            patch.setattr(Glue, name, self._telling(getattr(Glue, name)))

    def _making(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def make(glue: Glue, *given: Any) -> Any:
            with self._seen(opcode_of(given[1]) if name == "create" else name):
                made = real(glue, *given)
            self.alive.append(made)
            return made

        return make

    def _giving_back(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def give_back(glue: Glue, what: Any) -> None:
            with self._seen(name):
                real(glue, what)
            self.alive.remove(what)

        return give_back

    def _telling(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def tell(glue: Glue, what: Any, mailbox: bytes, *rest: Any) -> Any:
            with self._seen(opcode_of(mailbox)):
                return real(glue, what, mailbox, *rest)

        return tell

    @contextmanager
    def _seen(self, name: str) -> Iterator[None]:
        self.calls.append(name)
        try:
            yield
        except DeviceError:
            self.failed.append(name)
            raise

    @property
    def commands(self) -> int:
        """How many of the calls that are remembered were for the firmware."""
        return sum(name not in NO_COMMANDS for name in self.calls)

    def take(self) -> list[str]:
        """The calls since the last look."""
        calls, self.calls = self.calls, []
        return calls
