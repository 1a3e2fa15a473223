"""Images of your own: one folder a class, with or without train, val and test above."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pipelines.datasets import DatasetOptions
from pipelines.datasets.files import IMAGE_SUFFIXES, file_split
from pipelines.datasets.holdout import divide_train
from pipelines.types import SPLITS, DatasetError, OpenDataset, Split

SPLIT_NAMES: dict[str, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def open_folder(options: DatasetOptions) -> OpenDataset:
    """Opens `source/{train,val,test}/<class>/*` or `source/<class>/*`; labels are the sorted class names.

    Where val or test is missing it is split off train: stratified, seeded, `val_fraction` and `test_fraction` (0.1 each).
    With `imbalance_factor`, train keeps an exponential profile afterwards: the n-th largest class gets the n-th count, but never more than
    it has, so a set that is already steeper than asked keeps its tail. `subset` ("seeded") and `seed` (0) say which images stay.

    Raises:
        ConfigError: fractions that leave no training images, one for a split that has its own folder, or a subset of nothing.
        DatasetError: a folder without classes, a class without images, or a class of val or test that train lacks.
    """
    source = options.source
    assert source is not None  # `open_dataset` asked for it
    folders = find_split_folders(source)
    train = list_classes(folders["train"])
    class_names = tuple(train)
    splits: dict[str, Split] = {}
    for split in folders.keys() - {"train"}:
        splits[split] = read_split(list_classes(folders[split], class_names), class_names)

    paths = [path for files in train.values() for path in files]
    labels_N = np.repeat(np.arange(len(class_names)), [len(files) for files in train.values()])
    there = {split: str(folder) for split, folder in folders.items() if split != "train"}
    rows, resolved = divide_train(labels_N, len(class_names), there, options)
    splits |= {split: file_split([paths[row] for row in positions], labels_N[positions]) for split, positions in rows.items()}
    return OpenDataset(name="folder", class_names=class_names, splits={split: splits[split] for split in SPLITS}, options=resolved)


def find_split_folders(source: Path) -> dict[str, Path]:
    """The folders of the splits present: "train" always, and it is `source` itself in the flat layout.

    Raises:
        DatasetError: val or test without train, or two folders for one split.
    """
    names = set(_entries(source, folders=True))
    split_names = {name for known in SPLIT_NAMES.values() for name in known}
    # A folder `train` without folders inside, beside other classes, is a class of that name (vehicles have one).
    if not (names & split_names) or not (names <= split_names or ("train" in names and _entries(source / "train", folders=True))):
        return {"train": source}
    found = {}
    for split, known in SPLIT_NAMES.items():
        present = [source / name for name in known if name in names]
        if len(present) > 1:
            raise DatasetError(f"{present[0]} and {present[1]} are both there: keep one of them as the {split} split")
        if present:
            found[split] = present[0]
    if "train" not in found:
        raise DatasetError(
            f"{source} holds {', '.join(sorted(names))} but no train folder: put the training images into {source}/train/<class>/"
        )
    return found


def list_classes(folder: Path, known: tuple[str, ...] | None = None) -> dict[str, list[str]]:
    """Image files of each class folder, both sorted by name; hidden files and files of other kinds are left out.

    Args:
        folder: of one split.
        known: the classes of train, where this is another split; such a split may lack classes.

    Raises:
        DatasetError: no class folders, no images at all, a class without images (train) or one that train lacks (others).
    """
    classes = {name: _images(folder / name) for name in _entries(folder, folders=True)}
    if not classes:
        raise DatasetError(f"{folder} holds no class folders: put the images of each class into {folder}/<class>/")
    for name in classes:
        if not name.isprintable():  # neither are the stand-ins for bytes that are not UTF-8
            raise DatasetError(f"{folder} has a class folder with an unprintable name, {name!a}: rename it")
    empty = [name for name, files in classes.items() if not files]
    if empty and (known is None or len(empty) == len(classes)):
        kinds = " ".join(IMAGE_SUFFIXES)
        raise DatasetError(f"{folder / empty[0]} holds no images ({kinds}): add some right there, or remove the folder")
    strange = sorted(set(classes) - set(known)) if known is not None else []
    if strange:
        raise DatasetError(f"{folder / strange[0]} is a class that train lacks: add training images for it, or remove the folder")
    return classes


def read_split(classes: dict[str, list[str]], class_names: tuple[str, ...]) -> Split:
    """A split of all files of `classes`, labelled by the place of their class in `class_names`."""
    paths = [path for files in classes.values() for path in files]
    label_of = {name: label for label, name in enumerate(class_names)}
    return file_split(paths, np.repeat([label_of[name] for name in classes], [len(files) for files in classes.values()]))


def _entries(folder: Path, *, folders: bool) -> list[str]:
    """Sorted names of the visible folders, or of the visible files, in `folder`; the listing tells the kind, without a stat per file."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_dir(entry) == folders)
    except OSError as error:
        raise DatasetError(f"cannot list {folder} ({error.strerror}): make it readable and run the command again") from error


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle: a file that cannot be read, which is named, or skipped, when it is its turn
        return False


def _images(folder: Path) -> list[str]:
    return [os.path.join(folder, name) for name in _entries(folder, folders=False) if name.lower().endswith(IMAGE_SUFFIXES)]
