"""./demo: a guest gets a vDPA NIC, from nothing but its domain XML. Read `show` to see how it is done.

Everything runs on a private host (tests/harness/host.py), so the machine's own libvirtd, if it has one,
notices nothing, and nothing is left when the host is ended:

    libvirtd ── hooks/qemu ──▶ virtvdpad ──▶ virt-vdpa-port ──vfio-user──▶ virt-vdpa-nic ── TAP vdpa0
       │                                        ▲
       └──────────────▶ QEMU ──vhost-user───────┘             (guest 10.76.0.2)     (host 10.76.0.1)

On a machine with real VFs the emulated NIC is the only part that is not there. What `--migrate` shows is in
demo_migrate.py.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from tests import demo_migrate
from tests.demo_parts import Ending, Progress, carry_out, private, report_file
from tests.harness.domain_xml import DomainXml
from tests.harness.emulated_nic import BIN
from tests.harness.guest import guest_image
from tests.harness.processes import wait_for
from tests.harness.vdpa_host import GUEST_ADDRESS, RUN_FOLDER, VdpaHost

PINGS = 20
#: Pings sent while the VF is stopped: each is waited for a second.
PINGS_WHILE_STOPPED = 3


@dataclass
class Report(Ending):
    """What `--report` writes."""

    #: The domain's state while it was pinged, its name, and what its NIC is.
    domain: str = ""
    name: str = ""
    driver: str = ""
    device: str = ""
    #: Virtio features that the guest negotiated with the VF.
    features: list[str] = field(default_factory=list)
    ping: dict[str, int] = field(default_factory=dict)
    ping_while_vf_stopped: dict[str, int] = field(default_factory=dict)
    ping_after_vf_start: dict[str, int] = field(default_factory=dict)
    #: Seconds: `virsh start`; from its end to the first answer to a ping.
    start_s: float = 0.0
    boot_to_ping_s: float = 0.0


def show(host: VdpaHost, report: Report, step: Progress) -> None:
    """The demonstration itself, on a host that runs libvirtd, virtvdpad and our hook."""
    step(f"virtvdpad serves the pool 'default': {len(host.virt_vdpa('devices')['devices'])} emulated VFs")
    # The uplink of VF 0 is the TAP vdpa0; here it is the host's end of the guest's network.
    host.set_address("vdpa0")

    # The example domain is complete but for a kernel. Its <metadata> asks for a VF; its <interface> is an
    # ordinary vhost-user one. Nothing else tells libvirt about vDPA.
    domain = DomainXml.example("vdpa-demo.xml").boot(guest_image(), GUEST_ADDRESS)
    report.name = domain.name
    host.define(domain)
    step(f"defined the domain {domain.name} from xml/vdpa-demo.xml")

    # libvirtd runs the hook, the hook asks virtvdpad, virtvdpad starts a port: a process that opens the VF
    # and serves the vhost-user socket that QEMU then connects to.
    begin = time.monotonic()
    host.virsh("start", domain.name)
    started = time.monotonic()
    report.start_s = round(started - begin, 3)
    step(f"virsh start took {report.start_s:.2f} s; the guest boots")

    host.wait_for_ping()
    report.boot_to_ping_s = round(time.monotonic() - started, 3)
    step("the guest answers ping through the VF")
    report.domain = host.state(domain.name)
    report.ping = ping(host, PINGS)
    step(f"ping: {report.ping['received']} of {report.ping['sent']} came back")
    print(f"\n{describe(host, domain, report)}\n")

    # That the packets go through the VF is seen by stopping it.
    host.ask_nic("vf-stop", vf=0)
    report.ping_while_vf_stopped = ping(host, PINGS_WHILE_STOPPED)
    step(f"VF stopped: {report.ping_while_vf_stopped['received']} of {PINGS_WHILE_STOPPED} pings came back")
    host.ask_nic("vf-start", vf=0)
    host.wait_for_ping(seconds=20)
    report.ping_after_vf_start = ping(host, PINGS_WHILE_STOPPED)
    step(f"VF started: {report.ping_after_vf_start['received']} of {PINGS_WHILE_STOPPED} pings came back")


def end_guest(host: VdpaHost, report: Report, step: Progress) -> None:
    """Shut the guest down as an operator would; its port ends with it."""
    host.virsh("shutdown", report.name)
    wait_for("the guest to shut down", lambda: host.state(report.name) == "shut off", 30)
    wait_for("the port to end", lambda: not host.running("virt-vdpa-port"), 10)
    step("the guest is shut down, its port has ended and the VF is free again")


def ping(host: VdpaHost, count: int) -> dict[str, int]:
    """Ping the guest; what the report says about it."""
    sent, received = host.ping(count=count)
    return {"sent": sent, "received": received}


def describe(host: VdpaHost, domain: DomainXml, report: Report) -> str:
    """The table of what was put together, read from the daemon, the port and the NIC."""
    port = next(port for port in host.virt_vdpa("ports")["ports"] if port["uuid"] == domain.uuid)
    status = host.ask_port(domain, "query-status")
    kicks = host.ask_port(domain, "query-stats")
    vf = host.ask_nic("query-devices")["vfs"][0]
    report.driver, report.device, report.features = status["driver"], port["device"], status["feature_names"]
    rows: dict[str, Any] = {
        "domain": f"{domain.name}, {report.domain}",
        "interface": domain.mac,
        "port": f"pid {port['pid']}, {port['socket'].replace(RUN_FOLDER, '…')}",
        "driver": report.driver,
        "VF": report.device.replace(RUN_FOLDER, "…"),
        "features": wrap(report.features),
        "kicks": f"{kicks['kicks.0']} of the receive ring, {kicks['kicks.1']} of the transmit ring",
        "VF's packets": f"{vf['rx_packets']} to the guest, {vf['tx_packets']} from it",
    }
    return "\n".join(f"    {name:<14}{value}" for name, value in rows.items())


def wrap(words: list[str], width: int = 80) -> str:
    """Words in lines that fit the table's second column."""
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return f"\n{' ' * 18}".join(line.rstrip() for line in lines)


def look_around(host: VdpaHost, report: Report) -> str:
    """What `--keep` prints."""
    enter = " ".join(host.enter)
    return f"""
The guest keeps running. Look around, as root:

    {enter} bash                    # a shell on the private host; in it:
        virsh list
        virsh console {report.name}             # a shell in the guest; Ctrl-] leaves it
        ping {GUEST_ADDRESS.partition("/")[0]}
        {BIN}/virt-vdpa ports
        {BIN}/virt-vdpa devices

The configuration is {host.configuration}, the logs are below {host.logs}.
End it all with:

    {host.end_command}
"""


def run(report: Report, *, keep: bool) -> str | None:
    """Make the host, show, clean up; what is wrong with what was seen.

    :raise HarnessError: when something does not work; the host is ended then as well.
    """
    step = Progress()
    step("making a private host: libvirtd and virtvdpad with folders and a network of their own")
    host = VdpaHost("demo", keep=keep)
    with private(host, report, step, keep=keep):
        show(host, report, step)
        if not keep:
            end_guest(host, report, step)
    if keep:
        print(look_around(host, report))
    return verdict(report)


def verdict(report: Report) -> str | None:
    """What is wrong with what was seen; None when all is as it should be."""
    if report.ping["received"] != report.ping["sent"]:
        return f"only {report.ping['received']} of {report.ping['sent']} pings came back"
    if report.ping_while_vf_stopped["received"]:
        return "the guest answered ping although its VF was stopped"
    if report.ping_after_vf_start["received"] != report.ping_after_vf_start["sent"]:
        return "the guest did not answer ping after its VF was started again"
    if report.leftovers:
        return f"left behind: {', '.join(report.leftovers)}"
    return None


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="./demo", description="Watch a libvirt guest get a vDPA NIC.")
    parser.add_argument("--report", type=report_file, metavar="FILE", help="write what was seen as JSON")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--keep", action="store_true", help="leave everything running, and say how to look at it"
    )
    what.add_argument(
        "--migrate", action="store_true", help="move the guest to another host and back instead"
    )
    return parser.parse_args()


def main() -> int:
    """Run the demo; the exit code."""
    options = parse_arguments()
    if options.migrate:
        moved = demo_migrate.Report()
        return carry_out(lambda: demo_migrate.run(moved), moved, options.report)
    report = Report()
    return carry_out(lambda: run(report, keep=options.keep), report, options.report)


if __name__ == "__main__":
    sys.exit(main())
