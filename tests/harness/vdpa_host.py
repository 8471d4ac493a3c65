"""A private host with libvirt-vdpa on it, put together as an operator would.

    hooks/qemu  installed as /etc/libvirt/hooks/qemu before libvirtd starts
    virtvdpad   started with a configuration of one pool; it starts the pool's emulated NIC

Owns that, and the ways to look at it and to disturb it.
"""

import json
import re
from pathlib import Path
from typing import Any

from tests.harness.console import Console
from tests.harness.domain_xml import STATE, DomainXml
from tests.harness.emulated_nic import BIN, ask
from tests.harness.guest import CHECKOUT
from tests.harness.host import HostProcess, LibvirtHost
from tests.harness.processes import HarnessError, wait_for

HOOK = CHECKOUT / "hooks" / "qemu"
RUN_FOLDER = "/run/libvirt-vdpa"

#: The host's end of the network: VF 0's TAP has this address, guests have others of the network.
HOST_ADDRESS = "10.76.0.1/24"
GUEST_ADDRESS = "10.76.0.2/24"

CONFIGURATION = """\
# Where the VFs come from: an emulated NIC with two, each with a TAP as its uplink.
[pool.default]
driver = "ifcvf"
emulated = 2
tap = "vdpa%d"
"""


class VdpaHost(LibvirtHost):
    """One private host with our hook and daemon; the daemon's answers are those of its JSON."""

    daemon: HostProcess

    def __init__(
        self,
        name: str,
        *,
        configuration: str = CONFIGURATION,
        hook: str = "qemu",
        keep: bool = False,
        qemu_user: str = "root",
    ) -> None:
        """
        :param configuration: virtvdpad's, as TOML.
        :param hook: the hook's name in /etc/libvirt/hooks; `qemu.d/NAME` makes it one of several.
        """
        super().__init__(name, keep=keep, qemu_user=qemu_user)
        self._hook = hook
        self.configuration = self.folder / "virtvdpad.toml"
        self.configuration.write_text(configuration)

    def start(self) -> None:
        hook = self.path("/etc/libvirt/hooks") / self._hook
        hook.parent.mkdir(parents=True)
        hook.symlink_to(HOOK)
        super().start()
        self.make_links()
        self.start_daemon()

    def make_links(self) -> None:
        """Make the network links that the configuration wants to be there."""

    def make_bridge(self, name: str, mac: str, address: str) -> None:
        """A bridge that carries nothing but what tests send, and that at once: no IPv6, no wait for others.

        :param mac: its own. One without takes that of a port, and another when that goes.
        """
        self.run(["sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6"])
        options = ["stp_state", "0", "forward_delay", "0", "mcast_snooping", "0"]
        self.run(["ip", "link", "add", name, "address", mac, "type", "bridge", *options])
        self.run(["ip", "link", "set", name, "up"])
        self.set_address(name, address)

    def start_daemon(self) -> None:
        """Start virtvdpad (again) and wait until it answers."""
        command = [str(BIN / "virtvdpad"), f"--config={self.configuration}"]
        self.daemon = self.spawn("virtvdpad", command)
        self.daemon.wait_for("an answer", self._daemon_answers, 20)
        for pool in self.virt_vdpa("status")["pools"]:
            if pool["problem"]:
                raise HarnessError(f"pool '{pool['name']}': {pool['problem']}")

    def _daemon_answers(self) -> bool:
        socket = self.path(f"{RUN_FOLDER}/virtvdpad.sock")
        return socket.exists() and self.virt_vdpa("status", check=False) is not None

    def virt_vdpa(self, what: str, *, check: bool = True) -> Any:
        """What `virt-vdpa WHAT --json` says; None without `check` when it fails."""
        done = self.run([BIN / "virt-vdpa", what, "--json"], check=check)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def ask(self, socket: str, command: str, **arguments: object) -> Any:
        """Execute a command on a control socket in the host."""
        # Not by the host's folder: a socket's path has at most 107 bytes.
        return ask(Path(f"/proc/{self.init_pid}/root{socket}"), command, **arguments)

    def ask_nic(self, command: str, *, pool: str = "default", **arguments: object) -> Any:
        """Execute a command on the control socket of a pool's emulated NIC."""
        return self.ask(f"{RUN_FOLDER}/nics/{pool}/control", command, **arguments)

    def ask_port(self, domain: DomainXml, command: str, **arguments: object) -> Any:
        """Execute a command on the control socket of a domain's port."""
        return self.ask(f"{RUN_FOLDER}/ports/{domain.uuid}/{domain.mac}.ctl", command, **arguments)

    def start_guest(self, domain: DomainXml) -> None:
        """Define and start a domain, and wait until its guest answers ping."""
        self.define(domain)
        self.virsh("start", domain.name)
        self.wait_for_ping()

    def remove(self, domain: DomainXml) -> None:
        """End a domain, in whatever state it is, and forget it; its ports end with it."""
        self.virsh("destroy", domain.name, check=False)
        self.virsh("undefine", "--managed-save", domain.name, check=False)
        wait_for(f"{domain.name}'s ports to end", lambda: not self.ports_of(domain), 10)

    def ports(self) -> list[dict[str, Any]]:
        """The ports that the daemon has."""
        found: list[dict[str, Any]] = self.virt_vdpa("ports")["ports"]
        return found

    def ports_of(self, domain: DomainXml) -> list[dict[str, Any]]:
        """Those of one domain."""
        return [port for port in self.ports() if port["uuid"] == domain.uuid]

    def port(self, domain: DomainXml) -> dict[str, Any]:
        """A domain's one port."""
        (port,) = self.ports_of(domain)
        return port

    def guest_state(self, domain: DomainXml) -> str:
        """What a domain's metadata say that its guest uses; empty while they do not."""
        done = self.virsh("metadata", domain.name, STATE, check=False)
        return done.stdout if "negotiated" in done.stdout else ""

    def lent(self) -> list[str]:
        """Device strings of the VFs that are not free."""
        return [vf["device"] for vf in self.virt_vdpa("devices")["devices"] if vf["state"] == "lent"]

    def console(self, domain: DomainXml, *, seconds: float = 60.0) -> Console:
        """The guest's console, once its shell answers."""
        return Console(Path(self.virsh("ttyconsole", domain.name).stdout.strip()), seconds=seconds)

    def set_address(self, link: str = "vdpa0", address: str = HOST_ADDRESS) -> None:
        """Give a TAP an address."""
        self.run(["ip", "address", "add", address, "dev", link])

    def ping(
        self, address: str = GUEST_ADDRESS, *, count: int = 1, interval: float = 0.1, limit: int = 1
    ) -> tuple[int, int]:
        """Ping the guest; returns how many were sent and how many came back.

        :param limit: seconds to wait for the last answer.
        """
        host = address.partition("/")[0]
        words = ["-n", "-q", "-c", str(count), "-i", str(interval), "-W", str(limit), host]
        output = self.run(["ping", *words], check=False, seconds=count * interval + limit + 20).stdout
        found = re.search(r"(\d+) packets transmitted, (\d+) received", output)
        if found is None:
            raise HarnessError(f"ping {host}: {output.strip() or 'no output'}")
        return int(found[1]), int(found[2])

    def wait_for_ping(self, address: str = GUEST_ADDRESS, *, seconds: float = 60.0) -> None:
        """Wait until the guest answers."""
        wait_for(f"{address} to answer ping", lambda: self.ping(address)[1] == 1, seconds)

    def wait_for_state(self, domain: DomainXml, state: str, *, seconds: float = 20.0) -> None:
        """Wait until `virsh domstate` says so."""
        wait_for(f"{domain.name} to be {state}", lambda: self.state(domain.name) == state, seconds)
