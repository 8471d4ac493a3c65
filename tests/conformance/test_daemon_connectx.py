"""virtvdpad with pools of emulated ConnectX, and what `virt-vdpa stats` says of either kind of port."""

import json
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.harness.daemon_host import PROGRAMS, DaemonHost, Domain
from tests.harness.netns import NetworkNamespace
from tests.harness.processes import wait_for

POOL = """
[pool.cards]
driver = "mlx5"
emulated = 2
tap = "card%d"
mtu = 2000
options = "max_conf_threads=4"
queue-pairs = 2
"""


@pytest.fixture
def cards(network: NetworkNamespace) -> Iterator[DaemonHost]:
    """A host with a pool of either kind."""
    host = DaemonHost(network)
    host.configure(more=POOL)
    host.start()
    yield host
    host.close()


def on_a_card(host: DaemonHost, number: int = 1) -> Domain:
    """A domain whose VF is a ConnectX'."""
    domain = host.domain(number=number).edited("<name>vdpa-demo<", f"<name>carded-{number}<")
    return domain.edited("driver='ifcvf' pool='default'", "driver='mlx5' pool='cards'")


def virt_vdpa(host: DaemonHost, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAMS / "virt-vdpa"), f"--socket={host.socket}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_a_card_is_lent_and_given_back(cards: DaemonHost, network: NetworkNamespace) -> None:
    domain = on_a_card(cards)
    cards.hook(domain, "prepare")
    (port,) = cards.ports
    assert port["device"].startswith("mlx5,ibdev=emulated_cards_0,")
    assert port["device"].endswith(",max_conf_threads=4")
    assert "mtu 2000" in network.run("ip", "link", "show", "card0")
    status = cards.ask("query-status", domain.control)
    assert (status["driver"], status["queue_pairs"], status["max_mtu"]) == ("mlx5", 2, 2000)
    cards.hook(on_a_card(cards, 2), "prepare")
    assert cards.veto(on_a_card(cards, 3), "prepare").startswith(
        "domain 'carded-3': interface 52:54:00:76:64:01: pool 'cards' has no free VF: 2 of 2 lent to"
    )
    cards.hook(domain, "stopped")
    cards.hook(domain, "release")
    wait_for("the port to end", lambda: len(cards.ports) == 1, 10)
    assert "card0" not in network.run("ip", "link")


def test_a_killed_port_comes_back_with_its_card(cards: DaemonHost, network: NetworkNamespace) -> None:
    domain = on_a_card(cards)
    cards.hook(domain, "prepare")
    cards.hook(domain, "start")
    (port,) = cards.ports
    subprocess.run(["kill", f"-{signal.SIGKILL}", str(port["pid"])], check=True)
    wait_for("the port to be back", lambda: cards.ports[0]["restarts"] == 1 and serves(cards), 10)
    assert "card0" in network.run("ip", "link")


def serves(host: DaemonHost) -> bool:
    return bool(host.ports[0]["state"] == "serving")


def test_a_daemon_after_this_one_finds_the_card_lent(cards: DaemonHost) -> None:
    cards.hook(on_a_card(cards), "prepare")
    cards.stop()
    cards.configure()  # without the pool: what a port uses stays
    cards.start()
    (port,) = cards.ports
    assert port["state"] == "ready" or port["session"] == "waiting"
    assert (cards.folder / "nics/cards/vf0/mlx5_emulated.options").exists()


def test_statistics_of_either_kind(cards: DaemonHost) -> None:
    cards.hook(cards.domain(), "prepare")
    cards.hook(on_a_card(cards, 2), "prepare")
    answer = json.loads(virt_vdpa(cards, "stats", "--json").stdout)
    by_domain = {port["domain"]: port for port in answer["ports"]}
    assert by_domain["vdpa-demo"]["counters"]["kicks.1"] == 0
    assert "completed_descriptors.0" not in by_domain["vdpa-demo"]["counters"]
    assert by_domain["carded-2"]["counters"]["kicks.3"] == 0
    done = virt_vdpa(cards, "stats", "carded-2")
    assert done.returncode == 0
    title, headings, *rows = done.stdout.splitlines()
    assert title.startswith("carded-2 52:54:00:76:64:01, mlx5,ibdev=emulated_cards_0,")
    assert headings.split()[:2] == ["PAIR", "KICKS"]
    assert [row.split()[:3] for row in rows] == [
        [str(pair), direction, "0"] for pair in range(2) for direction in ("rx", "tx")
    ]
    unknown = virt_vdpa(cards, "stats", "nobody")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr == "virt-vdpa: domain 'nobody' has no port here; see virt-vdpa ports\n"


def test_a_port_that_does_not_answer_is_told_of(cards: DaemonHost) -> None:
    cards.hook(cards.domain(), "prepare")
    cards.hook(on_a_card(cards, 2), "prepare")
    stopped = next(port for port in cards.ports if port["domain"] == "vdpa-demo")
    subprocess.run(["kill", f"-{signal.SIGSTOP}", str(stopped["pid"])], check=True)
    try:
        done = virt_vdpa(cards, "stats")
    finally:
        subprocess.run(["kill", f"-{signal.SIGCONT}", str(stopped["pid"])], check=True)
    assert done.returncode == 0
    silent, blank, title, *_ = done.stdout.splitlines()
    assert silent.startswith("vdpa-demo 52:54:00:76:64:01, ifcvf,")
    assert "no answer within" in silent
    assert (blank, title.split()[0]) == ("", "carded-2")
