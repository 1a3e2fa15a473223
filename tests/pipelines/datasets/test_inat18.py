"""iNaturalist 2018: tree, tar and stream, lists and annotations give the same samples; faults of the json are named."""

from __future__ import annotations

import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.datasets import DatasetOptions, open_dataset
from pipelines.types import DatasetError, OpenDataset
from tests.pipelines.datasets.published import (
    Samples,
    jpeg,
    member,
    samples,
    streamed,
    until_error,
    write_files_tar,
    write_list,
    write_tar,
    write_tree,
)

GROUPS = ("Plantae", "Insecta", "Aves")
LISTS = {
    "train": [
        (f"train_val2018/{GROUPS[label]}/{label}/t{number}.jpg", label) for number in range(4) for label in (2, 0, 1)[: 3 - number // 2]
    ],
    "test": [(f"train_val2018/{GROUPS[label]}/{label}/v{number}.jpg", label) for number in range(2) for label in (1, 2, 0)],
}
ENTRIES = [entry for entries in LISTS.values() for entry in entries]
IMAGES = {name: jpeg(number) for number, (name, _) in enumerate(ENTRIES)}
EXPECTED: dict[str, Samples] = {
    split: [(name.rsplit("/", 1)[1], label, IMAGES[name]) for name, label in entries] for split, entries in LISTS.items()
} | {"val": []}
NAMES = ["Acer rubrum", "Apis mellifera", "Parus major"]
CATEGORIES = [{"id": label, "name": name, "supercategory": GROUPS[label]} for label, name in enumerate(NAMES)]
FILE = {"train": "train2018.json", "test": "val2018.json"}


def _annotations(split: str) -> dict[str, Any]:
    first = 1000 if split == "test" else 0
    ids = [first + number for number in range(len(LISTS[split]))]
    return {
        "info": {"year": 2018},
        "images": [{"id": i, "width": 9, "height": 7, "file_name": name} for i, (name, _) in zip(ids, LISTS[split], strict=True)],
        "categories": [dict(category) for category in CATEGORIES],
        # In another order than the images.
        "annotations": [
            {"id": i, "image_id": i, "category_id": label} for i, (_, label) in reversed([*zip(ids, LISTS[split], strict=True)])
        ],
        "licenses": [],
    }


def _write_json(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in FILE.items():
        (folder / name).write_text(json.dumps(_annotations(split)))
    return folder


def _write_txt(folder: Path) -> Path:
    for split, name in (("train", "train"), ("test", "val")):
        write_list(folder / f"iNaturalist18_{name}.txt", LISTS[split])
    (folder / "categories.json").write_text(json.dumps(CATEGORIES))
    return folder


def _archive(path: Path, mode: str) -> Path:
    """Sorted as the published one is, with folders and a stranger between."""
    members = [member("train_val2018/", kind=b"5"), member("./train_val2018/README", b"hello")]
    members += [member(("./" if number % 2 else "") + name, IMAGES[name]) for number, name in enumerate(sorted(IMAGES))]
    return write_tar(path, members, mode)


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "above": lambda root: write_tree(root, IMAGES),
    "the folder": lambda root: write_tree(root, IMAGES) / "train_val2018",
    "tar": lambda root: _archive(root / "train_val2018.tar", "w"),
    "tar.gz": lambda root: _archive(root / "train_val2018.tar.gz", "w:gz"),
    "folder of the tar": lambda root: _archive(root / "train_val2018.tar", "w").parent,
    "folder of the tar.gz": lambda root: _archive(root / "train_val2018.tar.gz", "w:gz").parent,
    "renamed": lambda root: _archive(root / "images.tgz", "w:gz"),
}


def _open(source: Path, lists: Path | None = None) -> OpenDataset:
    return open_dataset("inat18", DatasetOptions(source=source, lists=lists))


def _samples(dataset: OpenDataset) -> dict[str, Samples]:
    return streamed(dataset) if dataset.stream else {split: samples(dataset, split) for split in dataset.splits}


@pytest.mark.parametrize("write_lists", [_write_json, _write_txt])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_form_of_lists_gives_the_same_samples(tmp_path: Path, layout: str, write_lists: Callable[[Path], Path]) -> None:
    dataset = _open(LAYOUTS[layout](tmp_path / "images"), write_lists(tmp_path / "lists"))
    assert dataset.class_names == tuple(NAMES)
    assert _samples(dataset) == EXPECTED
    assert (dataset.stream is not None) == (layout in ("tar.gz", "folder of the tar.gz", "renamed"))
    assert all(split.labels_N.dtype == np.int64 for split in dataset.splits.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_are_looked_for_beside_the_images_too(tmp_path: Path, layout: str) -> None:
    source = LAYOUTS[layout](tmp_path / "images")
    _write_txt(tmp_path / "images")
    assert _samples(_open(source)) == EXPECTED


def test_a_stream_keeps_the_archives_order_starts_anew_and_is_not_read_at_random(tmp_path: Path) -> None:
    dataset = _open(LAYOUTS["tar.gz"](tmp_path / "images"), _write_txt(tmp_path / "lists"))
    assert dataset.stream is not None
    sources = [sample.source for _, _, sample in dataset.stream()]
    assert sources == sorted(sources)
    assert {split for split, _, _ in dataset.stream()} == {"train", "test"}
    assert next(iter(dataset.stream()))[2].source == sources[0]
    with pytest.raises(DatasetError, match=r"train_val2018\.tar\.gz is compressed and can only be read from front to back"):
        dataset.splits["train"].read(0)


def test_json_is_preferred_and_categories_have_the_last_word(tmp_path: Path) -> None:
    images, lists = LAYOUTS["above"](tmp_path / "images"), _write_txt(_write_json(tmp_path / "lists"))
    write_list(lists / "iNaturalist18_train.txt", LISTS["train"][:1])
    (lists / "categories.json").write_text(json.dumps([{"id": 2, "name": "tit"}, {"id": 1, "name": "tit"}]))
    dataset = _open(images, lists)
    assert len(dataset.splits["train"].labels_N) == len(LISTS["train"])
    assert dataset.class_names == ("0", "tit (1)", "tit (2)")
    (lists / "categories.json").unlink()
    assert _open(images, lists).class_names == tuple(NAMES)
    for name in FILE.values():
        (lists / name).unlink()
    assert _open(images, lists).class_names == ("0", "1", "2")


def test_what_differs_from_the_published_set_is_a_complaint(tmp_path: Path) -> None:
    assert _open(LAYOUTS["tar"](tmp_path / "images"), _write_json(tmp_path / "lists")).complaints == (
        "train2018.json lists 10 images, 437,513 expected: 437,503 are missing; is the list cut short?",
        "val2018.json lists 6 images, 24,426 expected: 24,420 are missing; is the list cut short?",
        "the lists of 'inat18' name 3 classes, 8,142 expected",
    )


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], Any]:
    """Replaces one value deep in the annotations of train."""

    def spoil(content: dict[str, Any]) -> Any:
        place: Any = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return content

    return spoil


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {name: value for name, value in content.items() if name != key}


JSON_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda content: [content], "{json} holds no object with images and annotations"),
    "no images": (_without("images"), "{json} has no list 'images'"),
    "no annotations": (_without("annotations"), "{json} has no list 'annotations'"),
    "images by id": (_set("images", value={"0": {}}), "{json} has no list 'images'"),
    "images of text": (_set("images", 1, value="x"), "'images' entry 2 of {json} does not have id (an integer) and file_name (text)"),
    "no file_name": (_set("images", 1, value={"id": 1}), "'images' entry 2 of {json} does not have id (an integer) and file_name (text)"),
    "id in text": (_set("images", 0, "id", value="0"), "'images' entry 1 of {json} does not have id (an integer)"),
    "true as id": (_set("images", 1, "id", value=True), "'images' entry 2 of {json} does not have id (an integer)"),
    "category in text": (
        _set("annotations", 0, "category_id", value="1"),
        "'annotations' entry 1 of {json} does not have image_id (an integer) and category_id (an integer)",
    ),
    "category below": (_set("annotations", 9, "category_id", value=-1), "image 1 of {json} has label -1, but labels run from 0 to 8141"),
    "category above": (
        _set("annotations", 9, "category_id", value=8142),
        "image 1 of {json} has label 8142, but labels run from 0 to 8141",
    ),
    "two annotations": (_set("annotations", 3, "image_id", value=9), "annotation 4 of {json} is the second one of image id 9"),
    "two images of an id": (_set("images", 3, "id", value=2), "image 4 of {json} (id 2) has no annotation of its own"),
    "no annotation": (lambda content: content | {"annotations": content["annotations"][1:]}, "image 10 of {json} (id 9) has no annotation"),
    "unknown image": (
        lambda content: content | {"annotations": [*content["annotations"], {"image_id": 77, "category_id": 0}]},
        "{json} annotates 1 images it does not list, the first is id 77",
    ),
    "empty": (lambda content: {"images": [], "annotations": []}, "{json} lists no images: fetch it again"),
    "upwards": (
        _set("images", 2, "file_name", value="../../etc/passwd"),
        "image 3 of {json} names '../../etc/passwd', which leaves the folder",
    ),
    "absolute": (_set("images", 2, "file_name", value="/etc/passwd"), "image 3 of {json} names '/etc/passwd', which is no path below"),
    "backslash": (_set("images", 2, "file_name", value="a\\b"), "image 3 of {json} names 'a\\b', which is no path below a folder"),
    "NUL": (_set("images", 2, "file_name", value="a\0b"), "image 3 of {json} names 'a\\x00b', which is no path below a folder"),
    "half a letter": (_set("images", 2, "file_name", value="a\ud800b"), "image 3 of {json} names 'a\\ud800b', which no file can be called"),
    "no name": (_set("images", 2, "file_name", value=""), "image 3 of {json} names '', which is no path below a folder"),
    "twice": (
        _set("images", 4, "file_name", value="./" + LISTS["train"][0][0]),
        f"image 5 of {{json}} names {LISTS['train'][0][0]}, as image 1 does: remove one of both",
    ),
    "train in test": (
        _set("images", 0, "file_name", value=LISTS["test"][1][0]),
        f"train and test share 1 of their images, the first is {LISTS['test'][1][0]} (image 1 of {{json}} and image 2 of ",
    ),
    "nameless category": (
        _set("categories", 1, value={"id": 1}),
        "'categories' entry 2 of {json} does not have id (an integer) and name (text)",
    ),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_faults_of_the_annotations_are_named_with_file_and_entry(tmp_path: Path, fault: str) -> None:
    spoil, sentence = JSON_FAULTS[fault]
    images, lists = LAYOUTS["above"](tmp_path / "images"), _write_json(tmp_path / "lists")
    (lists / "train2018.json").write_text(json.dumps(spoil(_annotations("train"))))
    with pytest.raises(DatasetError) as error:
        _open(images, lists)
    assert str(error.value).startswith(sentence.format(json=lists / "train2018.json"))
    assert str(error.value).isprintable()


@pytest.mark.parametrize("content", [b"", b'{"images": [', b"\xff\xfe\xfa", b"[" * 100_000, b'{"images": "\xe9"}'])
def test_what_is_no_json_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    images, lists = LAYOUTS["above"](tmp_path / "images"), _write_json(tmp_path / "lists")
    (lists / "val2018.json").write_bytes(content)
    with pytest.raises(DatasetError, match=r"lists/val2018\.json is not JSON \(.+\): fetch it again"):
        _open(images, lists)
    (lists / "val2018.json").unlink()
    with pytest.raises(DatasetError, match=r"lists holds neither val2018\.json nor iNaturalist18_val\.txt"):
        _open(images, lists)


@pytest.mark.parametrize("layout", ["above", "tar"])
def test_images_missing_from_tree_or_tar_are_counted_at_opening(tmp_path: Path, layout: str) -> None:
    lists = _write_txt(tmp_path / "lists")
    write_list(
        lists / "iNaturalist18_val.txt", [*LISTS["test"], ("train_val2018/Aves/2/none.jpg", 2), ("train_val2018/Reptilia/2/x.jpg", 2)]
    )
    sentence = r" lacks 2 of the 8 images of .*iNaturalist18_val\.txt, the first is train_val2018/Aves/2/none\.jpg \(line 7\)"
    with pytest.raises(DatasetError, match=sentence):
        _open(LAYOUTS[layout](tmp_path / "images"), lists)


def test_images_missing_from_a_stream_are_counted_at_its_end(tmp_path: Path) -> None:
    lists = _write_txt(tmp_path / "lists")
    write_list(lists / "iNaturalist18_val.txt", [*LISTS["test"], ("train_val2018/Aves/2/none.jpg", 2)])
    dataset = _open(LAYOUTS["tar.gz"](tmp_path / "images"), lists)
    assert dataset.stream is not None
    came, error = until_error(dataset.stream())
    assert "without 1 of 17 listed images, the first is train_val2018/Aves/2/none.jpg: fetch it again" in error
    assert len(came) == 16


def test_a_stream_cut_short_gives_what_came_before(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (len(IMAGES), 60_000), np.uint8)
    files = {name: noise[number].tobytes() for number, name in enumerate(IMAGES)}
    archive = write_files_tar(tmp_path / "train_val2018.tar.gz", files, "w:gz")
    os.truncate(archive, archive.stat().st_size // 2)
    dataset = _open(archive, _write_txt(tmp_path / "lists"))
    assert dataset.stream is not None
    came, error = until_error(dataset.stream())
    assert re.search(r"cut short or damaged after \d of 16 images \(.+\): fetch it again; the images already converted stay", error)
    assert all(sample.encoded == files[LISTS[split][index][0]] for split, index, sample in came)
    assert 5 <= len(came) < 8


def test_a_source_that_is_not_there_or_no_archive_is_named(tmp_path: Path) -> None:
    lists = _write_txt(tmp_path / "lists")
    with pytest.raises(
        DatasetError, match=rf"there is no folder or archive {tmp_path}/none\.tar: name the folder of 'inat18' with --source"
    ):
        _open(tmp_path / "none.tar", lists)
    with pytest.raises(DatasetError, match=r"categories\.json is cut short or damaged after byte 0"):
        _open(lists / "categories.json", lists)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DatasetError, match="there is no folder or archive"):
        _open(tmp_path / "loop", lists)


def test_the_published_val_list_opens_with_its_8142_names(tmp_path: Path, shared_data: Path) -> None:
    """The real val list and categories; as train, one image a class."""
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("iNaturalist18_val.txt", "categories.json"):
        (lists / name).write_bytes(lzma.decompress((shared_data / "lists" / f"{name}.xz").read_bytes()))
    lines = (lists / "iNaturalist18_val.txt").read_text().splitlines()
    write_list(lists / "iNaturalist18_train.txt", [(f"train_val2018/Plantae/{label}/t.jpg", label) for label in range(8142)])
    archive = tmp_path / "train_val2018.tar"
    names = [line.split()[0] for line in lines] + [f"train_val2018/Plantae/{label}/t.jpg" for label in range(8142)]
    write_tar(archive, [member(name) for name in names])
    dataset = _open(archive, lists)
    assert dataset.complaints == (
        "iNaturalist18_train.txt lists 8,142 images, 437,513 expected: 429,371 are missing; is the list cut short?",
    )
    assert (len(dataset.class_names), dataset.class_names[0]) == (8142, "Hermodice carunculata")
    assert len(dataset.splits["test"].labels_N) == 24_426
    assert len(dataset.splits["val"].labels_N) == 0
