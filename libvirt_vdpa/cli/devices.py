"""virt-vdpa devices: the VFs of the pools and the PCI functions of the host, as a table or as JSON.

The daemon knows pools and holders, sysfs knows the functions; without a daemon the ports' records still
say who holds what.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datapath.bus.sysfs import HostFunction, functions
from libvirt_vdpa.cli.query import ask, table
from libvirt_vdpa.client import ControlError
from libvirt_vdpa.host_functions import HostFunctions, Openers, drivers_for, wrong_ids
from libvirt_vdpa.inventory import Holder, InventoryError, address, pci_address
from libvirt_vdpa.kernel import Kernel
from libvirt_vdpa.ports import PORTS_FOLDER, Record, RecordError

#: What others than root are told: /proc shows them their own processes alone.
NOT_ROOT = "not run by root, so functions that other users' processes have open are shown as free"
#: One VF or function: member of the JSON -> value.
Device = dict[str, Any]
#: Heading -> member of the JSON.
COLUMNS = {
    "DEVICE": "where",
    "POOL": "pool",
    "DRIVER": "driver",
    "BOUND-TO": "kernel_driver",
    "GROUP": "iommu_group",
    "NUMA": "numa_node",
    "PF": "physical_function",
    "QUEUES": "queue_pairs",
    "STATE": "state",
    "HOLDER": "holder",
    "PROBLEM": "problem",
}


def show(options: argparse.Namespace) -> int:
    """Print the devices; also when the daemon does not run, which is then said on standard error."""
    try:
        known = asyncio.run(ask(options.socket, "query-devices"))["devices"]
    except ControlError as error:
        print(f"virt-vdpa: virtvdpad does not answer, its pools are not shown: {error}", file=sys.stderr)
        known = list(recorded(options.socket.parent))
    if os.geteuid() != 0:
        print(f"virt-vdpa: {NOT_ROOT}", file=sys.stderr)
    if (reason := mlx5_off()) is not None:
        print(f"virt-vdpa: mlx5 is off: {reason}", file=sys.stderr)
    shown = list(devices(Kernel(), known, options.all))
    if options.json:
        print(json.dumps({"devices": shown}, indent=2))
    else:
        rows = [[device[member] for member in COLUMNS.values()] for device in shown]
        print(table(list(COLUMNS), rows))
    return 0


def mlx5_off() -> str | None:
    """Why no ConnectX can be had on this host, in one line; None when one can be."""
    # Opens libraries that no other command needs, and a host may be without.
    from datapath.drivers.mlx5.glue import why_off

    return why_off()


def recorded(run_folder: Path) -> Iterator[Device]:
    """What ports hold by their records, in the form of the daemon's answer. Only root may read them."""
    for path in sorted(run_folder.glob(f"{PORTS_FOLDER}/*/*.json")):
        with contextlib.suppress(RecordError):
            record = Record.load(path)
            yield {
                "device": record.device,
                "driver": record.device.partition(",")[0],
                "pool": record.pool,
                "queue_pairs": None,
                "state": "lent",
                "domain": record.domain,
                "mac": record.mac,
                "problem": "",
            }


def holders_of(known: list[Device]) -> dict[str, str]:
    """Address -> holder, of the PCI functions that ports have."""
    found = {}
    for device in known:
        with contextlib.suppress(InventoryError):
            where = pci_address(device["device"])
            if where is not None and device["state"] == "lent":
                found[where] = str(Holder(device["domain"], "", device["mac"]))
    return found


def devices(kernel: Kernel, known: list[Device], everything: bool) -> Iterator[Device]:
    """All that is to be shown: first what the daemon knows, then what else the host has.

    :param known: the daemon's answer.
    :param everything: functions that no driver of ours serves, too.
    """
    host = HostFunctions(kernel)
    openers = host.openers()
    by_address = {found.address: found for found in functions(kernel.sysfs)}
    holders = holders_of(known)
    shown = set()
    for device in known:
        where = pci_address(device["device"])
        found = by_address.get(where or "")
        shown.add(where)
        yield complete(host, device, found, openers)
    for where, found in by_address.items():
        drivers = drivers_for(found.ids)
        if where in shown or not (drivers or everything):
            continue
        driver = drivers[0] if drivers else None
        problem = host.obstacle(where, driver, holders) if driver else wrong_ids(found.ids, None)
        device = {
            "device": f"{driver},pci={where}" if driver else None,
            "driver": driver,
            "pool": None,
            "queue_pairs": None,
            "state": "unusable" if problem else "free",
            "domain": None,
            "mac": None,
            "problem": problem,
        }
        yield complete(host, device, found, openers)


def complete(host: HostFunctions, device: Device, found: HostFunction | None, openers: Openers) -> Device:
    """A device with all that sysfs says of it."""
    device = dict(device)
    if found is not None and device["state"] == "free" and (users := host.users(found, openers)):
        device |= {"state": "unusable", "problem": f"in use by {', '.join(users)}"}
    return device | {
        "where": found.address if found else address(device["device"]).removeprefix("pci="),
        "holder": f"{device['domain']}/{device['mac']}" if device["domain"] else None,
        "ids": str(found.ids) if found else None,
        "kernel_driver": found.driver if found else None,
        "iommu_group": found.iommu_group if found else None,
        "numa_node": found.numa_node if found else None,
        "physical_function": found.physical_function if found else None,
        "net_interfaces": list(found.net_interfaces) if found else [],
    }


def lent(socket: Path) -> Mapping[str, str]:
    """Address -> holder, of the PCI functions that ports have; from records where no daemon answers."""
    try:
        return holders_of(asyncio.run(ask(socket, "query-devices"))["devices"])
    except ControlError:
        return holders_of(list(recorded(socket.parent)))
