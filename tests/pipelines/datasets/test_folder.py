"""Users' own folders: layouts, splits, the optional long tail, and what is said when something is off."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.datasets import DatasetOptions, class_counts, open_dataset
from pipelines.types import ConfigError, DatasetError, OpenDataset


def _image(seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def _fill(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index:03d}.png").write_bytes(_image(index))
    return folder


def _sources(dataset: OpenDataset, split: str) -> list[str]:
    return [dataset.splits[split].read(index).source for index in range(len(dataset.splits[split].labels_N))]


def _counts(dataset: OpenDataset, split: str) -> list[int]:
    return class_counts(dataset.splits[split].labels_N, len(dataset.class_names)).tolist()


def _open(source: Path, **options: object) -> OpenDataset:
    return open_dataset("folder", DatasetOptions(source=source, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("val_name", ["val", "valid", "validation"])
def test_split_layout(tmp_path: Path, val_name: str) -> None:
    _fill(tmp_path / "train", {"cat": 3, "ant": 2, "bee": 1})
    _fill(tmp_path / val_name, {"bee": 2})
    _fill(tmp_path / "test", {"ant": 1, "cat": 1})
    dataset = _open(tmp_path)
    assert dataset.class_names == ("ant", "bee", "cat")
    assert [_counts(dataset, split) for split in ("train", "val", "test")] == [[2, 1, 3], [0, 2, 0], [1, 0, 1]]
    assert _sources(dataset, "test") == [str(tmp_path / "test/ant/000.png"), str(tmp_path / "test/cat/000.png")]


def test_flat_layout_is_split_by_class_and_seed(tmp_path: Path) -> None:
    _fill(tmp_path, {"ant": 40, "bee": 20, "cat": 1})
    dataset = _open(tmp_path)
    assert [_counts(dataset, split) for split in ("train", "val", "test")] == [[32, 16, 1], [4, 2, 0], [4, 2, 0]]
    everything = [source for split in dataset.splits for source in _sources(dataset, split)]
    assert sorted(everything) == sorted(map(str, tmp_path.glob("*/*.png")))
    assert _sources(_open(tmp_path), "val") == _sources(dataset, "val")
    assert _sources(_open(tmp_path, seed=1), "val") != _sources(dataset, "val")
    assert _counts(_open(tmp_path, val_fraction=0.5, test_fraction=0.0), "val") == [20, 10, 0]


def test_only_the_missing_split_is_taken_from_train(tmp_path: Path) -> None:
    _fill(tmp_path / "train", {"ant": 10})
    _fill(tmp_path / "test", {"ant": 3})
    dataset = _open(tmp_path)
    assert [_counts(dataset, split) for split in ("train", "val", "test")] == [[9], [1], [3]]
    assert dataset.options["val_fraction"] == 0.1
    assert "test_fraction" not in dataset.options


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert _open(_fill(tmp_path, {"car": 3, "train": 3})).class_names == ("car", "train")


def test_long_tail_follows_the_size_of_classes_and_keeps_label_ids(tmp_path: Path) -> None:
    _fill(tmp_path / "train", {"ant": 20, "bee": 40, "cat": 3, "dog": 40})
    _fill(tmp_path / "val", {"ant": 1})
    _fill(tmp_path / "test", {"ant": 1})
    dataset = _open(tmp_path, imbalance_factor=8, subset="first")
    # bee, dog (by name), ant, cat: 40, 20, 10, 5, and cat has but 3.
    assert _counts(dataset, "train") == [10, 40, 3, 20]
    assert _sources(dataset, "train")[:10] == [str(tmp_path / f"train/ant/{index:03d}.png") for index in range(10)]
    seeded = _open(tmp_path, imbalance_factor=8)
    assert _counts(seeded, "train") == [10, 40, 3, 20]
    assert _sources(seeded, "train") != _sources(dataset, "train")


def test_files_are_found_by_suffix_and_read_as_they_are(tmp_path: Path) -> None:
    _fill(tmp_path / "train", {"ant": 1})
    for name in ("b.JPEG", "c.TIF", "d.webp", ".hidden.png", "notes.txt", "Thumbs.db"):
        (tmp_path / "train/ant" / name).write_bytes(name.encode())
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/ant/linked.png").symlink_to(tmp_path / "train/ant/000.png")
    train = _open(tmp_path, val_fraction=0.0, test_fraction=0.0).splits["train"]
    samples = [train.read(index) for index in range(len(train.labels_N))]
    assert [sample.extension for sample in samples] == ["png", "jpg", "tif", "webp", "png"]
    assert [sample.encoded for sample in samples[1:4]] == [b"b.JPEG", b"c.TIF", b"d.webp"]


def test_file_names_that_are_not_utf8_are_read_and_can_be_printed(tmp_path: Path) -> None:
    _fill(tmp_path / "train", {"ant": 1})
    os.rename(tmp_path / "train/ant/000.png", os.path.join(os.fsencode(tmp_path), b"train/ant/caf\xe9.png"))
    sample = _open(tmp_path, val_fraction=0.0, test_fraction=0.0).splits["train"].read(0)
    assert sample.encoded == _image(0)
    assert sample.source == rf"{tmp_path}/train/ant/caf\udce9.png"


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    dataset = _open(_fill(tmp_path, {"ant": 1}))
    (tmp_path / "ant/000.png").unlink()
    with pytest.raises(DatasetError, match=r"cannot read .*ant/000\.png \(No such file"):
        dataset.splits["train"].read(0)


@pytest.mark.parametrize(
    ("folders", "files", "sentence"),
    [
        ([], [], "{root} holds no class folders: put the images of each class into {root}/<class>/"),
        ([], ["loose.png"], "{root} holds no class folders: put the images of each class into {root}/<class>/"),
        (["train", "val"], [], "{root}/train holds no class folders: put the images of each class into {root}/train/<class>/"),
        (["train/ant", "train/bee"], ["train/ant/0.png"], "{root}/train/bee holds no images"),
        (["ant", "bee"], ["ant/0.png", "bee/notes.txt"], "{root}/bee holds no images"),
        (["train/ant", "val/wasp"], ["train/ant/0.png", "val/wasp/0.png"], "{root}/val/wasp is a class that train lacks"),
        (["train/ant", "val/ant"], ["train/ant/0.png"], "{root}/val/ant holds no images"),
        (["val/ant", "test/ant"], ["val/ant/0.png", "test/ant/0.png"], "{root} holds test, val but no train folder"),
        (["train/ant", "val/ant", "valid/ant"], ["train/ant/0.png"], "{root}/val and {root}/valid are both there"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, folders: list[str], files: list[str], sentence: str) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    for file in files:
        (tmp_path / file).write_bytes(_image())
    with pytest.raises(DatasetError) as error:
        _open(tmp_path)
    assert str(error.value).startswith(sentence.format(root=tmp_path))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"val_fraction": 0.1}, r"val_fraction splits images off train, but .*val is there: leave the option out"),
        ({"subset": "first"}, "subset picks what imbalance_factor keeps"),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, options: dict[str, object], sentence: str) -> None:
    _fill(tmp_path / "train", {"ant": 2})
    _fill(tmp_path / "val", {"ant": 1})
    with pytest.raises(ConfigError, match=sentence):
        _open(tmp_path, **options)


def test_fractions_must_leave_training_images(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="val and test would take 1 of each class"):
        _open(_fill(tmp_path, {"ant": 2}), val_fraction=0.5, test_fraction=0.5)
