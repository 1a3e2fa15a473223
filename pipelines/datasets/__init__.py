"""What a data set is: sources on disk turned into bytes and labels, ready to be sharded.

`open_dataset("cifar100-lt", DatasetOptions(source=Path("data")))` gives class names and the splits train, val and test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path

from pipelines.config import require, require_choice
from pipelines.datasets.longtail import (
    class_counts,
    exponential_counts,
    require_imbalance_factor,
    select_subset,
    shot_groups,
    stratified_split,
)
from pipelines.types import ConfigError, DatasetError, OpenDataset

__all__ = [
    "DATASETS",
    "SUBSETS",
    "DatasetEntry",
    "DatasetOptions",
    "class_counts",
    "exponential_counts",
    "open_dataset",
    "select_subset",
    "shot_groups",
    "stratified_split",
]

SUBSETS = ("first", "seeded")


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """What can be asked of a data set; None is the data set's own default.

    Args:
        source: folder that holds the images, or the folder above it; an archive where the data set is published as one.
        lists: folder of the published split lists or annotations.
        classes: only the first so many classes, at least 2.
        imbalance_factor: largest/smallest class of the exponential train profile, at least 1.
        subset: which images of a class the profile keeps: "first" in file order, or "seeded".
        seed: of every draw, at least 0.
        val_per_class: images of each class taken from train for val.
        val_fraction, test_fraction: shares of each class taken from train where the source has no such split, in [0, 1).
    """

    source: Path | None = None
    lists: Path | None = None
    classes: int | None = None
    imbalance_factor: float | None = None
    subset: str | None = None
    seed: int | None = None
    val_per_class: int | None = None
    val_fraction: float | None = None
    test_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.imbalance_factor is not None:
            require_imbalance_factor(self.imbalance_factor)
        require(self.classes is None or self.classes >= 2, f"classes must be at least 2, not {self.classes}")
        if self.subset is not None:
            require_choice("subset", self.subset, SUBSETS)
        for option in ("seed", "val_per_class"):
            value = getattr(self, option)
            require(value is None or value >= 0, f"{option} cannot be negative, not {value}")
        for option in ("val_fraction", "test_fraction"):
            value = getattr(self, option)
            require(value is None or 0 <= value < 1, f"{option} is a share of each class and must lie in [0, 1), not {value}")

    def given(self) -> tuple[str, ...]:
        """Names of the options that are not None."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One line of `DATASETS`.

    Args:
        summary: one line for lists of data sets.
        opener: "module:function" of a function `DatasetOptions -> OpenDataset`, imported when asked for.
        accepts: the options it reads.
        needs_source: True where `source` has no default.
        takes_archive: `source` may also be an archive.
        expected: split -> images of the published data set; another number is a complaint.
        num_classes: K of the published data set, None where it is anybody's.
    """

    summary: str
    opener: str
    accepts: tuple[str, ...]
    needs_source: bool = True
    takes_archive: bool = False
    expected: Mapping[str, int] = field(default_factory=dict)
    num_classes: int | None = None


_LONG_TAIL = ("source", "imbalance_factor", "subset", "seed")
_LISTED = ("source", "lists", "seed")  # nothing is drawn; the seed is that of the order in the shards

# The whole seam: a new data set is one file with one `open_…` function, and one entry here.
DATASETS: dict[str, DatasetEntry] = {
    "demo": DatasetEntry(
        summary="20 classes of drawn shapes in clutter, generated as JPEG files in a few seconds",
        opener="pipelines.datasets.demo:open_demo",
        accepts=("source", "imbalance_factor", "seed"),
        needs_source=False,
    ),
    "folder": DatasetEntry(
        summary="your own images, one folder a class, with or without train/val/test above",
        opener="pipelines.datasets.folder:open_folder",
        accepts=(*_LONG_TAIL, "val_fraction", "test_fraction"),
    ),
    "cifar10-lt": DatasetEntry(
        summary="CIFAR-10 (python version) with an exponential train profile",
        opener="pipelines.datasets.cifar_lt:open_cifar10_lt",
        accepts=(*_LONG_TAIL, "val_per_class", "classes"),
    ),
    "cifar100-lt": DatasetEntry(
        summary="CIFAR-100 (python version) with an exponential train profile",
        opener="pipelines.datasets.cifar_lt:open_cifar100_lt",
        accepts=(*_LONG_TAIL, "val_per_class", "classes"),
    ),
    "imagenet-lt": DatasetEntry(
        summary="ImageNet-LT: the published lists over ImageNet-1k, unpacked or in its two tars",
        opener="pipelines.datasets.imagenet_lt:open_imagenet_lt",
        accepts=_LISTED,
        takes_archive=True,
        expected={"train": 115_846, "val": 20_000, "test": 50_000},
        num_classes=1000,
    ),
    "inat18": DatasetEntry(
        summary="iNaturalist 2018: train2018, and val2018 as test, unpacked, .tar or .tar.gz",
        opener="pipelines.datasets.inat18:open_inat18",
        accepts=_LISTED,
        takes_archive=True,
        expected={"train": 437_513, "test": 24_426},
        num_classes=8142,
    ),
    "places-lt": DatasetEntry(
        summary="Places-LT: the published lists over Places365 at 256 pixels",
        opener="pipelines.datasets.places_lt:open_places_lt",
        accepts=_LISTED,
        expected={"train": 62_500},
        num_classes=365,
    ),
    "hf": DatasetEntry(
        summary="a local data set in one of Hugging Face's layouts: parquet, imagefolder or save_to_disk",
        opener="pipelines.datasets.hf:open_hf",
        accepts=(*_LONG_TAIL, "val_fraction", "test_fraction"),
    ),
}


def open_dataset(name: str, options: DatasetOptions | None = None) -> OpenDataset:
    """Opens a data set by its name in `DATASETS`.

    Raises:
        ConfigError: an unknown name, or an option the data set does not take.
        DatasetError: the source is not named, missing, or not what the data set expects.
    """
    options = options or DatasetOptions()
    require_choice("data set", name, tuple(DATASETS))
    entry = DATASETS[name]
    foreign = [option for option in options.given() if option not in entry.accepts]
    if foreign:
        raise ConfigError(f"data set '{name}' does not take {', '.join(foreign)}; it takes {', '.join(entry.accepts)}")
    if entry.needs_source:
        _require_source(name, entry, options.source)
    if options.lists is not None and not options.lists.is_dir():
        raise DatasetError(f"there is no folder {options.lists}: name the folder of the lists of '{name}' with --lists")
    module, function = entry.opener.split(":")
    opener: Callable[[DatasetOptions], OpenDataset] = getattr(import_module(module), function)
    return opener(options)


def _require_source(name: str, entry: DatasetEntry, source: Path | None) -> None:
    if source is None:
        raise DatasetError(f"data set '{name}' is read from a folder of yours: name it with --source")
    if not (source.is_dir() or (entry.takes_archive and source.is_file())):
        kind = "folder or archive" if entry.takes_archive else "folder"
        raise DatasetError(f"there is no {kind} {source}: name the folder of '{name}' with --source")
