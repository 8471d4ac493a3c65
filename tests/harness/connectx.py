"""An emulated ConnectX for a port process, in which it lives: the files that make it, and such a port."""

import itertools
import os
from pathlib import Path
from typing import Any

from datapath.emulation.mlx5 import LIBRARY
from tests.harness.emulated_nic import PortProcess
from tests.harness.netns import NetworkNamespace

#: Names of RDMA devices that no other test's has: two ports on one of a name refuse each other.
NUMBERS = itertools.count()


class ConnectX:
    """What a folder says of a function; a link to the library in it is that function's (`options.h`)."""

    def __init__(self, folder: Path, namespace: NetworkNamespace | None = None, **options: int | str) -> None:
        """
        :param namespace: where its TAP is, unless `options` say something else of the uplink.
        :param options: see datapath/emulation/mlx5/options.h; commands take no time unless they are to.
        """
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.namespace = namespace
        self.name = f"test{os.getpid()}_{next(NUMBERS)}"
        self.rdma = folder / "rdma"
        wire = {"tap": "vf0"} if namespace is not None else {}
        chosen = {"name": self.name, "ibdev": self.rdma, "latency_us": 0, "pairs": 1, **wire, **options}
        network = self.rdma / "device/net" / str(chosen.get("tap", "wire"))
        network.mkdir(parents=True, exist_ok=True)
        (network / "mtu").write_text(f"{chosen.get('mtu', 1500)}\n")
        (self.rdma / "device/vendor").write_text("0x15b3\n")
        self.library = folder / LIBRARY.name
        self.library.unlink(missing_ok=True)
        self.library.symlink_to(LIBRARY)
        text = ",".join(f"{name}={value}" for name, value in chosen.items())
        (folder / "mlx5_emulated.options").write_text(f"{text}\n")

    def device(self, **options: Any) -> str:
        """Its device string."""
        more = "".join(f",{name}={value}" for name, value in options.items())
        return f"mlx5,ibdev={self.name},libibverbs={self.library},libmlx5={self.library}{more}"

    def port(self, folder: Path, *options: str, **of_device: Any) -> PortProcess:
        """A port on it, in the namespace of its TAP."""
        prefix = self.namespace.prefix if self.namespace is not None else []
        return PortProcess(folder, self.device(**of_device), *options, prefix=prefix)
