"""virt-vdpa stats: what ports have counted, queue by queue."""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from libvirt_vdpa.cli.query import ask, table
from libvirt_vdpa.client import ControlError

#: How a queue of an index is called: receive queues are even (virtio 1.3 section 5.1.2).
DIRECTIONS = ("rx", "tx")


def show(options: argparse.Namespace) -> int:
    """Print the counters of all ports, or of one domain's."""
    try:
        answer = asyncio.run(ask(options.socket, "query-stats"))
    except ControlError as error:
        print(f"virt-vdpa: virtvdpad does not answer: {error}; is it running?", file=sys.stderr)
        return 1
    ports = [port for port in answer["ports"] if options.domain in (None, port["domain"], port["uuid"])]
    if options.domain is not None and not ports:
        print(f"virt-vdpa: domain '{options.domain}' has no port here; see virt-vdpa ports", file=sys.stderr)
        return 1
    print(json.dumps({"ports": ports}, indent=2) if options.json else "\n\n".join(map(text, ports)))
    return 0


def text(port: Mapping[str, Any]) -> str:
    """One port: a line about it, and a line for each of its queues."""
    title = f"{port['domain']} {port['mac']}, {port['device']}"
    if port["problem"]:
        return f"{title}: {port['problem']}"
    queues, whole = by_queue(port["counters"])
    about = ", ".join(f"{name} {count}" for name, count in whole.items())
    names = list(dict.fromkeys(name for counters in queues.values() for name in counters))
    rows = [
        (f"{index // 2} {DIRECTIONS[index % 2]}", *(counters.get(name) for name in names))
        for index, counters in sorted(queues.items())
    ]
    lines = table(("PAIR", *(name.upper() for name in names)), rows)
    return f"{title}: {about}\n{lines}" if about else f"{title}\n{lines}"


def by_queue(counters: Mapping[str, int]) -> tuple[dict[int, dict[str, int]], dict[str, int]]:
    """Counters by queue and name; and those that are of no queue."""
    queues: dict[int, dict[str, int]] = {}
    whole: dict[str, int] = {}
    for name, index, count in split(counters):
        if index is None:
            whole[name] = count
        else:
            queues.setdefault(index, {})[name] = count
    return queues, whole


def split(counters: Mapping[str, int]) -> Iterator[tuple[str, int | None, int]]:
    """Counters, which are called NAME.QUEUE or NAME alone."""
    for name, count in counters.items():
        what, _, queue = name.rpartition(".")
        yield (what, int(queue), count) if what and queue.isdecimal() else (name, None, count)
