"""The doors between the rooms: which module may import which, read from the source (docs/architecture.md)."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: What a port process must not load, to stay small.
HEAVY = {"asyncio", "lxml", "qemu", "libvirt", "tomllib"}

#: (who, must not import what): prefixes of module names.
CLOSED = [
    ("datapath", "libvirt_vdpa"),
    ("datapath", "libvirt"),
    ("datapath", "lxml"),
    ("datapath", "qemu"),
    ("datapath", "asyncio"),
    ("datapath", "tests"),
    ("libvirt_vdpa", "tests"),
    ("datapath.drivers", "datapath.emulation"),
    ("datapath.drivers", "datapath.vhost_user"),
    ("datapath.bus", "datapath.drivers"),
    ("datapath.bus", "datapath.emulation"),
    ("datapath.emulation", "datapath.drivers"),
    ("datapath.emulation", "datapath.bus"),
    ("datapath.emulation", "datapath.vhost_user"),
    ("datapath.vhost_user", "datapath.drivers"),
    ("datapath.vhost_user", "datapath.bus"),
    ("datapath.vhost_user", "datapath.emulation"),
]


def module_name(source: Path) -> str:
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: Path) -> Iterator[str]:
    """Full names of what a source file imports, wherever in it."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


SOURCES = sorted(
    path for room in ("datapath", "libvirt_vdpa") for path in (ROOT / room).rglob("*.py") if path.is_file()
)


@pytest.mark.parametrize(("who", "what"), CLOSED)
def test_closed_doors(who: str, what: str) -> None:
    through = [
        f"{module_name(source)} imports {name}"
        for source in SOURCES
        if within(module_name(source), who)
        for name in imports(source)
        if within(name, what)
    ]
    assert through == []


def test_hooks_import_the_standard_library_only() -> None:
    for hook in (ROOT / "hooks").iterdir():
        foreign = {name.split(".")[0] for name in imports(hook)} - sys.stdlib_module_names
        assert not foreign, hook


def test_the_xml_folder_never_shadows_the_standard_library() -> None:
    assert not list((ROOT / "xml").rglob("*.py"))


def test_a_port_process_loads_nothing_heavy() -> None:
    """Everything that the port's module imports, transitively, within the project."""
    seen: set[str] = set()
    queue = ["datapath.port", "datapath.drivers.ifcvf"]
    loaded: set[str] = set()
    known = {module_name(source): source for source in SOURCES}
    while queue:
        name = queue.pop()
        if name not in known or name in seen:
            continue
        seen.add(name)
        for imported in imports(known[name]):
            loaded.add(imported.split(".")[0])
            queue += [imported, imported.rpartition(".")[0]]
    assert "datapath.vhost_user.backend" in seen
    assert not loaded & HEAVY
