"""virtvdpad by itself: in a run folder and a network namespace of its own, without libvirt.

Owns the daemon, everything that it starts, and calls of the hook as libvirt would make them.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from libvirt_vdpa.client import ControlClient, ControlError
from libvirt_vdpa.metadata import xml_folder
from libvirt_vdpa.process import start_time
from tests.harness.guest import CHECKOUT
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import wait_for
from tests.harness.procfs import all_running

PROGRAMS = Path(sys.executable).parent
HOOK = CHECKOUT / "hooks" / "qemu"
#: What the daemon starts and does not end.
SERVANTS = ("virt-vdpa-port", "virt-vdpa-nic")
CONFIGURATION = """
run-folder = "{folder}"
log-folder = "{folder}/log"
libvirt-uri = ""
hook-time-limit = {limit}
[socket]
mode = "0606"
[pool.default]
driver = "ifcvf"
emulated = 2
"""


class Domain:
    """One of the examples, at home in a run folder."""

    def __init__(self, folder: Path, example: str = "vdpa-demo.xml", number: int = 1) -> None:
        text = (xml_folder() / example).read_text().replace("/run/libvirt-vdpa", str(folder))
        self.xml = text.replace("7664d0a0-", f"7664d0a{number}-")
        self.name = f"domain-{number}"
        self.folder = folder / self.xml.partition("<uuid>")[2][:36]
        mac = self.xml.partition("<mac address='")[2][:17]
        self.socket = self.folder / f"{mac}.sock"
        self.private = folder / "ports" / self.folder.name
        self.control = self.private / f"{mac}.ctl"
        self.record = self.private / f"{mac}.json"

    def edited(self, before: str, after: str) -> "Domain":
        """The same domain with a change in its XML."""
        assert before in self.xml
        self.xml = self.xml.replace(before, after)
        return self


class DaemonHost:
    """A daemon, its folders, and everything that it starts."""

    #: Seconds that the daemon has to answer once it is started, and a hook to end.
    PATIENCE = 20.0

    def __init__(self, network: NetworkNamespace) -> None:
        self.network = network
        self.folder = Path(tempfile.mkdtemp(prefix="vdpa-", dir="/tmp"))
        self.socket = self.folder / "virtvdpad.sock"
        self.configuration = self.folder / "virtvdpad.toml"
        self.log = self.folder / "daemon.log"
        self.daemon: subprocess.Popen[bytes] | None = None
        self.configure()

    def configure(self, limit: float = 10, more: str = "") -> None:
        """Write the configuration, with more lines for the pool."""
        self.configuration.write_text(CONFIGURATION.format(folder=self.folder, limit=limit) + more)

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        command = [*self.network.prefix, str(PROGRAMS / "virtvdpad"), f"--config={self.configuration}"]
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for("virtvdpad to answer", self.answers, self.PATIENCE)

    def answers(self) -> bool:
        assert self.daemon is not None
        assert self.daemon.poll() is None, self.log.read_text()
        try:
            return bool(self.ask("query-status")["pid"] == self.daemon.pid)
        except ControlError:
            return False

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the daemon; its exit code."""
        assert self.daemon is not None
        self.daemon.send_signal(number)
        code = self.daemon.wait(10)
        self.daemon = None
        return code

    def close(self) -> None:
        """End all: the daemon, then whatever it has left, found by its command line."""
        if self.daemon is not None:
            self.stop(signal.SIGKILL)
        for process in all_running():
            if process.name in SERVANTS and any(str(self.folder) in word for word in process.argv):
                end_process(process.pid)
        shutil.rmtree(self.folder)

    def ask(self, command: str, path: Path | None = None, arguments: dict[str, object] | None = None) -> Any:
        """Execute a command on the daemon's control socket, or another."""

        async def execute() -> object:
            async with ControlClient(path or self.socket) as client:
                return await client.execute(command, arguments)

        return asyncio.run(execute())

    @property
    def ports(self) -> list[dict[str, Any]]:
        found = self.ask("query-ports")["ports"]
        assert isinstance(found, list)
        return found

    @property
    def lent(self) -> int:
        """Number of VFs that a port holds."""
        return sum(device["state"] == "lent" for device in self.ask("query-devices")["devices"])

    @property
    def nic(self) -> int:
        """Pid of the emulated NIC."""
        pid = json.loads((self.folder / "nics/default/nic.json").read_text())["pid"]
        assert isinstance(pid, int)
        return pid

    def begin_hook(self, domain: Domain, operation: str) -> subprocess.Popen[str]:
        """Call the hook as libvirt does and do not wait for it."""
        pipe = subprocess.PIPE
        environment = {"LIBVIRT_VDPA_SOCKET": str(self.socket), "LC_ALL": "C", "PATH": os.environ["PATH"]}
        command = [str(HOOK), domain.name, operation, "begin", "-"]
        hook = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, cwd="/"
        )
        assert hook.stdin is not None
        hook.stdin.write(domain.xml)
        hook.stdin.close()
        hook.stdin = None
        return hook

    def hook(self, domain: Domain, *operations: str) -> str:
        """Call the hook for operations that must go well; what it says."""
        said = ""
        for operation in operations:
            hook = self.begin_hook(domain, operation)
            output, said = hook.communicate(timeout=self.PATIENCE)
            assert (hook.returncode, output) == (0, ""), said
        return said

    def veto(self, domain: Domain, operation: str) -> str:
        """Call the hook for an operation that must be refused; its one line."""
        hook = self.begin_hook(domain, operation)
        output, said = hook.communicate(timeout=self.PATIENCE)
        assert (hook.returncode, output) == (1, "")
        assert said.startswith("libvirt-vdpa: ")
        assert said.endswith("\n")
        assert said.count("\n") == 1
        return said.removeprefix("libvirt-vdpa: ").strip()

    def domain(self, example: str = "vdpa-demo.xml", number: int = 1) -> Domain:
        return Domain(self.folder, example, number)

    def is_clean(self) -> bool:
        """Whether no port, folder or lent VF is left."""
        folders = [*self.folder.glob("*-*-*"), *self.folder.glob("ports/*")]
        return not self.ports and not self.lent and not folders


def end_process(pid: int) -> None:
    """End a process that need not be our child, and wait until it has ended."""
    os.kill(pid, signal.SIGKILL)
    wait_for(f"process {pid} to end", lambda: start_time(pid) is None, 10)
