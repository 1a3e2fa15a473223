"""Places-LT: the first folder may be missing from lists or tree, or the source may lie above or below it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from pipelines.datasets import DatasetOptions, open_dataset
from pipelines.types import SPLITS, DatasetError, OpenDataset
from tests.pipelines.datasets.published import Samples, jpeg, samples, write_list, write_tree

FOLDERS = ("a/airfield", "a/apartment_building/outdoor", "b/beach")
LISTS = {
    "train": [(f"data_256/{folder}/{number:08d}.jpg", label) for label, folder in enumerate(FOLDERS) for number in range(3 - label)],
    "val": [(f"data_256/{folder}/{9:08d}.jpg", label) for label, folder in enumerate(FOLDERS)],
    "test": [(f"val_256/Places365_val_{label:08d}.jpg", label) for label in (2, 0, 1)],
}
IMAGES = {name: jpeg(number) for number, (name, _) in enumerate([entry for entries in LISTS.values() for entry in entries])}
EXPECTED: dict[str, Samples] = {
    split: [(name.rsplit("/", 1)[1], label, IMAGES[name]) for name, label in entries] for split, entries in LISTS.items()
}


def _without_head(name: str) -> str:
    return name.split("/", 1)[1]


def _write_lists(folder: Path, spell: Callable[[str], str] = str) -> Path:
    for split, entries in LISTS.items():
        write_list(folder / f"Places_LT_{split}.txt", [(spell(name), label) for name, label in entries])
    return folder


def _open(source: Path, lists: Path | None = None) -> OpenDataset:
    return open_dataset("places-lt", DatasetOptions(source=source, lists=lists))


SOURCES: dict[str, Callable[[Path], Path]] = {
    "both folders": lambda root: write_tree(root, IMAGES),
    "the folder above": lambda root: write_tree(root / "places", IMAGES).parent,
    "one of both": lambda root: write_tree(root, IMAGES) / "data_256",
    "without first folder": lambda root: write_tree(root, {_without_head(name): content for name, content in IMAGES.items()}),
}
SPELLINGS: dict[str, Callable[[str], str]] = {"as published": str, "./": "./{}".format, "without first folder": _without_head}


# A list that does not say val_256/ cannot lead out of data_256/, nor two folders down.
FOUND = [pair for pair in product(SPELLINGS, SOURCES) if pair[0] != "without first folder" or pair[1] in ("both folders", pair[0])]


@pytest.mark.parametrize(("spelling", "source"), FOUND)
def test_every_spelling_and_root_gives_the_same_samples(tmp_path: Path, spelling: str, source: str) -> None:
    dataset = _open(SOURCES[source](tmp_path / "images"), _write_lists(tmp_path / "lists", SPELLINGS[spelling]))
    assert dataset.class_names == ("airfield", "apartment_building/outdoor", "beach")
    assert {split: samples(dataset, split) for split in SPLITS} == EXPECTED


def test_lists_are_looked_for_beside_the_images_too(tmp_path: Path) -> None:
    _write_lists(write_tree(tmp_path, IMAGES))
    for source in (tmp_path, tmp_path / "data_256"):
        assert samples(_open(source), "test") == EXPECTED["test"]


def test_what_differs_from_the_published_set_is_a_complaint(tmp_path: Path) -> None:
    lists = _write_lists(tmp_path / "lists")
    write_list(lists / "Places_LT_train.txt", [*LISTS["train"][:-1], ("data_256/a/airfield/00000009.jpg", 1)])
    write_list(lists / "Places_LT_val.txt", LISTS["val"][1:])
    dataset = _open(write_tree(tmp_path / "images", IMAGES), lists)
    assert dataset.class_names == ("airfield", "apartment_building/outdoor", "2")
    assert dataset.complaints == (
        "Places_LT_train.txt lists 6 images, 62,500 expected: 62,494 are missing; is the list cut short?",
        "the lists of 'places-lt' name 3 classes, 365 expected",
        "1 of 3 classes have no image in Places_LT_train.txt, the first is label 2 (2)",
        f"line 6 of {lists}/Places_LT_train.txt gives label 1 to airfield, "
        f"but line 4 of {lists}/Places_LT_train.txt gives it to apartment_building/outdoor",
    )


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        (
            ["data_256/a/airfield/00000000.jpg"],
            "lacks 1 of the 6 images of {lists}/Places_LT_train.txt, the first is data_256/a/airfield/0",
        ),
        ([name for name in IMAGES if "airfield" in name], "lacks 3 of the 6 images of {lists}/Places_LT_train.txt"),
        (
            [LISTS["test"][0][0]],
            "lacks 1 of the 3 images of {lists}/Places_LT_test.txt, the first is val_256/Places365_val_00000002.jpg (line 1)",
        ),
        ([name for name, _ in LISTS["test"]], "lacks 3 of the 3 images of {lists}/Places_LT_test.txt"),
    ],
)
def test_images_that_are_not_there_are_counted(tmp_path: Path, gone: list[str], sentence: str) -> None:
    images, lists = write_tree(tmp_path / "images", IMAGES), _write_lists(tmp_path / "lists")
    for name in gone:
        (images / name).unlink()
    with pytest.raises(DatasetError) as error:
        _open(images, lists)
    assert str(error.value).startswith(f"{images} {sentence.format(lists=lists)}")


@pytest.mark.parametrize("path", ["data_256/../../etc/passwd", "/etc/passwd", "data_256\\a.jpg"])
def test_paths_that_leave_the_source_and_labels_above_364_are_refused(tmp_path: Path, path: str) -> None:
    images, lists = write_tree(tmp_path / "images", IMAGES), _write_lists(tmp_path / "lists")
    write_list(lists / "Places_LT_test.txt", [LISTS["test"][0], (path, 0)])
    with pytest.raises(DatasetError, match=r"line 2 of .*Places_LT_test\.txt names '.*', which (leaves|is no path)"):
        _open(images, lists)
    write_list(lists / "Places_LT_test.txt", [("val_256/a.jpg", 365)])
    with pytest.raises(DatasetError, match=r"line 1 of .*Places_LT_test\.txt has label 365, but labels run from 0 to 364"):
        _open(images, lists)


def test_links_in_a_circle_are_one_sentence(tmp_path: Path) -> None:
    images, lists = write_tree(tmp_path / "images", IMAGES), _write_lists(tmp_path / "lists")
    image = images / LISTS["test"][0][0]
    image.unlink()
    image.symlink_to(image.name)
    with pytest.raises(DatasetError, match=r"the links at .*Places365_val_00000002\.jpg run in a circle"):
        _open(images, lists)
