"""Creates the VFs of a physical function (the kernel's Documentation/PCI/pci-iov-howto.rst).

Only where it has none: another number than the wanted one is told and left alone, because changing it
would take away VFs that may be in use.
"""

import contextlib
import errno
from collections.abc import Iterator

from datapath.bus.sysfs import HostFunction, SysfsError, function
from libvirt_vdpa.kernel import DEVICES, Kernel, KernelError

#: errno of a write to sriov_numvfs -> what it means (drivers/pci/iov.c).
REASONS = {
    errno.ENOENT: "its driver does not create VFs",
    errno.ENOSPC: "the bus has no numbers left for so many; the firmware decides that",
    errno.ENOMEM: "it has no memory space for VFs; enable SR-IOV in the firmware, or boot with pci=realloc",
    errno.EBUSY: "it has VFs already",
}


class SriovError(Exception):
    """VFs that are not there as wanted; one line that names the physical function and what to do."""

    def __init__(self, text: str, for_now: bool = False) -> None:
        super().__init__(text)
        #: The physical function is not there yet, or has not got its driver.
        self.for_now = for_now


def create_vfs(kernel: Kernel, pf: str, wanted: int) -> bool:
    """See to it that a physical function has so many VFs.

    :return: whether they have been created now.
    :raise SriovError: when it has another number, or does not create them.
    """
    found = look(kernel, pf)
    has = len(found.virtual_functions)
    if has == wanted:
        return False
    if has:
        raise SriovError(
            f"{pf}: has {has} VFs, not {wanted}, and nothing is changed; set vfs = {has}, or while none is in"
            f" use remove them (echo 0 > {kernel.sysfs / DEVICES / pf}/sriov_numvfs), then restart virtvdpad"
        )
    if found.total_vfs is None:
        raise SriovError(f"{pf}: is no physical function with SR-IOV, or SR-IOV is off in the firmware")
    if wanted > found.total_vfs:
        raise SriovError(f"{pf}: is to have {wanted} VFs, and can have at most {found.total_vfs}")
    if found.driver is None:
        raise SriovError(f"{pf}: has no driver, which is to create its VFs; bind it to its own", for_now=True)
    try:
        kernel.write(f"{DEVICES}/{pf}/sriov_numvfs", str(wanted))
    except KernelError as error:
        reason = REASONS.get(error.number or 0)
        raise SriovError(f"{pf}: {wanted} VFs cannot be created: {reason or error}") from None
    has = len(look(kernel, pf).virtual_functions)
    if has != wanted:
        raise SriovError(f"{pf}: has made {has} VFs of {wanted}; the kernel's log may say why")
    return True


def without_autoprobe(kernel: Kernel, pf: str) -> str:
    """What to say of a physical function whose VFs get no driver by themselves; empty when they do.

    Somebody may want it so, but `no_autoprobe` leaves it so too when it is killed.
    """
    path = f"{DEVICES}/{pf}/sriov_drivers_autoprobe"
    if kernel.read(path) != "0":
        return ""
    return (
        f"{pf}: sriov_drivers_autoprobe is 0, so that its VFs get no driver by themselves, and stays so;"
        f" unless that is wanted: echo 1 > {kernel.sysfs / path}"
    )


@contextlib.contextmanager
def no_autoprobe(kernel: Kernel, pf: str) -> Iterator[None]:
    """Keep drivers from taking the VFs that are created within; they may be bound by name.

    :raise SriovError: when that cannot be set.
    """
    name = f"{DEVICES}/{pf}/sriov_drivers_autoprobe"
    before = kernel.read(name)
    if before != "1":  # off, or a kernel before 4.12 that has no such setting
        yield
        return
    try:
        kernel.write(name, "0")
        try:
            yield
        finally:
            kernel.write(name, before)
    except KernelError as error:
        raise SriovError(f"{pf}: {error}") from None


def look(kernel: Kernel, pf: str) -> HostFunction:
    """The physical function.

    :raise SriovError: when there is none.
    """
    try:
        return function(pf, kernel.sysfs)
    except SysfsError as error:
        raise SriovError(str(error), for_now=True) from None
