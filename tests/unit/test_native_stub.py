"""The typing stub of the C module names what the module has, no more and no less."""

import ast
from pathlib import Path

from datapath.native import _native

STUB = Path(_native.__file__).with_name("_native.pyi")


def declared() -> set[str]:
    """Functions and constants of the stub's class `Library`."""
    library = next(
        node
        for node in ast.parse(STUB.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Library"
    )
    names = set()
    for node in library.body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def test_the_stub_and_the_module_agree() -> None:
    assert declared() == set(dir(_native.lib))
