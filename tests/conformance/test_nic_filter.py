"""The door by which an emulated NIC is told what the guest of a VF wants to receive."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPError

from datapath.rx_filter import RxFilter
from tests.harness.bridged_guests import Guest, bridged
from tests.harness.emulated_nic import EmulatedNic, PortProcess, ask
from tests.harness.filters import WANTED
from tests.harness.front_end import VIRTIO
from tests.harness.nic_engine import wait_for
from tests.harness.offloads import SOURCE, TARGET

Switch = tuple[EmulatedNic, list[PortProcess]]


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Switch]:
    with bridged(tmp_path_factory.mktemp("filter")) as running:
        yield running


def set_filter(nic: EmulatedNic, wanted: RxFilter | None, vf: int = 1) -> None:
    ask(nic.control, "vf-rx-filter", vf=vf, filter=None if wanted is None else wanted.describe())


def numbered(number: int) -> bytes:
    """A frame that guests of the harness take for theirs (offloads.is_ours)."""
    return TARGET + SOURCE + bytes.fromhex("88b5") + bytes([number] * 46)


def test_the_nic_is_told(switch: Switch) -> None:
    nic, ports = switch
    with closing(Guest(ports[0])) as sender, closing(Guest(ports[1])) as receiver:
        sender.start(VIRTIO)
        receiver.start(VIRTIO)
        set_filter(nic, WANTED)
        assert nic.query(1)["rx_filter"] == WANTED.describe()
        before = nic.query(1)["rx_filtered"]
        sender.send_frame(numbered(1))
        wait_for(lambda: nic.query(1)["rx_filtered"] > before, "a filtered frame")
        set_filter(nic, replace(WANTED, macs=(TARGET,)))
        sender.send_frame(numbered(2))
        assert receiver.receive()[1] == numbered(2)
        set_filter(nic, None)
        sender.send_frame(numbered(3))
        assert receiver.receive()[1] == numbered(3)


def test_a_filter_ends_with_its_client(tmp_path: Path) -> None:
    with bridged(tmp_path) as (nic, ports):
        set_filter(nic, WANTED, vf=0)
        ports[0].kill()
        wait_for(lambda: nic.query(0)["state"] == "idle", "the NIC to see its client go")
        assert nic.query(0)["rx_filter"] is None
        with pytest.raises(QMPError, match="nobody has the VF"):
            set_filter(nic, WANTED, vf=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"promiscuous": 1}, "promiscuous: 1 is neither"),
        ({"vlan": "some"}, "vlan: 'some' is none of none, listed, all"),
        ({"macs": ["52:54"]}, "'52:54' is not a MAC"),
        ({"vlans": [4096]}, "4096 is not a number from 0 to 4095"),
        ({"more": 1}, "just these members"),
    ],
)
def test_what_is_no_filter_is_refused(switch: Switch, change: dict[str, Any], reason: str) -> None:
    nic, _ = switch
    with pytest.raises(QMPError, match=reason):
        ask(nic.control, "vf-rx-filter", vf=1, filter={**WANTED.describe(), **change})
    assert nic.query(1)["rx_filter"] is None
