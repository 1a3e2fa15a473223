"""ImageNet-LT: the published lists over ImageNet-1k, unpacked or in the archives it is published as (Liu et al. 2019)."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.datasets import DATASETS, DatasetOptions
from pipelines.datasets.files import list_files, printable
from pipelines.datasets.listed import tar_splits, tree_splits
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
from pipelines.types import SPLITS, DatasetError, OpenDataset, Split

_NAME = "imagenet-lt"
_HALVES = ("train", "val")  # of ImageNet; the lists' val is drawn from its train half, their test is its val half


def open_imagenet_lt(options: DatasetOptions) -> OpenDataset:
    """Opens ImageNet-LT; label i is the i-th wnid.

    Reads `lists`, the folder of `ImageNet_LT_{train,val,test}.txt` (by default `source` or the folder it is in), and `source`: a folder
    with `train/<wnid>/` or `ILSVRC2012_img_train.tar`, and `val/` (with or without class folders) or `ILSVRC2012_img_val.tar`; or the
    train archive itself with the other half beside it. Archives are read in place.

    Raises:
        DatasetError: a list is faulty, lists disagree about a label, images are missing, or an archive is damaged.
    """
    source = options.source
    assert source is not None  # `open_dataset` asked for it
    files = {split: f"ImageNet_LT_{split}.txt" for split in SPLITS}
    folder = lists_folder(options, *files.values())
    entry = DATASETS[_NAME]
    assert entry.num_classes is not None
    lists = {split: read_list(folder / file, entry.num_classes) for split, file in files.items()}
    overlaps = require_disjoint(lists)
    half_of = {split: _half(images) for split, images in lists.items()}
    class_names, disorder = _class_names(lists)
    splits: dict[str, Split] = {}
    for half in _HALVES:
        splits |= _half_splits(source, half, {split: images for split, images in lists.items() if half_of[split] == half})
    return OpenDataset(
        name=_NAME,
        class_names=class_names,
        splits={split: splits[split] for split in SPLITS},
        complaints=count_complaints(_NAME, lists, class_names) + overlaps + disorder,
    )


def _half(images: ImageList) -> str:
    """Which half of ImageNet a list names, "train" or "val"; `DatasetError` at the first line that names neither or the other."""
    half = images.paths[0].partition("/")[0]
    for row, path in enumerate(images.paths):
        parts = path.split("/")
        if parts[0] != half or parts[0] not in _HALVES or len(parts) not in ((3,) if half == "train" else (2, 3)):
            known = "train/<wnid>/<file> or val/<wnid>/<file>, and one of both in a list"
            raise DatasetError(f"{images.where(row)} names {printable(path)}, expected {known}: fetch the list of ImageNet-LT")
    return half


def _class_names(lists: dict[str, ImageList]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """K wnids, and a complaint where they are not sorted."""
    wnid_of, disagreement = class_folders(lists.values(), lambda path: path.split("/")[1] if path.count("/") == 2 else "")
    if disagreement:
        raise DatasetError(f"{disagreement}: fetch the lists again, all from one place")
    wnids = [wnid_of[label] for label in sorted(wnid_of)]
    disorder = () if wnids == sorted(wnids) else ("labels do not follow the sorted wnids, as those of ImageNet-LT do",)
    return name_classes(wnid_of, num_classes_of(lists)), disorder


def _half_splits(source: Path, half: str, lists: dict[str, ImageList]) -> dict[str, Split]:
    if not lists:
        return {}
    # Train by class and file; in val the file name alone says which image it is, so both layouts of it are one.
    kept = 2 if half == "train" else 1
    keys = {split: ["/".join(path.split("/")[-kept:]) for path in images.paths] for split, images in lists.items()}
    place = _place(source, half)
    if not place.is_dir():
        return tar_splits(place, lists, keys)
    if half == "train":
        return tree_splits(place, lists, {split: [f"{place}/{key}" for key in keys[split]] for split in lists})
    path_of = _list_val(str(place))
    return tree_splits(place, lists, {split: [path_of.get(key, f"{place}/{key}") for key in keys[split]] for split in lists})


def _place(source: Path, half: str) -> Path:
    """The folder or the archive of one half."""
    if source.is_file() and half == "train":
        return source
    root = source if source.is_dir() else source.parent
    folder, archive = root / half, root / f"ILSVRC2012_img_{half}.tar"
    if folder.is_dir() or archive.is_file():
        return folder if folder.is_dir() else archive
    raise DatasetError(f"{printable(str(root))} holds neither {half}/ nor {archive.name}: name the folder of ImageNet with --source")


def _list_val(folder: str) -> dict[str, str]:
    """File name -> path of every image below ImageNet's val folder."""
    names = list_files(folder)
    path_of = {name: f"{folder}/{name}" for name in names}
    try:
        class_folders_in = sorted(set(os.listdir(folder)) - names)
    except OSError as error:
        raise DatasetError(f"cannot list {printable(folder)} ({error.strerror}): make it readable and run the command again") from error
    for class_folder in class_folders_in:
        path_of |= {name: f"{folder}/{class_folder}/{name}" for name in list_files(f"{folder}/{class_folder}")}
    return path_of
