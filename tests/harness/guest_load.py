"""As much traffic as goes between a guest and its host, and what of it arrives: native/load.c at the peer.

The guest's side is in its image.
"""

import json
from dataclasses import dataclass
from typing import Literal

from tests.harness.compiled import compiled
from tests.harness.guest import LOAD_PORT
from tests.harness.host import Host

#: To the guest and from it; an echo is of datagrams, one at a time.
What = Literal["stream-in", "stream-out", "datagrams-in", "datagrams-out", "echo"]


@dataclass(frozen=True)
class Load:
    """What has arrived."""

    #: Datagrams, or calls that received some of a stream.
    count: int
    bytes: int
    #: Between the first and the last that came.
    seconds: float
    #: Microseconds for an echo: the median and the 99th percentile.
    median_us: float = 0.0
    most_us: float = 0.0


def load(host: Host, address: str, what: What, *, size: int, seconds: float, rate: int = 0) -> Load:
    """Load the way between a host and its guest.

    :param address: the guest's.
    :param size: bytes of a datagram's payload, or of a call that sends some of a stream.
    :param rate: datagrams per second that the host sends at the most; 0: as many as it can.
    :raise HarnessError: when the guest does not answer.
    """
    words = ["drive", address.partition("/")[0], LOAD_PORT, what, size, round(seconds * 1000), rate]
    told = host.run([compiled("load", "-static"), *map(str, words)], seconds=seconds + 60).stdout
    return read_load(told)


def read_load(told: str) -> Load:
    """What the program printed."""
    return Load(**json.loads(told))
