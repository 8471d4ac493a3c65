"""What the documents show is what the programs take."""

import re
from pathlib import Path

from libvirt_vdpa.config import Config, PoolConfig, read_config

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_sample_configuration_shows_the_defaults() -> None:
    pool = PoolConfig(name="default", driver="ifcvf", emulated=2, tap="vdpa%d", bridge=None)
    assert read_config(DOCS / "virtvdpad.toml") == Config(pools=(pool,))


def test_the_pools_that_the_sample_has_in_comments_are_taken(tmp_path: Path) -> None:
    text = (DOCS / "virtvdpad.toml").read_text()
    examples = text.partition("# PCI functions of the host")[2]
    lines = [line.removeprefix("# ") for line in examples.splitlines()]
    taken = tmp_path / "c.toml"
    taken.write_text("\n".join(line for line in lines if re.match(r"\[|[a-z]+ = ", line)))
    assert read_config(taken).pools == (
        PoolConfig("cards", "virtio", devices=("0000:06:00.3", "0000:06:00.4"), uplink="eth0"),
        PoolConfig("card", "ifcvf", pf="0000:08:00.0", vfs=8, uplink="eth0"),
    )


def test_the_pool_in_the_document_on_real_vfs_is_taken(tmp_path: Path) -> None:
    (block,) = re.findall("```toml\n(.*?)```", (DOCS / "hosts-with-real-vfs.md").read_text(), re.DOTALL)
    (tmp_path / "c.toml").write_text(block)
    assert read_config(tmp_path / "c.toml").pools == (
        PoolConfig("cards", "ifcvf", pf="0000:06:00.0", vfs=8, bind=True),
    )
