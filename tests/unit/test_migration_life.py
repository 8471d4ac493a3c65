"""The table of what becomes of a migration."""

import pytest

from libvirt_vdpa.migration_life import ENDS, TRANSITIONS, Action, Happening, MigrationLife, Phase

SOURCE = [Phase.SETUP, Phase.STARTING, Phase.COPYING, Phase.SWITCHING, Phase.ENDING]
DESTINATION = [Phase.INCOMING, Phase.ARRIVING, Phase.REFUSING]

#: Way through the table: where it begins, and each happening with what it must lead to.
WAYS = {
    "well at the source": (
        Phase.SETUP,
        [
            (Happening.ACTIVE, Phase.STARTING, Action.NONE),
            (Happening.LOGGING, Phase.COPYING, Action.NONE),
            (Happening.SWITCH, Phase.SWITCHING, Action.TAKE_FIGURES),
            (Happening.SENT, Phase.LEAVING, Action.TAKE_FIGURES),
            (Happening.LEFT, Phase.COMPLETED, Action.FINISH),
        ],
    ),
    "a log that never begins": (
        Phase.SETUP,
        [
            (Happening.ACTIVE, Phase.STARTING, Action.NONE),
            (Happening.PROBLEM, Phase.ENDING, Action.CANCEL),
            (Happening.STOPPED, Phase.RETURNING, Action.NONE),
            (Happening.QUIET, Phase.FAILED, Action.FINISH),
        ],
    ),
    "a log that fails": (
        Phase.COPYING,
        [
            (Happening.PROBLEM, Phase.ENDING, Action.CANCEL),
            (Happening.SWITCH, Phase.ENDING, Action.NONE),
            (Happening.STOPPED, Phase.RETURNING, Action.NONE),
        ],
    ),
    "cancelled too late": (
        Phase.SWITCHING,
        [
            (Happening.PROBLEM, Phase.ENDING, Action.CANCEL),
            (Happening.SENT, Phase.LEAVING, Action.TAKE_FIGURES),
            (Happening.LEFT, Phase.COMPLETED, Action.FINISH),
        ],
    ),
    "the destination cannot go on": (
        Phase.SWITCHING,
        [
            (Happening.SENT, Phase.LEAVING, Action.TAKE_FIGURES),
            (Happening.RUNS, Phase.RETURNING, Action.NONE),
            (Happening.QUIET, Phase.FAILED, Action.FINISH),
        ],
    ),
    "without QEMU's events": (
        Phase.SETUP,
        [
            (Happening.SWITCH, Phase.SWITCHING, Action.TAKE_FIGURES),
            (Happening.LEFT, Phase.COMPLETED, Action.FINISH),
        ],
    ),
    "well at the destination": (
        Phase.INCOMING,
        [
            (Happening.ACTIVE, Phase.INCOMING, Action.NONE),
            (Happening.SENT, Phase.ARRIVING, Action.NONE),
            (Happening.RUNS, Phase.COMPLETED, Action.WELCOME),
        ],
    ),
    "a port that is lost at the destination": (
        Phase.INCOMING,
        [
            (Happening.PROBLEM, Phase.REFUSING, Action.REFUSE),
            (Happening.GONE, Phase.FAILED, Action.FINISH),
        ],
    ),
    "refused too late": (
        Phase.INCOMING,
        [
            (Happening.PROBLEM, Phase.REFUSING, Action.REFUSE),
            (Happening.SENT, Phase.ARRIVING, Action.NONE),
            (Happening.RUNS, Phase.COMPLETED, Action.WELCOME),
        ],
    ),
    "lost after all has arrived": (
        # The guest may run any moment: only libvirt may end it now.
        Phase.ARRIVING,
        [(Happening.PROBLEM, Phase.ARRIVING, Action.NONE)],
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_way(way: tuple[Phase, list[tuple[Happening, Phase, Action]]]) -> None:
    begin, steps = way
    life = MigrationLife(begin)
    for happening, phase, action in steps:
        assert (life.feed(happening), life.phase) == (action, phase)


@pytest.mark.parametrize("phase", SOURCE)
def test_a_guest_that_stays_has_its_ports_watched(phase: Phase) -> None:
    life = MigrationLife(phase)
    assert (life.feed(Happening.STOPPED), life.phase) == (Action.NONE, Phase.RETURNING)


@pytest.mark.parametrize("phase", [*SOURCE, Phase.LEAVING, Phase.RETURNING, *DESTINATION])
def test_every_phase_ends_when_the_domain_does(phase: Phase) -> None:
    for happening in (Happening.GONE, Happening.LEFT):
        life = MigrationLife(phase)
        if happening is Happening.LEFT and phase in DESTINATION:
            # Told late of the QEMU that was here before.
            assert (life.feed(happening), life.phase) == (Action.NONE, phase)
        else:
            assert life.feed(happening) is Action.FINISH
            assert life.phase in ENDS


@pytest.mark.parametrize("phase", ENDS)
def test_nothing_happens_after_the_end(phase: Phase) -> None:
    for happening in Happening:
        life = MigrationLife(phase)
        assert (life.feed(happening), life.phase) == (Action.NONE, phase)


def test_what_is_told_twice_changes_nothing() -> None:
    # QEMU's events come by its own monitor and through libvirt.
    for begin, steps in WAYS.values():
        life = MigrationLife(begin)
        for happening, phase, _ in steps:
            life.feed(happening)
            if (phase, happening) != (Phase.ENDING, Happening.STOPPED):
                assert (life.feed(happening), life.phase) == (Action.NONE, phase)


def test_every_phase_is_in_the_table_and_reached() -> None:
    assert set(TRANSITIONS) == set(Phase)
    reached = {phase for steps in TRANSITIONS.values() for phase, _ in steps.values()}
    assert reached == set(Phase) - {Phase.SETUP, Phase.INCOMING}
