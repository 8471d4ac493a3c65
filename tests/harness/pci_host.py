"""virtvdpad on a machine whose PCI functions it lends: the nested one.

Owns no function: a test says which ones a pool has, and gives them back.
"""

from pathlib import Path

from libvirt_vdpa.metadata import xml_folder
from tests.harness.daemon_host import DaemonHost, Domain
from tests.harness.netns import NetworkNamespace

CONFIGURATION = """
run-folder = "{folder}"
log-folder = "{folder}/log"
libvirt-uri = ""
hook-time-limit = 60
{pools}
"""


class MachineNetwork(NetworkNamespace):
    """The machine's own network namespace, where the interfaces of its functions are."""

    def __init__(self) -> None:
        self.path = Path("/proc/self/ns/net")

    @property
    def prefix(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


class PciHost(DaemonHost):
    """A daemon with pools of a test's choice."""

    # Python starts slowly under emulation.
    PATIENCE = 60.0

    def __init__(self) -> None:
        super().__init__(MachineNetwork())

    def configure(self, limit: float = 60, more: str = "") -> None:
        self.configuration.write_text(CONFIGURATION.format(folder=self.folder, pools=more))

    def start_with(self, pools: str) -> None:
        """Start the daemon, or start it again, with these pools."""
        if self.daemon is not None:
            self.stop()
        self.configure(more=pools)
        self.start()

    @property
    def devices(self) -> dict[str, tuple[str, str]]:
        """Device string -> state and problem."""
        found = self.ask("query-devices")["devices"]
        return {device["device"]: (device["state"], device["problem"]) for device in found}

    def domain_with(self, attributes: str, number: int = 1) -> Domain:
        """The example domain, its VF chosen by these attributes of our metadata."""
        assert "driver='ifcvf' pool='default'" in (xml_folder() / "vdpa-demo.xml").read_text()
        return self.domain(number=number).edited("driver='ifcvf' pool='default'", attributes)
