"""virt-vdpa status, ports: what the daemon knows, as a table or as JSON."""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from libvirt_vdpa.client import ControlClient, ControlError


async def ask(path: Path, command: str) -> dict[str, Any]:
    """The daemon's answer to one command.

    :raise ControlError: when there is none.
    """
    async with ControlClient(path) as client:
        return await client.query(command)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as they must be; nothing known is a dash."""
    cells = [list(headings), *([("-" if cell in (None, "") else str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def status_text(answer: dict[str, Any]) -> str:
    """virtvdpad in general, and its pools."""
    rows = [(p["name"], p["driver"], p["vfs"], p["free"], p["problem"]) for p in answer["pools"]]
    first = f"virtvdpad {answer['version']}, pid {answer['pid']}, run folder {answer['run-folder']}"
    return f"{first}, ports: {answer['ports']}\n\n{table(('POOL', 'DRIVER', 'VFS', 'FREE', 'PROBLEM'), rows)}"


def ports_text(answer: dict[str, Any]) -> str:
    """One line a port."""
    headings = ("DOMAIN", "MAC", "STATE", "GUEST", "DEVICE", "PID", "RESTARTS", "PROBLEM")
    rows = [
        (
            port["domain"],
            port["mac"],
            port["state"],
            port["session"],
            port["device"],
            port["pid"],
            port["restarts"],
            port["problem"],
        )
        for port in answer["ports"]
    ]
    return table(headings, rows)


def show(command: str, text: Callable[[dict[str, Any]], str]) -> Callable[[argparse.Namespace], int]:
    """A subcommand that asks the daemon one thing and prints it."""

    def run(options: argparse.Namespace) -> int:
        try:
            answer = asyncio.run(ask(options.socket, command))
        except ControlError as error:
            print(f"virt-vdpa: virtvdpad does not answer: {error}; is it running?", file=sys.stderr)
            return 1
        print(json.dumps(answer, indent=2) if options.json else text(answer))
        return 0

    return run


#: Name -> function and summary.
COMMANDS = {
    "status": (show("query-status", status_text), "show the daemon and its pools"),
    "ports": (show("query-ports", ports_text), "show the ports: which guest has which VF"),
}
