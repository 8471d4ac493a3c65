"""virt-vdpa-nic and virt-vdpa-port as a test runs them, and their control sockets.

Owns the processes and the folder of their sockets and logs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qemu.qmp import QMPError
from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.harness.netns import NetworkNamespace
from tests.harness.processes import Process, tail, wait_for

BIN = Path(sys.executable).parent
#: Seconds that a port has to start; under emulation it takes several, and more on a busy machine.
START_TIME = 40.0


def ask(control: Path, command: str, **arguments: Any) -> Any:
    """One command on a control socket; its return value.

    :raise QMPError: when nobody serves the socket, or the command failed.
    """
    client = QEMUMonitorProtocol(str(control))
    client.settimeout(10)
    client.connect()
    try:
        return client.cmd(command, **arguments)
    finally:
        client.close()


def answers(control: Path) -> bool:
    """Whether a control socket is served."""
    if not control.is_socket():
        return False
    try:
        ask(control, "query-commands")
    except (QMPError, OSError):
        return False
    return True


class EmulatedNic(Process):
    """A running virt-vdpa-nic, its TAPs in a network namespace."""

    def __init__(self, folder: Path, namespace: NetworkNamespace, vfs: int = 2, *options: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.namespace = namespace
        self.control = folder / "control"
        argv: Sequence[str | Path] = [
            *namespace.prefix,
            BIN / "virt-vdpa-nic",
            f"--folder={folder}",
            f"--vfs={vfs}",
            "--tap=vf%d",
            *options,
        ]
        super().__init__(argv, folder / "nic.log")
        self.wait_for("an answer", lambda: answers(self.control))

    def device(self, vf: int, driver: str = "ifcvf") -> str:
        """The device string of a VF."""
        return f"{driver},vfio-user={self.folder}/vf{vf}.sock"

    def query(self, vf: int) -> dict[str, Any]:
        """What the NIC says of a VF."""
        found: dict[str, Any] = ask(self.control, "query-devices")["vfs"][vf]
        return found


class PortProcess(Process):
    """A running virt-vdpa-port; ready unless it was told to connect."""

    def __init__(
        self, folder: Path, device: str, *options: str, name: str = "port", prefix: Sequence[str] = ()
    ) -> None:
        """
        :param prefix: what stands before the command, such as that of a network namespace.
        """
        self.socket = folder / f"{name}.sock"
        self.control = folder / f"{name}.ctl"
        argv = [
            *prefix,
            str(BIN / "virt-vdpa-port"),
            f"--device={device}",
            f"--control={self.control}",
            f"--name={name}",
        ]
        where = (
            [] if any(option.startswith("--fd") for option in options) else [f"--socket-path={self.socket}"]
        )
        fds = [int(option.partition("=")[2]) for option in options if option.startswith("--fd")]
        super().__init__([*argv, *where, *options], folder / f"{name}.log", pass_fds=fds)
        try:
            self.wait_for("an answer", lambda: answers(self.control), START_TIME)
            if where and "--connect" not in options:
                self.wait_for("its socket", self.socket.exists)
        except BaseException:
            self.kill()
            raise

    def status(self) -> dict[str, Any]:
        """query-status."""
        found: dict[str, Any] = ask(self.control, "query-status")
        return found

    def wait_state(self, state: str, seconds: float = 10.0) -> dict[str, Any]:
        """Wait until the port is in a state; its status then."""

        def reached() -> dict[str, Any] | None:
            status = self.status()
            return status if status["state"] == state else None

        return wait_for(f"state '{state}' ({tail(self.log)})", reached, seconds) or {}

    def log_lines(self) -> list[str]:
        """What it has said so far."""
        return self.log.read_text().splitlines()

    def holdings(self) -> tuple[int, int]:
        """How many descriptors and mappings it has, once it has seen who left: the same before and after
        a connection."""

        def look() -> tuple[int, int]:
            descriptors = len(list(Path(f"/proc/{self.pid}/fd").iterdir()))
            return descriptors, len(Path(f"/proc/{self.pid}/maps").read_text().splitlines())

        seen = [look()]

        def quiet() -> bool:
            seen.append(look())
            return len(set(seen[-5:])) == 1 and len(seen) > 5

        wait_for("a port that rests", quiet, 10)
        return seen[-1]
