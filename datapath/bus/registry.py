"""Opens the PCI function that a device string names, on whichever bus it is reached by.

Owns the table of buses and their device options. A bus is imported only when it is asked for.
"""

import importlib
from collections.abc import Mapping

from datapath.bus.function import PciFunction
from datapath.vdpa import DeviceSpec, DeviceSpecError

#: Option of a device string -> the bus it stands for, as (module, class); the class takes the option's value.
BUSES: Mapping[str, tuple[str, str]] = {
    "vfio-user": ("datapath.bus.vfio_user", "VfioUserFunction"),
    "pci": ("datapath.bus.vfio", "VfioFunction"),
}
#: What messages say of the options.
USAGE = "use pci=DOMAIN:BUS:DEVICE.FUNCTION or vfio-user=PATH, the socket of the device"


def open_function(spec: DeviceSpec) -> PciFunction:
    """Take hold of the function of `DRIVER,pci=ADDRESS` or `DRIVER,vfio-user=PATH`.

    :raise DeviceSpecError: when the options name no function, more than one, or something else.
    :raise DeviceError: when the function cannot be had.
    """
    unknown = sorted(set(spec.options) - set(BUSES))
    if unknown:
        raise DeviceSpecError(f"device '{spec}': {spec.driver} takes no option '{unknown[0]}'; {USAGE}")
    if len(spec.options) != 1:
        which = "which VF?" if not spec.options else "names two VFs;"
        raise DeviceSpecError(f"device '{spec}': {which} {USAGE}")
    ((option, value),) = spec.options.items()
    module, name = BUSES[option]
    function = getattr(importlib.import_module(module), name)(value)
    assert isinstance(function, PciFunction)
    return function
