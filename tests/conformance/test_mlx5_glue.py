"""The glue to libibverbs and libmlx5: on the emulated ConnectX, on Debian's without a device, and on none."""

import ctypes.util
import errno
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath import mlx5_prm as prm
from datapath.drivers.mlx5 import abi
from datapath.drivers.mlx5._abi import ffi
from datapath.drivers.mlx5.glue import CommandError, Context, Glue, Libraries, ProtectionDomain, why_off
from datapath.emulation.mlx5 import LIBRARY
from datapath.mlx5_mailbox import get, pack
from datapath.vdpa import DeviceError

EMULATED = Libraries(str(LIBRARY), str(LIBRARY))
real = pytest.mark.skipif(
    not (ctypes.util.find_library("ibverbs") and ctypes.util.find_library("mlx5")),
    reason="needs libibverbs1 and ibverbs-providers",
)


@pytest.fixture
def glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Glue:
    """The emulated libraries, whose device has a folder as in sysfs."""
    (tmp_path / "device").mkdir()
    (tmp_path / "device/uevent").write_text("DRIVER=mlx5_core\nPCI_SLOT_NAME=0000:01:00.2\n")
    (tmp_path / "device/vendor").write_text("0x15b3\n")
    monkeypatch.setenv("MLX5_EMULATION", f"latency_us=0,name=mlx5_7,ibdev={tmp_path}")
    return Glue(EMULATED, "mlx5,pci=0000:01:00.2")


@pytest.fixture
def context(glue: Glue) -> Iterator[Context]:
    opened = glue.open(glue.devices()[0])
    yield opened
    glue.close(opened)


@pytest.fixture
def pd(glue: Glue, context: Context) -> Iterator[ProtectionDomain]:
    domain = glue.alloc_pd(context)
    yield domain
    glue.dealloc_pd(domain)


# --- structures ---


def test_structures_are_where_the_headers_have_them() -> None:
    """Offsets as gcc has them with rdma-core's headers."""
    assert ffi.offsetof("ibv_device", "ibdev_path") == 408
    assert ffi.sizeof("ibv_context") == 328
    assert ffi.offsetof("ibv_context", "cmd_fd") == 264
    assert ffi.offsetof("ibv_context", "abi_compat") == 320
    assert (ffi.sizeof("ibv_mr"), ffi.offsetof("ibv_mr", "lkey")) == (48, 36)
    assert (ffi.sizeof("mlx5dv_obj"), ffi.offsetof("mlx5dv_obj", "pd_in")) == (112, 96)
    assert (ffi.sizeof("mlx5dv_devx_uar"), ffi.offsetof("mlx5dv_devx_uar", "page_id")) == (40, 16)
    assert (ffi.sizeof("mlx5dv_var"), ffi.offsetof("mlx5dv_var", "mmap_off")) == (24, 8)


# --- what is missing ---


def test_no_libibverbs(tmp_path: Path) -> None:
    missing = why_off(Libraries(ibverbs=f"{tmp_path}/libibverbs.so.1"))
    assert missing == (
        f"cannot load {tmp_path}/libibverbs.so.1"
        " (cannot open shared object file: No such file or directory): install libibverbs1"
    )


def test_no_libmlx5(tmp_path: Path) -> None:
    missing = why_off(Libraries(str(LIBRARY), str(tmp_path / "libmlx5.so.1")))
    assert missing is not None
    assert missing.startswith(f"cannot load {tmp_path}/libmlx5.so.1 (")
    assert missing.endswith("): install ibverbs-providers")
    assert "\n" not in missing


def test_a_library_that_is_too_old(tmp_path: Path) -> None:
    """One that has a function less."""
    source = tmp_path / "old.c"
    names = [name for name in abi.functions(abi.VERBS) if name != "ibv_reg_mr_iova2"]
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    old = tmp_path / "libold.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", old, source], check=True)
    assert why_off(Libraries(str(old))) == f"{old} has no ibv_reg_mr_iova2: install rdma-core 44 or later"


@real
def test_debians_libraries_have_every_function() -> None:
    Glue(Libraries())


@real
@pytest.mark.skipif(Path("/sys/class/infiniband").exists(), reason="this host has an RDMA device")
def test_debians_libraries_without_a_device() -> None:
    assert why_off() == "no RDMA device on this host: for a ConnectX load mlx5_core and mlx5_ib"


def test_nothing_is_opened_unasked() -> None:
    """The other drivers are imported without libraries of RDMA, and without the glue."""
    program = (
        "import sys, datapath.port, datapath.drivers.ifcvf, datapath.drivers.mlx5\n"
        "print('datapath.drivers.mlx5.glue' in sys.modules, 'ibverbs' in open('/proc/self/maps').read())"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "False"]


# --- the emulated ConnectX ---


def test_a_device_is_found_by_its_address(glue: Glue) -> None:
    (device,) = glue.devices()
    assert (device.name, device.pci_address, device.vendor) == ("mlx5_7", "0000:01:00.2", 0x15B3)
    assert why_off(EMULATED) is None


def test_devices_of_others_are_no_connectx(glue: Glue, tmp_path: Path) -> None:
    (tmp_path / "device/vendor").write_text("0x8086\n")
    assert why_off(EMULATED) == "no ConnectX among the RDMA devices: mlx5_7"


def test_open_elsewhere(glue: Glue, context: Context) -> None:
    with pytest.raises(DeviceError) as error:
        glue.open(glue.devices()[0])
    assert str(error.value) == "mlx5,pci=0000:01:00.2: cannot open mlx5_7: Device or resource busy"


def test_capabilities_are_read(glue: Glue, context: Context) -> None:
    mailbox = pack(prm.QUERY_HCA_CAP_IN, op_mod=prm.capability_op_mod(prm.CapabilityPage.VDPA_EMULATION))
    answer = glue.command(context, mailbox, prm.QUERY_VDPA_CAP_OUT)
    assert get(prm.QUERY_VDPA_CAP_OUT, answer, "max_num_virtio_queues") == 17


def test_what_the_firmware_refuses_is_told(glue: Glue, context: Context) -> None:
    with pytest.raises(CommandError) as error:
        glue.create(context, pack(prm.CREATE_TIS_IN, transport_domain=0xABCDEF))
    assert re.fullmatch(
        r"mlx5,pci=0000:01:00.2: CREATE_TIS: [A-Z_]+, syndrome 0xe[0-9a-f]+", str(error.value)
    )
    assert error.value.status
    with pytest.raises(CommandError, match=r": command 0x7ff: BAD_OPERATION"):
        glue.command(context, bytes.fromhex("07ff0000") + bytes(12), prm.COMMAND_OUT)


def test_what_the_kernel_refuses_is_told(glue: Glue, context: Context) -> None:
    """It has a reason then, and no status of the firmware's: as for a call that does not take the command.

    The emulated device always gives a status, so the call is one that never reaches it.
    """

    class Refusing:
        def mlx5dv_devx_general_cmd(self, *given: object) -> int:
            return errno.EPERM

    glue._mlx5_library = Refusing()
    with pytest.raises(CommandError) as error:
        glue.command(context, pack(prm.QUERY_HCA_CAP_IN, op_mod=1), prm.COMMAND_OUT)
    assert str(error.value) == "mlx5,pci=0000:01:00.2: QUERY_HCA_CAP: Operation not permitted"
    assert error.value.status == 0


def test_objects_of_both_kinds_have_numbers(glue: Glue, context: Context) -> None:
    domain = glue.create(context, pack(prm.ALLOC_TRANSPORT_DOMAIN_IN))
    counters = glue.create(context, pack(prm.CREATE_VIRTIO_Q_COUNTERS_IN))
    assert domain.id
    assert counters.id
    told = glue.query(
        counters,
        pack(prm.QUERY_VIRTIO_Q_COUNTERS_IN, obj_id=counters.id),
        prm.QUERY_VIRTIO_Q_COUNTERS_OUT,
    )
    assert told["received_desc"] == 0
    glue.destroy(counters)
    glue.destroy(domain)


def test_memory_is_registered(glue: Glue, context: Context, pd: ProtectionDomain) -> None:
    assert glue.pd_number(pd)
    memory = mmap.mmap(-1, 1 << 16)
    address = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
    region = glue.register(pd, address, len(memory), 0x100000)
    nothing = glue.alloc_null_mr(pd)
    umem = glue.register_umem(context, address, len(memory))
    assert len({region.key, nothing.key}) == 2
    assert umem.id
    with pytest.raises(DeviceError, match="cannot register 0 bytes of memory for 0x5: Invalid argument"):
        glue.register(pd, address, 0, 5)
    glue.deregister_umem(umem)
    glue.deregister(nothing)
    glue.deregister(region)


@pytest.mark.parametrize("lacking", ["abi_compat", "size", "pointer"])
def test_a_context_without_null_memory(glue: Glue, lacking: str) -> None:
    """An older libibverbs': what lies before the context is not there, too short, or empty."""
    whole = ffi.new("char[]", 1024)
    begin = int(ffi.cast("uintptr_t", whole)) + 680
    context = ffi.cast("ibv_context *", begin)
    context.abi_compat = 1 if lacking == "abi_compat" else (1 << 64) - 1
    ffi.cast("size_t *", begin - abi.SIZE_BACK)[0] = 600 if lacking == "size" else 648
    ffi.cast("uintptr_t *", begin - abi.ALLOC_NULL_MR_BACK)[0] = 0 if lacking == "pointer" else 0xDEAD
    pd = ffi.new("ibv_pd *", {"context": context})
    with pytest.raises(DeviceError, match="ibv_alloc_null_mr: Operation not supported"):
        glue.alloc_null_mr(ProtectionDomain(pd))


def test_pages_and_channels(glue: Glue, context: Context) -> None:
    page = glue.alloc_var(context)
    with mmap.mmap(glue.command_fd(context), page.size, offset=page.offset) as mapped:
        assert len(mapped) == page.size
    uar = glue.alloc_uar(context)
    assert uar.page_id
    assert uar.address
    assert 0 <= glue.event_queue_number(context) <= 255
    channel = glue.create_event_channel(context)
    os.set_blocking(channel.fd, False)
    assert glue.take_event(channel) is None
    glue.destroy_event_channel(channel)
    glue.free_uar(uar)
    glue.free_var(page)


def test_steering_leads_to_a_table_of_queues(glue: Glue, context: Context) -> None:
    domain = glue.create_domain(context)
    table = glue.create_root_table(domain)
    matcher = glue.create_matcher(table, 7, 0, pack(prm.FLOW_MATCH))
    not_a_tir = glue.create(context, pack(prm.ALLOC_TRANSPORT_DOMAIN_IN))
    with pytest.raises(DeviceError, match="create_dest_devx_tir: Invalid argument"):
        glue.create_tir_action(not_a_tir)
    glue.destroy(not_a_tir)
    glue.destroy_matcher(matcher)
    glue.destroy_table(table)
    glue.destroy_domain(domain)
