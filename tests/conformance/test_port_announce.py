"""What announces a guest, seen on the wire: from a real port, over an emulated NIC or an interface."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from qemu.qmp import QMPError

from datapath.announce import rarp_frame
from datapath.vhost_user.messages import ProtocolFeature, Request
from datapath.vhost_user.protocol_features import PROTOCOL_FEATURES
from datapath.virtio import Feature, bit
from tests.harness.emulated_nic import BIN, EmulatedNic, PortProcess, ask
from tests.harness.front_end import VIRTIO, SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import wait_for

MAC = bytes.fromhex("525400123456")
#: The number of a SEND_RARP.
NUMBER = int.from_bytes(MAC, "little")
ANNOUNCE = bit(Feature.NET_F_GUEST_ANNOUNCE)
#: The mask of all features.
ALL = (1 << 64) - 1


@pytest.fixture(scope="module")
def namespace() -> Iterator[NetworkNamespace]:
    """A namespace with a bridge, which a NIC's TAPs are put into."""
    with NetworkNamespace() as made:
        made.run("ip", "link", "add", "br0", "type", "bridge")
        made.run("ip", "link", "set", "br0", "up")
        yield made


@pytest.fixture
def nic(namespace: NetworkNamespace, tmp_path: Path) -> Iterator[EmulatedNic]:
    with EmulatedNic(tmp_path / "nic", namespace, 2, "--bridge=br0") as running:
        yield running


@pytest.fixture
def bridge(nic: EmulatedNic) -> Iterator[socket.socket]:
    with closing(nic.namespace.packet_socket("br0")) as made:
        yield made


def next_rarp(wire: socket.socket) -> bytes:
    """The next RARP frame that somebody else has sent there."""
    while True:
        frame, address = wire.recvfrom(2048)
        if frame[12:14] == b"\x80\x35" and address[2] != socket.PACKET_OUTGOING:
            return frame


def nothing_there(wire: socket.socket) -> bool:
    """Whether no RARP frame waits to be seen."""
    wire.setblocking(False)
    try:
        next_rarp(wire)
    except BlockingIOError:
        return True
    finally:
        wire.settimeout(10)
    return False


@pytest.fixture
def port(nic: EmulatedNic, tmp_path: Path) -> Iterator[PortProcess]:
    with PortProcess(tmp_path, nic.device(0), f"--uplink=nic={nic.control},vf=0") as running:
        yield running


def test_a_request_is_kept_until_rings_run(
    port: PortProcess, front_end: SocketFrontEnd, bridge: socket.socket
) -> None:
    front_end.tell(Request.SEND_RARP, NUMBER)
    front_end.settle()
    assert port.status()["announce"]["pending"]
    assert nothing_there(bridge)
    front_end.start()
    assert next_rarp(bridge) == rarp_frame(MAC)
    for _ in range(4):
        front_end.tell(Request.SEND_RARP, NUMBER)
        assert next_rarp(bridge) == rarp_frame(MAC)
    wait_for("the last answer", lambda: port.status()["announce"]["sent"] == 5, 10)
    told = port.status()["announce"]
    assert (told["pending"], told["problem"]) == (False, None)
    assert abs(time.time() - told["last_sent"]) < 60


@pytest.mark.parametrize("driver", ["ifcvf", "virtio"])
def test_a_guest_that_cannot_is_announced(
    nic: EmulatedNic, tmp_path: Path, bridge: socket.socket, driver: str
) -> None:
    """It has not accepted GUEST_ANNOUNCE, or was not offered it: then QEMU asks the back-end."""
    options = (f"--uplink=nic={nic.control},vf=0", f"--features={ALL & ~ANNOUNCE:#x}")
    with PortProcess(tmp_path, nic.device(0, driver), *options) as port:
        with closing(SocketFrontEnd.dial(port.socket)) as peer:
            peer.connect()
            assert not peer.tell(Request.GET_FEATURES) & ANNOUNCE
            with pytest.raises(ConnectionError):
                peer.start(VIRTIO | ANNOUNCE)
        port.wait_state("waiting")
        with closing(SocketFrontEnd.dial(port.socket)) as peer:
            peer.connect()
            peer.start()
            peer.tell(Request.SEND_RARP, NUMBER)
            assert next_rarp(bridge) == rarp_frame(MAC)


def test_who_has_not_agreed_on_rarp_sends_none(
    port: PortProcess, nic: EmulatedNic, bridge: socket.socket
) -> None:
    protocol = PROTOCOL_FEATURES & ~bit(ProtocolFeature.RARP)
    with closing(SocketFrontEnd.dial(port.socket, protocol)) as peer:
        peer.connect()
        peer.start()
        peer.need_reply = True
        assert peer.tell(Request.SEND_RARP, NUMBER) != 0
        told = port.status()["announce"]
        assert (told["pending"], told["sent"]) == (False, 0)
        assert nothing_there(bridge)


def test_another_guest_is_not_announced(nic: EmulatedNic, tmp_path: Path, bridge: socket.socket) -> None:
    uplink = f"--uplink=nic={nic.control},vf=0"
    with (
        PortProcess(tmp_path, nic.device(0), uplink, "--mac=52:54:00:12:34:56") as port,
        closing(SocketFrontEnd.dial(port.socket)) as peer,
    ):
        peer.connect()
        peer.start()
        peer.tell(Request.SEND_RARP, int.from_bytes(bytes.fromhex("525400999999"), "little"))
        peer.settle()
        assert port.status()["announce"]["problem"] == "it is not the guest's address"
        peer.tell(Request.SEND_RARP, NUMBER)
        assert next_rarp(bridge) == rarp_frame(MAC)


def test_the_daemon_can_have_it_announced(
    port: PortProcess, front_end: SocketFrontEnd, bridge: socket.socket
) -> None:
    ask(port.control, "announce", mac="52:54:00:12:34:56")
    assert port.status()["announce"]["pending"]
    front_end.start()
    assert next_rarp(bridge) == rarp_frame(MAC)
    ask(port.control, "announce", mac="52:54:00:12:34:56")
    assert next_rarp(bridge) == rarp_frame(MAC)
    with pytest.raises(QMPError, match="is not a MAC address"):
        ask(port.control, "announce", mac="zz")


def test_a_nic_that_was_restarted_is_found_again(nic: EmulatedNic, tmp_path: Path) -> None:
    """The VF of one NIC announced by another, which goes and comes back."""
    folder = tmp_path / "other"
    with (
        NetworkNamespace() as elsewhere,
        EmulatedNic(folder, elsewhere, 1) as other,
        PortProcess(tmp_path, nic.device(0), f"--uplink=nic={other.control},vf=0") as port,
        closing(SocketFrontEnd.dial(port.socket)) as peer,
    ):
        peer.connect()
        peer.start()
        other.kill()
        peer.tell(Request.SEND_RARP, NUMBER)
        wait_for("its problem", lambda: port.status()["announce"]["problem"], 10)
        assert port.status()["state"] == "running"
        with EmulatedNic(folder, elsewhere, 1), closing(elsewhere.packet_socket("vf0")) as wire:
            peer.tell(Request.SEND_RARP, NUMBER)
            assert next_rarp(wire) == rarp_frame(MAC)
            wait_for("the end of its problem", lambda: port.status()["announce"]["problem"] is None, 10)


def test_without_an_uplink_it_is_dropped(nic: EmulatedNic, tmp_path: Path, bridge: socket.socket) -> None:
    with (
        PortProcess(tmp_path, nic.device(0)) as port,
        closing(SocketFrontEnd.dial(port.socket)) as peer,
    ):
        peer.connect()
        peer.start()
        peer.need_reply = True
        assert peer.tell(Request.SEND_RARP, NUMBER) == 0
        assert "no uplink" in port.status()["announce"]["problem"]
        with pytest.raises(QMPError, match="no uplink"):
            ask(port.control, "announce", mac="52:54:00:12:34:56")
        assert nothing_there(bridge)


def test_an_interface_carries_it(
    nic: EmulatedNic, namespace: NetworkNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace.run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1")
    for link in ("up0", "up1"):
        namespace.run("ip", "link", "set", link, "up")
    wrapper = tmp_path / "virt-vdpa-port"
    wrapper.write_text(f'#!/bin/sh\nexec {" ".join(namespace.prefix)} {BIN}/virt-vdpa-port "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr("tests.harness.emulated_nic.BIN", tmp_path)
    with (
        PortProcess(tmp_path, nic.device(0), "--uplink=interface=up0") as port,
        closing(SocketFrontEnd.dial(port.socket)) as peer,
        closing(namespace.packet_socket("up1")) as wire,
    ):
        peer.connect()
        peer.tell(Request.SEND_RARP, NUMBER)
        peer.start()
        assert next_rarp(wire) == rarp_frame(MAC)
        namespace.run("ip", "link", "set", "up0", "down")
        peer.tell(Request.SEND_RARP, NUMBER)
        wait_for("its problem", lambda: "Network is down" in str(port.status()["announce"]["problem"]), 10)
        namespace.run("ip", "link", "delete", "up0")


def test_an_uplink_that_cannot_be_had_is_named(nic: EmulatedNic, tmp_path: Path) -> None:
    folder = tmp_path
    for uplink, reason in {
        "interface=nosuch0": "uplink nosuch0: No such device; is it an interface here?",
        f"nic={folder}/none,vf=0": f"uplink {folder}/none: No such file or directory; is the NIC running?",
        f"nic={nic.control},vf=7": f"uplink {nic.control}: no VF 7; the NIC has 2",
    }.items():
        options = [f"--socket-path={tmp_path}/p.sock", f"--device={nic.device(0)}", f"--uplink={uplink}"]
        done = subprocess.run(
            [str(BIN / "virt-vdpa-port"), *options], capture_output=True, text=True, timeout=20
        )
        assert (done.returncode, done.stderr) == (1, f"virt-vdpa-port: {reason}\n")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"vf": 2, "frame": "00" * 60}, "is not a VF number"),
        ({"vf": 0, "frame": "00" * 13}, "13 bytes are no frame"),
        ({"vf": 0, "frame": "00" * 1515}, "1515 bytes are no frame"),
        ({"vf": 0, "frame": "zz"}, "frame: "),
        ({"vf": 0}, "frame: "),
    ],
)
def test_what_a_nic_cannot_send_is_refused(
    nic: EmulatedNic, arguments: dict[str, object], reason: str
) -> None:
    with pytest.raises(QMPError, match=reason):
        ask(nic.control, "vf-send", **arguments)


def test_a_cable_that_is_out_carries_nothing(nic: EmulatedNic) -> None:
    ask(nic.control, "vf-stop", vf=0)
    with pytest.raises(QMPError, match="cannot be sent: Network is down"):
        ask(nic.control, "vf-send", vf=0, frame="00" * 60)
