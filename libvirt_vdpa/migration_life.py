"""The life of a migration on either side, as a table.

Everything that decides what becomes of a migration is in TRANSITIONS: from each phase, each happening leads
to one next phase and at most one action. `MigrationLife` interprets it; migration.py reports happenings and
carries the actions out. What is not in the table changes nothing: QEMU's events come by two ways, so twice,
and libvirt's beside them.

    source:       setup -> starting -> copying -> switching -> leaving -> completed
                              |           |           |           |
                              +-> ending <+-----------+           |      a port's log cannot be relied on
                                    |                             |
                                 returning  <---------------------+      the guest stays; logs must end
                                    |
                                  failed

    destination:  incoming -> arriving -> completed
                     |           |
                  refusing ------+-> failed                              a port cannot be brought back
"""

from enum import Enum


class Phase(Enum):
    """Where a migration is."""

    #: Source: QEMU prepares.
    SETUP = "setup"
    #: Source: memory is copied, and not every port that runs is known to log.
    STARTING = "starting"
    #: Source: memory is copied, and the ports log.
    COPYING = "copying"
    #: Source: the guest stands still.
    SWITCHING = "switching"
    #: Source: QEMU has sent all; libvirt has yet to say that the guest runs elsewhere.
    LEAVING = "leaving"
    #: Source: we have asked for an end.
    ENDING = "ending"
    #: Source: the guest goes on here; the ports are to stop logging.
    RETURNING = "returning"
    #: Destination: the guest's memory arrives.
    INCOMING = "incoming"
    #: Destination: all has arrived, and the guest does not run yet.
    ARRIVING = "arriving"
    #: Destination: we have asked for an end.
    REFUSING = "refusing"
    #: Both: the guest is where it was to go.
    COMPLETED = "completed"
    #: Both: the guest is where it was.
    FAILED = "failed"


#: Nothing changes in them.
ENDS = (Phase.COMPLETED, Phase.FAILED)


class Happening(Enum):
    """What happens to a migration."""

    #: QEMU's status, the beginning of a pass over the memory, or a job that was found.
    ACTIVE = "active"
    #: The guest was stopped for the switch-over.
    SWITCH = "switch"
    #: QEMU's status: all was sent, or has arrived.
    SENT = "sent"
    #: QEMU's status: failed or cancelled; or libvirt knows of no job any more, and the domain is here.
    STOPPED = "stopped"
    #: Every port that runs marks what it writes.
    LOGGING = "logging"
    #: A port's log cannot be relied on, or has not begun in time; a port cannot be brought back.
    PROBLEM = "problem"
    #: No port logs any more, or one still does after a while.
    QUIET = "quiet"
    #: The guest runs (again) on this host, or could: it is paused by its user.
    RUNS = "runs"
    #: Another migration of the domain has begun.
    AGAIN = "again"
    #: The domain's QEMU has left this host, for the other one. At a destination it was an earlier one.
    LEFT = "left"
    #: The domain's QEMU has left this host in any other way.
    GONE = "gone"


class Action(Enum):
    """What is to be done."""

    NONE = "none"
    #: Take down what the ports have done, before they end.
    TAKE_FIGURES = "take-figures"
    #: Cancel the migration, until it has stopped.
    CANCEL = "cancel"
    #: End the incoming domain, until it has ended.
    REFUSE = "refuse"
    #: Announce the guest, and take down how long the ports took.
    WELCOME = "welcome"
    #: Say how it went.
    FINISH = "finish"


Steps = dict[Happening, tuple[Phase, Action]]

#: What may happen at the source in every phase before the guest has gone.
STAYS: Steps = {
    Happening.STOPPED: (Phase.RETURNING, Action.NONE),
    Happening.SENT: (Phase.LEAVING, Action.TAKE_FIGURES),
    Happening.LEFT: (Phase.COMPLETED, Action.FINISH),
    Happening.GONE: (Phase.FAILED, Action.FINISH),
}
TRANSITIONS: dict[Phase, Steps] = {
    Phase.SETUP: {
        **STAYS,
        Happening.ACTIVE: (Phase.STARTING, Action.NONE),
        Happening.SWITCH: (Phase.SWITCHING, Action.TAKE_FIGURES),
    },
    Phase.STARTING: {
        **STAYS,
        Happening.LOGGING: (Phase.COPYING, Action.NONE),
        Happening.PROBLEM: (Phase.ENDING, Action.CANCEL),
        Happening.SWITCH: (Phase.SWITCHING, Action.TAKE_FIGURES),
    },
    Phase.COPYING: {
        **STAYS,
        Happening.PROBLEM: (Phase.ENDING, Action.CANCEL),
        Happening.SWITCH: (Phase.SWITCHING, Action.TAKE_FIGURES),
    },
    Phase.SWITCHING: {
        **STAYS,
        # There is hardly time, but a guest that has lost writes had better stay.
        Happening.PROBLEM: (Phase.ENDING, Action.CANCEL),
        Happening.RUNS: (Phase.RETURNING, Action.NONE),
    },
    Phase.LEAVING: {
        Happening.LEFT: (Phase.COMPLETED, Action.FINISH),
        Happening.GONE: (Phase.COMPLETED, Action.FINISH),
        # The destination could not go on with what it got: libvirt lets the guest run here.
        Happening.RUNS: (Phase.RETURNING, Action.NONE),
        Happening.STOPPED: (Phase.RETURNING, Action.NONE),
        Happening.AGAIN: (Phase.FAILED, Action.FINISH),
    },
    Phase.ENDING: {**STAYS, Happening.RUNS: (Phase.RETURNING, Action.NONE)},
    Phase.RETURNING: {
        Happening.QUIET: (Phase.FAILED, Action.FINISH),
        Happening.AGAIN: (Phase.FAILED, Action.FINISH),
        Happening.LEFT: (Phase.COMPLETED, Action.FINISH),
        Happening.GONE: (Phase.FAILED, Action.FINISH),
    },
    Phase.INCOMING: {
        Happening.SENT: (Phase.ARRIVING, Action.NONE),
        Happening.RUNS: (Phase.COMPLETED, Action.WELCOME),
        Happening.PROBLEM: (Phase.REFUSING, Action.REFUSE),
        Happening.GONE: (Phase.FAILED, Action.FINISH),
    },
    Phase.ARRIVING: {
        Happening.RUNS: (Phase.COMPLETED, Action.WELCOME),
        Happening.GONE: (Phase.FAILED, Action.FINISH),
    },
    Phase.REFUSING: {
        # It is too late: the guest may run here any moment, with or without its port.
        Happening.SENT: (Phase.ARRIVING, Action.NONE),
        Happening.RUNS: (Phase.COMPLETED, Action.WELCOME),
        Happening.GONE: (Phase.FAILED, Action.FINISH),
    },
    Phase.COMPLETED: {},
    Phase.FAILED: {},
}


class MigrationLife:
    """One migration's way through TRANSITIONS."""

    def __init__(self, phase: Phase) -> None:
        """A migration begins.

        :param phase: SETUP at the source, INCOMING at the destination.
        """
        self.phase = phase

    def feed(self, happening: Happening) -> Action:
        """Take one step; what to do now."""
        self.phase, action = TRANSITIONS[self.phase].get(happening, (self.phase, Action.NONE))
        return action
