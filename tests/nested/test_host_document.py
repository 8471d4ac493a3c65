"""docs/hosts-with-real-vfs.md: its commands run, in order, and print what it shows."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from datapath.bus.sysfs import function
from libvirt_vdpa.config import read_config
from libvirt_vdpa.metadata import xml_folder
from tests.harness.daemon_host import SERVANTS, end_process
from tests.harness.guest import CHECKOUT
from tests.harness.host import ACCOUNTS, LIBVIRTD_CONF, QEMU_CONF
from tests.harness.host_pci import give_back
from tests.harness.nested_hardware import FUNCTIONS
from tests.harness.processes import tail
from tests.harness.procfs import all_running

DOCUMENT = CHECKOUT / "docs" / "hosts-with-real-vfs.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOMAIN_XML = Path("/root/vdpa-demo.xml")
LOG = Path("/var/log/libvirt-vdpa/virtvdpad.log")
#: Stands for the machine's service manager, of which the document wants one thing.
SYSTEMCTL = """#!/bin/sh
[ "$*" = "restart libvirtd" ] || exit 1
virtlogd -d
libvirtd -d
until virsh version >/dev/null 2>&1; do sleep 0.2; done
"""
#: What the commands start and leave.
SERVICES = ("virtvdpad", "libvirtd", "virtlogd", "qemu-system-x86", "qemu-system-x86_64", *SERVANTS)


@dataclass
class Step:
    """Commands of the document, and what it says that they print."""

    commands: str
    shown: list[str] = field(default_factory=list)


def steps() -> list[Step]:
    """The document's command blocks, each with the text that follows it."""
    found: list[Step] = []
    for kind, content in BLOCK.findall(DOCUMENT.read_text()):
        if kind == "sh":
            found.append(Step(content))
        elif kind == "text":
            found[-1].shown += content.splitlines()
    return found


def plain(line: str) -> str:
    """A line without what differs from run to run: widths of columns, numbers of interfaces and processes."""
    line = re.sub(r"\beth\d+", "ethN", line)
    line = re.sub(r"\bpid \d+", "pid N", line)
    line = re.sub(r"(virtio,pci=\S+) +\d+ ", r"\1 N ", line)
    return " ".join(line.split())


def only_block(wanted: str) -> str:
    """The document's only block of a kind."""
    (content,) = [content for kind, content in BLOCK.findall(DOCUMENT.read_text()) if kind == wanted]
    return str(content)


def snippet() -> list[str]:
    """The lines that the document wants in a domain."""
    return [line.strip() for line in only_block("xml").splitlines()]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[dict[str, str]]:
    """libvirt and a guest as the document expects them; the environment of its commands."""
    etc = Path("/etc/libvirt")
    etc.mkdir(exist_ok=True)
    (etc / "qemu.conf").write_text(QEMU_CONF.format(user="root", ownership=0))
    (etc / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(host_uuid="7664d0a0-1111-4000-8000-000000000001"))
    (etc / "virtlogd.conf").write_text("")
    Path("/var/log/libvirt").mkdir(exist_ok=True)
    for name, line in ACCOUNTS.items():
        file = Path("/etc", name)
        if "\nlibvirt-qemu:" not in file.read_text():
            with file.open("a") as accounts:
                accounts.write(line)
    # Firmware alone, which finds nothing to boot and rests: a kernel would take minutes, emulated in an
    # emulated machine.
    example = (xml_folder() / "vdpa-demo.xml").read_text()
    example = re.sub(r" *<(kernel|initrd|cmdline)>.*\n", "", example)
    example = example.replace("<model type='virtio'/>", "<model type='virtio'/><rom enabled='no'/>")
    DOMAIN_XML.write_text(example.replace("driver='ifcvf' pool='default'", "driver='virtio' pool='cards'"))
    (tmp_path / "systemctl").write_text(SYSTEMCTL)
    (tmp_path / "systemctl").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    yield {**os.environ, "PATH": path, "LIBVIRT_DEFAULT_URI": "qemu:///system"}
    for process in all_running():
        if process.name in SERVICES:
            end_process(process.pid)
    for address in FUNCTIONS:
        if function(address).driver != "virtio-pci":
            give_back(address)


def test_the_domain_is_as_the_document_wants_it(machine: dict[str, str]) -> None:
    lines = {line.strip() for line in DOMAIN_XML.read_text().splitlines()}
    assert set(snippet()) <= lines


def test_the_configuration_is_one(tmp_path: Path) -> None:
    file = tmp_path / "virtvdpad.toml"
    file.write_text(only_block("toml"))
    (pool,) = read_config(file).pools
    assert (pool.name, pool.driver, pool.pf, pool.vfs, pool.bind) == (
        "cards",
        "ifcvf",
        "0000:06:00.0",
        8,
        True,
    )


def test_the_commands(machine: dict[str, str], tmp_path: Path) -> None:
    all_steps = steps()
    script = tmp_path / "commands"
    parts = [
        f"exec >{tmp_path}/output-{number} 2>&1\n{step.commands}" for number, step in enumerate(all_steps)
    ]
    script.write_text("set -eu -o pipefail\n" + "\n".join(parts))
    code = subprocess.run(["bash", script], cwd=CHECKOUT, env=machine, stdin=subprocess.DEVNULL).returncode
    printed = [tmp_path / f"output-{number}" for number in range(len(all_steps))]
    last = next((output for output in reversed(printed) if output.exists()), script)
    assert code == 0, f"{last.read_text()}\nvirtvdpad: {tail(LOG, 20)}"
    for step, output in zip(all_steps, printed, strict=True):
        lines = iter([plain(line) for line in output.read_text().splitlines()])
        for line in step.shown:
            # Takes the lines up to this one: what is shown is printed in this order.
            assert plain(line) in lines, f"{step.commands}prints, at '{line}'\n{output.read_text()}"
