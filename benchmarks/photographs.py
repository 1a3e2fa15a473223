"""What the benchmarks of the loaders share: a few photographs made into a set, by links under many names, and its shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.conversion import WriteOptions, write_shards
from pipelines.datasets import DatasetOptions, open_dataset
from pipelines.format import ShardSet, open_shards
from pipelines.types import DatasetError


def photographs(folder: Path) -> list[Path]:
    """The JPEGs of a folder, by name; a user's error where there are none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise DatasetError(f"{folder} holds no JPEG files; name a folder of photographs with --images")
    return found


def link_photographs(images: Path, folder: Path, repeats: int) -> list[str]:
    """A folder data set of two classes made of links to `images`, each `repeats` times in train; returns the train paths."""
    paths = []
    for split, count in (("train", repeats), ("val", 1), ("test", 1)):
        for name in ("even", "odd"):
            (folder / split / name).mkdir(parents=True)
        for repeat in range(count):
            for number, source in enumerate(photographs(images)):
                link = folder / split / ("odd" if number % 2 else "even") / f"{repeat:03d}-{source.name}"
                link.symlink_to(source.resolve())
                paths += [str(link)] if split == "train" else []
    return paths


def shard_photographs(folder: Path, out: Path, formats: tuple[str, ...] = ("wds",)) -> ShardSet:
    """Shards of a folder of `link_photographs`, in an order drawn once."""
    opened = open_dataset("folder", DatasetOptions(source=folder))
    rng = np.random.default_rng(0)
    orders = {name: rng.permutation(len(split.labels_N)) for name, split in opened.splits.items()}
    write_shards(opened, orders, out, WriteOptions(formats=formats))
    return open_shards(out)
