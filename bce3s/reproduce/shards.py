"""The shards of a table: found where the user has them, or made from the source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bce3s.reproduce.grid import ShardsOf
from pipelines.conversion import WriteOptions, write_shards
from pipelines.conversion.orders import write_orders
from pipelines.datasets import DatasetOptions, open_dataset
from pipelines.format import ShardSet, open_shards
from pipelines.format.index import MANIFEST_FILE
from pipelines.types import ConfigError

_SEED = 0  # of the order in the shards, as tools/make_shards.py has it by default: the same shards, to the last byte


def find_shards(wanted: ShardsOf, source: Path | None, shards: Path | None, out: Path, console: Console) -> ShardSet:
    """Opens the shards `wanted`, made under `out` if need be.

    Args:
        wanted: which.
        source: folder of the unpacked CIFAR archives, or None.
        shards: folder of shards that are there, or of several such folders by their `ShardsOf.name`, or None.
        out: of the table; what is made lies in its folder shards.
        console: told when something is made.

    Raises:
        ConfigError: neither is given and nothing was made before, or the shards are others.
        DatasetError: the source is not what the data set expects.
        ShardError: the shards are damaged.
    """
    if shards is not None:
        inner = shards / wanted.name
        found = inner if (inner / MANIFEST_FILE).is_file() else shards
        opened = open_shards(found)
        require_wanted(opened, wanted)
        return opened
    made = out / "shards" / wanted.name
    if not (made / MANIFEST_FILE).is_file():
        if source is None:
            raise ConfigError(f"there are no shards in {made} yet: name the folder of the unpacked CIFAR archives with --source")
        make_shards(wanted, source, made, console)
    opened = open_shards(made)
    require_wanted(opened, wanted)
    return opened


def make_shards(wanted: ShardsOf, source: Path, out: Path, console: Console) -> None:
    """Writes them; what a kill left is continued.

    Raises:
        DatasetError: what `open_dataset` raises.
        ShardError: `out` cannot be written.
    """
    options = DatasetOptions(source=source, imbalance_factor=float(wanted.imbalance_factor), classes=wanted.classes)
    opened = open_dataset(wanted.dataset, options)
    opened = replace(opened, options={**opened.options, "seed": _SEED})
    orders = write_orders(opened, _SEED)
    images = ", ".join(f"{split} {len(order_N):,}" for split, order_N in orders.items() if len(order_N))
    console.print(f"making shards of {wanted.name} ({images} images) in {out}", highlight=False, soft_wrap=True)
    write_shards(opened, orders, out, WriteOptions(resume=True))


def require_wanted(opened: ShardSet, wanted: ShardsOf) -> None:
    """Raises `ConfigError` unless the manifest says that these are the shards `wanted`."""
    made_with = opened.manifest.get("options", {})
    said = {"dataset": opened.dataset, **made_with}
    asked = {"dataset": wanted.dataset, "imbalance_factor": wanted.imbalance_factor, "subset": "first", "classes": wanted.classes}
    for name, value in asked.items():
        if said.get(name) != value:
            raise ConfigError(
                f"the table needs shards of {wanted.name}, but {opened.root} has {name} {_said(said.get(name))}; leave out --shards "
                "and give --source to have them made"
            )


def _said(value: object) -> str:
    return "none, so all" if value is None else str(value)
