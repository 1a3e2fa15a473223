"""What every entry of `DATASETS` promises, and what `open_dataset` says when asked for something else."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.datasets import DATASETS, DatasetEntry, DatasetOptions, class_counts, demo, exponential_counts, open_dataset
from pipelines.types import SPLITS, ConfigError, DatasetError, OpenDataset
from tests.pipelines.datasets.published import jpeg, write_list, write_tree


def _make_demo(source: Path) -> DatasetOptions:
    return DatasetOptions(source=source)


def _make_folder(source: Path) -> DatasetOptions:
    for name, count in {"ant": 12, "bee": 5, "cat": 1}.items():
        (source / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (9, 7), (index, 0, 0)).save(source / name / f"{index}.jpg")
    return DatasetOptions(source=source)


def _make_cifar(source: Path, folder: str, files: tuple[str, str, str], prefix: bytes, max_count: int, num_classes: int) -> DatasetOptions:
    """Black images, as many as a steep profile asks for."""
    (source / folder).mkdir(parents=True)
    counts_K = exponential_counts(max_count, num_classes, max_count)
    for name, labels in ((files[0], np.repeat(np.arange(num_classes), counts_K)), (files[1], np.arange(num_classes))):
        content = {b"data": np.zeros((len(labels), 3072), np.uint8), prefix + b"labels": labels.tolist()}
        (source / folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = [b"class%d" % label for label in range(num_classes)]
    (source / folder / files[2]).write_bytes(pickle.dumps({prefix + b"label_names": names}, protocol=2))
    return DatasetOptions(source=source, imbalance_factor=max_count)


def _make_listed(source: Path, files: dict[str, tuple[str, ...]]) -> DatasetOptions:
    """One image a path, beside the lists that name them; the label is the place in the list."""
    for name, paths in files.items():
        write_list(source / "lists" / name, [(path, label) for label, path in enumerate(paths)])
        write_tree(source, {path: jpeg(number) for number, path in enumerate(paths)})
    return DatasetOptions(source=source, lists=source / "lists")


def _make_hf(source: Path) -> DatasetOptions:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    images = [{"bytes": jpeg(number), "path": None} for number in range(20)]
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 10}, features=features).save_to_disk(source)
    if not bars:
        datasets.enable_progress_bars()
    return DatasetOptions(source=source)


# A new entry of `DATASETS` adds the few lines here that make a small source for it.
MAKERS: dict[str, Callable[[Path], DatasetOptions]] = {
    "demo": _make_demo,
    "folder": _make_folder,
    "cifar10-lt": lambda source: _make_cifar(source, "cifar-10-batches-py", ("data_batch_1", "test_batch", "batches.meta"), b"", 5000, 10),
    "cifar100-lt": lambda source: _make_cifar(source, "cifar-100-python", ("train", "test", "meta"), b"fine_", 500, 100),
    "imagenet-lt": lambda source: _make_listed(
        source,
        {
            "ImageNet_LT_train.txt": ("train/n01/n01_1.JPEG", "train/n02/n02_1.JPEG"),
            "ImageNet_LT_val.txt": ("train/n01/n01_2.JPEG",),
            "ImageNet_LT_test.txt": ("val/n01/ILSVRC2012_val_1.JPEG", "val/n02/ILSVRC2012_val_2.JPEG"),
        },
    ),
    "inat18": lambda source: _make_listed(
        source,
        {
            "iNaturalist18_train.txt": ("train_val2018/Aves/0/a.jpg", "train_val2018/Fungi/1/b.jpg"),
            "iNaturalist18_val.txt": ("train_val2018/Aves/0/c.jpg",),
        },
    ),
    "places-lt": lambda source: _make_listed(
        source,
        {
            "Places_LT_train.txt": ("data_256/a/airfield/1.jpg", "data_256/b/beach/1.jpg"),
            "Places_LT_val.txt": ("data_256/a/airfield/2.jpg",),
            "Places_LT_test.txt": ("val_256/Places365_val_1.jpg",),
        },
    ),
    "hf": _make_hf,
}


@pytest.fixture(scope="module", params=DATASETS)
def opened_twice(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, OpenDataset, OpenDataset]:
    name = request.param
    options = MAKERS[name](tmp_path_factory.mktemp(name) / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DEFAULT", demo.DemoSpec(max_count=3, imbalance_factor=2, val_per_class=1, test_per_class=1))
        return name, open_dataset(name, options), open_dataset(name, options)


def test_splits_are_complete(opened_twice: tuple[str, OpenDataset, OpenDataset]) -> None:
    name, dataset, _ = opened_twice
    assert dataset.name == name
    assert tuple(dataset.splits) == SPLITS
    assert len(dataset.splits["train"].labels_N) > 0


def test_classes_are_unique_and_all_trained(opened_twice: tuple[str, OpenDataset, OpenDataset]) -> None:
    _, dataset, _ = opened_twice
    assert len(set(dataset.class_names)) == len(dataset.class_names)
    assert class_counts(dataset.splits["train"].labels_N, len(dataset.class_names)).min() >= 1
    for split in dataset.splits.values():
        assert split.labels_N.dtype == np.int64
        class_counts(split.labels_N, len(dataset.class_names))


def test_images_decode_and_repeat(opened_twice: tuple[str, OpenDataset, OpenDataset]) -> None:
    _, *datasets = opened_twice
    for split in SPLITS:
        first, second = (dataset.splits[split] for dataset in datasets)
        assert first.labels_N.tolist() == second.labels_N.tolist()
        for index in range(0, len(first.labels_N), max(1, len(first.labels_N) // 20)):
            sample = first.read(index)
            assert sample == second.read(index)
            assert sample.label == first.labels_N[index]
            assert sample.extension in ("jpg", "png")
            Image.open(io.BytesIO(sample.encoded)).convert("RGB")


def test_options_can_be_saved(opened_twice: tuple[str, OpenDataset, OpenDataset]) -> None:
    _, dataset, _ = opened_twice
    assert json.loads(json.dumps(dict(dataset.options))) == dataset.options


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown data set 'cifar'; known: demo, folder, cifar10-lt, cifar100-lt"):
        open_dataset("cifar")


@pytest.mark.parametrize("name", [name for name, entry in DATASETS.items() if entry.needs_source])
def test_a_missing_source_is_asked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"data set '{name}' is read from a folder of yours: name it with --source"):
        open_dataset(name)
    with pytest.raises(
        DatasetError, match=f"there is no folder (or archive )?{tmp_path / 'none'}: name the folder of '{name}' with --source"
    ):
        open_dataset(name, DatasetOptions(source=tmp_path / "none"))


@pytest.mark.parametrize("entry", DATASETS.values(), ids=DATASETS)
def test_every_entry_takes_the_seed_that_conversion_passes(entry: DatasetEntry) -> None:
    assert "seed" in entry.accepts


def test_an_option_it_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data set 'demo' does not take subset, val_per_class; it takes source, imbalance_factor, seed"):
        open_dataset("demo", DatasetOptions(subset="first", val_per_class=0, seed=0))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"imbalance_factor": 0.01}, "must be >= 1, not 0.01; did you mean 100?"),
        ({"subset": "last"}, "unknown subset 'last'; known: first, seeded"),
        ({"seed": -1}, "seed cannot be negative, not -1"),
        ({"val_per_class": -1}, "val_per_class cannot be negative, not -1"),
        ({"val_fraction": 1.0}, r"val_fraction is a share of each class and must lie in \[0, 1\), not 1.0"),
    ],
)
def test_impossible_options_are_refused_when_made(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace("?", r"\?")):
        DatasetOptions(**options)  # type: ignore[arg-type]
