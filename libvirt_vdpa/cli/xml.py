"""virt-vdpa xml: work on domain XML files."""

import argparse
import sys
from pathlib import Path

from libvirt_vdpa.domain import check_domain


def check(options: argparse.Namespace) -> int:
    """Print what is wrong with a domain, as FILE:LINE: TEXT; 1 when it could not start."""
    file: Path = options.file
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        print(f"virt-vdpa: {file}: {error.strerror or error}", file=sys.stderr)
        return 1
    spec, problems = check_domain(content, options.run_folder)
    for problem in sorted(problems, key=lambda problem: problem.line):
        print(f"{file}:{problem.line}: {'' if problem.fatal else 'recommended: '}{problem}")
    if any(problem.fatal for problem in problems):
        return 1
    if spec is None or not spec.ports:
        print(f"{file}: no vDPA interfaces: nothing here is ours")
    else:
        print(f"{file}: {len(spec.ports)} vDPA interface{'s' if len(spec.ports) > 1 else ''}: good")
    return 0
