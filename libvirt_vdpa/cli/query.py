"""virt-vdpa status, ports, migrations: what the daemon knows, as a table or as JSON."""

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
    headings = ("DOMAIN", "MAC", "STATE", "GUEST", "MIGRATION", "DEVICE", "PID", "RESTARTS", "PROBLEM")
    rows = [
        (
            port["domain"],
            port["mac"],
            port["state"],
            f"{port['session']}, no link" if port["link"] == "down" else port["session"],
            migration_text(port["migration"]),
            port["device"],
            port["pid"],
            port["restarts"],
            port["problem"],
        )
        for port in answer["ports"]
    ]
    return table(headings, rows)


def migration_text(migration: dict[str, Any] | None) -> str:
    """How a port's domain migrates: phase, how much is left, and how the port marks what it writes."""
    if migration is None or migration["ended"] is not None:
        return ""
    words = [migration["status"]]
    progress, port = migration["progress"], migration["port"] or {}
    if migration["side"] == "source":
        if progress.get("total"):
            words.append(f"{100 - 100 * progress.get('remaining', 0) // progress['total']} %")
        words.append(f"{port.get('mode') or 'no'} log")
    return ", ".join(words)


def migrations_text(answer: dict[str, Any]) -> str:
    """One line a migration, the latest last."""
    headings = ("DOMAIN", "SIDE", "STATUS", "TIME", "DOWNTIME", "PAGES MARKED", "REASON")
    rows = [
        (
            migration["domain"],
            migration["side"],
            migration["status"],
            milliseconds(migration["progress"].get("elapsed_ms")),
            milliseconds(migration["progress"].get("downtime_ms")),
            sum(port.get("pages", 0) for port in migration["ports"]),
            migration["reason"],
        )
        for migration in answer["migrations"]
    ]
    return table(headings, rows)


def milliseconds(number: int | None) -> str:
    """A time with its unit, empty when it is not known."""
    return "" if number is None else f"{number} ms"


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
    "migrations": (show("query-migrations", migrations_text), "show migrations: how they go or went"),
}
