"""Builds C tests of datapath/native together with the units that they test, under a sanitizer or none."""

from pathlib import Path

from tests.harness.processes import run

NATIVE = Path(__file__).resolve().parents[2] / "datapath" / "native"
#: What a test can be built with. gcc's TSan does not see fences, and says so as a warning.
SANITIZERS = {
    "address": ["-fsanitize=address,undefined"],
    "thread": ["-fsanitize=thread", "-Wno-tsan"],
}
#: What shadow rings are made of, and the relay's thread on top of that.
SHADOW = [NATIVE / f"{unit}.c" for unit in ("shadow", "written", "log", "dma")]
RELAY = [*SHADOW, *(NATIVE / f"{unit}.c" for unit in ("relay", "forwarder", "guard", "thread"))]
#: The thread that looks for completions.
COMPLETIONS = [NATIVE / f"{unit}.c" for unit in ("completions", "completion_queue", "guard", "thread")]
FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-fno-sanitize-recover=all"]


def build(sanitizer: str | None, program: Path, *sources: Path) -> Path:
    """Compile `sources` into `program`; without a sanitizer as they are compiled for use.

    :raise HarnessError: with the compiler's message.
    """
    flags = SANITIZERS[sanitizer] if sanitizer else ["-O2"]
    run(["gcc", *FLAGS, *flags, f"-I{NATIVE}", *sources, "-o", program])
    return program
