"""Recorded conversations: what programs that are not ours said to each other, kept under tests/unit/data.

One JSON object a line. The first names the origin: both programs with their versions, and how the
recording was taken. Each other line is one whole message: who sent it, how many descriptors came with
it, its bytes in hexadecimal; or a note for the reader on what was done at that moment.
tests/unit/data/README.md tells the rest.

Knows the file format only; what the bytes mean is for the codec under test to say.
"""

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "unit/data"


@dataclass(frozen=True)
class Recorded:
    """One message as it was seen on the socket."""

    #: "client" or "server" for vfio-user, "front-end" or "back-end" for vhost-user.
    sender: str
    data: bytes
    #: Number of descriptors that came with it.
    fds: int


@dataclass(frozen=True)
class Recording:
    """One file of recorded messages, in the order they were seen."""

    name: str
    #: Who spoke, in which version, how it was taken.
    origin: dict[str, str]
    messages: tuple[Recorded, ...]

    def sent_by(self, sender: str) -> tuple[Recorded, ...]:
        """One side's messages."""
        return tuple(message for message in self.messages if message.sender == sender)


def recording(name: str) -> Recording:
    """Read a file of tests/unit/data, named without its suffix: `vfio_user/qemu_client`."""
    first, *rest = (json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines())
    spoken = (line for line in rest if "note" not in line)
    messages = (Recorded(line["from"], bytes.fromhex(line["hex"]), line["fds"]) for line in spoken)
    return Recording(name, first["origin"], tuple(messages))


def recordings(folder: str) -> list[Recording]:
    """All recordings of one protocol, a folder of tests/unit/data."""
    return [recording(f"{folder}/{path.stem}") for path in sorted((FOLDER / folder).glob("*.jsonl"))]
