"""Binding to vfio-pci and back: what is written, what is refused, and that nothing is left half-done."""

import errno
import json
from pathlib import Path

import pytest

from libvirt_vdpa.binding import Binder, BindingError, MoveError
from libvirt_vdpa.kernel import Kernel, KernelError
from tests.harness.fake_kernel import FakeKernel

ONE, OTHER = "0000:01:00.0", "0000:01:00.1"
NVME = {"vendor": "0x1b36", "device": "0x0010", "class": "0x010802"}
OVERRIDE = f"bus/pci/devices/{ONE}/driver_override"


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    return FakeKernel(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def binder(kernel: FakeKernel, folder: Path) -> Binder:
    return Binder(kernel, folder)


def records(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("bindings/*.json"))


class TestBind:
    def test_and_back(self, kernel: FakeKernel, binder: Binder, folder: Path) -> None:
        kernel.add(ONE, group=7, driver="virtio-pci")
        assert binder.bind([ONE]) == [f"{ONE}: bound to vfio-pci; before: virtio-pci"]
        assert kernel.writes == [
            (OVERRIDE, "vfio-pci\n"),
            ("bus/pci/drivers/virtio-pci/unbind", ONE),
            ("bus/pci/drivers_probe", ONE),
        ]
        assert kernel.driver_of(ONE) == "vfio-pci"
        record = folder / f"bindings/{ONE}.json"
        assert json.loads(record.read_text()) == {
            "version": 1,
            "address": ONE,
            "driver": "virtio-pci",
            "driver_override": None,
        }
        assert (record.stat().st_mode & 0o777, record.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        kernel.writes.clear()
        assert binder.unbind(ONE, {}) == f"{ONE}: given back, bound to virtio-pci"
        assert kernel.writes == [
            (OVERRIDE, "\n"),
            ("bus/pci/drivers/vfio-pci/unbind", ONE),
            ("bus/pci/drivers/virtio-pci/bind", ONE),
        ]
        assert kernel.driver_of(ONE) == "virtio-pci"
        assert records(folder) == []

    def test_twice_changes_nothing(self, kernel: FakeKernel, binder: Binder, folder: Path) -> None:
        kernel.add(ONE, group=7, driver="virtio-pci")
        binder.bind([ONE])
        kernel.writes.clear()
        assert binder.bind([ONE, ONE]) == [f"{ONE}: is bound to vfio-pci already"]
        assert kernel.writes == []
        assert records(folder) == [f"{ONE}.json"]
        binder.unbind(ONE, {})
        kernel.writes.clear()
        assert binder.unbind(ONE, {}) == f"{ONE}: is not bound to vfio-pci; bound to virtio-pci"
        assert kernel.writes == []

    @pytest.mark.parametrize("driver", [None, "virtio-pci"])
    def test_an_override_of_before_is_restored(
        self, kernel: FakeKernel, binder: Binder, driver: str | None
    ) -> None:
        kernel.add(ONE, group=7, driver=driver)
        kernel.write(OVERRIDE, "virtio-pci")
        binder.bind([ONE])
        binder.unbind(ONE, {})
        assert kernel.read(OVERRIDE) == "virtio-pci"
        assert kernel.driver_of(ONE) == driver

    def test_the_module_is_loaded_when_it_is_not(self, kernel: FakeKernel, binder: Binder) -> None:
        kernel.add(ONE, group=7, driver="virtio-pci")
        (kernel.sysfs / "bus/pci/drivers/vfio-pci").rmdir()
        kernel.stubborn.add("vfio-pci")
        with pytest.raises(BindingError, match=r"^module vfio-pci cannot be loaded: not found$"):
            binder.bind([ONE])
        assert kernel.writes == []
        kernel.stubborn.clear()
        binder.bind([ONE])
        assert kernel.modules == ["vfio-pci", "vfio-pci"]

    @pytest.mark.parametrize("moment", [OVERRIDE, "bus/pci/drivers_probe"])
    def test_one_that_another_driver_takes_at_that_moment(
        self, kernel: FakeKernel, binder: Binder, moment: str
    ) -> None:
        kernel.add(ONE, group=7)

        class Probing(FakeKernel):
            def write(self, name: str, text: str) -> None:
                if name == moment and name not in [written for written, _ in self.writes]:
                    self._take(ONE, "virtio-pci", name)
                super().write(name, text)

        kernel.__class__ = Probing
        assert binder.bind([ONE]) == [f"{ONE}: bound to vfio-pci; before: no driver"]
        assert kernel.driver_of(ONE) == "vfio-pci"

    @pytest.mark.parametrize("driver", [None, "virtio-pci"])
    def test_one_whose_binding_was_lost_keeps_its_record(
        self, kernel: FakeKernel, binder: Binder, driver: str | None
    ) -> None:
        kernel.add(ONE, group=7, driver="virtio-pci")
        binder.bind([ONE])
        kernel.write("bus/pci/drivers/vfio-pci/unbind", ONE)
        if driver is not None:
            kernel.write(f"bus/pci/drivers/{driver}/bind", ONE)
        binder.bind([ONE])
        assert binder.unbind(ONE, {}) == f"{ONE}: given back, bound to virtio-pci"
        assert kernel.read(OVERRIDE) == "(null)"

    def test_one_whose_binding_was_lost_and_its_record_too(
        self, kernel: FakeKernel, binder: Binder, folder: Path
    ) -> None:
        kernel.add(ONE, group=7, files={"driver_override": "vfio-pci"})
        binder.bind([ONE])
        assert binder.unbind(ONE, {}) == f"{ONE}: given back, bound to virtio-pci"
        assert kernel.read(OVERRIDE) == "(null)"
        assert records(folder) == []

    def test_a_second_attempt_that_fails_keeps_the_record(
        self, kernel: FakeKernel, binder: Binder, folder: Path
    ) -> None:
        kernel.add(ONE, group=7, driver="virtio-pci")
        binder.bind([ONE])
        kernel.write("bus/pci/drivers/vfio-pci/unbind", ONE)
        kernel.stubborn.add("vfio-pci")
        with pytest.raises(MoveError, match="is left bound to no driver"):
            binder.bind([ONE])
        assert binder.unbind(ONE, {}) == f"{ONE}: given back, bound to virtio-pci"

    def test_both_of_a_group(self, kernel: FakeKernel, binder: Binder) -> None:
        kernel.add(ONE, group=7, driver="virtio-pci")
        kernel.add(OTHER, group=7, driver="virtio-pci")
        with pytest.raises(
            BindingError, match=f"^{ONE}: IOMMU group 7 is shared with {OTHER}, which is bound"
        ):
            binder.bind([ONE])
        assert kernel.writes == []
        assert len(binder.bind([ONE, OTHER])) == 2


class TestRefused:
    """Before anything is written."""

    @pytest.mark.parametrize(
        ("files", "words"),
        [
            ({"class": "0x060400"}, "is a bridge; name a network function behind it"),
            (
                {"vendor": "0x15b3", "device": "0x101e"},
                "mlx5 drives it through mlx5_core, the kernel's own driver: nothing is to be bound",
            ),
            (NVME, "not a virtio-net function: 1b36:0010 (subsystem 8086:001a)"),
        ],
    )
    def test_what_it_is(
        self, kernel: FakeKernel, binder: Binder, folder: Path, files: dict[str, str], words: str
    ) -> None:
        kernel.add(ONE, group=7, driver="nvme", files=files)
        with pytest.raises(BindingError) as refused:
            binder.bind([ONE])
        assert str(refused.value) == f"{ONE}: {words}"
        assert (kernel.writes, records(folder)) == ([], [])

    def test_a_physical_function_with_vfs(self, kernel: FakeKernel, binder: Binder) -> None:
        kernel.add(ONE, group=7, driver="virtio-pci", files={"sriov_numvfs": "0"})
        kernel.write(f"bus/pci/devices/{ONE}/sriov_numvfs", "2")
        with pytest.raises(BindingError, match="is the physical function of 2 VFs, which need its driver"):
            binder.bind([ONE])

    def test_no_iommu(self, kernel: FakeKernel, binder: Binder) -> None:
        kernel.add(ONE, driver="virtio-pci")
        with pytest.raises(BindingError, match=f"^{ONE}: no IOMMU group, the IOMMU is off: "):
            binder.bind([ONE])

    def test_in_use_by_the_host(self, kernel: FakeKernel, binder: Binder) -> None:
        kernel.add(ONE, group=7, driver="virtio-pci")
        kernel.add_interface(ONE, "ens1")
        kernel.addressed.add("ens1")
        with pytest.raises(BindingError) as refused:
            binder.bind([ONE])
        assert str(refused.value) == f"{ONE}: its interface ens1 has an address: ip address flush dev ens1"
        assert kernel.writes == []

    def test_in_use_by_the_kernel_s_vdpa(self, kernel: FakeKernel, binder: Binder) -> None:
        """Its driver would wait for whoever has it open, and we for the driver."""
        folder = kernel.add(ONE, group=7, driver="vp-vdpa")
        (folder / "vdpa0/vhost-vdpa-3").mkdir(parents=True)
        kernel.open_by(30, "qemu-system-x86", "/dev/vhost-vdpa-3")
        with pytest.raises(BindingError) as refused:
            binder.bind([ONE])
        assert str(refused.value) == (
            f"{ONE}: its vDPA device vdpa0 (/dev/vhost-vdpa-3) is open in qemu-system-x86 (pid 30);"
            " the kernel would wait for it to end, so end it first"
        )
        assert kernel.writes == []
        (kernel.procfs / "30/fd/7").unlink()
        kernel.open_by(31, "other", "/dev/vhost-vdpa-30")
        binder.bind([ONE])

    def test_behind_an_interface_of_the_kernel_s_vdpa(self, kernel: FakeKernel, binder: Binder) -> None:
        folder = kernel.add(ONE, group=7, driver="vp-vdpa")
        kernel.add_interface(ONE, "eth7", flags=1, place="vdpa0/virtio5/net")
        with pytest.raises(BindingError, match="its interface eth7 is up"):
            binder.bind([ONE])
        (folder / "vdpa0/virtio5/net/eth7").rmdir()
        with pytest.raises(BindingError, match="its interface is in another network namespace"):
            binder.bind([ONE])

    def test_no_such_function(self, binder: Binder) -> None:
        for act in (lambda: binder.bind([ONE]), lambda: binder.unbind(ONE, {})):
            with pytest.raises(BindingError, match=f"^{ONE}: no such PCI function on this host$"):
                act()

    def test_one_of_several_refuses_all(self, kernel: FakeKernel, binder: Binder) -> None:
        kernel.add(ONE, group=7, driver="virtio-pci")
        kernel.add(OTHER, driver="virtio-pci")
        with pytest.raises(BindingError, match=f"^{OTHER}: no IOMMU group"):
            binder.bind([ONE, OTHER])
        assert kernel.writes == []

    def test_to_give_back_what_is_held(self, kernel: FakeKernel, binder: Binder) -> None:
        kernel.add(ONE, group=7, driver="vfio-pci")
        kernel.add(OTHER, group=7, driver="vfio-pci")
        for holders, words in (
            ({ONE: "domain 'a' (mac)"}, "is held by domain 'a' (mac); shut that domain down first"),
            (
                {OTHER: "domain 'b' (mac)"},
                f"IOMMU group 7 is held by domain 'b' (mac), with {OTHER}; shut that domain down first",
            ),
        ):
            with pytest.raises(BindingError) as refused:
                binder.unbind(ONE, holders)
            assert str(refused.value) == f"{ONE}: {words}"
        kernel.open_by(30, "qemu-system-x86", "/dev/vfio/7")
        with pytest.raises(
            BindingError, match=r"IOMMU group 7 is open in qemu-system-x86 \(pid 30\); the ker"
        ):
            binder.unbind(ONE, {})
        assert kernel.writes == []

    @pytest.mark.parametrize("content", ["", "[]", '{"version": 2}', '{"version": 1, "address": "x"}'])
    def test_a_record_that_is_none(
        self, kernel: FakeKernel, binder: Binder, folder: Path, content: str
    ) -> None:
        kernel.add(ONE, group=7, driver="vfio-pci")
        record = folder / f"bindings/{ONE}.json"
        record.parent.mkdir(parents=True)
        record.write_text(content)
        with pytest.raises(BindingError, match="remove it, and the kernel will choose a driver"):
            binder.unbind(ONE, {})
        assert kernel.writes == []

    def test_a_folder_that_cannot_be_made(self, kernel: FakeKernel, folder: Path) -> None:
        folder.write_text("")
        with pytest.raises(BindingError, match="bindings/lock: "):
            Binder(kernel, folder).bind([ONE])


class TestHalfWay:
    """What fails in the middle is put back."""

    def test_vfio_does_not_take_it(self, kernel: FakeKernel, binder: Binder, folder: Path) -> None:
        kernel.add(ONE, group=7, driver="virtio-pci")
        kernel.stubborn.add("vfio-pci")
        with pytest.raises(MoveError) as failed:
            binder.bind([ONE])
        assert str(failed.value) == (
            f"{ONE}: vfio-pci did not take it, the kernel's log may say why;"
            f" {ONE} is left bound to virtio-pci"
        )
        assert (kernel.driver_of(ONE), kernel.read(OVERRIDE)) == ("virtio-pci", "(null)")
        assert records(folder) == []

    @pytest.mark.parametrize(
        "attribute", [OVERRIDE, "bus/pci/drivers/virtio-pci/unbind", "bus/pci/drivers_probe"]
    )
    def test_any_write_is_refused(
        self, kernel: FakeKernel, binder: Binder, folder: Path, attribute: str
    ) -> None:
        kernel.add(ONE, group=7, driver="virtio-pci")
        kernel.refuses[attribute] = errno.EIO
        with pytest.raises(MoveError, match=r"Input/output error; .* is left bound to virtio-pci"):
            binder.bind([ONE])
        assert (kernel.driver_of(ONE), kernel.read(OVERRIDE)) == ("virtio-pci", "(null)")
        assert records(folder) == []

    def test_the_second_fails_and_the_first_is_put_back(
        self, kernel: FakeKernel, binder: Binder, folder: Path
    ) -> None:
        for address in (ONE, OTHER):
            kernel.add(address, group=7, driver="virtio-pci")
        kernel.refuses[f"bus/pci/devices/{OTHER}/driver_override"] = errno.EIO
        with pytest.raises(MoveError):
            binder.bind([ONE, OTHER])
        assert [kernel.driver_of(address) for address in (ONE, OTHER)] == ["virtio-pci"] * 2
        assert records(folder) == []

    def test_the_former_driver_does_not_take_it_back(
        self, kernel: FakeKernel, binder: Binder, folder: Path
    ) -> None:
        kernel.add(ONE, group=7, driver="virtio-pci")
        binder.bind([ONE])
        kernel.stubborn.add("virtio-pci")
        with pytest.raises(MoveError, match=f"No such device; {ONE} is left bound to vfio-pci"):
            binder.unbind(ONE, {})
        assert kernel.driver_of(ONE) == "vfio-pci"
        assert records(folder) == [f"{ONE}.json"]
        kernel.stubborn.clear()
        binder.unbind(ONE, {})
        assert kernel.driver_of(ONE) == "virtio-pci"

    def test_what_a_killed_bind_has_left_is_given_back(self, kernel: FakeKernel, binder: Binder) -> None:
        kernel.add(ONE, group=7, driver="virtio-pci")
        kernel.refuses["bus/pci/drivers_probe"] = errno.EIO

        class Killed(BaseException):
            pass

        class Dying(FakeKernel):
            def write(self, name: str, text: str) -> None:
                if name == "bus/pci/drivers_probe":
                    raise Killed
                super().write(name, text)

        kernel.__class__ = Dying
        with pytest.raises(Killed):
            binder.bind([ONE])
        kernel.__class__ = FakeKernel
        assert (kernel.driver_of(ONE), kernel.read(OVERRIDE)) == (None, "vfio-pci")
        assert binder.unbind(ONE, {}) == f"{ONE}: given back, bound to virtio-pci"
        assert kernel.read(OVERRIDE) == "(null)"

    def test_bound_by_somebody_else(self, kernel: FakeKernel, binder: Binder) -> None:
        kernel.add(ONE, group=7, driver="vfio-pci")
        (kernel.sysfs / OVERRIDE).write_text("vfio-pci\n")
        assert binder.unbind(ONE, {}) == f"{ONE}: given back, bound to virtio-pci"

    def test_what_somebody_else_has_begun_is_left_alone(self, kernel: FakeKernel, binder: Binder) -> None:
        kernel.add(ONE, group=7)
        (kernel.sysfs / OVERRIDE).write_text("vfio-pci\n")
        assert binder.unbind(ONE, {}) == f"{ONE}: is not bound to vfio-pci; bound to no driver"
        assert kernel.writes == []

    def test_one_that_vanishes_meanwhile(self, kernel: FakeKernel, binder: Binder, folder: Path) -> None:
        kernel.add(ONE, group=7, driver="virtio-pci")

        class Unplugged(FakeKernel):
            def write(self, name: str, text: str) -> None:
                super().write(name, text)
                if name.endswith("/unbind"):
                    self.remove(ONE)

        kernel.__class__ = Unplugged
        with pytest.raises(MoveError, match=f"{ONE}: .*'{ONE}': Invalid argument; {ONE} is gone"):
            binder.bind([ONE])
        assert records(folder) == []


def test_the_kernel_s_words_name_attribute_and_value(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, tmp_path)
    with pytest.raises(KernelError) as refused:
        kernel.write("bus/x", "7\n")
    assert str(refused.value) == f"{tmp_path}/bus/x: '7': No such file or directory"
    assert refused.value.number == errno.ENOENT
    (tmp_path / "y").write_text("")
    kernel.write("y", "7")
    assert kernel.read("y") == "7"
    assert kernel.has_ipv4_address("lo-and-behold-what-a-name") is False
