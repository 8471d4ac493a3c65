"""A private host: a libvirtd of its own on this machine, with which nothing else here interferes.

A host is a process that holds mount, PID, UTS and network namespaces (host_init.sh). libvirt's folders
are private there, and TAPs made there are not seen outside. Ending that one process ends everything in
the host, and its mounts, links and sockets with it; it also ends with the program that made it.

Owns the namespaces, the libvirtd in them and its configuration. What our own programs do in a host is
vdpa_host.py's.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.domain_xml import METADATA, DomainXml
from tests.harness.guest import CACHE, CHECKOUT
from tests.harness.processes import HarnessError, Process, run
from tests.harness.procfs import Running, all_running

#: What libvirt found out about QEMU, kept between runs: finding out takes 4 to 8 s. libvirt checks
#: itself whether it still holds.
CAPABILITIES = CACHE / "libvirt"

#: No confinement. Guests run as root unless a test wants another user, to whom libvirt must then give
#: what the guest uses.
QEMU_CONF = """\
user = "{user}"
group = "{user}"
dynamic_ownership = {ownership}
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
"""

#: Debian's libvirtd does not start without this account, whatever qemu.conf says; only the package
#: libvirt-daemon-system creates it. The host gets copies of the machine's files with the account added.
ACCOUNTS = {
    "passwd": "libvirt-qemu:x:64055:64055:Libvirt Qemu:/var/lib/libvirt:/usr/sbin/nologin\n",
    "group": "libvirt-qemu:x:64055:\n",
}

LIBVIRTD_CONF = """\
auth_unix_rw = "none"
host_uuid = "{host_uuid}"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""


class HostProcess(Process):
    """A program in a host: nsenter starts it as its child, waits for it and ends as it ends."""

    @property
    def pid(self) -> int:
        """Its pid outside the host (nsenter's, until that has forked)."""
        nsenter = self.popen.pid
        with suppress(FileNotFoundError):
            children = Path(f"/proc/{nsenter}/task/{nsenter}/children").read_text().split()
            if children:
                return int(children[0])
        return nsenter

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal. When it is stopped nsenter stops itself, and continues it when continued."""
        if number is signal.SIGCONT:
            self.popen.send_signal(number)
        else:
            super().signal(number)


class PrivateHosts(ABC):
    """One private host or several; as a context manager they are started and ended."""

    @abstractmethod
    def start(self) -> None:
        """Start them. Whatever comes of it, `end` must be called.

        :raise HarnessError: when that does not work, such as for want of root.
        """

    @abstractmethod
    def end(self) -> None:
        """End everything in them, and remove it. Idempotent."""

    @abstractmethod
    def save_logs(self, folder: Path) -> None:
        """Copy their logs to a folder that outlives them, instead of what is there."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class Host(PrivateHosts):
    """One private host."""

    def __init__(self, name: str, *, keep: bool = False, qemu_user: str = "root") -> None:
        """
        :param name: its host name, and part of its folder's name.
        :param keep: let it outlive this program; `end_command` then ends it.
        :param qemu_user: whom QEMU runs as, in the group of that name.
        """
        self.name = name
        self._qemu_user = qemu_user
        # The pid tells whose folder it is (leftovers.py).
        self.folder = Path(tempfile.mkdtemp(prefix=f"libvirt-vdpa-{os.getpid()}-{name}-", dir="/tmp"))
        self.logs = self.folder / "var/log"
        self._keep = keep
        self._services: list[Process] = []
        self._holder: Process | None = None
        #: Pid of the host's first process, as seen from outside; 0 while there is none.
        self.init_pid = 0

    def start(self) -> None:
        """Make the namespaces."""
        if os.geteuid() != 0:
            raise HarnessError("a private host needs root: namespaces, mounts and TAPs")
        self._make_folders()
        self._make_namespaces()

    def _make_folders(self) -> None:
        etc = self.folder / "etc/libvirt"
        etc.mkdir(parents=True, exist_ok=True)
        (etc / "qemu.conf").write_text(
            QEMU_CONF.format(user=self._qemu_user, ownership=int(self._qemu_user != "root"))
        )
        (etc / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(host_uuid=uuid.uuid4()))
        (etc / "virtlogd.conf").write_text("")
        for name, line in ACCOUNTS.items():
            text = Path("/etc", name).read_text()
            (self.folder / "etc" / name).write_text(text if "\nlibvirt-qemu:" in text else text + line)
        for place in ("run", "var/lib/libvirt", "var/log/libvirt", "var/cache/libvirt"):
            (self.folder / place).mkdir(parents=True)
        CAPABILITIES.mkdir(parents=True, exist_ok=True)
        (self.folder / "capabilities").symlink_to(CAPABILITIES)

    def _make_namespaces(self) -> None:
        unshare = ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
        # With this program's death, however it comes, unshare dies, and with unshare the host's init.
        bond = [] if self._keep else ["setpriv", "--pdeathsig", "KILL"]
        init = [str(Path(__file__).with_name("host_init.sh")), str(self.folder), str(CHECKOUT), self.name]
        self._holder = Process([*bond, *unshare, *init], self.folder / "init.log")
        self._holder.name = f"host {self.name}"
        self._holder.wait_for("namespaces", (self.folder / "ready").exists)
        holder = self._holder.pid
        self.init_pid = int(Path(f"/proc/{holder}/task/{holder}/children").read_text())

    @property
    def enter(self) -> list[str]:
        """The command prefix that runs a command in this host."""
        return ["nsenter", "--target", str(self.init_pid), "--mount", "--uts", "--net", "--pid"]

    @property
    def network(self) -> Path:
        """The host's network namespace."""
        return Path(f"/proc/{self.init_pid}/ns/net")

    @property
    def end_command(self) -> str:
        """The shell command that ends a host that was kept."""
        return f"kill -9 {self.init_pid}; tail --pid={self.init_pid} -f /dev/null; rm -r {self.folder}"

    def path(self, inside: str) -> Path:
        """Where a file of the host's /run, /var or /etc/libvirt is seen from outside."""
        return self.folder / inside.lstrip("/")

    def run(
        self, argv: Sequence[str | Path], *, check: bool = True, seconds: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the host to its end; as `processes.run`."""
        return run(argv, prefix=self.enter, check=check, seconds=seconds)

    def spawn(self, name: str, argv: Sequence[str | Path], *, stdin: int = subprocess.DEVNULL) -> HostProcess:
        """Start a program in the host, with its output in /var/log/NAME.output; it ends with the host."""
        process = HostProcess([*self.enter, *argv], self.logs / f"{name}.output", stdin=stdin)
        process.name = name
        self._services.append(process)
        return process

    def running(self, *names: str) -> list[Running]:
        """What runs in the host under one of these names; without names, everything but its init."""
        namespace = str(Path(f"/proc/{self.init_pid}/ns/pid").readlink())
        return [
            process
            for process in all_running()
            if process.namespaces["pid"] == namespace
            and process.inner_pid != 1
            and (not names or process.name in names)
        ]

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a process by the pid that it has in the host."""
        (process,) = [process for process in self.running() if process.inner_pid == pid]
        os.kill(process.pid, number)

    def save_logs(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if self.logs.exists():
            shutil.copytree(self.logs, folder)

    def end(self) -> None:
        if self.init_pid:
            with suppress(ProcessLookupError):
                os.kill(self.init_pid, signal.SIGKILL)
            self.init_pid = 0
        elif self._holder is not None:
            self._holder.kill()
        if self._holder is not None:
            # It ends when the host's first process has, and that when all others have.
            self._holder.popen.wait()
        for service in self._services:
            # What it had entered the host for has ended; itself, it may be stopped.
            service.popen.kill()
            service.popen.wait()
        shutil.rmtree(self.folder, onerror=unless_gone)


def unless_gone(_function: object, _path: object, failure: tuple[type, BaseException, object]) -> None:
    """For `rmtree`: what somebody has removed meanwhile need not be, the rest is removed all the same.

    :raise OSError: what went wrong otherwise.
    """
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]


class LibvirtHost(Host):
    """A host with virtlogd and libvirtd, started as an operator's machine has them."""

    libvirtd: Process

    def start(self) -> None:
        super().start()
        self.spawn("virtlogd", ["virtlogd"])
        self.start_libvirtd()

    def start_libvirtd(self) -> None:
        """Start libvirtd (again) and wait until it answers."""
        self.libvirtd = self.spawn("libvirtd", ["libvirtd"])
        self.libvirtd.wait_for("an answer", self._libvirtd_answers, 20)

    def _libvirtd_answers(self) -> bool:
        socket = self.path("/run/libvirt/libvirt-sock")
        return socket.exists() and self.virsh("version", check=False).returncode == 0

    def virsh(
        self, *words: str | Path, check: bool = True, seconds: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run virsh against the host's libvirtd."""
        return self.run(["virsh", "--connect", "qemu:///system", *words], check=check, seconds=seconds)

    def state(self, domain: str) -> str:
        """A domain's state as `virsh domstate` says it; "" when there is no such domain."""
        return self.virsh("domstate", domain, check=False).stdout.strip()

    def define(self, domain: DomainXml) -> None:
        """Define a domain as `virsh define` does."""
        path = self.folder / f"{domain.name}.xml"
        path.write_text(str(domain))
        self.virsh("define", path)

    def set_metadata(self, domain: DomainXml) -> None:
        """Have a running domain's metadata be what a `DomainXml` now says."""
        words = ["--uri", METADATA, "--key", "vdpa", "--set", domain.metadata, "--live", "--config"]
        self.virsh("metadata", domain.name, *words)
