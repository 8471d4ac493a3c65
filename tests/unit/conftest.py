"""What several unit tests share."""

from collections.abc import Iterator
from contextlib import ExitStack

import hypothesis
import pytest

from datapath.native.relay import Relay
from tests.harness.shadow_link import Link, MakeLink

# An example that takes long on a busy machine says nothing about the code.
hypothesis.settings.register_profile("without deadlines", deadline=None)
hypothesis.settings.load_profile("without deadlines")


@pytest.fixture
def make_link() -> Iterator[MakeLink]:
    """Makes shadow rings."""
    with ExitStack() as stack:

        def make(size: int = 8, start: int = 0, event_idx: bool = False, polled: bool = False) -> Link:
            link = Link(Relay(2), size, start, event_idx, polled)
            stack.callback(link.close)
            link.map()
            return link

        yield make
