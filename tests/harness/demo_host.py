"""The host of ./demo: a pool and a network for each of a guest's NICs, whatever their drivers.

pool 'default' ── TAPs a0, a1 ── bridge net0, 10.76.0.1       the guest's first NIC has 10.76.0.2
pool 'second'  ── TAPs b0, b1 ── bridge net1, 10.77.0.1       its second one 10.77.0.2
"""

from collections.abc import Sequence
from typing import NamedTuple

from tests.harness.vdpa_host import VdpaHost

POOL = """\
[pool.{pool}]
driver = "{driver}"
emulated = 2
tap = "{tap}%d"
bridge = "{bridge}"
"""


class Network(NamedTuple):
    """What one NIC of the guest is on."""

    driver: str
    pool: str
    #: The TAP of the pool's first VF, and the bridge that it is in.
    tap: str
    bridge: str
    #: The host's address, and the guest's.
    host: str
    guest: str


def networks(drivers: Sequence[str]) -> list[Network]:
    """The networks of NICs with these drivers, two at most."""
    pools = ("default", "second")[: len(drivers)]
    return [
        Network(driver, pool, f"{'ab'[n]}0", f"net{n}", f"10.{76 + n}.0.1/24", f"10.{76 + n}.0.2/24")
        for n, (driver, pool) in enumerate(zip(drivers, pools, strict=True))
    ]


class DemoHost(VdpaHost):
    """A private host with those pools and networks."""

    def __init__(self, name: str, drivers: Sequence[str], *, keep: bool = False) -> None:
        self.networks = networks(drivers)
        pools = (
            POOL.format(pool=one.pool, driver=one.driver, tap=one.tap[:-1], bridge=one.bridge)
            for one in self.networks
        )
        super().__init__(name, configuration="\n".join(pools), keep=keep)

    def make_links(self) -> None:
        for number, network in enumerate(self.networks):
            self.make_bridge(network.bridge, f"02:76:64:00:01:{number:02x}", network.host)

    def plug(self, network: Network, plugged: bool) -> None:
        """Plug the cable of a NIC's VF in, or pull it."""
        self.run(["ip", "link", "set", network.tap, "up" if plugged else "down"])
