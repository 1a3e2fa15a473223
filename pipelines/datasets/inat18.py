"""iNaturalist 2018: the competition's images and annotations, unpacked or in the archive they are published as (Van Horn et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from pipelines.datasets import DATASETS, DatasetOptions
from pipelines.datasets.annotations import read_annotations, read_categories
from pipelines.datasets.archives import MemberSources, is_gzip, stream_tar
from pipelines.datasets.files import image_extension
from pipelines.datasets.listed import tar_splits, tree_splits
from pipelines.datasets.lists import (
    ImageList,
    count_complaints,
    lists_folder,
    name_classes,
    num_classes_of,
    read_list,
    require_disjoint,
)
from pipelines.types import DatasetError, EncodedSample, OpenDataset, Split

_NAME = "inat18"
_FOLDER = "train_val2018"
# The field reports on val2018, whose labels are public: it is our test split, and there is no val split.
_PUBLISHED = {"train": "train", "test": "val"}
_CATEGORIES = "categories.json"


def open_inat18(options: DatasetOptions) -> OpenDataset:
    """Opens iNaturalist 2018: train2018 as train and val2018, on which the field reports, as test; val is empty.

    Reads `lists`, the folder of `{train,val}2018.json` or, without them, `iNaturalist18_{train,val}.txt`, and perhaps of `categories.json`
    (by default beside the images); and `source`: the folder of `train_val2018/`, that folder, or `train_val2018.tar` or `.tar.gz`.
    The compressed archive can only be read from front to back, so the data set then has a `stream`. Label is the category id.

    Raises:
        DatasetError: lists or annotations are faulty, images are missing, or an archive is damaged.
    """
    source = options.source
    assert source is not None  # `open_dataset` asked for it
    folder = lists_folder(options, *(name for split in _PUBLISHED for name in _list_names(split)))
    lists, category_of = _read_lists(folder)
    overlaps = require_disjoint(lists)
    if (folder / _CATEGORIES).is_file():
        category_of = read_categories(folder / _CATEGORIES)
    class_names = name_classes(category_of, num_classes_of(lists))
    members = {split: [_member(path) for path in images.paths] for split, images in lists.items()}
    images_at = _images_at(source)
    stream = None
    if images_at.is_dir():
        paths = {split: [f"{images_at}{name[len(_FOLDER) :]}" for name in names] for split, names in members.items()}
        splits = tree_splits(images_at, lists, paths)
    elif is_gzip(images_at):
        streamed = _Streamed(images_at, lists, members)
        splits, stream = streamed.splits, streamed.samples
    else:
        splits = tar_splits(images_at, lists, members)
    val = Split(labels_N=np.empty(0, np.int64), sources=(), read=_no_sample)
    return OpenDataset(
        name=_NAME,
        class_names=class_names,
        splits={"train": splits["train"], "val": val, "test": splits["test"]},
        stream=stream,
        complaints=count_complaints(_NAME, lists, class_names) + overlaps,
    )


def _list_names(split: str) -> tuple[str, str]:
    return f"{_PUBLISHED[split]}2018.json", f"iNaturalist18_{_PUBLISHED[split]}.txt"


def _read_lists(folder: Path) -> tuple[dict[str, ImageList], dict[int, str]]:
    """The list of each split, and the names of the categories where a json file has them."""
    num_classes = DATASETS[_NAME].num_classes
    assert num_classes is not None
    lists: dict[str, ImageList] = {}
    names: dict[int, str] = {}
    for split in _PUBLISHED:
        annotations, plain = (folder / name for name in _list_names(split))
        if annotations.is_file():
            lists[split], found = read_annotations(annotations, num_classes)
            names |= found
        elif plain.is_file():
            lists[split] = read_list(plain, num_classes)
        else:
            raise DatasetError(f"{folder} holds neither {annotations.name} nor {plain.name}: name the folder of the lists with --lists")
    return lists, names


def _member(path: str) -> str:
    """A path below train_val2018/, whether the list says so or not."""
    return path if path.startswith(f"{_FOLDER}/") else f"{_FOLDER}/{path}"


def _images_at(source: Path) -> Path:
    """The folder or archive that holds the images."""
    if source.is_dir():
        if (source / _FOLDER).is_dir():
            return source / _FOLDER
        for name in (f"{_FOLDER}.tar", f"{_FOLDER}.tar.gz"):
            if (source / name).is_file():
                return source / name
    return source


def _no_sample(position: int) -> EncodedSample:
    raise IndexError(f"val of '{_NAME}' is empty, so there is no sample {position}")


class _Streamed:
    """Splits that can only be read together, in the archive's order."""

    def __init__(self, archive: Path, lists: Mapping[str, ImageList], members: Mapping[str, list[str]]) -> None:
        self._archive = archive
        self._members = members
        self._labels = {split: images.labels_N for split, images in lists.items()}
        self._sources = {split: MemberSources(archive, members[split]) for split in lists}
        self.splits = {split: Split(labels_N=self._labels[split], sources=self._sources[split], read=self._read) for split in lists}

    def samples(self) -> Iterator[tuple[str, int, EncodedSample]]:
        """Yields (split, position, sample) of every listed image; raises as `stream_tar` does."""
        num_train = len(self._members["train"])
        for row, encoded in stream_tar(self._archive, [*self._members["train"], *self._members["test"]]):
            split, position = ("train", row) if row < num_train else ("test", row - num_train)
            extension = image_extension(self._members[split][position])
            label, source = int(self._labels[split][position]), self._sources[split][position]
            yield split, position, EncodedSample(encoded=encoded, extension=extension, label=label, source=source)

    def _read(self, position: int) -> EncodedSample:
        raise DatasetError(f"{self._archive} is compressed and can only be read from front to back: use the data set's stream")
