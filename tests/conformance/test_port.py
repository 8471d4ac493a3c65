"""virt-vdpa-port over a real emulated VF, driven by a front-end that plays every order and every fault."""

import json
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from datapath.vhost_user.messages import (
    HEADER,
    LAYOUTS,
    Message,
    ProtocolFeature,
    Region,
    Request,
    VringAddress,
    VringFd,
    VringState,
    encode_request,
)
from datapath.vhost_user.protocol_features import PROTOCOL_FEATURES
from datapath.virtio import Feature, Status, bit, feature_names
from tests.harness.emulated_nic import BIN, EmulatedNic, PortProcess, ask
from tests.harness.front_end import DRIVER_OK, MEMORY_SIZE, USER, SocketFrontEnd
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import run, wait_for
from tests.harness.traffic import TX, both_ways, offer_buffers, received, transmit
from tests.harness.virtqueue import Buffer
from tests.harness.wire import Wire


@pytest.fixture(scope="module")
def nic(network: NetworkNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedNic]:
    with EmulatedNic(tmp_path_factory.mktemp("nic"), network) as running:
        yield running


PROTOCOLS = {
    "all": PROTOCOL_FEATURES,
    "memory-table": PROTOCOL_FEATURES & ~bit(ProtocolFeature.CONFIGURE_MEM_SLOTS),
    "no-status": PROTOCOL_FEATURES & ~bit(ProtocolFeature.STATUS),
    "no-reply-ack": PROTOCOL_FEATURES & ~bit(ProtocolFeature.REPLY_ACK),
    "none": 0,
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_frames_pass_both_ways(port: PortProcess, wire: Wire, protocol: str) -> None:
    with closing(SocketFrontEnd.dial(port.socket, PROTOCOLS[protocol])) as peer:
        peer.connect()
        peer.start()
        offer_buffers(peer)
        both_ways(peer, wire, 100)
        status = port.status()
        assert status["state"] == "running"
        assert status["driver"] == "ifcvf"
        assert [ring["running"] for ring in status["rings"]] == [True, True]
        assert status["rings"][TX]["used"] == 1
        assert ask(port.control, "query-stats")["kicks.1"] >= 1
    port.wait_state("waiting")


@pytest.mark.parametrize("status_first", [True, False], ids=["qemu-7.2", "qemu-8.1"])
def test_stop_and_start_again(front_end: SocketFrontEnd, wire: Wire, status_first: bool) -> None:
    front_end.start()
    offer_buffers(front_end, 8)
    for turn in range(3):
        both_ways(front_end, wire, 200 + 10 * turn)
        bases = front_end.stop(status_first=status_first)
        assert bases == [queue.used_index for queue in front_end.queues]
        front_end.start(share=False)


def test_while_stopped_nothing_of_the_guest_is_touched(front_end: SocketFrontEnd, wire: Wire) -> None:
    front_end.start()
    offer_buffers(front_end)
    both_ways(front_end, wire, 300)
    front_end.stop()
    before = [queue.used_index for queue in front_end.queues]
    transmit(front_end, 302)
    wire.send(303)
    front_end.settle()
    assert [queue.used_index for queue in front_end.queues] == before
    front_end.start(share=False)
    wire.expect(302)  # started rings are served without a new kick


def test_a_disabled_transmit_ring_waits(front_end: SocketFrontEnd, wire: Wire) -> None:
    front_end.start()
    front_end.tell(Request.SET_VRING_ENABLE, VringState(TX, 0))
    front_end.settle()
    transmit(front_end, 310)
    offer_buffers(front_end)
    wire.send(311)
    assert received(front_end) == 311
    assert front_end.queues[TX].used_index == 0
    front_end.tell(Request.SET_VRING_ENABLE, VringState(TX, 1))
    wire.expect(310)


def test_a_front_end_that_comes_back_finds_its_rings(port: PortProcess, wire: Wire) -> None:
    peer = SocketFrontEnd.dial(port.socket)
    peer.connect()
    peer.start()
    offer_buffers(peer, 16)
    both_ways(peer, wire, 400)
    for turn in range(3):
        peer.socket.close()  # without a word, as a front-end that was killed
        port.wait_state("waiting")
        again = SocketFrontEnd.dial(port.socket)
        peer.socket = again.socket
        peer.connect()
        peer.start()
        both_ways(peer, wire, 410 + 10 * turn)
    peer.close()


def test_a_port_that_was_killed_goes_on_where_it_stood(nic: EmulatedNic, tmp_path: Path, wire: Wire) -> None:
    with PortProcess(tmp_path, nic.device(0)) as first:
        peer = SocketFrontEnd.dial(first.socket)
        peer.connect()
        peer.start()
        offer_buffers(peer, 16)
        both_ways(peer, wire, 450)
        first.kill()
    transmit(peer, 460)  # into the void: its kick is never seen
    with PortProcess(tmp_path, nic.device(0)) as second:
        again = SocketFrontEnd.dial(second.socket)
        peer.socket = again.socket
        peer.connect()
        peer.start()
        wire.expect(460)
        peer.queues[TX].wait_used()
        both_ways(peer, wire, 470)
        peer.close()


def test_a_second_front_end_is_turned_away(port: PortProcess, front_end: SocketFrontEnd, wire: Wire) -> None:
    front_end.start()
    offer_buffers(front_end)
    with closing(SocketFrontEnd.dial(port.socket)) as second:
        assert second.ended()
    both_ways(front_end, wire, 500)


def test_an_offer_can_be_narrowed(nic: EmulatedNic, tmp_path: Path) -> None:
    mask = bit(Feature.F_VERSION_1)
    with (
        PortProcess(tmp_path, nic.device(0), f"--features={mask:#x}") as port,
        closing(SocketFrontEnd.dial(port.socket)) as peer,
    ):
        offered = peer.tell(Request.GET_FEATURES)
    assert feature_names(offered) == ["VHOST_USER_F_PROTOCOL_FEATURES", "F_VERSION_1"]


def test_the_port_connects_where_the_front_end_listens(nic: EmulatedNic, tmp_path: Path, wire: Wire) -> None:
    with PortProcess(tmp_path, nic.device(0), "--connect") as port:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(port.socket))
        listener.settimeout(10)
        listener.listen()  # it connects as soon as it can: nobody need see it wait
        for number in (600, 610):  # and connects again after a disconnect
            with closing(SocketFrontEnd(listener.accept()[0])) as peer:
                peer.connect()
                peer.start()
                offer_buffers(peer)
                both_ways(peer, wire, number)
        listener.close()


def test_a_front_end_that_never_listens_is_named(nic: EmulatedNic, tmp_path: Path) -> None:
    path = tmp_path / "absent.sock"
    options = [f"--socket-path={path}", "--connect", "--connect-timeout=0.2", f"--device={nic.device(0)}"]
    done = subprocess.run([BIN / "virt-vdpa-port", *options], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert f"socket {path}: no front-end listens there after 0.2 s" in done.stderr


@pytest.mark.parametrize("listening", [True, False])
def test_a_socket_can_be_handed_over(nic: EmulatedNic, tmp_path: Path, wire: Wire, listening: bool) -> None:
    path = tmp_path / "handed.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        peer = SocketFrontEnd.dial(path)
        handed = listener if listening else listener.accept()[0]
        port = PortProcess(tmp_path, nic.device(0), f"--fd={handed.fileno()}")
        with port:
            handed.close()
            peer.connect()
            peer.start()
            offer_buffers(peer)
            both_ways(peer, wire, 700)
            peer.close()
            if not listening:
                assert wait_for("its end", lambda: not port.running, 10)
                assert port.popen.returncode == 0


def test_sigterm_gives_everything_back(nic: EmulatedNic, tmp_path: Path) -> None:
    with PortProcess(tmp_path, nic.device(0)) as port:
        peer = SocketFrontEnd.dial(port.socket)
        peer.connect()
        peer.start()
        assert port.stop() == 0
        assert not port.socket.exists()
        assert not port.control.exists()
        assert peer.ended()
        peer.close()
    assert wait_for("an idle VF", lambda: nic.query(0)["state"] == "idle", 10)


def test_a_socket_in_use_is_left_alone(port: PortProcess, nic: EmulatedNic) -> None:
    command = [str(BIN / "virt-vdpa-port"), f"--socket-path={port.socket}", f"--device={nic.device(1)}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert done.stderr == f"virt-vdpa-port: socket {port.socket}: another process serves this socket\n"
    assert port.status()["state"] == "waiting"


def test_a_path_too_long_for_a_socket_is_named(nic: EmulatedNic, tmp_path: Path) -> None:
    for option in ("--socket-path", "--control"):
        other = [] if option == "--socket-path" else [f"--socket-path={tmp_path}/p.sock"]
        path = tmp_path / ("x" * 120)
        command = [str(BIN / "virt-vdpa-port"), f"{option}={path}", f"--device={nic.device(0)}", *other]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert done.returncode == 1
        assert f"{path}: a socket's path has at most" in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_a_port_without_descriptors_turns_front_ends_away(port: PortProcess) -> None:
    port.holdings()  # once it has seen that we have left its control socket
    in_use = {int(path.name) for path in Path(f"/proc/{port.pid}/fd").iterdir()}
    free = next(number for number in range(1024) if number not in in_use)
    resource.prlimit(port.pid, resource.RLIMIT_NOFILE, (free, 1024))
    for _ in range(3):
        with closing(SocketFrontEnd.dial(port.socket)) as peer:
            assert peer.ended()
    resource.prlimit(port.pid, resource.RLIMIT_NOFILE, (1024, 1024))
    with closing(SocketFrontEnd.dial(port.socket)) as peer:
        peer.connect()


def test_a_killed_port_loses_the_device_before_the_front_end(
    nic: EmulatedNic, port: PortProcess, front_end: SocketFrontEnd
) -> None:
    """By its numbers, see `closed_early`: QEMU must not find a ring that the device still writes to."""
    front_end.start()
    folder = Path(f"/proc/{port.pid}/fd")
    highest = max(folder.iterdir(), key=lambda path: int(path.name))
    inode = highest.readlink().name.removeprefix("socket:[").removesuffix("]")
    ends = run(["ss", "-xH", "state", "established"]).stdout.splitlines()
    (vf,) = (line for line in ends if f"{nic.folder}/.vf0.sock." in line)  # it is bound under another name
    assert vf.split()[-1] == inode  # that of the other end


def test_a_stale_socket_is_replaced(nic: EmulatedNic, tmp_path: Path) -> None:
    with PortProcess(tmp_path, nic.device(0)) as port:
        port.kill()
        assert port.socket.exists()
    with PortProcess(tmp_path, nic.device(0)) as port, closing(SocketFrontEnd.dial(port.socket)) as peer:
        peer.connect()


COMMAND_LINES = {
    "unknown driver": (["--device=nosuch,a=b"], 2, "no driver 'nosuch'; use one of: ifcvf"),
    "no value": (["--device=ifcvf,vfio-user"], 2, "'vfio-user' is not key=value"),
    "unknown option": (["--device=ifcvf,colour=blue"], 1, "colour"),
    "no device": ([], 2, "--device"),
    "no VF there": (["--device=ifcvf,vfio-user=/nowhere/vf.sock"], 1, "/nowhere/vf.sock"),
    "connect without path": (["--device=ifcvf,vfio-user=/x", "--fd=0", "--connect"], 2, "--connect needs"),
    "no such descriptor": (["--device=ifcvf,vfio-user=/x", "--fd=99"], 1, "--fd=99: Bad file descriptor"),
    "features no number": (["--device=ifcvf,vfio-user=/x", "--features=zz"], 2, "'zz' is not a mask"),
    "features negative": (["--device=ifcvf,vfio-user=/x", "--features=-1"], 2, "'-1' is not a mask"),
    "time-out no number": (["--device=ifcvf,vfio-user=/x", "--connect-timeout=nan"], 2, "'nan' is not a"),
    "log mode": (["--device=ifcvf,vfio-user=/x", "--log-mode=zz"], 2, "'zz' is not one of: auto, hardware"),
    "uplink": (["--device=ifcvf,vfio-user=/x", "--uplink=eth0"], 2, "neither interface=NAME nor nic=SOCKET"),
    "uplink without VF": (
        ["--device=ifcvf,vfio-user=/x", "--uplink=nic=/x"],
        2,
        "neither interface=NAME nor",
    ),
    "two sockets": (["--device=ifcvf,vfio-user=/x", "--fd=0", "--socket-path=/x"], 2, "not allowed with"),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_wrong_command_lines(tmp_path: Path, case: str) -> None:
    options, code, text = COMMAND_LINES[case]
    if not any(option.startswith("--fd") for option in options):
        options = [*options, f"--socket-path={tmp_path}/p.sock"]
    done = subprocess.run(
        [BIN / "virt-vdpa-port", *options],
        capture_output=True,
        text=True,
        timeout=20,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_device_can_be_probed(nic: EmulatedNic) -> None:
    command = [str(BIN / "virt-vdpa-port"), "--probe", f"--device={nic.device(1)}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["features"] & bit(Feature.F_VERSION_1)
    assert (found["queue_pairs"], found["max_mtu"]) == (1, 1500)
    assert "software" in found["log_modes"]
    assert wait_for("an idle VF", lambda: nic.query(1)["state"] == "idle", 10)


def test_capabilities_are_printed_whatever_else_is_said() -> None:
    done = subprocess.run(
        [BIN / "virt-vdpa-port", "--print-capabilities", "--nonsense"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stdout) == (0, '{"type": "net"}\n')


# Faults. Each is told the front-end and does what a broken or hostile one would.


def send_half_a_message(peer: SocketFrontEnd) -> None:
    peer.send(HEADER.pack(Request.SET_VRING_NUM, 1, 8) + b"\0\0")
    peer.socket.shutdown(socket.SHUT_WR)


def send_fds_with(request: Request, count: int) -> Callable[[SocketFrontEnd], None]:
    def send(peer: SocketFrontEnd) -> None:
        body = bytes(LAYOUTS[request].payload.size or 0)
        peer.send(HEADER.pack(request, 1, len(body)) + body, [peer.memory.fd] * count)

    return send


def start_with_address(address: VringAddress) -> Callable[[SocketFrontEnd], None]:
    def start(peer: SocketFrontEnd) -> None:
        peer.share_memory()
        peer.tell(Request.SET_VRING_NUM, VringState(address.index, 256))
        peer.tell(Request.SET_VRING_ADDR, address)

    return start


def tell(request: Request, payload: object, *, fd: bool = False) -> Callable[[SocketFrontEnd], None]:
    def send(peer: SocketFrontEnd) -> None:
        peer.send(encode_request(Message(request, payload)), [peer.memory.fd] if fd else [])

    return send


def corrupt_ring(change: Callable[[SocketFrontEnd], None]) -> Callable[[SocketFrontEnd], None]:
    """Break a ring that runs: the device must notice."""

    def run(peer: SocketFrontEnd) -> None:
        peer.start()
        change(peer)
        peer.queues[TX].kick()

    return run


def start_without_size(peer: SocketFrontEnd) -> None:
    peer.enable()
    peer.tell(Request.SET_FEATURES, bit(Feature.F_VERSION_1))
    peer.tell(Request.SET_STATUS, DRIVER_OK)
    peer.tell(Request.SET_VRING_KICK, VringFd(0, False))


def point_outside_memory(peer: SocketFrontEnd) -> None:
    peer.queues[TX].add(Buffer(MEMORY_SIZE, 64))


def shrink_memory(peer: SocketFrontEnd) -> None:
    os.ftruncate(peer.memory.fd, 4096)


def flood_without_reading(peer: SocketFrontEnd) -> None:
    data = encode_request(Message(Request.GET_FEATURES)) * 4096
    try:
        while True:
            peer.send(data)
    except OSError:
        return


FAULTS: dict[str, tuple[Callable[[SocketFrontEnd], None], str]] = {
    "garbage": (lambda peer: peer.send(os.urandom(64) + b"\xff" * 64), "broke the protocol"),
    "zeroes": (lambda peer: peer.send(bytes(64)), "no version 1 request"),
    "a reply": (lambda peer: peer.send(HEADER.pack(1, 5, 8) + bytes(8)), "no version 1 request"),
    "huge payload": (lambda peer: peer.send(HEADER.pack(5, 1, 1 << 30)), "payload of 1073741824 bytes"),
    "short payload": (lambda peer: peer.send(HEADER.pack(8, 1, 4) + bytes(4)), "payload of 4 bytes"),
    "long payload": (lambda peer: peer.send(HEADER.pack(1, 1, 8) + bytes(8)), "payload of 8 bytes"),
    "half a message": (send_half_a_message, "in the middle of a message"),
    "fd where none belongs": (send_fds_with(Request.SET_FEATURES, 1), "1 descriptors instead of 0"),
    "fd missing": (send_fds_with(Request.ADD_MEM_REG, 0), "0 descriptors instead of 1"),
    "fds too many": (send_fds_with(Request.SET_LOG_FD, 8), "8 descriptors instead of 1"),
    "fds far too many": (send_fds_with(Request.SET_LOG_FD, 60), "more than 8 descriptors"),
    "size no power of two": (tell(Request.SET_VRING_NUM, VringState(0, 100)), "no power of two"),
    "size 0": (tell(Request.SET_VRING_NUM, VringState(0, 0)), "no power of two"),
    "no such ring": (tell(Request.SET_VRING_BASE, VringState(1 << 31, 0)), "has rings 0 to 1"),
    "ring outside memory": (
        start_with_address(VringAddress(0, 0, USER, USER + MEMORY_SIZE, USER, 0)),
        "lie in no memory region",
    ),
    "ring wraps": (
        start_with_address(VringAddress(0, 0, USER, 2**64 - 8, USER, 0)),
        "lie in no memory region",
    ),
    "region empty": (tell(Request.ADD_MEM_REG, Region(0, 0, USER, 0), fd=True), "empty"),
    "region beyond its file": (
        tell(Request.ADD_MEM_REG, Region(0, MEMORY_SIZE * 2, USER, 0), fd=True),
        f"of a file that has {MEMORY_SIZE}",
    ),
    "region not there": (tell(Request.REM_MEM_REG, Region(0, 4096, 0, 0)), "not a region of this connection"),
    "kick without a size": (start_without_size, "started without a size"),
    "feature not offered": (tell(Request.SET_FEATURES, bit(Feature.F_RING_PACKED)), "F_RING_PACKED"),
    "config asked for": (lambda peer: peer.send(HEADER.pack(24, 1, 12) + bytes(12)), "GET_CONFIG"),
    "status too wide": (tell(Request.SET_STATUS, int(Status.FAILED) << 4), "more than 8 bits"),
    "flood": (flood_without_reading, "does not read its replies"),
    "avail index jumps": (
        corrupt_ring(lambda peer: peer.queues[TX].set_avail_index(5000)),
        "needs a reset",
    ),
    "descriptor outside memory": (
        corrupt_ring(point_outside_memory),
        "needs a reset",
    ),
    "memory shrinks": (corrupt_ring(shrink_memory), "needs a reset"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_ends_one_connection_and_nothing_else(
    case: str, nic: EmulatedNic, port: PortProcess, tmp_path: Path, wire: Wire
) -> None:
    fault, reason = FAULTS[case]
    with (
        PortProcess(tmp_path, nic.device(1), name="neighbour") as neighbour,
        closing(SocketFrontEnd.dial(neighbour.socket)) as undisturbed,
        closing(Wire(nic.namespace, "vf1")) as other_wire,
    ):
        undisturbed.connect()
        undisturbed.start()
        offer_buffers(undisturbed, 8)
        both_ways(undisturbed, other_wire, 800)
        with closing(SocketFrontEnd.dial(port.socket)) as warm_up:  # what the first connection loads for good
            warm_up.connect()
            warm_up.start()
        port.wait_state("waiting")
        holdings = port.holdings()
        lines = len(port.log_lines())
        with closing(SocketFrontEnd.dial(port.socket)) as peer:
            peer.connect()
            with suppress(OSError):  # ended before the fault was complete
                fault(peer)
            assert peer.ended()
        port.wait_state("waiting")
        said = port.log_lines()[lines:]
        assert len(said) == 1
        assert reason in said[0]
        assert port.holdings() == holdings
        with closing(SocketFrontEnd.dial(port.socket)) as good:
            good.connect()
            good.start()
            offer_buffers(good)
            both_ways(good, wire, 810)
        both_ways(undisturbed, other_wire, 820)


def test_a_vf_that_does_not_answer_ends_the_connection_in_time(tmp_path: Path) -> None:
    with (
        NetworkNamespace() as namespace,
        EmulatedNic(tmp_path / "nic", namespace, 1) as nic,
        PortProcess(tmp_path, nic.device(0)) as port,
        closing(SocketFrontEnd.dial(port.socket)) as peer,
    ):
        peer.connect()
        peer.start()
        nic.signal(signal.SIGSTOP)
        try:
            peer.send(encode_request(Message(Request.GET_VRING_BASE, VringState(0, 0))))
            peer.socket.settimeout(20)
            assert peer.ended()
        finally:
            nic.signal(signal.SIGCONT)


def test_a_vf_that_vanishes_ends_the_port_with_its_name(tmp_path: Path) -> None:
    with (
        NetworkNamespace() as namespace,
        EmulatedNic(tmp_path / "nic", namespace, 1) as nic,
        PortProcess(tmp_path, nic.device(0)) as port,
        closing(SocketFrontEnd.dial(port.socket)) as peer,
    ):
        peer.connect()
        peer.start()
        nic.kill()
        assert peer.ended()
        assert wait_for("its end", lambda: not port.running, 10)
        assert port.popen.returncode == 1
        assert not port.socket.exists()
        assert "Traceback" not in port.log.read_text()
        assert f"{nic.folder}/vf0.sock" in port.log_lines()[-1]
        assert port.log_lines().count(port.log_lines()[-1]) == 1
