"""./demo: a guest gets a vDPA NIC, from nothing but its domain XML. Read `show` to see how it is done.

Everything runs on a private host (tests/harness/host.py), so the machine's own libvirtd, if it has one,
notices nothing, and nothing is left when the host is ended:

    libvirtd ── hooks/qemu ──▶ virtvdpad ──▶ virt-vdpa-port ──vfio-user──▶ virt-vdpa-nic ── TAP a0 ── net0
       │                                        ▲
       └──────────────▶ QEMU ──vhost-user───────┘             (guest 10.76.0.2)           (host 10.76.0.1)

With `--driver mlx5` the VF is one of an emulated ConnectX, which is in the port's own process. On a machine
with real VFs the emulated NIC is the only part that is not there. What `--migrate` shows is in
demo_migrate.py.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests import demo_migrate
from tests.demo_parts import Ending, Progress, carry_out, private, report_file
from tests.harness.demo_host import DemoHost, Network
from tests.harness.domain_xml import DomainXml
from tests.harness.emulated_nic import BIN
from tests.harness.guest import guest_image
from tests.harness.processes import wait_for
from tests.harness.vdpa_host import RUN_FOLDER

PINGS = 20
MOST_NICS = 2
#: Pings sent while the VF's cable is out: each is waited for a second.
PINGS_WHILE_UNPLUGGED = 3


@dataclass
class Nic:
    """What the report says of one NIC of the guest."""

    driver: str
    mac: str
    device: str = ""
    #: Virtio features that the guest negotiated with the VF.
    features: list[str] = field(default_factory=list)
    ping: dict[str, int] = field(default_factory=dict)
    ping_while_unplugged: dict[str, int] = field(default_factory=dict)
    ping_when_plugged_in: dict[str, int] = field(default_factory=dict)


@dataclass
class Report(Ending):
    """What `--report` writes."""

    #: The domain's state while it was pinged, and its name.
    domain: str = ""
    name: str = ""
    nics: list[Nic] = field(default_factory=list)
    #: Seconds: `virsh start`; from its end to the first answer to a ping.
    start_s: float = 0.0
    boot_to_ping_s: float = 0.0


def show(host: DemoHost, report: Report, step: Progress) -> None:
    """The demonstration itself, on a host that runs libvirtd, virtvdpad and our hook."""
    for pool in host.virt_vdpa("status")["pools"]:
        step(
            f"virtvdpad serves the pool '{pool['name']}': {pool['vfs']} emulated VFs, driver {pool['driver']}"
        )

    # The example domain is complete but for a kernel. Its <metadata> asks for VFs; its <interface>s are
    # ordinary vhost-user ones. Nothing else tells libvirt about vDPA.
    domain = domain_of(host, report)
    host.define(domain)
    step(f"defined the domain {domain.name} from xml/vdpa-demo.xml")

    # libvirtd runs the hook, the hook asks virtvdpad, virtvdpad starts a port for each NIC: a process that
    # opens the VF and serves the vhost-user socket that QEMU then connects to.
    begin = time.monotonic()
    host.virsh("start", domain.name)
    started = time.monotonic()
    report.start_s = round(started - begin, 3)
    step(f"virsh start took {report.start_s:.2f} s; the guest boots")

    host.wait_for_ping(host.networks[0].guest)
    report.boot_to_ping_s = round(time.monotonic() - started, 3)
    step("the guest answers ping through the VF")
    report.domain = host.state(domain.name)
    for nic, network in zip(report.nics, host.networks, strict=True):
        show_nic(host, nic, network, step)
    print(f"\n{describe(host, domain, report)}\n")


def domain_of(host: DemoHost, report: Report) -> DomainXml:
    """The example domain with a NIC for each of the host's networks."""
    first, *others = (network.guest for network in host.networks)
    domain = DomainXml.example("vdpa-demo.xml").boot(guest_image(), first, *others)
    macs = [domain.mac, *(domain.add_nic() for _ in others)]
    for number, network in enumerate(host.networks):
        domain.use_pool(number, network.driver, network.pool)
        report.nics.append(Nic(network.driver, macs[number]))
    report.name = domain.name
    return domain


def show_nic(host: DemoHost, nic: Nic, network: Network, step: Progress) -> None:
    """Ping the guest through one NIC; that the packets go by its VF is seen by pulling the cable."""
    nic.ping = ping(host, network, PINGS)
    step(f"{nic.driver}: {nic.ping['received']} of {nic.ping['sent']} pings came back")
    host.plug(network, False)
    nic.ping_while_unplugged = ping(host, network, PINGS_WHILE_UNPLUGGED)
    step(
        f"{nic.driver}, its cable pulled: {nic.ping_while_unplugged['received']} of"
        f" {PINGS_WHILE_UNPLUGGED} pings came back"
    )
    host.plug(network, True)
    host.wait_for_ping(network.guest, seconds=20)
    nic.ping_when_plugged_in = ping(host, network, PINGS_WHILE_UNPLUGGED)
    step(
        f"{nic.driver}, plugged in again: {nic.ping_when_plugged_in['received']} of"
        f" {PINGS_WHILE_UNPLUGGED} pings came back"
    )


def end_guest(host: DemoHost, report: Report, step: Progress) -> None:
    """Shut the guest down as an operator would; its port ends with it."""
    host.virsh("shutdown", report.name)
    wait_for("the guest to shut down", lambda: host.state(report.name) == "shut off", 30)
    wait_for("the port to end", lambda: not host.running("virt-vdpa-port"), 10)
    step("the guest is shut down, its port has ended and the VF is free again")


def ping(host: DemoHost, network: Network, count: int) -> dict[str, int]:
    """Ping the guest; what the report says about it."""
    sent, received = host.ping(network.guest, count=count)
    return {"sent": sent, "received": received}


def describe(host: DemoHost, domain: DomainXml, report: Report) -> str:
    """The table of what was put together, read from the daemon and the ports."""
    ports = {port["mac"]: port for port in host.ports_of(domain)}
    rows: list[tuple[str, Any]] = [("domain", f"{domain.name}, {report.domain}")]
    for nic in report.nics:
        port = ports[nic.mac]
        control = f"{RUN_FOLDER}/ports/{domain.uuid}/{nic.mac}.ctl"
        status, counters = host.ask(control, "query-status"), host.ask(control, "query-stats")
        nic.device, nic.features = port["device"], status["feature_names"]
        rows += [
            ("interface", nic.mac),
            ("  port", f"pid {port['pid']}, {port['socket'].replace(RUN_FOLDER, '…')}"),
            ("  driver", status["driver"]),
            ("  VF", nic.device.partition(",libibverbs")[0].replace(RUN_FOLDER, "…")),
            ("  features", wrap(nic.features)),
            (
                "  kicks",
                f"{counters['kicks.0']} of the receive ring, {counters['kicks.1']} of the transmit ring",
            ),
        ]
        if "completed_descriptors.0" in counters:
            done = [counters[f"completed_descriptors.{ring}"] for ring in (0, 1)]
            rows.append(("  descriptors", f"{done[0]} to the guest, {done[1]} from it"))
    return "\n".join(f"    {name:<14}{value}" for name, value in rows)


def wrap(words: list[str], width: int = 80) -> str:
    """Words in lines that fit the table's second column."""
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return f"\n{' ' * 18}".join(line.rstrip() for line in lines)


def look_around(host: DemoHost, report: Report) -> str:
    """What `--keep` prints."""
    enter = " ".join(host.enter)
    return f"""
The guest keeps running. Look around, as root:

    {enter} bash                    # a shell on the private host; in it:
        virsh list
        virsh console {report.name}             # a shell in the guest; Ctrl-] leaves it
        ping {host.networks[0].guest.partition("/")[0]}
        {BIN}/virt-vdpa ports
        {BIN}/virt-vdpa devices

The configuration is {host.configuration}, the logs are below {host.logs}.
End it all with:

    {host.end_command}
"""


def run(drivers: Sequence[str], report: Report, *, keep: bool) -> str | None:
    """Make the host, show, clean up; what is wrong with what was seen.

    :param drivers: of the guest's NICs.
    :raise HarnessError: when something does not work; the host is ended then as well.
    """
    step = Progress()
    step("making a private host: libvirtd and virtvdpad with folders and a network of their own")
    host = DemoHost("demo", drivers, keep=keep)
    with private(host, report, step, keep=keep):
        show(host, report, step)
        if not keep:
            end_guest(host, report, step)
    if keep:
        print(look_around(host, report))
    return verdict(report)


def verdict(report: Report) -> str | None:
    """What is wrong with what was seen; None when all is as it should be."""
    for nic in report.nics:
        if nic.ping["received"] != nic.ping["sent"]:
            return f"{nic.driver}: only {nic.ping['received']} of {nic.ping['sent']} pings came back"
        if nic.ping_while_unplugged["received"]:
            return f"{nic.driver}: the guest answered ping although its VF's cable was out"
        if nic.ping_when_plugged_in["received"] != nic.ping_when_plugged_in["sent"]:
            return f"{nic.driver}: the guest did not answer ping after its VF's cable was plugged in again"
    if report.leftovers:
        return f"left behind: {', '.join(report.leftovers)}"
    return None


def driver_list(text: str) -> list[str]:
    """Drivers of the guest's NICs."""
    drivers = text.split(",")
    if len(drivers) > MOST_NICS or not set(drivers) <= demo_migrate.MODES.keys():
        there = ", ".join(demo_migrate.MODES)
        raise argparse.ArgumentTypeError(f"'{text}' is not one or two of: {there}")
    return drivers


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="./demo", description="Watch a libvirt guest get a vDPA NIC.")
    parser.add_argument("--report", type=report_file, metavar="FILE", help="write what was seen as JSON")
    parser.add_argument(
        "--driver",
        type=driver_list,
        default=["ifcvf"],
        metavar="DRIVER[,DRIVER]",
        help=f"of the guest's NIC, or of two: {', '.join(demo_migrate.MODES)} (default: ifcvf)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--keep", action="store_true", help="leave everything running, and say how to look at it"
    )
    what.add_argument(
        "--migrate", action="store_true", help="move the guest to another host and back instead"
    )
    options = parser.parse_args()
    if options.migrate and len(options.driver) > 1:
        parser.error("--migrate moves a guest with one NIC: name one driver")
    return options


def main() -> int:
    """Run the demo; the exit code."""
    options = parse_arguments()
    if options.migrate:
        moved = demo_migrate.Report()
        return carry_out(lambda: demo_migrate.run(options.driver[0], moved), moved, options.report)
    report = Report()
    return carry_out(lambda: run(options.driver, report, keep=options.keep), report, options.report)


if __name__ == "__main__":
    sys.exit(main())
