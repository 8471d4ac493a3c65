"""virt-vdpa-port whose VF dies in the middle of one call: environment variables say which, and whose it is.

DOOMED_CALL names a method of the device, DOOMED_NIC the process that serves the VF: it is killed as the
method is called, which goes on against a VF that is gone.
"""

import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

from datapath import port
from datapath.vdpa import DeviceSpec, LogMode, VdpaDevice
from datapath.vdpa import open_device as open_real_device

CALL, NIC = "DOOMED_CALL", "DOOMED_NIC"
ROOT = Path(__file__).resolve().parents[2]
#: What runs it, to be written to a file.
PROGRAM = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.harness.doomed_port import main
sys.exit(main())
"""


def end(pid: int) -> None:
    """Kill a process and wait until it holds nothing any more."""
    os.kill(pid, signal.SIGKILL)
    state = Path(f"/proc/{pid}/stat")
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)


def open_device(spec: DeviceSpec, log_mode: LogMode, mac: bytes | None) -> VdpaDevice:
    device = open_real_device(spec, log_mode, mac)
    name = os.environ[CALL]
    real = getattr(device, name)

    def doomed(*arguments: object) -> object:
        end(int(os.environ[NIC]))
        return real(*arguments)

    setattr(device, name, doomed)
    return device


def main() -> int:
    """Run the port's own program."""
    with mock.patch.object(port, "open_device", open_device):
        return port.main()
