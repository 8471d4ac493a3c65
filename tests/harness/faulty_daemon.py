"""virtvdpad, in which the log of every port fails as soon as a file is there.

No VF of ours can be made to write outside a log that QEMU gave: this says that it did.

    faulty_daemon.py FILE [virtvdpad's arguments]
"""

import sys
from pathlib import Path

from libvirt_vdpa.daemon import main
from libvirt_vdpa.migration_figures import PortFigures
from libvirt_vdpa.supervisor import Port

PROBLEM = "the log is not to be relied on"


def fail_when_there(file: Path) -> None:
    """Have the port's figures tell a problem while the file exists."""
    real = PortFigures.log_problem

    def log_problem(self: PortFigures, port: Port) -> str:
        return PROBLEM if file.exists() else real(self, port)

    PortFigures.log_problem = log_problem  # type: ignore[method-assign]


if __name__ == "__main__":
    fail_when_there(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
