"""virt-vdpa, the operator's command. Each subcommand is a function that prints and returns an exit code.

Shows what daemon and kernel say, moves PCI functions between drivers and checks files; owns no state. What
cannot be done is told in one line.
"""

import argparse
import sys
from pathlib import Path

from libvirt_vdpa.cli import binding, devices, features, query, stats, xml
from libvirt_vdpa.config import RUN_FOLDER, SOCKET_NAME


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="virt-vdpa", description="Looks after vDPA NICs of libvirt guests.")
    top.add_argument(
        "--socket", type=Path, default=RUN_FOLDER / SOCKET_NAME, help="the daemon's (default: %(default)s)"
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, summary) in query.COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--json", action="store_true", help="print what the daemon answers")
        command.set_defaults(run=run)
    summary = "show what ports have counted, queue by queue"
    counted = commands.add_parser("stats", help=summary, description=summary)
    counted.add_argument("domain", nargs="?", metavar="DOMAIN", help="name or UUID (default: all domains)")
    counted.add_argument("--json", action="store_true", help="print what the daemon answers")
    counted.set_defaults(run=stats.show)
    add_function_commands(commands)
    summary = "show what each driver can do, and which test shows it"
    able = commands.add_parser("features", help=summary, description=summary)
    form = able.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print all that is declared, for programs")
    form.add_argument("--markdown", action="store_true", help="print docs/features.md")
    able.set_defaults(run=features.show)
    files = commands.add_parser("xml", help="domain XML").add_subparsers(metavar="COMMAND", required=True)
    check = files.add_parser("check", help="say what is wrong with a domain, and in which line")
    check.add_argument("file", type=Path, metavar="FILE", help="domain XML; '-' reads standard input")
    check.add_argument(
        "--run-folder", type=Path, default=RUN_FOLDER, help="the daemon's (default: %(default)s)"
    )
    check.set_defaults(run=xml.check)
    return top


def add_function_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What an operator does with PCI functions."""
    summary = "show VFs and PCI functions: who holds them, and why one cannot be used"
    shown = commands.add_parser("devices", help=summary, description=summary)
    shown.add_argument("--all", action="store_true", help="PCI functions that no driver of ours serves, too")
    shown.add_argument("--json", action="store_true", help="print all that is known, for programs")
    shown.set_defaults(run=devices.show)
    for name, run, summary in (
        ("bind", binding.bind, "give PCI functions to vfio-pci, all or none, remembering their drivers"),
        ("unbind", binding.unbind, "give PCI functions back to the drivers that they had"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("addresses", nargs="+", metavar="ADDRESS", help="such as 0000:01:00.0")
        command.set_defaults(run=run)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except BrokenPipeError:  # the reader, such as head(1), has seen enough
        sys.stderr.close()
        return 1
    return code
