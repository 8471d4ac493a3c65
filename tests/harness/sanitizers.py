"""Builds C tests of datapath/native together with the unit that they test, under a sanitizer."""

from pathlib import Path

from tests.harness.processes import run

NATIVE = Path(__file__).resolve().parents[2] / "datapath" / "native"
#: What a test can be built with. gcc's TSan does not see fences, and says so as a warning.
SANITIZERS = {
    "address": ["-fsanitize=address,undefined"],
    "thread": ["-fsanitize=thread", "-Wno-tsan"],
}
FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-fno-sanitize-recover=all"]


def build(sanitizer: str, program: Path, *sources: Path) -> Path:
    """Compile `sources` into `program`.

    :raise HarnessError: with the compiler's message.
    """
    run(["gcc", *FLAGS, *SANITIZERS[sanitizer], f"-I{NATIVE}", *sources, "-o", program])
    return program
