"""What the documents show is what the programs take."""

from pathlib import Path

from libvirt_vdpa.config import Config, PoolConfig, read_config

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_sample_configuration_shows_the_defaults() -> None:
    pool = PoolConfig(name="default", driver="ifcvf", emulated=2, tap="vdpa%d", bridge=None)
    assert read_config(DOCS / "virtvdpad.toml") == Config(pools=(pool,))
