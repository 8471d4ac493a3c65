"""The life of a port, as a table, and the record of it on disk.

Everything that decides what becomes of a port is in TRANSITIONS: from each state, each event that may
happen there leads to one next state and at most one action. `PortLife` interprets it. The supervisor
reports events (a process was started, answered, died …) and carries out the actions; it decides nothing.

A port is *wanted* from `prepare` until its guest has left or it is released; a wanted port whose process
dies is started again, with the same socket, VF and features, because its guest waits for it:

    idle -> starting -> serving <-> retrying/restarting          wanted
                           |
                       lingering                                 the guest has left, nobody restarts it
                           |
                        ending -> gone                           released

The record says on disk what a restarted daemon must know to go on: which process carries which VF for
which guest. It is one JSON file a port, replaced atomically, beside the port's control socket and apart
from its vhost-user socket: QEMU may write where that one is, and must not say what we believe.
"""

import json
import os
import stat
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path

#: Layout of the record; another number is not understood, but for the one before: what is new has a default.
RECORD_VERSION = 3
NEW_IN_VERSION_3 = {"link_cut": False, "host_notifiers": "off"}
#: Folder, in the run folder, of what is for root alone: records and control sockets, by domain.
PORTS_FOLDER = "ports"


class State(Enum):
    """Where a port is in its life."""

    #: The VF is held; there is no process.
    IDLE = "idle"
    #: The first process was started and has not answered yet.
    STARTING = "starting"
    #: A process answers.
    SERVING = "serving"
    #: The process died; another will be started.
    RETRYING = "retrying"
    #: Another process was started and has not answered yet.
    RESTARTING = "restarting"
    #: The guest has left; a process may still be there until the release.
    LINGERING = "lingering"
    #: The process was told to end.
    ENDING = "ending"
    #: Nothing is left.
    GONE = "gone"


class Event(Enum):
    """What happens to a port."""

    #: Somebody wants the process.
    START = "start"
    #: A restarted daemon found the process that the record speaks of.
    FOUND = "found"
    #: A restarted daemon found that the process is no more.
    LOST = "lost"
    #: The process answered and its socket is in place.
    ANSWERED = "answered"
    #: The process ended, for whatever reason.
    DIED = "died"
    #: The process did not answer, or did not end, in time.
    HUNG = "hung"
    #: It is time for another try.
    RETRY = "retry"
    #: QEMU is gone.
    GUEST_LEFT = "guest-left"
    #: The port is not needed any more.
    RELEASE = "release"


class Action(Enum):
    """What the supervisor has to do."""

    NONE = "none"
    #: Start a process.
    SPAWN = "spawn"
    #: Ask the process to end, with a deadline.
    TERMINATE = "terminate"
    #: End the process at once.
    KILL = "kill"
    #: See to it that RETRY comes, later each time.
    RETRY_LATER = "retry-later"
    #: Remove socket and record, give the VF back.
    FORGET = "forget"


TRANSITIONS: dict[State, dict[Event, tuple[State, Action]]] = {
    State.IDLE: {
        Event.START: (State.STARTING, Action.SPAWN),
        Event.FOUND: (State.RESTARTING, Action.NONE),
        Event.LOST: (State.RETRYING, Action.RETRY_LATER),
        Event.GUEST_LEFT: (State.IDLE, Action.NONE),
        Event.RELEASE: (State.GONE, Action.FORGET),
    },
    State.STARTING: {
        Event.ANSWERED: (State.SERVING, Action.NONE),
        # Not tried again: whoever waits for the start is told the reason.
        Event.DIED: (State.IDLE, Action.NONE),
        Event.HUNG: (State.STARTING, Action.KILL),
        Event.GUEST_LEFT: (State.LINGERING, Action.NONE),
        Event.RELEASE: (State.ENDING, Action.TERMINATE),
    },
    State.SERVING: {
        Event.DIED: (State.RETRYING, Action.RETRY_LATER),
        Event.HUNG: (State.SERVING, Action.KILL),
        Event.GUEST_LEFT: (State.LINGERING, Action.NONE),
        Event.RELEASE: (State.ENDING, Action.TERMINATE),
    },
    State.RETRYING: {
        Event.RETRY: (State.RESTARTING, Action.SPAWN),
        Event.GUEST_LEFT: (State.IDLE, Action.NONE),
        Event.RELEASE: (State.GONE, Action.FORGET),
    },
    State.RESTARTING: {
        Event.ANSWERED: (State.SERVING, Action.NONE),
        Event.DIED: (State.RETRYING, Action.RETRY_LATER),
        Event.HUNG: (State.RESTARTING, Action.KILL),
        Event.GUEST_LEFT: (State.LINGERING, Action.NONE),
        Event.RELEASE: (State.ENDING, Action.TERMINATE),
    },
    State.LINGERING: {
        Event.ANSWERED: (State.LINGERING, Action.NONE),
        Event.DIED: (State.IDLE, Action.NONE),
        Event.HUNG: (State.LINGERING, Action.KILL),
        Event.GUEST_LEFT: (State.LINGERING, Action.NONE),
        Event.RELEASE: (State.ENDING, Action.TERMINATE),
    },
    State.ENDING: {
        Event.ANSWERED: (State.ENDING, Action.NONE),
        Event.DIED: (State.GONE, Action.FORGET),
        Event.HUNG: (State.ENDING, Action.KILL),
        Event.GUEST_LEFT: (State.ENDING, Action.NONE),
        Event.RELEASE: (State.ENDING, Action.NONE),
    },
    State.GONE: {
        Event.GUEST_LEFT: (State.GONE, Action.NONE),
        Event.RELEASE: (State.GONE, Action.NONE),
    },
}
#: State in a record that a restarted daemon finds -> what it feeds to the port, when the process still
#: runs and when it does not; see `adoption`. Whoever waited for a start was told that it failed, so that is
#: undone. Where the guest has left and the process too, nothing is to be waited for: libvirt's `release` may
#: have come while no daemon was there, and will not come again. IDLE is either that or a start that failed;
#: the one port that is IDLE and wanted, `Record.awaits_start`, is excepted.
ADOPTION: dict[State, tuple[tuple[Event, ...], tuple[Event, ...]]] = {
    State.IDLE: ((Event.FOUND, Event.RELEASE), (Event.RELEASE,)),
    State.STARTING: ((Event.FOUND, Event.RELEASE), (Event.RELEASE,)),
    State.SERVING: ((Event.FOUND,), (Event.LOST,)),
    State.RETRYING: ((Event.FOUND,), (Event.LOST,)),
    State.RESTARTING: ((Event.FOUND,), (Event.LOST,)),
    State.LINGERING: ((Event.FOUND, Event.GUEST_LEFT), (Event.RELEASE,)),
    State.ENDING: ((Event.FOUND, Event.RELEASE), (Event.RELEASE,)),
    State.GONE: ((Event.FOUND, Event.RELEASE), (Event.RELEASE,)),
}


class PortLifeError(Exception):
    """An event where the table knows none: our bug."""


class PortLife:
    """One port's way through TRANSITIONS."""

    def __init__(self) -> None:
        self.state = State.IDLE

    def feed(self, event: Event) -> Action:
        """Take one step.

        :return: what to do now.
        :raise PortLifeError: when the event cannot happen in this state.
        """
        try:
            self.state, action = TRANSITIONS[self.state][event]
        except KeyError:
            raise PortLifeError(f"event '{event.value}' in state '{self.state.value}'") from None
        return action


class RecordError(Exception):
    """A record that cannot be used; the text names the file."""


@dataclass(frozen=True)
class Record:
    """What a daemon must know of a port to go on with it. Replaced, never changed."""

    #: The domain's name and UUID, the interface's MAC.
    domain: str
    uuid: str
    mac: str
    #: Device string of virt-vdpa-port, such as "ifcvf,vfio-user=/run/vf0.sock".
    device: str
    #: Pool the VF was lent from; None when the domain names the VF.
    pool: str | None
    #: Our role on the vhost-user socket: "listen" or "connect".
    role: str
    #: Paths of the vhost-user socket, of the port's control socket and of its log.
    socket: str
    control: str
    log: str
    state: str = State.IDLE.value
    #: The process and the time it started, in clock ticks since boot: together they name it for ever.
    pid: int | None = None
    start_time: int | None = None
    #: Virtio features that the first process offered, here or where the guest came from: a guest must not
    #: find others later.
    features: int | None = None
    #: Virtio features that the guest had negotiated when it came here; None when it was started here, or its
    #: front-end has told of its features since: those are kept there.
    negotiated: int | None = None
    #: Whether it was made for a guest that is to come from another host, and has not yet.
    arriving: bool = False
    #: Whether the guest is to see a link, as the operator wants it.
    link_up: bool = True
    #: Whether it sees none, though it is to, because its VF has none; or, having come from elsewhere, may
    #: see none.
    link_cut: bool = False
    #: Seconds after which QEMU looks for a port that has gone; 0: it does not.
    reconnect: int = 0
    #: Who marks the pages that the VF writes while the guest migrates: a LogMode's value.
    log_mode: str = "auto"
    #: Whether the guest's kicks may reach the VF without the port: virt-vdpa-port's --host-notifiers.
    host_notifiers: str = "off"
    #: Who tells the network where the guest is after a migration, as its metadata says, and further rounds.
    announce: str = "auto"
    announce_rounds: int = 0
    #: Where the port sends what announces its guest, virt-vdpa-port's --uplink; None: nowhere.
    uplink: str | None = None
    version: int = RECORD_VERSION

    @property
    def key(self) -> tuple[str, str]:
        """What tells a port from all others: domain UUID and MAC."""
        return self.uuid, self.mac

    @property
    def label(self) -> str:
        """What logs call the port."""
        return f"{self.domain}/{self.mac}"

    @property
    def awaits_start(self) -> bool:
        """Whether its first process comes with `start`: `prepare` has been, QEMU is to make the socket.

        Not of a port that a migrating guest is to come to: its source goes on without it.
        """
        return self.state == State.IDLE.value and self.role == "connect" and self.features is None

    @property
    def path(self) -> Path:
        """The record's file."""
        return Path(self.control).with_suffix(".json")

    def save(self) -> None:
        """Write the file, whole or not at all. The run folder does not outlive the host: no fsync."""
        write_atomically(self.path, json.dumps(asdict(self), indent=1) + "\n")

    def with_process(self, pid: int | None, start_time: int | None) -> "Record":
        """The same port carried by another process."""
        return replace(self, pid=pid, start_time=start_time)

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Read a record back.

        :raise RecordError: when the file is not one of ours, or of another version.
        """
        try:
            # Neither led elsewhere by a link nor kept waiting by a pipe.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise RecordError(f"{path}: not a file")
                if status.st_uid != os.geteuid():
                    raise RecordError(f"{path}: belongs to another user")
                content = json.load(file)
        except OSError as error:
            raise RecordError(f"{path}: {error.strerror or error}") from None
        except ValueError as error:
            raise RecordError(f"{path}: {error}") from None
        return cls._from_json(path, content)

    @classmethod
    def _from_json(cls, path: Path, content: object) -> "Record":
        if isinstance(content, dict) and content.get("version") == 2:
            content |= {**NEW_IN_VERSION_3, "version": RECORD_VERSION}
        if not isinstance(content, dict) or content.get("version") != RECORD_VERSION:
            raise RecordError(f"{path}: not a record of version {RECORD_VERSION}")
        members = fields(cls)
        if set(content) != {member.name for member in members}:
            raise RecordError(f"{path}: has other members than a record")
        for member in members:
            assert not isinstance(member.type, str)
            if not isinstance(content[member.name], member.type):
                raise RecordError(f"{path}: '{member.name}' has the wrong type")
        record = cls(**content)
        if record.state not in {state.value for state in State}:
            raise RecordError(f"{path}: there is no state '{record.state}'")
        if record.path != path:
            raise RecordError(f"{path}: belongs to another path, {record.path}")
        return record


def adoption(record: Record, alive: bool) -> tuple[Event, ...]:
    """What a restarted daemon feeds to a port whose record it has found.

    :param alive: whether the port's process runs.
    """
    if record.awaits_start and not alive:
        return ()
    return ADOPTION[State(record.state)][0 if alive else 1]


def control_path(run_folder: Path, uuid: str, mac: str) -> Path:
    """Where the control socket of a port is, and its record beside it."""
    return run_folder / PORTS_FOLDER / uuid / f"{mac}.ctl"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file, so that whoever reads it finds the old or the new content, whole."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(temporary, new, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)
