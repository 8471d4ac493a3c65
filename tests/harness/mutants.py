"""A copy of the project in which one line is missing, to see that a test misses it too."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.harness.cached import CHECKOUT
from tests.harness.processes import run

#: What tests need of the checkout; what is compiled comes along, and is compiled anew where C changes.
PARTS = ("datapath", "hooks", "libvirt_vdpa", "tests", "xml", "pyproject.toml", "setup.cfg", "setup.py")
#: Seconds for the tests of one mutant; one that makes a test wait for ever is seen, too.
PATIENCE = 300.0


@dataclass(frozen=True)
class Mutation:
    """A change of one place in the source that tests must see."""

    #: Path in the checkout, and text that is there exactly once.
    file: str
    text: str
    #: A node for pytest, which fails when the text is replaced.
    seen_by: str
    replacement: str = ""


class Mutant:
    """A copy of the project with a mutation."""

    def __init__(self, folder: Path, mutation: Mutation) -> None:
        """:raise AssertionError: when the mutation's text is not in the source just once.

        :raise HarnessError: when the mutant does not compile.
        """
        self._folder = folder
        for part in PARTS:
            source = CHECKOUT / part
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, folder / part)
        (folder / ".cache").symlink_to(CHECKOUT / ".cache")
        file = folder / mutation.file
        text = file.read_text()
        assert text.count(mutation.text) == 1, f"{mutation.file}: '{mutation.text}' is not there just once"
        file.write_text(text.replace(mutation.text, mutation.replacement))
        if file.suffix == ".c":
            run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, seconds=120)

    def fails(self, node: str) -> bool:
        """Whether a test fails with it, or one of several."""
        argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", node]
        # Programs are the checkout's scripts; what they import is found here first.
        environment = {**os.environ, "PYTHONPATH": str(self._folder)}
        try:
            done = subprocess.run(
                argv, cwd=self._folder, env=environment, capture_output=True, text=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            return True
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return done.returncode == 1
