"""Connections to libvirt: which a call gets, and what becomes of it."""

import libvirt
import pytest

from libvirt_vdpa.connections import MOST_IDLE, Connections


class Connection:
    """What is used of libvirt.virConnect."""

    def __init__(self) -> None:
        self.alive: int | None = 1
        self.closed = 0

    def isAlive(self) -> int:  # noqa: N802
        if self.alive is None:
            raise libvirt.libvirtError("isAlive")
        return self.alive

    def close(self) -> None:
        self.closed += 1
        if not self.alive:
            raise libvirt.libvirtError("close")


@pytest.fixture
def made() -> list[Connection]:
    return []


@pytest.fixture
def connections(made: list[Connection]) -> Connections:
    def connect() -> Connection:
        made.append(Connection())
        return made[-1]

    return Connections(connect)  # type: ignore[arg-type]


def test_one_is_used_again_and_by_one_call_at_a_time(
    connections: Connections, made: list[Connection]
) -> None:
    with connections.one() as first:
        pass
    with connections.one() as again, connections.one() as other:
        assert again is first
        assert other is not first
    assert len(made) == 2


@pytest.mark.parametrize("alive", [0, None], ids=["dead", "unknown"])
def test_a_dead_one_is_replaced(connections: Connections, made: list[Connection], alive: int | None) -> None:
    with connections.one():
        pass
    made[0].alive = alive
    with connections.one() as other:
        assert other is made[1]  # type: ignore[comparison-overlap]
    assert made[0].closed == 1


def test_a_calls_own_error_is_what_is_raised(connections: Connections, made: list[Connection]) -> None:
    def fail() -> None:
        with connections.one():
            made[0].alive = 0
            raise ZeroDivisionError

    connections.close()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert made[0].closed == 1


def test_few_are_kept_and_none_once_closed(connections: Connections, made: list[Connection]) -> None:
    def several(count: int) -> None:
        if count:
            with connections.one():
                several(count - 1)

    several(MOST_IDLE + 2)
    assert [connection.closed for connection in made].count(1) == 2
    connections.close()
    assert all(connection.closed == 1 for connection in made)
    several(1)
    assert made[-1].closed == 1
