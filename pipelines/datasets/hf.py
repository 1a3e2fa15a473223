"""Local data sets in Hugging Face's layouts, through their `datasets` library: parquet, imagefolder, `save_to_disk`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets import DatasetOptions
from pipelines.datasets.files import IMAGE_SUFFIXES, image_extension, printable
from pipelines.datasets.folder import SPLIT_NAMES
from pipelines.datasets.holdout import divide_train
from pipelines.datasets.longtail import class_counts
from pipelines.types import SPLITS, BackendError, DatasetError, EncodedSample, IntArray, OpenDataset, Split

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "picture")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "category", "cls")


def open_hf(options: DatasetOptions) -> OpenDataset:
    """Opens a folder of parquet files, an imagefolder, or what `save_to_disk` wrote; images keep their bytes.

    `source` is the folder. Splits are train, validation (val, valid) and test; what is missing is split off train as for `folder`, whose
    `val_fraction`, `test_fraction`, `imbalance_factor`, `subset` and `seed` it takes. The image column is one of that type, the label
    column a ClassLabel, whose names stay in order, or integers or text, whose sorted values are the classes. Nothing is fetched from
    anywhere; the library copies parquet files to its cache (HF_DATASETS_CACHE) the first time.

    Raises:
        BackendError: the library is not installed.
        ConfigError: as for `folder`.
        DatasetError: the library cannot read the folder, there is no train split, no such column, or a row has no label.
    """
    source = options.source
    assert source is not None  # `open_dataset` asked for it
    found = _known_splits(_load(source), source)
    columns = _columns(found["train"].features, source)
    roots = _image_roots(source)
    raw = {split: _raw_labels(content, columns, f"{source}/{split}") for split, content in found.items()}
    class_names, label_of = _classes(found["train"].features[columns.label], raw["train"])
    labels = {split: _labels(values, label_of, f"{source}/{split}") for split, values in raw.items()}

    def split_of(split: str, rows_N: IntArray, name: str) -> Split:
        return _rows_split(found[name], columns.image, rows_N, labels[name][rows_N], f"{source}/{name}", roots)

    there = {split: f"split {split} of {source}" for split in found if split != "train"}
    rows, resolved = divide_train(labels["train"], len(class_names), there, options)
    splits = {split: split_of(split, positions, "train") for split, positions in rows.items()}
    splits |= {split: split_of(split, np.arange(len(labels[split])), split) for split in there}
    empty = np.flatnonzero(class_counts(splits["train"].labels_N, len(class_names)) == 0)
    complaints: tuple[str, ...] = ()
    if len(empty):
        first = class_names[int(empty[0])]
        complaints = (f"{len(empty):,} of {len(class_names):,} classes have no training image in {source}, the first is {first}",)
    return OpenDataset(
        name="hf",
        class_names=class_names,
        splits={split: splits[split] for split in SPLITS},
        options=resolved,
        complaints=complaints,
    )


@dataclass(frozen=True, kw_only=True)
class _Columns:
    image: str
    label: str


def _load(source: Path) -> Mapping[str, Any]:
    """Split name -> `datasets.Dataset`."""
    try:
        import datasets
    except ImportError:
        raise BackendError("data set 'hf' needs the package datasets: pip install 'bce3s[hf]'") from None
    folder = str(source.absolute())
    try:
        with _quiet_and_offline():
            if (source / "dataset_dict.json").is_file() or (source / "state.json").is_file():
                content = datasets.load_from_disk(folder)
            else:
                content = datasets.load_dataset(folder)
    except Exception as error:  # whatever the readers of a dozen formats raise
        cause: BaseException = error
        while cause.__cause__ is not None:  # "an error occurred while generating" says nothing
            cause = cause.__cause__
        reason = printable(next(iter(str(cause).splitlines()), "")) or type(cause).__name__
        raise DatasetError(
            f"the datasets library cannot open {source} ({reason}): it must hold parquet files, class folders or what save_to_disk wrote"
        ) from error
    return content if isinstance(content, dict) else {"train": content}


@contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """No progress bars and log lines beside ours, and no network, whatever a README in the folder asks for; both as before afterwards."""
    import datasets
    from huggingface_hub import constants

    online = [(module, getattr(module, "HF_HUB_OFFLINE", False)) for module in (datasets.config, constants)]
    had_bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it raises as well
    for module, _ in online:
        setattr(module, "HF_HUB_OFFLINE", True)  # noqa: B010, mypy knows it as constant
    try:
        yield
    finally:
        for module, before in online:
            setattr(module, "HF_HUB_OFFLINE", before)  # noqa: B010
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def _known_splits(content: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """train, val and test under our names."""
    found: dict[str, Any] = {}
    for split, known in SPLIT_NAMES.items():
        present = [name for name in known if name in content]
        if len(present) > 1:
            raise DatasetError(f"{source} has the splits {present[0]} and {present[1]}: keep one of them as the {split} split")
        if present and len(content[present[0]]):
            found[split] = content[present[0]]
    if "train" not in found:
        there = ", ".join(printable(str(name)) for name in content) or "none"
        raise DatasetError(f"{source} has no train split with images (its splits: {there}): call the training images 'train'")
    return found


def _columns(features: Mapping[str, Any], source: Path) -> _Columns:
    from datasets import ClassLabel, Image

    images = [name for name, feature in features.items() if isinstance(feature, Image) or _is_struct(feature)]
    labels = [name for name in _LABEL_COLUMNS if name in features] or [name for name in features if isinstance(features[name], ClassLabel)]
    image = next((name for name in _IMAGE_COLUMNS if name in images), images[0] if len(images) == 1 else None)
    if image is None or not labels or (len(labels) > 1 and labels[0] not in _LABEL_COLUMNS):
        kind = "image" if image is None else "label"
        raise DatasetError(f"{source} has no one {kind} column (its columns: {', '.join(features)}): call it '{kind}'")
    return _Columns(image=image, label=labels[0])


def _is_struct(feature: object) -> bool:
    """Whether a column holds images as other tools write them to parquet: {bytes, path} without a note of what it is."""
    return isinstance(feature, dict) and {"bytes", "path"} <= set(feature)


def _raw_labels(content: Any, columns: _Columns, place: str) -> list[Any]:
    missing = [name for name in (columns.image, columns.label) if name not in content.features]
    if missing:
        raise DatasetError(f"{place} has no column '{missing[0]}', which train has: give every split the same columns")
    values: list[Any] = content.select_columns([columns.label]).with_format("arrow")[:].column(0).to_pylist()
    return values


def _classes(feature: Any, values: Sequence[Any]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """K names, and what stands in the column -> label."""
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        return tuple(printable(name) for name in feature.names), {label: label for label in range(feature.num_classes)}
    known = sorted({value for value in values if type(value) in (int, str)}, key=lambda value: (isinstance(value, str), value))
    return tuple(printable(str(value)) for value in known), {value: label for label, value in enumerate(known)}


def _labels(values: Sequence[Any], label_of: Mapping[Any, int], place: str) -> IntArray:
    """int64 [N]."""
    try:
        return np.array([label_of[value] for value in values], np.int64)
    except (KeyError, TypeError):
        row = next(row for row, value in enumerate(values) if type(value) not in (int, str) or value not in label_of)
        raise DatasetError(
            f"{place}#{row} has the label {printable(str(values[row])[:40])}, which is no class of train: remove the split, or label it"
        ) from None


def _rows_split(content: Any, column: str, rows_N: IntArray, labels_N: IntArray, place: str, roots: Sequence[str]) -> Split:
    """Rows of one of the library's splits; its memory-mapped tables may be read from several threads and forked processes."""
    from datasets import Image

    if isinstance(content.features[column], Image):
        content = content.cast_column(column, Image(decode=False))
    images = content.select_columns([column]).with_format(None)
    sources = [f"{printable(place)}#{row}" for row in rows_N.tolist()]

    def read(position: int) -> EncodedSample:
        try:
            value = images[int(rows_N[position])][column] or {}
            path = value.get("path") or ""
            encoded = value.get("bytes")
            if encoded is None:
                encoded = _read_inside(path, roots)
        except OSError as error:
            raise DatasetError(
                f"cannot read {sources[position]} ({error.strerror or error}): restore it and run the command again"
            ) from error
        extension = image_extension(path)
        if f".{extension}" not in IMAGE_SUFFIXES:
            extension = "png" if encoded.startswith(b"\x89PNG") else "jpg"
        return EncodedSample(encoded=encoded, extension=extension, label=int(labels_N[position]), source=sources[position])

    return Split(labels_N=labels_N.astype(np.int64), sources=sources, read=read)


def _image_roots(source: Path) -> tuple[str, ...]:
    """Where image files may lie: in the folder itself, or, out of archives in it, in the library's cache."""
    from datasets import config

    folders = (source.absolute(), source.resolve(), config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH)
    return tuple(os.path.join(os.path.normpath(folder), "") for folder in folders)


def _read_inside(path: str, roots: Sequence[str]) -> bytes:
    if not path:
        raise OSError("the row holds neither bytes nor a path")
    file = os.path.normpath(os.path.join(roots[0], path))
    if not file.startswith(tuple(roots)):
        raise OSError(f"its path {printable(path)} leaves the data set")
    return Path(file).read_bytes()
