"""The queue pairs of a guest's first NIC: how many it uses, and on which rings packets move."""

from collections import Counter

from tests.harness.console import Console
from tests.harness.domain_xml import DomainXml
from tests.harness.guest_load import load
from tests.harness.processes import HarnessError, wait_for
from tests.harness.vdpa_host import GUEST_ADDRESS, HOST_ADDRESS, VdpaHost

#: Connections that are tried, to a port each where nobody listens: as many flows, each way.
FLOWS = 16
FIRST_PORT = 9000
#: How many datagrams of one flow are looked at; seconds that are tried for as many; bytes of each.
ECHOES, SAMPLES, SIZE = 200, (0.5, 2, 8, 30), 100
#: A ring's index is so wide.
INDEX = 1 << 16


def running(host: VdpaHost, domain: DomainXml) -> dict[int, int]:
    """The rings that the VF runs, each with its used index."""
    rings = host.ask_port(domain, "query-status")["rings"]
    return {ring["index"]: ring["used"] for ring in rings if ring["running"]}


def receiving(host: VdpaHost, domain: DomainXml) -> int:
    """On how many pairs the VF receives."""
    return sum(index % 2 == 0 for index in running(host, domain))


def use_pairs(host: VdpaHost, domain: DomainXml, console: Console, pairs: int, of: int) -> None:
    """Have the guest use so many pairs of those it has, and wait until the VF receives on them."""
    console.run(f"channels eth0 {pairs}")
    assert console.run("channels eth0").strip() == f"{pairs} of {of}"
    wait_for(f"{pairs} pairs to receive", lambda: receiving(host, domain) == pairs, 20)


def rings_of_many_flows(host: VdpaHost, domain: DomainXml, console: Console) -> set[int]:
    """The rings on which many flows move packets."""
    before = running(host, domain)
    peer = HOST_ADDRESS.partition("/")[0]
    ports = f"$(seq {FIRST_PORT} {FIRST_PORT + FLOWS - 1})"
    console.run(f"for port in {ports}; do nc {peer} $port </dev/null 2>/dev/null; done; true", seconds=60)
    after = running(host, domain)
    return {index for index, used in after.items() if used != before[index]}


def rings_of_one_flow(peer: VdpaHost, host: VdpaHost, domain: DomainXml) -> tuple[int, Counter[int]]:
    """Let datagrams go there and back, one at a time: how many did, and how many packets each ring moved.

    :param peer: the host that sends them.
    :param host: where the guest is.
    :raise HarnessError: when too few come back, as long as it may take.
    """
    for seconds in SAMPLES:
        before = running(host, domain)
        found = load(peer, GUEST_ADDRESS, "echo", size=SIZE, seconds=seconds)
        after = running(host, domain)
        if found.count >= ECHOES:
            return found.count, Counter(
                {index: (used - before[index]) % INDEX for index, used in after.items()}
            )
    raise HarnessError(f"{found.count} echoes within {seconds:g} s")
