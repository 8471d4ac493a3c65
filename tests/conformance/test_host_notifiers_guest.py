"""Host notifiers with QEMU: a Linux guest whose kicks go to the VF's own doorbell, and one whose do not."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.harness.console import Console
from tests.harness.emulated_nic import EmulatedNic, PortProcess, ask
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import HarnessError, wait_for
from tests.harness.vfio_user_qemu import vfio_user_qemu
from tests.harness.vhost_user_guest import VhostUserGuest

pytestmark = pytest.mark.guest

HOST, GUEST = "10.97.0.1", "10.97.0.2"
PINGS = 5

#: A way to a QEMU, and how it is told to connect again.
QEMUS: dict[str, tuple[Callable[[], Path], str]] = {
    "own": (lambda: Path("qemu-system-x86_64"), "reconnect=1"),
    "backports": (vfio_user_qemu, "reconnect-ms=1000"),
}


class Machine:
    """A guest on a port whose VF has doorbells to be mapped."""

    def __init__(self, network: NetworkNamespace, port: PortProcess, guest: VhostUserGuest) -> None:
        self._network = network
        self.port = port
        self.guest = guest

    def wait_given(self, given: bool) -> None:
        """Wait until all rings' doorbells are the guest's to write to, or none is."""

        def settled() -> bool:
            status = self.port.status()
            return status["state"] == "running" and {r["host_notifier"] for r in status["rings"]} == {given}

        self.guest.wait_for(f"host notifiers {given}", settled, 60)

    def relayed(self) -> int:
        """How many kicks of both rings pass the relay while the guest answers pings."""
        before = self._kicks()
        self._network.run("ping", "-q", "-c", str(PINGS), "-i", "0.2", "-W", "10", GUEST)
        return self._kicks() - before

    def wait_up(self) -> None:
        """Wait until the guest answers."""

        def answers() -> bool:
            try:
                self._network.run("ping", "-q", "-c", "1", "-W", "1", GUEST)
            except HarnessError:
                return False
            return True

        self.guest.wait_for("an answer", answers, 60)

    def _kicks(self) -> int:
        statistics = ask(self.port.control, "query-stats")
        return sum(count for name, count in statistics.items() if name.startswith("kicks."))


@contextmanager
def machine(folder: Path, qemu: str, *options: str, incoming: str | None = None) -> Iterator[Machine]:
    """A guest that has started, or one that waits for its memory and state."""
    folder.mkdir(exist_ok=True)
    find, reconnect = QEMUS[qemu]
    with ExitStack() as stack:
        network = stack.enter_context(NetworkNamespace())
        nic = stack.enter_context(EmulatedNic(folder / "nic", network, 1, "--keep", "--doorbell=mapped"))
        network.run("ip", "address", "add", f"{HOST}/24", "dev", "vf0")
        network.run("ip", "link", "set", "vf0", "up")
        port = stack.enter_context(
            PortProcess(folder, nic.device(0), "--host-notifiers=auto", "--log-mode=software")
        )
        guest = VhostUserGuest(
            folder,
            port.socket,
            f"{GUEST}/24",
            *options,
            qemu=find(),
            reconnect=reconnect,
            incoming=incoming,
        )
        stack.enter_context(guest)
        made = Machine(network, port, guest)
        if incoming is None:
            stack.enter_context(Console(guest.terminal))
            made.wait_up()
        yield made


def test_kicks_of_a_guest_pass_no_relay(tmp_path: Path) -> None:
    with machine(tmp_path, "own", "page-per-vq=on") as made:
        made.wait_given(True)
        assert made.relayed() == 0
        assert made.port.log_lines()[1:] == []


@pytest.mark.full
@pytest.mark.parametrize("qemu", QEMUS)
def test_kicks_come_back_to_the_relay_when_it_needs_them(tmp_path: Path, qemu: str) -> None:
    """While the guest's memory is being moved; and a guest that is reset begins anew."""
    with machine(tmp_path, qemu, "page-per-vq=on") as made:
        made.wait_given(True)
        ask(made.guest.qmp, "migrate-set-parameters", **{"max-bandwidth": 4096})
        ask(made.guest.qmp, "migrate", uri="exec:cat >/dev/null")
        wait_for("the relay", lambda: made.port.status()["shadowed"], 20)
        made.wait_given(False)
        assert made.relayed() >= PINGS
        ask(made.guest.qmp, "migrate_cancel")
        wait_for("the direct way", lambda: not made.port.status()["shadowed"], 20)
        made.wait_given(True)
        assert made.relayed() == 0

        ask(made.guest.qmp, "system_reset")
        made.wait_given(False)
        made.wait_given(True)
        made.wait_up()
        assert made.relayed() == 0
        assert made.port.log_lines()[1:] == []


def test_kicks_of_a_guest_without_pages_pass_the_relay(tmp_path: Path) -> None:
    with machine(tmp_path, "own") as made:
        said = wait_for("a refusal", lambda: made.port.log_lines()[1:], 20) or []
        assert ["needs page_per_vq" in line for line in said] == [True]
        made.wait_given(False)
        assert made.relayed() >= PINGS


@pytest.mark.full
@pytest.mark.parametrize("qemu", QEMUS)
def test_a_guest_takes_its_kicks_along(tmp_path: Path, qemu: str) -> None:
    """It moves, and writes to the doorbells of another VF."""
    place = f"unix:{tmp_path}/moving"
    with (
        machine(tmp_path / "to", qemu, "page-per-vq=on", incoming=place) as there,
        machine(tmp_path / "from", qemu, "page-per-vq=on") as here,
    ):
        here.wait_given(True)
        ask(here.guest.qmp, "migrate-set-parameters", **{"max-bandwidth": 1 << 30})
        ask(here.guest.qmp, "migrate", uri=place)
        here.guest.wait_for(
            "its end", lambda: ask(here.guest.qmp, "query-migrate").get("status") == "completed", 60
        )
        there.wait_given(True)
        there.wait_up()
        assert there.relayed() == 0
        assert [made.port.log_lines()[1:] for made in (here, there)] == [[], []]
