"""Convert a data set of images into WebDataset shards with manifest and index (format: shards/README.md).

python tools/make_shards.py --dataset cifar100-lt --source DIR --out shards/cifar100-lt
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bce3s.cli import run_app
from pipelines.config import require_choice
from pipelines.datasets import DATASETS, DatasetOptions, open_dataset, shot_groups
from pipelines.format import WriteOptions, WriteReport, write_shards
from pipelines.randomness import Purpose, derive_key, permutation
from pipelines.types import SPLITS, ConfigError, IntArray, OpenDataset

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def parse_bytes(text: str) -> int:
    """Bytes of '256MiB', '1G' or '100000'.

    Raises:
        ConfigError: not a number with one of the known units.
    """
    digits = text.strip().rstrip("BbKkMmGgIi")
    unit = text.strip()[len(digits) :].lower()
    unit = unit if unit in _UNITS else unit.removesuffix("b")
    try:
        return int(float(digits) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ConfigError(f"'{text}' is not a size; write bytes or a number with a unit, such as 256MiB or 1G") from None


def write_orders(dataset: OpenDataset, seed: int) -> dict[str, IntArray]:
    """The training split shuffled by `seed`, so that sequential readers see mixed classes; the others as they come."""
    orders = {name: np.arange(len(dataset.splits[name].labels_N), dtype=np.int64) for name in SPLITS}
    orders["train"] = permutation(derive_key(seed, Purpose.SHARD_ORDER), len(orders["train"]))
    return orders


def _require_apart(source: Path | None, out: Path) -> None:
    """Neither of both folders may lie in the other: --overwrite removes one of them."""
    if source is not None and (source.resolve() in (out.resolve(), *out.resolve().parents) or out.resolve() in source.resolve().parents):
        raise ConfigError(f"--out {out} and --source {source} lie in one another; choose another --out")


def print_report(console: Console, dataset: OpenDataset, report: WriteReport, out: Path) -> None:
    """A table of the splits, then what was re-encoded and skipped."""
    counts_K = report.class_counts["train"]
    filled_K = counts_K[counts_K > 0]
    table = Table(title=f"{dataset.name}: {len(dataset.class_names)} classes", title_justify="left")
    for column in ("split", "images"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name in SPLITS:
        table.add_row(name, f"{int(report.class_counts[name].sum()):,}")
    console.print(table)
    groups = ", ".join(f"{int(members.sum())} {name}" for name, members in shot_groups(counts_K).items())
    factor = filled_K.max() / filled_K.min()
    console.print(
        f"training images a class: {filled_K.max():,} … {filled_K.min():,} (imbalance factor {factor:.0f}); shot groups: {groups}"
    )
    if report.num_reencoded:
        console.print(f"{report.num_reencoded:,} images were re-encoded as upright RGB JPEG")
    for sentence in report.skipped[:20]:
        console.print(f"skipped: {sentence}", soft_wrap=True)
    if report.skipped:
        console.print(f"{len(report.skipped):,} images skipped because they do not decode")
    console.print(f"shards: {out}", soft_wrap=True)


@app.command()
def make_shards(
    dataset: Annotated[str, typer.Option(help=f"One of: {', '.join(DATASETS)}.")],
    out: Annotated[Path | None, typer.Option(help="Output folder; default shards/DATASET.")] = None,
    source: Annotated[Path | None, typer.Option(help="Folder of the original data.")] = None,
    imbalance_factor: Annotated[float | None, typer.Option(help="Largest class over smallest, at least 1.")] = None,
    subset: Annotated[str | None, typer.Option(help="first (as the reference) or seeded: which images of a class are kept.")] = None,
    val_per_class: Annotated[int | None, typer.Option(help="Training images a class set aside for validation.")] = None,
    val_fraction: Annotated[float | None, typer.Option(help="Share of a folder's images for validation where it has none.")] = None,
    test_fraction: Annotated[float | None, typer.Option(help="Share of a folder's images for test where it has none.")] = None,
    seed: Annotated[int, typer.Option(help="Of subset, splits and the order in the shards.")] = 0,
    shard_bytes: Annotated[str, typer.Option(help="A shard is closed at this size.")] = "256MiB",
    on_error: Annotated[str, typer.Option(help="stop at an image that does not decode, or skip it.")] = "stop",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
) -> None:
    """Convert a data set of images into shards."""
    require_choice("dataset", dataset, tuple(DATASETS))
    options = WriteOptions(shard_bytes=parse_bytes(shard_bytes), on_error=on_error, overwrite=overwrite)
    console = Console()
    _require_apart(source, out or Path("shards") / dataset)
    folder = out or Path("shards") / dataset
    with console.status(f"opening {dataset}"):  # the demo set is drawn here, large folders are listed here
        opened = open_dataset(
            dataset,
            DatasetOptions(
                source=source,
                imbalance_factor=imbalance_factor,
                subset=subset,
                seed=seed,
                val_per_class=val_per_class,
                val_fraction=val_fraction,
                test_fraction=test_fraction,
            ),
        )
    total = sum(len(split.labels_N) for split in opened.splits.values())
    columns = (
        TextColumn("{task.description:>5}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[size]}"),
        TimeRemainingColumn(),
    )
    num_bytes = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("train", total=total, size="")

        def on_sample(split: str, size: int) -> None:
            nonlocal num_bytes
            num_bytes += size
            progress.update(task, advance=1, description=split, size=f"{num_bytes / 1e6:.1f} MB")

        recorded = replace(opened, options={**opened.options, "seed": seed})
        report = write_shards(recorded, write_orders(opened, seed), folder, options, on_sample)
    print_report(console, opened, report, folder)


if __name__ == "__main__":
    run_app(app)
