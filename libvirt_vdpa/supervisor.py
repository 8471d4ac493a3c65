"""Starts, adopts, watches and ends port processes.

Carries out what ports.TRANSITIONS orders: this is where a port's process, its socket's owner and mode,
its record and its control connection are. Which ports there should be is lifecycle.py's concern.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from datapath.vdpa import LogMode
from libvirt_vdpa.client import ControlClient, ControlError
from libvirt_vdpa.config import SocketConfig
from libvirt_vdpa.ports import (
    PORTS_FOLDER,
    Action,
    Event,
    PortLife,
    Record,
    RecordError,
    State,
    adoption,
)
from libvirt_vdpa.process import Process, ProgramError, find_program, log_size, start_time

logger = logging.getLogger(__name__)

PROGRAM = "virt-vdpa-port"
#: Seconds until a started process must answer, unless told otherwise.
START_LIMIT = 7.0
#: Seconds between looks at whether a process's sockets have appeared, and between tries to connect to one
#: that a dead process may have left. A look costs nothing beside a connection, and libvirt waits for us.
LOOK_INTERVAL = 0.002
READY_INTERVAL = 0.01
#: Seconds between two questions to a port that serves, and until it must have answered each.
WATCH_INTERVAL = 5.0
ANSWER_LIMIT = 5.0
#: Seconds that a process has to end itself before it is killed.
END_LIMIT = 3.0
#: Seconds before the second and the last of many tries to start a process again; the first is at once.
RETRY_FIRST = 0.1
RETRY_LAST = 5.0
#: Seconds of service after which a process that dies is tried again at once.
STEADY = 10.0
#: Mode of the folder of a domain's vhost-user sockets: QEMU's user passes through to them. Where QEMU makes
#: one itself it may do that, and remove nothing but its own; nothing found there is trusted.
PASS_THROUGH = 0o711
MAKE_SOCKETS = 0o1771
#: States of a port process in which a front-end is there.
CONNECTED = ("connected", "running")
#: Event of a port process -> the part of its status that it brings up to date.
STATUS_OF_EVENT = {"PORT_LOG": "log", "PORT_ANNOUNCE": "announce"}
#: Policies of announcing (metadata's `announce`) in which the port sends nothing on its uplink.
SILENT = ("guest", "off")


class PortError(Exception):
    """A port that cannot be started; the text gives the reason, as the process told it."""


class Port:
    """One port and its process. Made by `Supervisor`; calls between the two stay in this module."""

    def __init__(
        self,
        record: Record,
        owner: SocketConfig,
        changed: Callable[["Port"], None],
        start_limit: float = START_LIMIT,
    ) -> None:
        self.record = record
        self._start_limit = start_limit
        #: The last that was heard from the process, an answer to query-status.
        self.status: dict[str, object] = {}
        #: Why it is not serving, as far as known.
        self.problem = ""
        self.restarts = 0
        self._owner = owner
        self._changed = changed
        self._life = PortLife()
        self._process: Process | None = None
        self._client: ControlClient | None = None
        self._attendant: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        #: DIED, on its way for want of a process.
        self._stillborn: asyncio.Handle | None = None
        self._delay = 0.0
        self._served_since: float | None = None
        #: Size of the log when the process was started or found.
        self._log_mark = 0
        #: Why we have ended the process ourselves, until it has.
        self._killed_for = ""
        self._transition = asyncio.Event()

    @property
    def state(self) -> State:
        """Where the port is in its life."""
        return self._life.state

    def feed(self, event: Event) -> None:
        """Let something happen to the port and do what its table says."""
        before = self.state
        action = self._life.feed(event)
        if self.state is not before:
            logger.info("%s: %s -> %s (%s)", self.record.label, before.value, self.state.value, event.value)
            self._cancel_timer()
        ACTIONS[action](self)
        if self.state is not State.GONE:
            self.record = replace(self.record, state=self.state.value)
            self._save()
        # Whoever waits is woken once; a new event is for those who wait next.
        self._transition.set()
        self._transition = asyncio.Event()
        self._changed(self)

    async def settled(self, *states: State) -> None:
        """Wait until the port is in one of the states."""
        while self.state not in states:
            await self._transition.wait()

    def arrived(self) -> None:
        """The guest that the port was made for is here. Idempotent."""
        if self.record.arriving:
            self.record = replace(self.record, arriving=False)
            self._save()

    def note_link(self, link_up: bool, *, cut: bool) -> None:
        """Whether the operator wants the guest to see a link, and whether it is kept from it. Idempotent."""
        if (self.record.link_up, self.record.link_cut) != (link_up, cut):
            self.record = replace(self.record, link_up=link_up, link_cut=cut)
            self._save()

    async def query_status(self) -> dict[str, object]:
        """Ask the process how it is.

        :raise ControlError: when it does not answer.
        """
        if self._client is None:
            raise ControlError(f"{self.record.control}: not connected")
        self.status = await self._client.query("query-status")
        self._note_former()
        return self.status

    async def ask(self, command: str, arguments: dict[str, object] | None = None) -> object:
        """Have the process execute a command.

        :raise ControlError: when it does not answer, or refuses.
        """
        if self._client is None:
            raise ControlError(f"{self.record.control}: not connected")
        return await self._client.execute(command, arguments)

    async def adopt(self) -> None:
        """Take up, after a restart of the daemon, where the record says that the port was."""
        before = self.record
        self._log_mark = log_size(Path(self.record.log))
        self._process = await self._find_process()
        if self._process is None:
            logger.info("%s: was %s, has no process", self.record.label, before.state)
            self.record = self.record.with_process(None, None)
        else:
            logger.info("%s: was %s, adopts process %d", self.record.label, before.state, self._process.pid)
            self.record = self.record.with_process(self._process.pid, self._process.start_time)
            self._process.watch(self._ended)
            self._attend()
        for event in adoption(before, self._process is not None):
            self.feed(event)

    async def _find_process(self) -> Process | None:
        """The port's process: the recorded one, or one that was started just before the daemon died."""
        pid, started = self.record.pid, self.record.start_time
        if pid is not None and started is not None and (process := Process.find(pid, started)):
            return process
        with contextlib.suppress(ControlError):
            async with ControlClient(self.record.control, ANSWER_LIMIT) as client:
                answer = (await client.query("query-status")).get("pid")
                # The process will be signalled: its own word for which one it is does not do.
                if (answer, os.geteuid()) != client.peer:
                    logger.error("%s: not served by process %s", self.record.control, answer)
                elif (started := start_time(client.peer[0])) is not None:
                    return Process.find(client.peer[0], started)
        return None

    def disregard(self) -> None:
        """Stop watching; the process goes on. For the daemon's own end."""
        self._cancel_timer()
        if self._attendant is not None:
            self._attendant.cancel()
        if self._process is not None:
            self._process.close()

    # What the table orders

    def _spawn(self) -> None:
        record = self.record
        if self.state is State.RESTARTING and not uplink_is_there(record.uplink):
            # At a first start the process says so and ends; a guest that has run needs its NIC more.
            logger.error("%s: no uplink %s; its guest is not announced", record.label, record.uplink)
            record = replace(record, uplink=None)
        self._log_mark = log_size(Path(record.log))
        try:
            self._process = Process.spawn([find_program(PROGRAM), *port_arguments(record)], Path(record.log))
        except (ProgramError, OSError) as error:
            self.problem = str(error)
            self._die_soon()
            return
        self.record = self.record.with_process(self._process.pid, self._process.start_time)
        self._process.watch(self._ended)
        self._attend()

    def _terminate(self) -> None:
        self._signal(signal.SIGTERM)
        self._timer = asyncio.get_running_loop().call_later(END_LIMIT, self.feed, Event.HUNG)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _retry_later(self) -> None:
        loop = asyncio.get_running_loop()
        if self._served_since is not None and loop.time() - self._served_since >= STEADY:
            self._delay = 0.0
        self._served_since = None
        self.restarts += 1
        self._timer = loop.call_later(self._delay, self.feed, Event.RETRY)
        self._delay = min(max(2 * self._delay, RETRY_FIRST), RETRY_LAST)

    def _forget(self) -> None:
        for path in (Path(self.record.socket), Path(self.record.control), self.record.path):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.error("%s: %s cannot be removed: %s", self.record.label, path, error.strerror or error)
            # The folder stays as long as the domain has other ports.
            with contextlib.suppress(OSError):
                path.parent.rmdir()

    # What happens by itself

    def _note_former(self) -> None:
        """Forget what a guest had negotiated elsewhere once its front-end tells: it may boot another."""
        outdated = self.record.negotiated is not None and self.status.get("features_former", "") is None
        if outdated and not self.record.arriving:
            self.record = replace(self.record, negotiated=None)
            self._save()

    def _save(self) -> None:
        try:
            self.record.save()
        except OSError as error:
            logger.error("%s: its record cannot be written: %s", self.record.label, error)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send(number)
        else:
            self._die_soon()

    def _die_soon(self) -> None:
        """Have DIED follow, once, where there is no process whose end would bring it."""

        def die() -> None:
            self._stillborn = None
            self.feed(Event.DIED)

        if self._stillborn is None:
            self._stillborn = asyncio.get_running_loop().call_soon(die)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ended(self) -> None:
        process, self._process = self._process, None
        if self._attendant is not None:
            self._attendant.cancel()
            self._attendant = None
        assert process is not None
        words = process.obituary(PROGRAM, Path(self.record.log), self._log_mark)
        self.problem = self._killed_for or words.removeprefix(f"{self.record.label}: ")
        self._killed_for = ""
        if self.state is not State.ENDING:
            logger.warning("%s: the process ended: %s", self.record.label, self.problem)
        self.status = {}
        self.record = self.record.with_process(None, None)
        self.feed(Event.DIED)

    def _heard(self, name: str, data: dict[str, object]) -> None:
        """An event of the process: who is there, its VF's link, the log, announcements."""
        if name == "PORT_STATE":
            state, reason = data.get("state"), data.get("reason")
            logger.info("%s: %s%s", self.record.label, state, f" ({reason})" if reason else "")
            self.status["state"] = state
            self.status["front_end"] = state in CONNECTED
        elif name == "PORT_LINK":
            logger.info("%s: the VF's link is %s", self.record.label, data.get("link"))
            self.status["link"] = data.get("link")
        elif name in STATUS_OF_EVENT:
            known = self.status.get(STATUS_OF_EVENT[name])
            self.status[STATUS_OF_EVENT[name]] = {**(known if isinstance(known, dict) else {}), **data}
        else:
            return
        self._changed(self)

    def _attend(self) -> None:
        self._attendant = asyncio.create_task(self._look_after(), name=f"port {self.record.label}")

    async def _look_after(self) -> None:
        """From the process's start, or its adoption, to its end: wait until it answers, then keep asking."""
        try:
            async with asyncio.timeout(self._start_limit):
                client = await self._ready_client()
        except TimeoutError:
            self._give_up(f"{PROGRAM} was not ready within {self._start_limit:g} s")
            return
        except OSError as error:
            self._give_up(f"{error.filename or self.record.socket}: {error.strerror or error}")
            return
        self._client = client
        try:
            client.listen(self._heard)
            self._serve_begins()
            while True:
                await asyncio.sleep(WATCH_INTERVAL)
                await self.query_status()
        except ControlError as error:
            self._give_up(f"{PROGRAM} does not answer: {error}")
        finally:
            self._client = None
            await client.close()

    def _give_up(self, reason: str) -> None:
        logger.error("%s: %s; it is killed", self.record.label, reason)
        self._killed_for = reason
        self.feed(Event.HUNG)

    async def _ready_client(self) -> ControlClient:
        """A connection to a process that answers and whose socket is in place."""
        while True:
            while not self._sockets_exist():
                await asyncio.sleep(LOOK_INTERVAL)
            client = ControlClient(self.record.control, ANSWER_LIMIT)
            try:
                await client.connect()
                status = await client.query("query-status")
                if status.get("pid") == self.record.pid and self._socket_in_place():
                    self.status = status
                    return client
            except ControlError:
                pass
            except BaseException:
                await client.close()
                raise
            await client.close()
            await asyncio.sleep(READY_INTERVAL)

    def _sockets_exist(self) -> bool:
        """Whether there is something to connect to; the process makes its control socket first."""
        made = self.record.control if self.record.role == "connect" else self.record.socket
        return Path(made).exists()

    def _socket_in_place(self) -> bool:
        """Give the vhost-user socket to QEMU's user; False when it is not there yet. QEMU makes its own."""
        return self.record.role == "connect" or give_socket(Path(self.record.socket), self._owner)

    def _serve_begins(self) -> None:
        self.problem = ""
        self._served_since = asyncio.get_running_loop().time()
        offered = self.status.get("features_offered")
        # A guest that comes from elsewhere may have been offered more there, and not have taken it.
        first = self.record.features is None or self.state is State.STARTING
        if first and isinstance(offered, int):
            self.record = replace(self.record, features=offered)
        elif offered != self.record.features:
            logger.error(
                "%s: the VF offers features %s, before %s", self.record.label, offered, self.record.features
            )
        self.feed(Event.ANSWERED)


#: Action -> what carries it out.
ACTIONS: dict[Action, Callable[[Port], None]] = {
    Action.NONE: lambda port: None,
    Action.SPAWN: Port._spawn,
    Action.TERMINATE: Port._terminate,
    Action.KILL: Port._kill,
    Action.RETRY_LATER: Port._retry_later,
    Action.FORGET: Port._forget,
}


def port_arguments(record: Record) -> list[str]:
    """virt-vdpa-port's command line for a port."""
    arguments = [
        f"--socket-path={record.socket}",
        f"--device={record.device}",
        f"--control={record.control}",
        f"--name={record.label}",
        f"--mac={record.mac}",
    ]
    if record.role == "connect":
        arguments.append("--connect")
    if record.negotiated is not None:
        arguments.append(f"--negotiated={record.negotiated:#x}")
    if record.log_mode != LogMode.AUTO.value:
        arguments.append(f"--log-mode={record.log_mode}")
    if record.host_notifiers != "off":
        arguments.append(f"--host-notifiers={record.host_notifiers}")
    if record.features is not None:
        arguments.append(f"--features={record.features:#x}")
    if record.uplink is not None and record.announce not in SILENT:
        arguments.append(f"--uplink={record.uplink}")
    elif record.uplink is not None and record.uplink.startswith("nic="):
        arguments += [f"--uplink={record.uplink}", "--silent"]  # it filters what the guest receives
    return arguments


def uplink_is_there(uplink: str | None) -> bool:
    """Whether a port finds the network interface that it is to announce its guest on; True for all else."""
    kind, _, name = (uplink or "").partition("=")
    if kind != "interface":
        return True
    try:
        return socket.if_nametoindex(name) > 0
    except OSError:
        return False


def give_socket(path: Path, owner: SocketConfig) -> bool:
    """Give a socket to a user; False when there is none.

    The path may be in a folder where QEMU writes, so what is looked at is what is given, and never a link.
    """
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
        found = Path(f"/proc/self/fd/{descriptor}")
        os.chown(found, owner.uid, owner.gid)
        found.chmod(owner.mode)
    finally:
        os.close(descriptor)
    return True


class Supervisor:
    """All ports of this host."""

    def __init__(
        self,
        owner: SocketConfig,
        changed: Callable[[Port], None],
        forgotten: Callable[[Record], None],
        start_limit: float = START_LIMIT,
    ) -> None:
        """No ports yet; `adopt` finds those of an earlier daemon.

        :param owner: who may use the vhost-user sockets.
        :param changed: called after whatever happened to a port.
        :param forgotten: called when a port is gone, its process ended and its VF free.
        :param start_limit: seconds until a started process must answer.
        """
        self.ports: dict[tuple[str, str], Port] = {}
        self._owner = owner
        self._start_limit = start_limit
        self._notify = changed
        self._forgotten = forgotten

    def of_domain(self, uuid: str) -> list[Port]:
        """The ports of a domain."""
        return [port for port in self.ports.values() if port.record.uuid == uuid]

    def add(self, record: Record) -> Port:
        """A new port, recorded and without a process.

        :raise PortError: when its folders cannot be made, or it is there already.
        """
        port = self._insert(record)
        try:
            self._make_folders(record)
            record.save()
        except OSError as error:
            del self.ports[record.key]
            raise PortError(f"{error.filename}: {error.strerror or error}") from None
        return port

    def _make_folders(self, record: Record) -> None:
        """The folders of a port's sockets and record; they may be there, with other ports' or from before."""
        sockets, private = Path(record.socket).parent, record.path.parent
        for folder in (private.parent, private, sockets):
            folder.mkdir(mode=0o700, exist_ok=True)
        roles = {record.role, *(port.record.role for port in self.of_domain(record.uuid))}
        if "connect" in roles:
            os.chown(sockets, -1, self._owner.gid)
            sockets.chmod(MAKE_SOCKETS)
        else:
            os.chown(sockets, -1, os.getegid())
            sockets.chmod(PASS_THROUGH)

    async def start(self, port: Port) -> None:
        """Start a port's process and wait until it answers and its socket is in place.

        :raise PortError: when it ends instead.
        """
        port.feed(Event.START)
        await port.settled(State.SERVING, State.IDLE, State.GONE)
        if port.state is not State.SERVING:
            raise PortError(port.problem or f"{PROGRAM} ended; see {port.record.log}")

    def guest_left(self, port: Port) -> None:
        """QEMU is gone: whatever happens to the process now, nobody needs another."""
        port.feed(Event.GUEST_LEFT)

    async def release(self, port: Port) -> None:
        """End a port and wait until nothing of it is left."""
        port.feed(Event.RELEASE)
        await port.settled(State.GONE)

    async def adopt(self, run_folder: Path) -> None:
        """Take over the ports of an earlier daemon."""
        for path in sorted(run_folder.glob(f"{PORTS_FOLDER}/*/*.json")):
            try:
                await self._insert(Record.load(path)).adopt()
            except RecordError as error:
                logger.error("%s; it is left alone", error)
            except Exception:
                # Whatever is wrong with one port, the others' guests need us.
                logger.exception("%s: the port cannot be adopted", path)

    def disregard(self) -> None:
        """Let all ports run on without us."""
        for port in self.ports.values():
            port.disregard()

    def _insert(self, record: Record) -> Port:
        # The other one's process and VF would be lost sight of.
        if record.key in self.ports:
            raise PortError(f"{record.label}: there is such a port already, it is not replaced")
        port = Port(record, self._owner, self._changed, self._start_limit)
        self.ports[record.key] = port
        return port

    def _changed(self, port: Port) -> None:
        if port.state is State.GONE:
            self.ports.pop(port.record.key, None)
            self._forgotten(port.record)
        self._notify(port)
