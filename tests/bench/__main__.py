"""./bench: times what matters to an operator, beside a peer measured in the same run.

Owns the command line; each subject is a module with `measure(runs)` that prints a table.
"""

import argparse
import sys

from tests.bench import dirty_logging, hooks, migration, relay
from tests.harness.processes import HarnessError

SUBJECTS = {
    "hooks": (hooks.measure, "what the hook costs, and what hook and port add to virsh start"),
    "logging": (
        dirty_logging.measure,
        "packets per second while dirty pages are logged, and where the time goes",
    ),
    "migration": (migration.measure, "what a live migration takes, beside that of a guest with a TAP NIC"),
    "relay": (relay.measure, "what the relay of a ring takes per used entry, beside DPDK's"),
}


def positive(text: str) -> int:
    """A number of runs."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of runs")
    return int(text)


def main() -> int:
    """Measure one subject; the exit code."""
    parser = argparse.ArgumentParser(prog="./bench", description="Measure.")
    subjects = parser.add_subparsers(metavar="SUBJECT", required=True)
    for name, (measure, summary) in SUBJECTS.items():
        subject = subjects.add_parser(name, help=summary, description=summary)
        subject.add_argument(
            "--runs", type=positive, default=10, help="measurements of each kind (default: %(default)s)"
        )
        subject.set_defaults(measure=measure)
    options = parser.parse_args()
    try:
        options.measure(options.runs)
    except HarnessError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
