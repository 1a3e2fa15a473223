"""CIFAR-10-LT and CIFAR-100-LT, made from the official python version.

The largest class keeps what it has in the full set (5,000 or 500 images) and the others follow `exponential_counts` by label. A smaller
set of the same kind has the first classes only, and the profile runs over those.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.config import require
from pipelines.datasets import DatasetOptions
from pipelines.datasets.cifar_pickle import load_cifar_pickle
from pipelines.datasets.longtail import class_counts, exponential_counts, rows_by_class, select_subset
from pipelines.types import DatasetError, EncodedSample, IntArray, OpenDataset, Split


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Names inside one archive, and the images each class has in its whole train set."""

    name: str
    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    label_key: bytes
    names_key: bytes
    max_count: int


_CIFAR10 = _Layout(
    name="cifar10-lt",
    archive="cifar-10-python.tar.gz",
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    label_key=b"labels",
    names_key=b"label_names",
    max_count=5000,
)
_CIFAR100 = _Layout(
    name="cifar100-lt",
    archive="cifar-100-python.tar.gz",
    folder="cifar-100-python",
    train=("train",),
    test="test",
    meta="meta",
    label_key=b"fine_labels",
    names_key=b"fine_label_names",
    max_count=500,
)


@dataclass(frozen=True, kw_only=True)
class _Images:
    """`pixels_NP`: uint8 [N, 3072], red, green, then blue rows; `sources`: N times "path#row"."""

    pixels_NP: NDArray[np.uint8]
    labels_N: IntArray
    sources: list[str]


def open_cifar10_lt(options: DatasetOptions) -> OpenDataset:
    """Opens CIFAR-10-LT; see `open_cifar100_lt`."""
    return _open(_CIFAR10, options)


def open_cifar100_lt(options: DatasetOptions) -> OpenDataset:
    """Opens CIFAR-100-LT.

    Reads `source` (the folder of the archive or the one above), `imbalance_factor` (100), `subset` ("first", as the reference; "seeded"),
    `seed` (0), `classes` (all) and `val_per_class` (0, as the field has no val split). Val takes the last images of each class before the
    subset is made; the largest class shrinks by as many, so the counts are then no longer the published ones. With `classes`, the images
    of the others are in no split, and the profile falls to 1/imbalance_factor over the classes that are left.

    Raises:
        ConfigError: a val split as large as the largest class, or more classes than there are.
        DatasetError: a file is missing or damaged, or has fewer images of a class than the profile asks for.
    """
    return _open(_CIFAR100, options)


def _open(layout: _Layout, options: DatasetOptions) -> OpenDataset:
    imbalance_factor = 100.0 if options.imbalance_factor is None else options.imbalance_factor
    subset = options.subset or "first"
    seed, val_per_class = options.seed or 0, options.val_per_class or 0
    max_count = layout.max_count - val_per_class
    require(max_count >= 1, f"val_per_class must be below the {layout.max_count} images of a class, not {val_per_class}")

    folder = _folder(layout, options.source)
    class_names = _class_names(folder / layout.meta, layout.names_key)
    num_classes = options.classes or len(class_names)
    require(num_classes <= len(class_names), f"classes must be at most the {len(class_names)} of {layout.name}, not {num_classes}")
    train = _first_classes(_read(folder, layout.train, layout.label_key, len(class_names)), num_classes)
    test = _first_classes(_read(folder, (layout.test,), layout.label_key, len(class_names)), num_classes)
    class_names = class_names[:num_classes]

    by_class = rows_by_class(train.labels_N, num_classes)
    val_rows = np.sort(np.concatenate([rows[max(0, len(rows) - val_per_class) :] for rows in by_class]))
    left_rows = np.setdiff1d(np.arange(len(train.labels_N)), val_rows)
    counts_K = exponential_counts(max_count, num_classes, imbalance_factor)
    _require_enough(class_counts(train.labels_N[left_rows], num_classes), counts_K, class_names, folder)
    train_rows = left_rows[select_subset(train.labels_N[left_rows], counts_K, subset=subset, seed=seed)]
    resolved = {"imbalance_factor": imbalance_factor, "subset": subset, "val_per_class": val_per_class}
    return OpenDataset(
        name=layout.name,
        class_names=class_names,
        splits={"train": _split(train, train_rows), "val": _split(train, val_rows), "test": _split(test, np.arange(len(test.labels_N)))},
        options=resolved | ({"seed": seed} if subset == "seeded" else {}) | ({"classes": num_classes} if options.classes else {}),
    )


def _folder(layout: _Layout, source: Path | None) -> Path:
    assert source is not None  # `open_dataset` asked for it
    for folder in (source / layout.folder, source):
        if (folder / layout.meta).is_file():
            return folder
    raise DatasetError(
        f"{source} holds no {layout.folder}/{layout.meta}: unpack {layout.archive} there (https://www.cs.toronto.edu/~kriz/cifar.html)"
    )


def _class_names(path: Path, key: bytes) -> tuple[str, ...]:
    names = load_cifar_pickle(path).get(key)
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise DatasetError(f"{path} lists no class names under '{key.decode()}': unpack the archive of the python version again")
    return tuple(name.decode("ascii") for name in names)


def _read(folder: Path, names: tuple[str, ...], label_key: bytes, num_classes: int) -> _Images:
    """Joins the files that exist; a part of CIFAR-10's train set is enough where the subset asks for no more."""
    present = [folder / name for name in names if (folder / name).is_file()]
    if not present:
        raise DatasetError(f"{folder} holds no {names[0]}: unpack the archive of the python version there again")
    pixels, labels, sources = [], [], []
    for path in present:
        content = load_cifar_pickle(path)
        rows_NP, labels_N = content.get(b"data"), np.array(content.get(label_key, []), ndmin=1)
        labelled = len(labels_N) > 0 and labels_N.dtype.kind == "i" and 0 <= labels_N.min() <= labels_N.max() < num_classes
        if not labelled or not isinstance(rows_NP, np.ndarray) or rows_NP.dtype != np.uint8 or rows_NP.shape != (len(labels_N), 3072):
            raise DatasetError(
                f"{path} does not hold images and '{label_key.decode()}' of {num_classes} classes: unpack the archive there again"
            )
        pixels.append(rows_NP)
        labels.append(labels_N.astype(np.int64))
        sources += [f"{path}#{row}" for row in range(len(labels_N))]
    return _Images(pixels_NP=np.concatenate(pixels), labels_N=np.concatenate(labels), sources=sources)


def _first_classes(images: _Images, num_classes: int) -> _Images:
    """`images` without those of labels from `num_classes` on, in the same order."""
    kept_N = np.flatnonzero(images.labels_N < num_classes)
    if len(kept_N) == len(images.labels_N):
        return images
    return _Images(
        pixels_NP=images.pixels_NP[kept_N], labels_N=images.labels_N[kept_N], sources=[images.sources[row] for row in kept_N.tolist()]
    )


def _require_enough(available_K: IntArray, counts_K: IntArray, class_names: tuple[str, ...], folder: Path) -> None:
    short = np.flatnonzero(available_K < counts_K)
    if len(short):
        label = int(short[0])
        raise DatasetError(
            f"the subset asks for {counts_K[label]} images of class '{class_names[label]}', but {folder} has {available_K[label]}: "
            "unpack every train file of the archive there, or ask for a larger imbalance_factor"
        )


def _split(images: _Images, rows: IntArray) -> Split:
    """Copies the kept rows, so that the whole file does not stay in memory for a hundredth of it."""
    pixels_NP, labels_N = images.pixels_NP[rows], images.labels_N[rows]
    sources = [images.sources[row] for row in rows]

    def read(position: int) -> EncodedSample:
        image_HWC = np.ascontiguousarray(pixels_NP[position].reshape(3, 32, 32).transpose(1, 2, 0))
        file = io.BytesIO()
        Image.fromarray(image_HWC).save(file, "PNG", compress_level=6)
        return EncodedSample(encoded=file.getvalue(), extension="png", label=int(labels_N[position]), source=sources[position])

    return Split(labels_N=labels_N, sources=sources, read=read)
