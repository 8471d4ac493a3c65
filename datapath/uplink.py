"""The wire of a VF as its port may use it beside the VF: frames that announce a guest, and a receive filter.

An `UplinkSpec` is what the command line says: `interface=NAME`, a network interface on the VF's wire, or
`nic=PATH,vf=N`, the control socket of an emulated NIC, which sends a frame as VF N does, and filters what
VF N receives. (A packet socket on its TAP would not do: what is sent there goes into the VF, not to the
bridge that the TAP is in.)

Owns the sockets. To send never waits: a guest that has just arrived stands still meanwhile. What can fail is
tried when the uplink is opened.
"""

import abc
import contextlib
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datapath.control import JsonStream, StreamError, encode
from datapath.loop import dispatch
from datapath.rx_filter import RxFilter

#: Seconds that an emulated NIC has to answer.
ANSWER_TIME = 2.0
#: Seconds between attempts to connect to a NIC that has gone.
RETRY_INTERVAL = 0.5

#: Told how a frame fared: None when it has left, else what is wrong.
Outcome = Callable[[str | None], None]


class UplinkSpecError(ValueError):
    """A text that names no uplink; it says why."""


class UplinkError(Exception):
    """An uplink that cannot be had; the text names it and the reason."""


@dataclass(frozen=True)
class UplinkSpec:
    """A parsed uplink: an interface, or a VF of an emulated NIC."""

    interface: str | None = None
    nic: Path | None = None
    vf: int = 0

    @classmethod
    def parse(cls, text: str) -> "UplinkSpec":
        """Take `interface=NAME` or `nic=PATH,vf=N` apart.

        :raise UplinkSpecError: for anything else.
        """
        parts = dict(part.partition("=")[::2] for part in text.split(","))
        if set(parts) == {"interface"} and parts["interface"]:
            return cls(interface=parts["interface"])
        if set(parts) == {"nic", "vf"} and parts["nic"] and parts["vf"].isdecimal():
            return cls(nic=Path(parts["nic"]), vf=int(parts["vf"]))
        raise UplinkSpecError(f"uplink '{text}': neither interface=NAME nor nic=SOCKET,vf=N")

    def __str__(self) -> str:
        if self.interface is not None:
            return f"interface={self.interface}"
        return f"nic={self.nic},vf={self.vf}"


class Uplink(abc.ABC):
    """An open uplink, for a loop that calls `poll` at `deadline`."""

    @abc.abstractmethod
    def send(self, frame: bytes, outcome: Outcome) -> None:
        """Send an Ethernet frame; `outcome` is called once, now or later."""

    @property
    def filters(self) -> bool:
        """Whether it takes receive filters."""
        return False

    def set_rx_filter(self, wanted: RxFilter | None, outcome: Outcome) -> None:
        """Have the VF receive what its guest wants and no more, None: all; `outcome` as with `send`.

        The filter is gone when the VF is let go.
        """
        outcome("such an uplink has no filter for one VF")

    def deadline(self) -> float | None:
        """When to call `poll` next (time.monotonic), if at all."""
        return None

    def poll(self) -> None:
        """Do what is due."""
        return

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of it; frames that are under way are forgotten."""


class InterfaceUplink(Uplink):
    """A network interface of the host. It needs CAP_NET_RAW."""

    def __init__(self, name: str) -> None:
        """:raise UplinkError: when there is no such interface, or it may not be used."""
        self._name = name
        self._socket = self._open()

    def _open(self) -> socket.socket:
        try:
            # Protocol 0: nothing is ever received.
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        except OSError as error:
            raise UplinkError(f"uplink {self._name}: {error.strerror}; it needs CAP_NET_RAW") from error
        try:
            sock.bind((self._name, 0))
        except OSError as error:
            sock.close()
            raise UplinkError(f"uplink {self._name}: {error.strerror}; is it an interface here?") from error
        return sock

    def send(self, frame: bytes, outcome: Outcome) -> None:
        problem = self._send(frame)
        if problem is not None:  # an interface that was made anew has the same name, and is another
            with contextlib.suppress(UplinkError):
                fresh = self._open()
                self._socket.close()
                self._socket = fresh
                problem = self._send(frame)
        outcome(problem)

    def _send(self, frame: bytes) -> str | None:
        try:
            self._socket.send(frame)
        except OSError as error:
            return f"uplink {self._name}: {error.strerror}"
        return None

    def close(self) -> None:
        self._socket.close()


class NicUplink(Uplink):
    """A VF of an emulated NIC, asked over its control socket (QMP; `vf-send`, `vf-rx-filter`).

    Commands are written as they come, `qmp_capabilities` first, and answered in order: nobody waits.
    """

    def __init__(self, path: Path, vf: int, selector: selectors.BaseSelector) -> None:
        """Connect, and see that the VF is there.

        :raise UplinkError: when nobody answers, or has no such VF.
        """
        self._name = f"uplink {path}"
        self._path = path
        self._vf = vf
        self._selector = selector
        self._socket: socket.socket | None = None
        self._stream = JsonStream()
        #: Who waits for the answers to come, and until when (time.monotonic).
        self._awaited: deque[tuple[float, Callable[[dict[str, Any]], None]]] = deque()
        self._retry = 0.0
        self._problem = ""
        found: list[dict[str, Any]] = []
        self._connect()
        self._ask("query-devices", {}, found.append)
        while self._awaited and self._socket is not None:
            dispatch(selector, max(0.0, self._awaited[0][0] - time.monotonic()), only={self._socket})
            self._drop_if_late()
        try:
            if not found or "return" not in found[0]:
                raise UplinkError(f"{self._name}: {self._problem or 'not the control socket of a NIC'}")
            count = len(found[0]["return"]["vfs"])
            if vf >= count:
                raise UplinkError(f"{self._name}: no VF {vf}; the NIC has {count}")
        except UplinkError:
            self.close()
            raise

    def send(self, frame: bytes, outcome: Outcome) -> None:
        self._order("vf-send", {"frame": frame.hex()}, outcome)

    @property
    def filters(self) -> bool:
        return True

    def set_rx_filter(self, wanted: RxFilter | None, outcome: Outcome) -> None:
        self._order("vf-rx-filter", {"filter": None if wanted is None else wanted.describe()}, outcome)

    def deadline(self) -> float | None:
        if self._socket is None:
            return self._retry
        return self._awaited[0][0] if self._awaited else None

    def poll(self) -> None:
        if self._socket is not None:
            self._drop_if_late()
        elif time.monotonic() >= self._retry:
            self._connect()

    def close(self) -> None:
        self._awaited.clear()
        self._drop("closed")

    def _connect(self) -> None:
        self._retry = time.monotonic() + RETRY_INTERVAL
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(str(self._path))
        except OSError as error:
            sock.close()
            self._problem = f"{error.strerror}; is the NIC running?"
            return
        self._socket = sock
        self._stream = JsonStream()
        self._selector.register(sock, selectors.EVENT_READ, self._receive)
        self._ask("qmp_capabilities", {}, lambda reply: None)

    def _order(self, command: str, arguments: dict[str, Any], outcome: Outcome) -> None:
        """Have the NIC do something for our VF."""

        def answered(reply: dict[str, Any]) -> None:
            outcome(None if "return" in reply else f"{self._name}: {reply['error'].get('desc', 'refused')}")

        if self._socket is None:
            self._connect()
        if self._socket is None:
            outcome(f"{self._name}: {self._problem}")
        else:
            self._ask(command, {"vf": self._vf, **arguments}, answered)

    def _ask(self, command: str, arguments: dict[str, Any], then: Callable[[dict[str, Any]], None]) -> None:
        if self._socket is None:
            return
        data = encode({"execute": command, "arguments": arguments})
        self._awaited.append((time.monotonic() + ANSWER_TIME, then))
        try:
            if self._socket.send(data, socket.MSG_NOSIGNAL) < len(data):
                self._drop("does not read what it is asked")
        except OSError as error:
            self._drop(str(error))

    def _receive(self, _mask: int) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(65536)
            for message in self._stream.feed(data):
                if ("return" in message or "error" in message) and self._awaited:
                    self._awaited.popleft()[1](message)
        except BlockingIOError:
            return
        except (OSError, StreamError) as error:
            self._drop(str(error))
            return
        if not data:
            self._drop("the NIC has ended")

    def _drop_if_late(self) -> None:
        if self._awaited and time.monotonic() >= self._awaited[0][0]:
            self._drop(f"no answer in {ANSWER_TIME:g} s")

    def _drop(self, problem: str) -> None:
        """Give the connection up, and tell whoever waits."""
        if self._socket is not None:
            self._selector.unregister(self._socket)
            self._socket.close()
            self._socket = None
        self._problem = problem
        waiting, self._awaited = self._awaited, deque()
        for _, then in waiting:
            then({"error": {"desc": problem}})


def open_uplink(spec: UplinkSpec, selector: selectors.BaseSelector) -> Uplink:
    """Make an uplink ready to send.

    :raise UplinkError: when it cannot be had.
    """
    if spec.interface is not None:
        return InterfaceUplink(spec.interface)
    assert spec.nic is not None
    return NicUplink(spec.nic, spec.vf, selector)
