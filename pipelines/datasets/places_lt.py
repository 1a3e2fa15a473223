"""Places-LT: the published lists over Places365 at 256 pixels (Liu et al. 2019)."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.datasets import DATASETS, DatasetOptions
from pipelines.datasets.files import list_files, printable
from pipelines.datasets.listed import tree_splits
from pipelines.datasets.lists import (
    ImageList,
    class_folders,
    count_complaints,
    lists_folder,
    name_classes,
    num_classes_of,
    read_list,
    require_disjoint,
)
from pipelines.types import SPLITS, DatasetError, OpenDataset

_NAME = "places-lt"


def open_places_lt(options: DatasetOptions) -> OpenDataset:
    """Opens Places-LT; labels are those of the lists, classes are named by their folder.

    Reads `lists`, the folder of `Places_LT_{train,val,test}.txt` (by default beside the images), and `source`: the folder that holds
    `data_256/` and `val_256/`, one of these, or the folder above. The lists may name images with or without that first folder.

    Raises:
        DatasetError: a list is faulty, or images are missing.
    """
    source = options.source
    assert source is not None  # `open_dataset` asked for it
    files = {split: f"Places_LT_{split}.txt" for split in SPLITS}
    folder = lists_folder(options, *files.values())
    num_classes = DATASETS[_NAME].num_classes
    assert num_classes is not None
    lists = {split: read_list(folder / file, num_classes) for split, file in files.items()}
    complaints = require_disjoint(lists)
    folder_of, disagreement = class_folders((lists["train"],), _class_folder)
    if disagreement:
        complaints += (disagreement,)
    class_names = name_classes(folder_of, num_classes_of(lists))
    heads = {_head(path) for images in lists.values() for path in images.paths}
    # Somebody who names data_256/ means what lies beside it too.
    root = source.parent if f"{source.name}/" in heads and not (source / source.name).is_dir() else source
    paths = {split: _locate(root, images) for split, images in lists.items()}
    return OpenDataset(
        name=_NAME,
        class_names=class_names,
        splits=tree_splits(root, lists, paths),
        complaints=count_complaints(_NAME, lists, class_names) + complaints,
    )


def _class_folder(path: str) -> str:
    """'data_256/a/apartment_building/outdoor/1.jpg' and the same without 'data_256/' -> 'apartment_building/outdoor'."""
    folders = path.split("/")[:-1]
    # Places365 sorts its classes into a folder a letter.
    letters = [depth for depth, name in enumerate(folders) if len(name) == 1]
    return "/".join(folders[letters[0] + 1 :] if letters else folders[-1:])


def _locate(root: Path, images: ImageList) -> list[str]:
    """The file of each entry, once it is known where the entries of each first folder lie."""
    paths_of: dict[str, list[str]] = {}
    for path in images.paths:
        paths_of.setdefault(_head(path), []).append(path)
    root_of = {head: _root(root, head, paths) for head, paths in paths_of.items()}
    located = []
    for path in images.paths:
        folder, dropped = root_of[_head(path)]
        located.append(f"{folder}/{path[dropped:]}")
    return located


def _head(path: str) -> str:
    """The first folder of a path with its '/', or ""."""
    head, slash, _ = path.partition("/")
    return head + slash if slash else ""


def _root(root: Path, head: str, paths: list[str]) -> tuple[str, int]:
    """The folder below which `paths` lie, and how many letters of each are left out for that; `root` and 0 where none is found."""
    candidates = [(str(root), 0), (str(root), len(head))]
    candidates += [(folder, 0) for folder in _folders_in(root)]
    for folder, dropped in candidates:
        if _lie_in(folder, [path[dropped:] for path in paths]):
            return folder, dropped
    return candidates[0]


def _lie_in(folder: str, paths: list[str]) -> bool:
    """Whether any of `paths` can lie in `folder`: its own folder is there, or, of files right inside, one file."""
    folders = {os.path.dirname(path) for path in paths} - {""}
    if folders:
        return any(os.path.isdir(f"{folder}/{name}") for name in folders)
    return not list_files(folder).isdisjoint(paths)


def _folders_in(source: Path) -> list[str]:
    try:
        with os.scandir(source) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir())
    except OSError as error:
        name = printable(str(source))
        raise DatasetError(f"cannot list {name} ({error.strerror}): make it readable and run the command again") from error
