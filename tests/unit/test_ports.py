"""A port's life: properties of the transition table, the stories it must tell, and the record."""

import dataclasses
import itertools
import json
import os
import threading
from pathlib import Path

import pytest

from libvirt_vdpa.ports import (
    ADOPTION,
    RECORD_VERSION,
    TRANSITIONS,
    Action,
    Event,
    PortLife,
    PortLifeError,
    Record,
    RecordError,
    State,
    adoption,
)

RECORD = Record(
    domain="vdpa-demo",
    uuid="7664d0a0-0001-4000-8000-000000000001",
    mac="52:54:00:76:64:01",
    device="ifcvf,vfio-user=/vf0.sock",
    pool="default",
    role="listen",
    socket="/r/u/52:54:00:76:64:01.sock",
    control="/r/ports/u/52:54:00:76:64:01.ctl",
    log="/l/x.log",
)

#: Events in order -> state and action at the end.
STORIES = {
    "start": ("start answered", State.SERVING, Action.NONE),
    "failed start is not tried again": ("start died", State.IDLE, Action.NONE),
    "hanging start is killed": ("start hung", State.STARTING, Action.KILL),
    "undone while starting": ("start release", State.ENDING, Action.TERMINATE),
    "died under a guest": ("start answered died", State.RETRYING, Action.RETRY_LATER),
    "tried again": ("start answered died retry", State.RESTARTING, Action.SPAWN),
    "back": ("start answered died retry answered", State.SERVING, Action.NONE),
    "never gives up": ("start answered died retry died", State.RETRYING, Action.RETRY_LATER),
    "hangs": ("start answered hung", State.SERVING, Action.KILL),
    "hung and killed": ("start answered hung died", State.RETRYING, Action.RETRY_LATER),
    "died after the guest": ("start answered guest-left died", State.IDLE, Action.NONE),
    "guest left a dead port": ("start answered died guest-left", State.IDLE, Action.NONE),
    "released": ("start answered guest-left release", State.ENDING, Action.TERMINATE),
    "gone": ("start answered guest-left release died", State.GONE, Action.FORGET),
    "does not end": ("start answered release hung", State.ENDING, Action.KILL),
    "released without a process": ("release", State.GONE, Action.FORGET),
    "released between two tries": ("start answered died release", State.GONE, Action.FORGET),
    "adopted": ("found answered", State.SERVING, Action.NONE),
    "adopted dead": ("lost retry", State.RESTARTING, Action.SPAWN),
}


@pytest.mark.parametrize("story", STORIES)
def test_story(story: str) -> None:
    events, state, action = STORIES[story]
    life = PortLife()
    last = [life.feed(Event(name)) for name in events.split()][-1]
    assert (life.state, last) == (state, action)


def test_what_cannot_happen_is_a_bug() -> None:
    with pytest.raises(PortLifeError, match="event 'answered' in state 'idle'"):
        PortLife().feed(Event.ANSWERED)


def test_every_state_is_in_the_table_and_can_be_reached() -> None:
    assert set(TRANSITIONS) == set(State)
    reached = {State.IDLE}
    while more := {state for at in reached for state, _ in TRANSITIONS[at].values()} - reached:
        reached |= more
    assert reached == set(State)


def test_libvirt_may_say_stopped_and_release_at_any_time() -> None:
    for state, event in itertools.product(State, (Event.GUEST_LEFT, Event.RELEASE)):
        assert event in TRANSITIONS[state], state


def test_from_everywhere_release_leads_to_gone() -> None:
    for state in State:
        after, action = TRANSITIONS[state][Event.RELEASE]
        if after is State.ENDING:
            assert action is Action.TERMINATE or state is State.ENDING
            after, action = TRANSITIONS[after][Event.DIED]
        assert after is State.GONE
        assert action is Action.FORGET or state is State.GONE


def test_only_gone_forgets_and_only_starting_states_spawn() -> None:
    for state, action in (pair for row in TRANSITIONS.values() for pair in row.values()):
        assert (action is Action.FORGET) <= (state is State.GONE)
        assert (action is Action.SPAWN) <= (state in {State.STARTING, State.RESTARTING})
        assert (action is Action.RETRY_LATER) == (state is State.RETRYING)


def test_a_process_may_die_wherever_there_is_one() -> None:
    with_process = {State.STARTING, State.SERVING, State.RESTARTING, State.LINGERING, State.ENDING}
    assert {state for state in State if Event.DIED in TRANSITIONS[state]} == with_process
    assert {state for state in State if Event.HUNG in TRANSITIONS[state]} == with_process


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("alive", [True, False])
def test_adoption_of_any_state_is_possible(state: State, alive: bool) -> None:
    life = PortLife()
    for event in ADOPTION[state][0 if alive else 1]:
        life.feed(event)
    if state in {State.SERVING, State.RETRYING, State.RESTARTING}:
        assert life.state is (State.RESTARTING if alive else State.RETRYING)
    elif not alive:
        assert life.state is State.GONE


@pytest.mark.parametrize(
    ("role", "features", "events"),
    [
        ("connect", None, ()),
        # It has served: the guest has left, and the process after it.
        ("connect", 1, (Event.RELEASE,)),
        # Its start failed, and that was told.
        ("listen", None, (Event.RELEASE,)),
    ],
)
def test_only_a_port_that_awaits_its_start_is_kept_idle(
    role: str, features: int | None, events: tuple[Event, ...]
) -> None:
    record = dataclasses.replace(RECORD, role=role, features=features)
    assert adoption(record, alive=False) == events
    assert adoption(record, alive=True) == (Event.FOUND, Event.RELEASE)


def test_record_comes_back_as_it_was(tmp_path: Path) -> None:
    control = tmp_path / "52:54:00:76:64:01.ctl"
    record = dataclasses.replace(
        RECORD, control=str(control), pid=12, start_time=34, features=1 << 63, pool=None
    )
    record.save()
    assert Record.load(record.path) == record
    assert record.path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["52:54:00:76:64:01.json"]


def test_record_of_the_version_before_is_understood(tmp_path: Path) -> None:
    record = dataclasses.replace(RECORD, control=str(tmp_path / "x.ctl"))
    before = {**dataclasses.asdict(record), "version": 2}
    del before["link_cut"], before["host_notifiers"]
    (tmp_path / "x.json").write_text(json.dumps(before))
    assert Record.load(tmp_path / "x.json") == record


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 1}, f"not a record of version {RECORD_VERSION}"),
        ({"pid": "12"}, "'pid' has the wrong type"),
        ({"features": 1.5}, "'features' has the wrong type"),
        ({"announce_rounds": "3"}, "'announce_rounds' has the wrong type"),
        ({"state": "happy"}, "there is no state 'happy'"),
        ({"surprise": 1}, "has other members than a record"),
        ({"control": "/elsewhere/x.ctl"}, "belongs to another path, /elsewhere/x.json"),
    ],
)
def test_record_that_is_not_ours(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    record = dataclasses.replace(RECORD, control=str(tmp_path / "x.ctl"))
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**dataclasses.asdict(record), **change}))
    with pytest.raises(RecordError, match=reason):
        Record.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_record_that_is_garbage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"x\.json"):
        Record.load(path)


def test_what_lies_where_a_record_is_written_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    record = dataclasses.replace(RECORD, control=str(tmp_path / "x.ctl"))
    (tmp_path / ".x.json.new").symlink_to(victim)
    record.save()
    assert victim.read_text() == "precious"
    assert not record.path.is_symlink()
    assert Record.load(record.path) == record


def test_a_link_to_a_record_is_none(tmp_path: Path) -> None:
    record = dataclasses.replace(RECORD, control=str(tmp_path / "x.ctl"))
    record.save()
    record.path.rename(tmp_path / "elsewhere")
    record.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecordError, match=r"x\.json: Too many levels of symbolic links"):
        Record.load(record.path)


def test_a_pipe_in_the_place_of_a_record_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    os.mkfifo(path)
    reasons: list[str] = []

    def load() -> None:
        try:
            Record.load(path)
        except RecordError as error:
            reasons.append(str(error))

    thread = threading.Thread(target=load)
    thread.start()
    thread.join(5)
    held_up = thread.is_alive()
    if held_up:
        # A writer that leaves again lets it go.
        path.write_bytes(b"")
        thread.join(5)
    assert not held_up
    assert reasons == [f"{path}: not a file"]
