"""Moves PCI functions to vfio-pci and back, and remembers where they came from.

A function is moved by driver_override, the former driver's `unbind` and `drivers_probe` (the kernel's
Documentation/ABI/testing/sysfs-bus-pci). Before anything is written, what it had goes into a record in
the run folder, from which `unbind` restores it. Whatever is refused is refused before anything is
changed; what fails half-way is put back.

Who asks for it, an operator's command or a pool of the configuration, is not decided here.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from datapath.bus.sysfs import HostFunction, SysfsError, is_bridge
from libvirt_vdpa.host_functions import VFIO_PCI, Holders, HostFunctions, stays_bound, wrong_ids
from libvirt_vdpa.kernel import DEVICES, DRIVERS, DRIVERS_PROBE, Kernel, KernelError
from libvirt_vdpa.ports import write_atomically

#: Folder, in the run folder, of the records; root's alone.
BINDINGS_FOLDER = "bindings"
#: Layout of a record; another number is not understood.
RECORD_VERSION = 1
#: Seconds to wait for another process that moves functions, and between looks whether it has done.
LOCK_LIMIT = 10.0
LOCK_INTERVAL = 0.05


class BindingError(Exception):
    """A function that is not moved: nothing has been changed. One line: what, why, and what to do."""


class MoveError(BindingError):
    """A move that the kernel did not carry out; the text says how the function is left."""


@dataclass(frozen=True)
class Former:
    """What a function had before we bound it."""

    address: str
    driver: str | None
    driver_override: str | None
    version: int = RECORD_VERSION


class Binder:
    """Moves the functions of this host. Processes that move some wait for each other."""

    def __init__(self, kernel: Kernel, run_folder: Path) -> None:
        self._kernel = kernel
        self._functions = HostFunctions(kernel)
        self._folder = run_folder / BINDINGS_FOLDER

    def bind(self, addresses: Sequence[str]) -> list[str]:
        """Give functions to vfio-pci, all of them or none; one that it has already stays as it is.

        :return: what became of each, for an operator to read.
        :raise BindingError: when one must not be bound.
        :raise MoveError: when one could not be bound; all have their former drivers.
        """
        with self._alone():
            found = [self._look(address) for address in dict.fromkeys(addresses)]
            for one in found:
                self._check_bind(one, addresses)
            # Before the first is moved: a record of one may be none of ours.
            records = {one.address: self._to_remember(one) for one in found if one.driver != VFIO_PCI}
            self._prepare()
            moved: list[Former] = []
            said = []
            for one in found:
                if one.driver == VFIO_PCI:
                    said.append(f"{one.address}: is bound to {VFIO_PCI} already")
                    continue
                moved.append(Former(one.address, one.driver, one.driver_override))
                try:
                    self._take(one.address, records[one.address])
                except (KernelError, SysfsError) as error:
                    raise MoveError(f"{one.address}: {error}; {self._put_all_back(moved)}") from None
                said.append(f"{one.address}: bound to {VFIO_PCI}; before: {one.driver or 'no driver'}")
            return said

    def unbind(self, address: str, holders: Holders) -> str:
        """Give a function back to the driver that it had, or that the kernel chooses where nothing is known.

        :param holders: what ports hold.
        :return: what became of it, for an operator to read.
        :raise BindingError: when it is in use.
        :raise MoveError: when its former driver did not take it.
        """
        with self._alone():
            found = self._look(address)
            former = self._load(address)
            if found.driver == VFIO_PCI:
                self._check_unbind(found, holders)
            elif former is None or found.driver is not None or found.driver_override != VFIO_PCI:
                self._forget(address)
                return f"{address}: is not bound to {VFIO_PCI}; {bound_to(found)}"
            try:
                self._restore(former or Former(address, None, None), choose=former is None)
            except (KernelError, SysfsError) as error:
                with contextlib.suppress(KernelError, SysfsError):
                    self._override(address, VFIO_PCI)
                    self._probe(address)
                raise MoveError(f"{address}: {error}; {self._whereabouts(address)}") from None
            self._forget(address)
            return f"{address}: given back, {bound_to(self._look(address))}"

    def _to_remember(self, found: HostFunction) -> Former | None:
        """What `unbind` is to restore once a function has been bound; None leaves it to the kernel.

        Where vfio-pci is all that may take it, a bind before this one was killed half-way, or its driver
        was taken from it: what the function had before that is in the record, if anywhere.
        """
        override = found.driver_override
        if override != VFIO_PCI:
            return Former(found.address, found.driver, override)
        recorded = self._load(found.address)
        if found.driver is None:
            return recorded
        return Former(found.address, found.driver, recorded.driver_override if recorded else None)

    # What is refused

    def _check_bind(self, found: HostFunction, together: Collection[str]) -> None:
        if found.driver == VFIO_PCI:
            return
        if is_bridge(found):
            reason = "is a bridge; name a network function behind it"
        elif found.virtual_functions:
            many = len(found.virtual_functions)
            reason = f"is the physical function of {many} VFs, which need its driver; bind one of those"
        else:
            reason = (
                wrong_ids(found.ids, None)
                or stays_bound(found)
                or self._functions.without_iommu(found)
                or self._functions.host_use(found)
                or self._functions.unviable(found, together)
            )
        if reason:
            raise BindingError(f"{found.address}: {reason}")

    def _check_unbind(self, found: HostFunction, holders: Holders) -> None:
        if holder := holders.get(found.address):
            raise BindingError(f"{found.address}: is held by {holder}; shut that domain down first")
        if reason := self._functions.group_held(found, holders):
            raise BindingError(f"{found.address}: {reason}; shut that domain down first")
        if users := self._functions.users(found, self._functions.openers()):
            raise BindingError(
                f"{found.address}: IOMMU group {found.iommu_group} is open in {', '.join(users)};"
                " the kernel would wait for it to end, so end it first"
            )

    def _look(self, address: str) -> HostFunction:
        try:
            return self._functions.look(address)
        except SysfsError as error:
            raise BindingError(str(error)) from None

    # Moving

    def _prepare(self) -> None:
        """See to it that there is a vfio-pci to bind to."""
        if (self._kernel.sysfs / DRIVERS / VFIO_PCI).is_dir():
            return
        try:
            self._kernel.load_module(VFIO_PCI)
        except KernelError as error:
            raise BindingError(str(error)) from None

    def _take(self, address: str, remember: Former | None) -> None:
        """Have vfio-pci take a function.

        :param remember: what the record is to say.
        :raise KernelError: when it does not.
        """
        if remember is not None:
            self._save(remember)
        self._override(address, VFIO_PCI)
        # Twice: one that has just appeared may have been given to another driver since it was looked at.
        for _ in range(2):
            driver = self._functions.look(address).driver
            if driver not in (None, VFIO_PCI):
                self._kernel.write(f"{DRIVERS}/{driver}/unbind", address)
            self._probe(address)
            if self._functions.look(address).driver == VFIO_PCI:
                return
        raise KernelError(f"{VFIO_PCI} did not take it, the kernel's log may say why")

    def _restore(self, former: Former, choose: bool = False) -> None:
        """Have a function as it was.

        :param choose: its driver is not known: the kernel chooses.
        :raise KernelError: when its driver does not take it.
        """
        address = former.address
        now = self._functions.look(address)
        if now.driver_override != former.driver_override:
            self._override(address, former.driver_override)
        if now.driver == former.driver and not choose:
            return
        if now.driver is not None:
            self._kernel.write(f"{DRIVERS}/{now.driver}/unbind", address)
        if choose:
            self._probe(address)
        elif former.driver is not None:
            # By name: another driver may match as well.
            self._kernel.write(f"{DRIVERS}/{former.driver}/bind", address)

    def _put_all_back(self, moved: Sequence[Former]) -> str:
        """Undo what has been begun; how the functions are left."""
        said = []
        for former in reversed(moved):
            try:
                self._restore(former)
            except SysfsError:
                pass
            except KernelError as error:
                said.append(f"{former.address} could not be put back: {error}")
                continue
            if former.driver_override != VFIO_PCI:  # else there is as much to be restored as before
                self._forget(former.address)
            said.append(self._whereabouts(former.address))
        return "; ".join(said)

    def _whereabouts(self, address: str) -> str:
        try:
            return f"{address} is left {bound_to(self._functions.look(address))}"
        except SysfsError:
            return f"{address} is gone"

    def _override(self, address: str, driver: str | None) -> None:
        # A line end alone clears it.
        self._kernel.write(f"{DEVICES}/{address}/driver_override", f"{driver or ''}\n")

    def _probe(self, address: str) -> None:
        self._kernel.write(DRIVERS_PROBE, address)

    # Records

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes, and other threads of ours, from moving functions meanwhile."""
        path = self._folder / "lock"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            who = "" if os.geteuid() == 0 else "; run it as root"
            raise BindingError(f"{path}: {error.strerror or error}{who}") from None
        try:
            deadline = time.monotonic() + LOCK_LIMIT
            while not try_lock(descriptor):
                if time.monotonic() > deadline:
                    raise BindingError(
                        f"{path}: another process has been moving functions for {LOCK_LIMIT:g} s"
                    )
                time.sleep(LOCK_INTERVAL)
            yield
        finally:
            os.close(descriptor)

    def _record(self, address: str) -> Path:
        return self._folder / f"{address}.json"

    def _save(self, former: Former) -> None:
        path = self._record(former.address)
        try:
            write_atomically(path, json.dumps(asdict(former)) + "\n")
        except OSError as error:
            raise KernelError(f"{path}: {error.strerror or error}") from None

    def _forget(self, address: str) -> None:
        self._record(address).unlink(missing_ok=True)

    def _load(self, address: str) -> Former | None:
        """What a function had; None when it is not known."""
        path = self._record(address)
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise BindingError(f"{path}: {error}; remove it, and the kernel will choose a driver") from None
        match content:
            case {
                "version": 1,
                "address": str(named),
                "driver": None | str() as driver,
                "driver_override": None | str() as override,
            } if named == address:
                return Former(address, driver, override)
        raise BindingError(f"{path}: is no record of ours; remove it, and the kernel will choose a driver")


def try_lock(descriptor: int) -> bool:
    """Lock a file for this descriptor; False when another one has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def bound_to(found: HostFunction) -> str:
    """Which driver a function has, in words."""
    return f"bound to {found.driver}" if found.driver else "bound to no driver"
