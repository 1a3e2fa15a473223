"""A long-tailed set of real JPEG files that needs no download: drawn once into a folder, then read as any folder of images.

Twenty classes, each one of ten shapes, shaded or striped. The profile runs through `CLASSES` in that order, not through the sorted
labels, so that head and tail both hold every shape and both fills.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.datasets import DatasetOptions
from pipelines.datasets.demo_scene import FILLS, SHAPES, draw_scene
from pipelines.datasets.folder import list_classes, read_split
from pipelines.datasets.longtail import exponential_counts
from pipelines.durable import publish_folder
from pipelines.types import SPLITS, DatasetError, JsonValue, OpenDataset

# Raise it with every change of a pixel: folders of another version are drawn anew.
VERSION = 1
MARKER = ".bce3s-demo.json"
CLASSES = tuple((shape, FILLS[(index + turn) % 2]) for turn in range(2) for index, shape in enumerate(SHAPES))


@dataclass(frozen=True, kw_only=True)
class DemoSpec:
    """What a demo folder holds; equal specs give equal bytes.

    Args:
        max_count: train images of the largest class.
        imbalance_factor: largest/smallest class of train.
        val_per_class, test_per_class: both splits are balanced.
        seed: of every picture.
    """

    max_count: int = 400
    imbalance_factor: float = 50.0
    val_per_class: int = 10
    test_per_class: int = 50
    seed: int = 0

    def counts(self) -> dict[str, dict[str, int]]:
        """Split -> class name -> images, in the order of `CLASSES`."""
        names = [f"{fill}-{shape}" for shape, fill in CLASSES]
        train_K = exponential_counts(self.max_count, len(names), self.imbalance_factor).tolist()
        return {
            "train": dict(zip(names, train_K, strict=True)),
            "val": dict.fromkeys(names, self.val_per_class),
            "test": dict.fromkeys(names, self.test_per_class),
        }


DEFAULT = DemoSpec()


def open_demo(options: DatasetOptions) -> OpenDataset:
    """Opens the demo set in `source` (default data/demo), after drawing it there if need be; takes about ten seconds once.

    Reads `imbalance_factor` (50) and `seed` (0); a folder of another factor, seed or version is drawn anew.

    Raises:
        DatasetError: the folder holds something else, or cannot be written.
    """
    factor = DEFAULT.imbalance_factor if options.imbalance_factor is None else options.imbalance_factor
    return open_drawn(options.source or Path("data/demo"), replace(DEFAULT, imbalance_factor=factor, seed=options.seed or 0))


def open_drawn(folder: Path, spec: DemoSpec) -> OpenDataset:
    """Opens the demo set of `spec` in `folder`, drawing it first unless it is whole."""
    if not _is_whole(folder, spec):
        try:
            draw_folder(folder, spec)
        except OSError as error:
            raise DatasetError(f"cannot draw the demo set in {folder} ({error.strerror}): choose another folder with --source") from error
    classes = {split: list_classes(folder / split) for split in SPLITS}
    class_names = tuple(classes["train"])
    splits = {split: read_split(files, class_names) for split, files in classes.items()}
    return OpenDataset(name="demo", class_names=class_names, splits=splits, options={"version": VERSION, **asdict(spec)})


def draw_folder(folder: Path, spec: DemoSpec) -> None:
    """Draws `folder/<split>/<class>/<index>.jpg` beside `folder` and moves it there in one step; an older demo there is replaced.

    Raises:
        DatasetError: `folder` holds something that is not a demo set.
        OSError: it cannot be written.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder / MARKER).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise DatasetError(f"{folder} holds something that is not the demo set: choose another folder with --source, or empty it")
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for split_index, (split, counts) in enumerate(spec.counts().items()):
            for class_index, (name, count) in enumerate(counts.items()):
                _draw_class(unfinished / split / name, (VERSION, spec.seed, split_index, class_index), count)
        (unfinished / MARKER).write_text(json.dumps(_marker(spec), indent=1))
        publish_folder(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _draw_class(folder: Path, key: tuple[int, ...], count: int) -> None:
    folder.mkdir(parents=True)
    shape, fill = CLASSES[key[-1]]
    for index in range(count):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((*key, index))))
        draw_scene(shape, fill, rng).save(folder / f"{index:05d}.jpg", quality=90, subsampling="4:2:0")


def _marker(spec: DemoSpec) -> Mapping[str, JsonValue]:
    return {"version": VERSION, "seed": spec.seed, "counts": spec.counts()}


def _is_whole(folder: Path, spec: DemoSpec) -> bool:
    """True where the marker asks for this very set and every file is still there."""
    try:
        if json.loads((folder / MARKER).read_text()) != _marker(spec):
            return False
        counts = {split: {name: len(files) for name, files in list_classes(folder / split).items()} for split in SPLITS}
    except (OSError, ValueError):
        return False
    return counts == spec.counts()
