"""What a guest wants to receive, given to its port and from there to the VF's NIC."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPError

from datapath.rx_filter import RxFilter, Scope
from tests.harness.bridged_guests import Guest
from tests.harness.emulated_nic import EmulatedNic, PortProcess, ask
from tests.harness.filters import WANTED
from tests.harness.front_end import VIRTIO
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import wait_for

#: The largest that a front-end may tell.
LARGEST = replace(
    WANTED,
    macs=tuple(bytes.fromhex("0200") + number.to_bytes(4, "big") for number in range(130)),
    vlans=tuple(range(4095)),
)


@pytest.fixture(scope="module")
def nic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedNic]:
    with NetworkNamespace() as network, EmulatedNic(tmp_path_factory.mktemp("nic"), network) as running:
        yield running


@pytest.fixture
def port(nic: EmulatedNic, tmp_path: Path) -> Iterator[PortProcess]:
    with PortProcess(tmp_path, nic.device(0), f"--uplink=nic={nic.control},vf=0") as running:
        yield running


def give(port: PortProcess, wanted: RxFilter | None) -> None:
    ask(port.control, "set-rx-filter", filter=None if wanted is None else wanted.describe())


def wait_filter(nic: EmulatedNic, wanted: RxFilter | None) -> None:
    expected = wanted.describe() if wanted is not None else None
    wait_for("the VF's filter", lambda: nic.query(0)["rx_filter"] == expected, 10)


def told(port: PortProcess) -> Any:
    return port.status()["rx_filter"]


@pytest.mark.parametrize("driver", ["ifcvf", "virtio"])
def test_the_nic_filters(nic: EmulatedNic, tmp_path: Path, driver: str) -> None:
    uplink = f"--uplink=nic={nic.control},vf=0"
    with PortProcess(tmp_path, nic.device(0, driver), uplink) as port, closing(Guest(port)) as guest:
        guest.start(VIRTIO)
        port.wait_state("running")
        assert told(port) == {"wanted": None, "problem": None}
        for wanted in (WANTED, replace(WANTED, vlan=Scope.ALL), LARGEST, None):
            give(port, wanted)
            wait_filter(nic, wanted)
            expected = wanted.describe() if wanted is not None else None
            assert told(port) == {"wanted": expected, "problem": None}


def test_a_filter_ends_with_the_run(nic: EmulatedNic, port: PortProcess) -> None:
    with closing(Guest(port)) as guest:
        guest.start(VIRTIO)
        port.wait_state("running")
        give(port, WANTED)
        wait_filter(nic, WANTED)
        guest.peer.stop()
        port.wait_state("connected")
        wait_filter(nic, None)
        assert told(port) == {"wanted": None, "problem": None}
        with pytest.raises(QMPError, match="no guest's rings run"):
            give(port, WANTED)


def test_the_next_guest_has_none(nic: EmulatedNic, port: PortProcess) -> None:
    with closing(Guest(port)) as guest:
        guest.start(VIRTIO)
        port.wait_state("running")
        give(port, WANTED)
        wait_filter(nic, WANTED)
    port.wait_state("waiting")
    wait_filter(nic, None)


def test_a_nic_that_refuses_is_told_of(nic: EmulatedNic, tmp_path: Path) -> None:
    """Nobody has the VF that this port believes to be its own."""
    with (
        PortProcess(tmp_path, nic.device(0), f"--uplink=nic={nic.control},vf=1") as port,
        closing(Guest(port)) as guest,
    ):
        guest.start(VIRTIO)
        port.wait_state("running")
        give(port, WANTED)
        wait_for("the NIC's answer", lambda: told(port)["problem"] is not None, 10)
        assert "nobody has the VF" in told(port)["problem"]
        assert "is not filtered" in port.log_lines()[-1]


def test_a_vf_without(nic: EmulatedNic, tmp_path: Path) -> None:
    with PortProcess(tmp_path, nic.device(0), "--uplink=interface=lo") as port, closing(Guest(port)) as guest:
        guest.start(VIRTIO)
        port.wait_state("running")
        assert told(port) is None
        with pytest.raises(QMPError, match="no receive filter that could be set"):
            give(port, WANTED)


def test_a_silent_port_filters(nic: EmulatedNic, tmp_path: Path) -> None:
    uplink = f"--uplink=nic={nic.control},vf=0"
    with PortProcess(tmp_path, nic.device(0), uplink, "--silent") as port, closing(Guest(port)) as guest:
        guest.start(VIRTIO)
        port.wait_state("running")
        give(port, WANTED)
        wait_filter(nic, WANTED)
        with pytest.raises(QMPError, match="no uplink to announce"):
            ask(port.control, "announce", mac="52:54:00:76:64:01")
        assert port.status()["announce"]["uplink"] is None
