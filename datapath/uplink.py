"""Where frames that announce a guest leave a port: what VFs cannot send by themselves.

An `UplinkSpec` is what the command line says: `interface=NAME`, a network interface on the VF's wire, or
`nic=PATH,vf=N`, the control socket of an emulated NIC, which sends a frame as VF N does. (A packet socket on
its TAP would not do: what is sent there goes into the VF, not to the bridge that the TAP is in.)
"""

from dataclasses import dataclass
from pathlib import Path


class UplinkSpecError(ValueError):
    """A text that names no uplink; it says why."""


@dataclass(frozen=True)
class UplinkSpec:
    """A parsed uplink: an interface, or a VF of an emulated NIC."""

    interface: str | None = None
    nic: Path | None = None
    vf: int = 0

    @classmethod
    def parse(cls, text: str) -> "UplinkSpec":
        """Take `interface=NAME` or `nic=PATH,vf=N` apart.

        :raise UplinkSpecError: for anything else.
        """
        parts = dict(part.partition("=")[::2] for part in text.split(","))
        if set(parts) == {"interface"} and parts["interface"]:
            return cls(interface=parts["interface"])
        if set(parts) == {"nic", "vf"} and parts["nic"] and parts["vf"].isdecimal():
            return cls(nic=Path(parts["nic"]), vf=int(parts["vf"]))
        raise UplinkSpecError(f"uplink '{text}': neither interface=NAME nor nic=SOCKET,vf=N")

    def __str__(self) -> str:
        if self.interface is not None:
            return f"interface={self.interface}"
        return f"nic={self.nic},vf={self.vf}"
