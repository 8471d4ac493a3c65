"""./bench: measures what matters to an operator, beside a peer in the same run.

Owns the command line. A topic that fails is told in one line, and the others go on.
"""

import argparse
import compileall
import contextlib
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

from qemu.qmp import QMPError

from tests.bench import (
    dirty_logging,
    guest,
    hooks,
    kick,
    machine,
    migration,
    mlx5,
    mlx5_setup,
    packets,
    relay,
    scale,
    setup,
    table,
)
from tests.bench.rows import Measure, Row
from tests.harness.guest import CHECKOUT
from tests.harness.processes import HarnessError


@dataclass(frozen=True)
class Topic:
    """Something that can be measured."""

    summary: str
    measure: Measure
    #: Measurements of each kind unless the command line says how many.
    runs: int = 10


#: In this order, what takes longest last.
TOPICS: Mapping[str, Topic] = {
    "relay": Topic("what the relay of a ring takes for a used entry, beside DPDK's", relay.measure),
    "packets": Topic("packets per second there and back, beside DPDK's vhost", packets.measure, 5),
    "guest": Topic("TCP and UDP of a guest, beside QEMU's own TAP NIC", guest.measure, 5),
    "kick": Topic("from a guest's kick to the VF's doorbell, beside DPDK's notify relay", kick.measure),
    "setup": Topic("from connect to running rings and to the first frame, beside DPDK's", setup.measure, 20),
    "mlx5": Topic("a ConnectX under our driver, beside DPDK's on the same emulated one", mlx5.measure),
    "mlx5-setup": Topic(
        "a ConnectX' rings: one pair and sixteen, with threads and without", mlx5_setup.measure
    ),
    "logging": Topic(
        "packets per second while dirty pages are logged, and where the time goes", dirty_logging.measure
    ),
    "hooks": Topic("what the hook takes, and virsh start beside DPDK's vhost without a hook", hooks.measure),
    "scale": Topic("what ports cost when there are many", scale.measure, 1),
    "migration": Topic("a live migration beside that of a guest with a TAP NIC", migration.measure),
}


class Parser(argparse.ArgumentParser):
    """One that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench: {message}\n")


def positive(text: str) -> int:
    """A number of runs."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of runs")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with 2 where it is wrong."""
    topics = "\n".join(f"  {name:<12}{topic.summary}" for name, topic in TOPICS.items())
    parser = Parser(
        "./bench",
        description="Measure, beside a peer where there is one. A ratio above 1 means that ours is better.",
        epilog=f"topics:\n{topics}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help="what to measure (default: all)")
    parser.add_argument(
        "--runs", type=positive, metavar="N", help="measurements of each kind (default: the topic's own)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there, too")
    options = parser.parse_args(arguments)
    for name in options.topics:
        if name not in TOPICS:
            parser.error(f"'{name}' is not a topic; there are {', '.join(TOPICS)}")
    return options


def complain(text: str) -> None:
    """One line on standard error."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def measure(name: str, runs: int | None) -> tuple[list[Row], str | None]:
    """Print one topic's table; its rows, and what kept it from its end."""
    topic = TOPICS[name]
    rows: list[Row] = []
    print(f"\n{name}: {topic.summary}\n{table.heading()}", flush=True)
    try:
        for found in topic.measure(runs or topic.runs):
            if isinstance(found, Row):
                rows.append(found)
                found = table.line(found)
            print(found, flush=True)
    except (HarnessError, OSError, QMPError) as error:
        complain(f"{name}: {error}")
        return rows, str(error)
    return rows, None


def measure_all(names: Sequence[str], runs: int | None, file: TextIO | None) -> int:
    """Measure these topics and write what was found; the exit code."""
    # As an installation has it: else each process that starts compiles what has changed, and may not keep it.
    for package in ("datapath", "libvirt_vdpa"):
        compileall.compile_dir(CHECKOUT / package, quiet=1)
    facts = machine.describe()
    print(", ".join(f"{name} {fact}" for name, fact in facts.items() if fact is not None))
    rows: list[tuple[str, Row]] = []
    failed: dict[str, str] = {}
    try:
        for name in names:
            found, error = measure(name, runs)
            rows += [(name, row) for row in found]
            if error is not None:
                failed[name] = error
    finally:
        if file is not None:
            table.write_json(file, facts, rows, failed)
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    options = parse_arguments(arguments)
    # As Ctrl-C: what was started is ended, some of which would keep a processor busy for ever.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        file = None
        if options.json is not None:
            try:
                # Before anything is measured: it may take an hour.
                file = stack.enter_context(options.json.open("w"))
            except OSError as error:
                complain(f"{options.json}: {error.strerror}")
                return 1
        try:
            return measure_all(options.topics or list(TOPICS), options.runs, file)
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
