"""The glue to libibverbs and libmlx5, which are opened when a ConnectX is asked for and not before.

Owns the two libraries and the conventions of their calls: what fails raises `DeviceError` in one line that
names the call and, of a command, what the firmware said. Handles are the libraries' own pointers; what is
read behind one is read here. cffi gives the interpreter's lock back during every call.
"""

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NewType

from datapath.drivers.mlx5 import abi
from datapath.drivers.mlx5._abi import ffi
from datapath.mlx5_mailbox import Structure, get, unpack
from datapath.mlx5_prm import COMMAND_IN, COMMAND_OUT, CREATED_OUT, OBJECT_OUT, Opcode, Status
from datapath.vdpa import DeviceError, DeviceLostError

#: Vendor id of every ConnectX and BlueField.
NVIDIA = 0x15B3
#: Device ids of those that have virtqueues (DPDK's drivers/vdpa/mlx5/mlx5_vdpa.c, mlx5_vdpa_pci_id_map).
SERVED: Mapping[int, str] = {
    0x101B: "ConnectX-6",
    0x101C: "ConnectX-6 VF",
    0x101D: "ConnectX-6 Dx",
    0x101E: "ConnectX family VF",
    0x101F: "ConnectX-6 Lx",
    0x1021: "ConnectX-7",
    0xA2D6: "BlueField-2",
    0xA2DC: "BlueField-3",
}

Context = NewType("Context", object)
ProtectionDomain = NewType("ProtectionDomain", object)
Steering = NewType("Steering", object)


class CommandError(DeviceError):
    """The firmware has not done what a mailbox asked for."""

    def __init__(self, text: str, status: int, syndrome: int) -> None:
        super().__init__(text)
        self.status = status
        self.syndrome = syndrome


@dataclass(frozen=True)
class Libraries:
    """Which libraries to open: paths, or names that the loader looks for."""

    ibverbs: str = "libibverbs.so.1"
    mlx5: str = "libmlx5.so.1"


@dataclass(frozen=True)
class RdmaDevice:
    """A device that libibverbs has found."""

    handle: Any
    name: str
    #: Its folder in sysfs.
    folder: Path

    @property
    def pci_address(self) -> str | None:
        """Where its PCI function is; None when it has none, as a device in software."""
        for line in _read(self.folder / "device/uevent").splitlines():
            key, _, value = line.partition("=")
            if key == "PCI_SLOT_NAME":
                return value
        return None

    @property
    def mtu(self) -> int | None:
        """The largest packet that its network interface takes, in bytes; None when it has none."""
        found = [_read(path).strip() for path in sorted(self.folder.glob("device/net/*/mtu"))]
        return min((int(text) for text in found if text.isdecimal()), default=None)

    @property
    def vendor(self) -> int | None:
        """Vendor id of its PCI function."""
        text = _read(self.folder / "device/vendor").strip()
        return int(text, 16) if text else None


@dataclass(frozen=True)
class DevxObject:
    """An object of the firmware's, with its number there."""

    handle: Any
    id: int


@dataclass(frozen=True)
class Region:
    """Registered memory."""

    handle: Any
    key: int


@dataclass(frozen=True)
class Umem:
    """Memory that is the device's to use as long as it is registered."""

    handle: Any
    id: int


@dataclass(frozen=True)
class Uar:
    """A page to arm completion queues by."""

    handle: Any
    page_id: int
    #: Address of the page in this process.
    address: int


@dataclass(frozen=True)
class DoorbellPage:
    """The page of the virtqueues' doorbells (VAR)."""

    handle: Any
    #: Where to map it from the context's `command_fd`, and its length in bytes.
    offset: int
    size: int


@dataclass(frozen=True)
class EventChannel:
    """Where the firmware's events arrive: readable when there is one."""

    handle: Any
    fd: int


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _load(path: str, wanted: str, package: str) -> Any:
    """
    :raise DeviceError: when the library is missing, cannot be loaded, or lacks a function.
    """
    try:
        library: Any = ffi.dlopen(path, ffi.RTLD_NOW)
    except OSError as error:
        # "cannot load library 'PATH': PATH: reason.  Additionally, …": what the loader says is the reason.
        reason = str(error).partition("  Additionally")[0].rpartition(f"{path}: ")[2].rstrip(".")
        raise DeviceError(f"mlx5: cannot load {path} ({reason}): install {package}") from None
    missing = [name for name in abi.functions(wanted) if not _has(library, name)]
    if missing:
        raise DeviceError(f"mlx5: {path} has no {missing[0]}: install rdma-core 44 or later")
    return library


def _has(library: Any, name: str) -> bool:
    try:
        getattr(library, name)
    except ffi.error:
        return False
    return True


def _called(numbers: type[IntEnum], number: int, kind: str) -> str:
    """The name of a number, or itself after what kind it is of."""
    try:
        return numbers(number).name
    except ValueError:
        return f"{kind}{number:#x}"


def _said(mailbox: bytes, answer: bytes) -> tuple[str, int, int]:
    """What a command was, and the status and syndrome of its answer."""
    opcode = get(COMMAND_IN, mailbox, "opcode")
    values = unpack(COMMAND_OUT, answer)
    return _called(Opcode, opcode, "command "), int(values["status"]), int(values["syndrome"])


class Glue:
    """Both libraries, opened. `name` is what messages call the device."""

    def __init__(self, libraries: Libraries, name: str = "mlx5") -> None:
        """
        :raise DeviceError: when one is missing or too old.
        """
        self.name = name
        self._given_up: str | None = None
        #: How many calls have come back.
        self.answers = 0
        self._verbs_library = _load(libraries.ibverbs, abi.VERBS, "libibverbs1")
        self._mlx5_library = _load(libraries.mlx5, abi.MLX5, "ibverbs-providers")

    def give_up(self, reason: str) -> None:
        """Refuse all calls from now on: the next would not come back either.

        :param reason: what they are told.
        """
        self._given_up = reason

    @property
    def given_up(self) -> bool:
        """Whether calls are refused, because one has not come back."""
        return self._given_up is not None

    def check_alive(self) -> None:
        """
        :raise DeviceLostError: when it has been given up.
        """
        if self._given_up is not None:
            raise DeviceLostError(f"{self.name}: {self._given_up}")

    @property
    def _verbs(self) -> Any:
        self.check_alive()
        return self._verbs_library

    @property
    def _mlx5(self) -> Any:
        self.check_alive()
        return self._mlx5_library

    # --- results ---

    def _made(self, call: str, made: Any) -> Any:
        """What a call has made.

        :raise DeviceError: when that is nothing.
        """
        self.answers += 1
        if made == ffi.NULL:
            raise DeviceError(f"{self.name}: {call}: {os.strerror(ffi.errno)}")
        return made

    def _done(self, call: str, result: int) -> None:
        """
        :param result: 0, or an errno of either sign.
        :raise DeviceError: when it is not 0.
        """
        self.answers += 1
        if result:
            raise DeviceError(f"{self.name}: {call}: {os.strerror(abs(result))}")

    def _executed(self, mailbox: bytes, out: Any, error: int) -> bytes:
        """The answer to a command.

        :raise CommandError: when it has not been executed.
        """
        self.answers += 1
        answer = bytes(ffi.buffer(out))
        if not error and not get(COMMAND_OUT, answer, "status"):
            return answer
        name, status, syndrome = _said(mailbox, answer)
        said = f"{_called(Status, status, 'status ')}, syndrome {syndrome:#x}"
        why = said if status else os.strerror(abs(error))
        raise CommandError(f"{self.name}: {name}: {why}", status, syndrome)

    # --- devices ---

    def devices(self) -> list[RdmaDevice]:
        """All devices that libibverbs finds; each can be opened as long as the process lives.

        The list is not given back, for that would free those devices that have not been opened.

        :raise DeviceError: when the list cannot be read, unless for the want of RDMA in the kernel.
        """
        count = ffi.new("int *")
        found = self._verbs.ibv_get_device_list(count)
        if found == ffi.NULL:
            return []
        devices = [found[index] for index in range(count[0])]
        return [RdmaDevice(device, _text(device.name), Path(_text(device.ibdev_path))) for device in devices]

    def open(self, device: RdmaDevice) -> Context:
        """Open a device for DevX.

        :raise DeviceError: when it cannot be.
        """
        attributes = ffi.new("mlx5dv_context_attr *", {"flags": abi.DEVX})
        made = self._mlx5.mlx5dv_open_device(device.handle, attributes)
        return Context(self._made(f"cannot open {device.name}", made))

    def close(self, context: Context) -> None:
        self._done("ibv_close_device", self._verbs.ibv_close_device(context))

    def async_fd(self, context: Context) -> int:
        """The descriptor that the device's own events are read from (ibv_get_async_event(3))."""
        pointer: Any = context
        return int(pointer.async_fd)

    def command_fd(self, context: Context) -> int:
        """The descriptor to map doorbell pages from; the context owns it."""
        pointer: Any = context
        return int(pointer.cmd_fd)

    # --- memory ---

    def alloc_pd(self, context: Context) -> ProtectionDomain:
        return ProtectionDomain(self._made("ibv_alloc_pd", self._verbs.ibv_alloc_pd(context)))

    def dealloc_pd(self, pd: ProtectionDomain) -> None:
        self._done("ibv_dealloc_pd", self._verbs.ibv_dealloc_pd(pd))

    def pd_number(self, pd: ProtectionDomain) -> int:
        """The firmware's number of a protection domain."""
        out = ffi.new("mlx5dv_pd *")
        request = ffi.new("mlx5dv_obj *", {"pd_in": pd, "pd_out": out})
        self._done("mlx5dv_init_obj", self._mlx5.mlx5dv_init_obj(request, abi.OBJ_PD))
        return int(out.pdn)

    def register(
        self, pd: ProtectionDomain, address: int, size: int, iova: int, access: int = abi.LOCAL_WRITE
    ) -> Region:
        """Let the device reach memory of this process.

        :param iova: the address that the device is to know it by.
        """
        where = ffi.cast("void *", address)
        made = self._verbs.ibv_reg_mr_iova2(pd, where, size, iova, access)
        made = self._made(f"cannot register {size} bytes of memory for {iova:#x}", made)
        return Region(made, int(made.lkey))

    def alloc_null_mr(self, pd: ProtectionDomain) -> Region:
        """Memory that is not there: what the device reads is nothing, and what it writes is lost.

        Inline in verbs.h: a pointer that lies before the context.

        :raise DeviceError: when the device has none such.
        """
        domain: Any = pd
        context = domain.context
        begin = ffi.cast("uintptr_t", context)
        size = ffi.cast("size_t *", int(begin) - abi.SIZE_BACK)
        extended = int(context.abi_compat) == (1 << 8 * ffi.sizeof("uintptr_t")) - 1
        function = ffi.NULL
        if extended and int(size[0]) >= abi.LEAST_SIZE:
            function = ffi.cast("alloc_null_mr **", int(begin) - abi.ALLOC_NULL_MR_BACK)[0]
        if function == ffi.NULL:
            raise DeviceError(f"{self.name}: ibv_alloc_null_mr: {os.strerror(errno.EOPNOTSUPP)}")
        self.check_alive()
        made = self._made("ibv_alloc_null_mr", function(pd))
        return Region(made, int(made.lkey))

    def deregister(self, region: Region) -> None:
        self._done("ibv_dereg_mr", self._verbs.ibv_dereg_mr(region.handle))

    def register_umem(self, context: Context, address: int, size: int) -> Umem:
        """Give the device memory of this process to work with."""
        where = ffi.cast("void *", address)
        made = self._mlx5.mlx5dv_devx_umem_reg(context, where, size, abi.LOCAL_WRITE)
        made = self._made(f"mlx5dv_devx_umem_reg of {size} bytes", made)
        return Umem(made, int(made.umem_id))

    def deregister_umem(self, umem: Umem) -> None:
        self._done("mlx5dv_devx_umem_dereg", self._mlx5.mlx5dv_devx_umem_dereg(umem.handle))

    # --- commands ---

    def command(self, context: Context, mailbox: bytes, answer: Structure) -> bytes:
        """Have a command executed that is about no object.

        :raise CommandError: when it is not.
        """
        out = ffi.new("uint8_t[]", answer.size)
        call = self._mlx5.mlx5dv_devx_general_cmd
        return self._executed(mailbox, out, call(context, mailbox, len(mailbox), out, answer.size))

    def create(self, context: Context, mailbox: bytes) -> DevxObject:
        """Make an object.

        :raise CommandError: when it is not made.
        """
        out = ffi.new("uint8_t[]", CREATED_OUT.size)
        made = self._mlx5.mlx5dv_devx_obj_create(context, mailbox, len(mailbox), out, CREATED_OUT.size)
        answer = self._executed(mailbox, out, ffi.errno if made == ffi.NULL else 0)
        general = get(COMMAND_IN, mailbox, "opcode") == Opcode.CREATE_GENERAL_OBJECT
        number = get(OBJECT_OUT, answer, "obj_id") if general else get(CREATED_OUT, answer, "id")
        return DevxObject(made, number)

    def modify(self, what: DevxObject, mailbox: bytes) -> None:
        """
        :raise CommandError: when the object is not modified.
        """
        out = ffi.new("uint8_t[]", COMMAND_OUT.size)
        call = self._mlx5.mlx5dv_devx_obj_modify
        self._executed(mailbox, out, call(what.handle, mailbox, len(mailbox), out, COMMAND_OUT.size))

    def query(self, what: DevxObject, mailbox: bytes, answer: Structure) -> dict[str, int | bytes]:
        """The fields of what the firmware tells of an object.

        :raise CommandError: when it tells nothing.
        """
        out = ffi.new("uint8_t[]", answer.size)
        call = self._mlx5.mlx5dv_devx_obj_query
        result = call(what.handle, mailbox, len(mailbox), out, answer.size)
        return unpack(answer, self._executed(mailbox, out, result))

    def destroy(self, what: DevxObject) -> None:
        self._done("mlx5dv_devx_obj_destroy", self._mlx5.mlx5dv_devx_obj_destroy(what.handle))

    # --- doorbells and events ---

    def alloc_uar(self, context: Context) -> Uar:
        made = self._mlx5.mlx5dv_devx_alloc_uar(context, abi.UAR_NOT_CACHED)
        made = self._made("mlx5dv_devx_alloc_uar", made)
        return Uar(made, int(made.page_id), int(ffi.cast("uintptr_t", made.base_addr)))

    def free_uar(self, uar: Uar) -> None:
        self._mlx5.mlx5dv_devx_free_uar(uar.handle)

    def alloc_var(self, context: Context) -> DoorbellPage:
        made = self._made("mlx5dv_alloc_var", self._mlx5.mlx5dv_alloc_var(context, 0))
        return DoorbellPage(made, int(made.mmap_off), int(made.length))

    def free_var(self, page: DoorbellPage) -> None:
        self._mlx5.mlx5dv_free_var(page.handle)

    def event_queue_number(self, context: Context) -> int:
        """The number of the kernel's event queue for the first interrupt vector."""
        number = ffi.new("uint32_t *")
        self._done("mlx5dv_devx_query_eqn", self._mlx5.mlx5dv_devx_query_eqn(context, 0, number))
        return int(number[0])

    def create_event_channel(self, context: Context) -> EventChannel:
        made = self._mlx5.mlx5dv_devx_create_event_channel(context, abi.OMIT_EVENT_DATA)
        made = self._made("mlx5dv_devx_create_event_channel", made)
        return EventChannel(made, int(made.fd))

    def destroy_event_channel(self, channel: EventChannel) -> None:
        self._mlx5.mlx5dv_devx_destroy_event_channel(channel.handle)

    def subscribe(self, channel: EventChannel, what: DevxObject, event: int, cookie: int) -> None:
        """Have an event of an object arrive on a channel, with a 64-bit number to know it by."""
        events = ffi.new("uint16_t[]", [event])
        call = self._mlx5.mlx5dv_devx_subscribe_devx_event
        self._done("mlx5dv_devx_subscribe_devx_event", call(channel.handle, what.handle, 2, events, cookie))

    def take_event(self, channel: EventChannel) -> int | None:
        """The cookie of the next event; None when a channel that does not block has none.

        :raise DeviceError: when the channel has failed.
        """
        cookie = ffi.new("uint64_t *")
        got = self._mlx5.mlx5dv_devx_get_event(channel.handle, cookie, 8)
        if got == 8:
            return int(cookie[0])
        if got < 0 and ffi.errno in (errno.EAGAIN, errno.EINTR):
            return None
        raise DeviceError(f"{self.name}: mlx5dv_devx_get_event: {os.strerror(ffi.errno)}")

    # --- steering: all of it needs CAP_NET_RAW when it is made ---

    def create_domain(self, context: Context) -> Steering:
        """The steering of what the device receives."""
        made = self._mlx5.mlx5dv_dr_domain_create(context, abi.DOMAIN_RECEIVE)
        return Steering(self._made("mlx5dv_dr_domain_create", made))

    def create_root_table(self, domain: Steering) -> Steering:
        return Steering(self._made("mlx5dv_dr_table_create", self._mlx5.mlx5dv_dr_table_create(domain, 0)))

    def create_matcher(self, table: Steering, priority: int, criteria: int, mask: bytes) -> Steering:
        """
        :param priority: the lower, the earlier it is looked at.
        :param criteria: bit 0 when the outer headers are looked at.
        :param mask: a FLOW_MATCH.
        """
        made = self._mlx5.mlx5dv_dr_matcher_create(table, priority, criteria, _match(mask))
        return Steering(self._made("mlx5dv_dr_matcher_create", made))

    def create_tir_action(self, tir: DevxObject) -> Steering:
        made = self._mlx5.mlx5dv_dr_action_create_dest_devx_tir(tir.handle)
        return Steering(self._made("mlx5dv_dr_action_create_dest_devx_tir", made))

    def create_rule(self, matcher: Steering, value: bytes, actions: Sequence[Steering]) -> Steering:
        """
        :param value: a FLOW_MATCH.
        """
        array = ffi.new("void *[]", list(actions))
        made = self._mlx5.mlx5dv_dr_rule_create(matcher, _match(value), len(actions), array)
        return Steering(self._made("mlx5dv_dr_rule_create (it needs CAP_NET_RAW)", made))

    def destroy_rule(self, rule: Steering) -> None:
        self._done("mlx5dv_dr_rule_destroy", self._mlx5.mlx5dv_dr_rule_destroy(rule))

    def destroy_action(self, action: Steering) -> None:
        self._done("mlx5dv_dr_action_destroy", self._mlx5.mlx5dv_dr_action_destroy(action))

    def destroy_matcher(self, matcher: Steering) -> None:
        self._done("mlx5dv_dr_matcher_destroy", self._mlx5.mlx5dv_dr_matcher_destroy(matcher))

    def destroy_table(self, table: Steering) -> None:
        self._done("mlx5dv_dr_table_destroy", self._mlx5.mlx5dv_dr_table_destroy(table))

    def destroy_domain(self, domain: Steering) -> None:
        self._done("mlx5dv_dr_domain_destroy", self._mlx5.mlx5dv_dr_domain_destroy(domain))


def _text(characters: Any) -> str:
    return bytes(ffi.string(characters)).decode(errors="replace")


def _match(parameters: bytes) -> Any:
    return ffi.new("mlx5dv_flow_match_parameters *", {"match_sz": len(parameters), "match_buf": parameters})


def why_off(libraries: Libraries | None = None) -> str | None:
    """Why no ConnectX can be used on this host, in one line; None when one can be."""
    try:
        devices = Glue(libraries or Libraries()).devices()
    except DeviceError as error:
        return str(error).removeprefix("mlx5: ")
    if not devices:
        return "no RDMA device on this host: for a ConnectX load mlx5_core and mlx5_ib"
    if not any(device.vendor == NVIDIA for device in devices):
        return f"no ConnectX among the RDMA devices: {', '.join(device.name for device in devices)}"
    return None
