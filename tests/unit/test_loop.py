"""The event loop that a port and an emulated NIC share."""

import os
import selectors
from collections.abc import Iterator

import pytest

from datapath.loop import dispatch


@pytest.fixture
def selector() -> Iterator[selectors.BaseSelector]:
    with selectors.DefaultSelector() as made:
        yield made


@pytest.fixture
def ready() -> Iterator[list[int]]:
    """Two eventfds that can be read."""
    fds = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(2)]
    yield fds
    for fd in fds:
        os.close(fd)


def test_only_what_is_asked_for_is_called_back(selector: selectors.BaseSelector, ready: list[int]) -> None:
    called: list[int] = []
    for fd in ready:
        selector.register(fd, selectors.EVENT_READ, lambda _mask, fd=fd: called.append(fd))
    dispatch(selector, 0, only={ready[1]})
    assert called == ready[1:]
    dispatch(selector, 0)
    assert sorted(called[1:]) == sorted(ready)


def test_what_was_served_meanwhile_is_not_called_back_again(
    selector: selectors.BaseSelector, ready: list[int]
) -> None:
    """A callback serves the other descriptor from within, and has it unregistered."""
    called: list[str] = []

    def other(_mask: int) -> None:
        called.append("other")
        selector.unregister(ready[1])

    def lasts(_mask: int) -> None:
        called.append("lasts")
        dispatch(selector, 0, only={ready[1]})

    selector.register(ready[0], selectors.EVENT_READ, lasts)
    selector.register(ready[1], selectors.EVENT_READ, other)
    dispatch(selector, 0)
    assert called.count("other") == 1
