"""The emulated ConnectX functions of a pool: a folder for each, of which its port makes what it is.

An emulated ConnectX lives in the process of its driver, as a shared object that stands for libibverbs and
libmlx5. A link to that in a folder with a file of options (datapath/emulation/mlx5/options.h) is a function
of its own, and what its RDMA device would have in sysfs is beside them. So there is no process of the NIC's,
and a TAP is there as long as a port has the function.
"""

import logging
import shutil
from pathlib import Path

from datapath.emulation.mlx5 import LIBRARY
from libvirt_vdpa.config import PoolConfig, with_options
from libvirt_vdpa.emulated import end, nic_folder, recorded_process
from libvirt_vdpa.inventory import Inventory
from libvirt_vdpa.ports import write_atomically

logger = logging.getLogger(__name__)

OPTIONS_FILE = "mlx5_emulated.options"
#: Of a TAP, where the pool says nothing else: as virt-vdpa-nic's.
TAP = "vdpa%d"
#: What the PCI function of an RDMA device says of its vendor.
NVIDIA = "0x15b3"


class EmulatedConnectX:
    """The functions of one pool."""

    def __init__(self, pool: PoolConfig, run_folder: Path, inventory: Inventory) -> None:
        self.pool = pool
        self._folder = nic_folder(run_folder, pool.name)
        self._inventory = inventory

    async def start(self) -> None:
        """Make what is not there, and tell the inventory. A port that runs goes on with what it has read."""
        if (former := recorded_process(self._folder)) is not None:
            await end(former[0])  # the pool was another driver's
        try:
            devices = [self._function(number) for number in range(self.pool.emulated)]
        except OSError as error:
            problem = f"{error.filename or self._folder}: {error.strerror}"
            self._inventory.pools[self.pool.name].problem = problem
            logger.error("pool '%s': %s", self.pool.name, problem)
            return
        bridge = self.pool.bridge
        uplinks = dict.fromkeys(devices, f"interface={bridge}") if bridge else {}
        self._inventory.set_pool(
            self.pool.name, [(device, self.pool.queue_pairs) for device in devices], uplinks
        )
        logger.info("pool '%s': %d VFs", self.pool.name, len(devices))

    def disregard(self) -> None:
        """There is nobody to be watched."""

    def _function(self, number: int) -> str:
        """The device string of a function that is there now.

        :raise OSError: when it cannot be made.
        """
        pool, folder = self.pool, self._folder / f"vf{number}"
        name, tap = f"emulated_{pool.name}_{number}", (pool.tap or TAP).replace("%d", str(number))
        network = folder / "rdma/device/net" / tap
        shutil.rmtree(network.parent, ignore_errors=True)  # it may have had another name
        network.mkdir(parents=True)
        (network / "mtu").write_text(f"{pool.mtu}\n")
        (folder / "rdma/device/vendor").write_text(f"{NVIDIA}\n")
        library = folder / LIBRARY.name
        library.unlink(missing_ok=True)
        library.symlink_to(LIBRARY)
        options = {
            "name": name,
            "ibdev": folder / "rdma",
            "pairs": pool.queue_pairs,
            "tap": tap,
            **({"bridge": pool.bridge} if pool.bridge else {}),
            "mtu": pool.mtu,
        }
        text = ",".join(f"{key}={value}" for key, value in options.items())
        write_atomically(folder / OPTIONS_FILE, f"{text}\n")
        return with_options(f"mlx5,ibdev={name},libibverbs={library},libmlx5={library}", pool)
