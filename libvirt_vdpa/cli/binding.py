"""virt-vdpa bind, unbind: PCI functions to vfio-pci and back."""

import argparse
import sys

from libvirt_vdpa.binding import Binder, BindingError
from libvirt_vdpa.cli.devices import lent
from libvirt_vdpa.kernel import Kernel


def bind(options: argparse.Namespace) -> int:
    """Bind all of the functions, or none; one line for each."""
    try:
        said = Binder(Kernel(), options.socket.parent).bind([one.lower() for one in options.addresses])
    except BindingError as error:
        print(f"virt-vdpa: {error}", file=sys.stderr)
        return 1
    print("\n".join(said))
    return 0


def unbind(options: argparse.Namespace) -> int:
    """Give functions back, one after the other; 1 when one stays."""
    binder = Binder(Kernel(), options.socket.parent)
    holders = lent(options.socket)
    code = 0
    for address in dict.fromkeys(one.lower() for one in options.addresses):
        try:
            print(binder.unbind(address, holders))
        except BindingError as error:
            print(f"virt-vdpa: {error}", file=sys.stderr)
            code = 1
    return code
