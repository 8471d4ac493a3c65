"""Packages of another Debian release than this machine's, with what they depend on, unpacked into a folder.

Nothing is installed: apt works with a state of its own in a scratch folder and verifies what it fetches by
Debian's keys; of the machine's configuration it takes where Debian's archive is, and proxies.
"""

import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.harness.processes import HarnessError, run

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
#: Where a machine's own sources may say another name than its release's.
ALIASES = ("stable", "oldstable")

SOURCES = """Types: deb
URIs: {archive}
Suites: {suites}
Components: main
Signed-By: {keyring}
"""

#: Read after the machine's own configuration. apt's own user may not write where we do, and the machine's
#: hooks would refresh the machine's caches.
CONFIGURATION = """
#clear APT::Update;
#clear DPkg;
#clear Dir::Etc::sourcelist;
#clear Dir::Etc::preferences;
#clear APT::Default-Release;
Dir::Etc::sourcelist "{folder}/none";
Dir::Etc::sourceparts "{folder}/sources";
Dir::Etc::preferences "{folder}/none";
Dir::Etc::preferencesparts "{folder}/none";
Dir::State "{folder}/state";
Dir::State::lists "{folder}/lists";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Cache::archives "{folder}/archives";
Dir::Log "{folder}/log";
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::Retries "1";
Acquire::http::Timeout "20";
"""


class UnavailableError(HarnessError):
    """This machine's package source cannot be reached, is not Debian's, or does not have the package."""


def debian_archive() -> str:
    """Where this machine gets Debian's packages from, as its own apt says.

    :raise UnavailableError: when it has no such source.
    """
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    targets = run(
        ["apt-get", "--no-release-info", "indextargets", "--format", "$(REPO_URI) $(RELEASE)"], check=False
    )
    for line in targets.stdout.splitlines():
        archive, _, suite = line.partition(" ")
        if suite in (release, *ALIASES):
            return archive
    raise UnavailableError("this machine has no package source of a Debian release")


def unpack(folder: Path, package: str, suites: Sequence[str]) -> None:
    """Unpack a package and its dependencies into `folder`, their newest versions of the last of `suites`
    that has them.

    :param suites: names of releases, such as `trixie` and `trixie-backports`.
    :raise UnavailableError: when the package cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="packages-", dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        for name in ("sources", "state", "lists/partial", "cache", "archives/partial", "log"):
            (scratch / name).mkdir(parents=True)
        # As on a machine with nothing installed, so that all dependencies come along.
        (scratch / "status").touch()
        sources = SOURCES.format(archive=debian_archive(), suites=" ".join(suites), keyring=KEYRING)
        (scratch / "sources/debian.sources").write_text(sources)
        configuration = scratch / "apt.conf"
        configuration.write_text(CONFIGURATION.format(folder=scratch))
        apt = ["apt-get", "--quiet", "--quiet", f"--config-file={configuration}"]
        what = ["--no-install-recommends", f"--target-release={suites[-1]}", "install", package]
        try:
            run([*apt, "update"], seconds=300)
            run([*apt, "--yes", "--download-only", *what], seconds=600)
        except HarnessError as error:
            raise UnavailableError(f"no package {package} of {suites[-1]}: {error}") from None
        for archive in sorted((scratch / "archives").glob("*.deb")):
            run(["dpkg-deb", "--extract", archive, folder])
