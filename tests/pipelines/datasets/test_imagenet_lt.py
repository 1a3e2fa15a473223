"""ImageNet-LT: every layout of images and lists gives the same samples, and what is off in the lists is named with its line."""

from __future__ import annotations

import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.datasets import DatasetOptions, class_counts, open_dataset
from pipelines.datasets.lists import class_folders, count_complaints, name_classes, num_classes_of, read_list, require_disjoint
from pipelines.types import SPLITS, DatasetError, OpenDataset
from tests.pipelines.datasets.published import Samples, jpeg, member, samples, write_files_tar, write_list, write_tar, write_tree

WNIDS = ("n0101", "n0202", "n0303")
TRAIN = {f"train/{wnid}/{wnid}_{number}.JPEG": jpeg(10 * label + number) for label, wnid in enumerate(WNIDS) for number in range(6)}
VAL = {
    f"val/{wnid}/ILSVRC2012_val_{label}{number}.JPEG": jpeg(100 + 10 * label + number)
    for label, wnid in enumerate(WNIDS)
    for number in (0, 1)
}
LISTS = {
    "train": [(f"train/{wnid}/{wnid}_{number}.JPEG", label) for label, wnid in enumerate(WNIDS) for number in range(4 - label)],
    "val": [(f"train/{wnid}/{wnid}_5.JPEG", label) for label, wnid in enumerate(WNIDS)],
    "test": [(name, WNIDS.index(name.split("/")[1])) for name in reversed(VAL)],
}
IMAGES = TRAIN | VAL
EXPECTED: dict[str, Samples] = {
    split: [(name.split("/")[-1], label, IMAGES[name]) for name, label in entries] for split, entries in LISTS.items()
}


def _write_lists(folder: Path, spell: Callable[[str], str] = str) -> Path:
    for split, entries in LISTS.items():
        write_list(folder / f"ImageNet_LT_{split}.txt", [(spell(name), label) for name, label in entries])
    return folder


def _flat(name: str) -> str:
    return f"val/{name.split('/')[-1]}" if name.startswith("val/") else name


def _train_tar(root: Path) -> Path:
    tars = []
    for wnid in WNIDS:
        inner = {name.split("/")[2]: content for name, content in TRAIN.items() if f"/{wnid}/" in name}
        tars.append(member(f"{wnid}.tar", write_files_tar(root.parent / "inner.tar", inner).read_bytes()))
    return write_tar(root / "ILSVRC2012_img_train.tar", tars)


def _val_tar(root: Path) -> Path:
    return write_files_tar(root / "ILSVRC2012_img_val.tar", {name.split("/")[2]: content for name, content in VAL.items()})


def _links(root: Path) -> Path:
    """A link farm, as people make them to save space."""
    write_tree(root.parent / "elsewhere", IMAGES)
    for name in IMAGES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(root.parent / "elsewhere" / name)
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "tree": lambda root: write_tree(root, IMAGES),
    "flat val": lambda root: write_tree(root, TRAIN | {_flat(name): content for name, content in VAL.items()}),
    "links": _links,
    "two tars": lambda root: (_train_tar(root), _val_tar(root))[0].parent,
    "the train tar": lambda root: (_val_tar(root), _train_tar(root))[1],
    "the train tar beside val/": lambda root: (write_tree(root, VAL), _train_tar(root))[1],
    "train/ and val tar": lambda root: (write_tree(root, TRAIN), _val_tar(root))[0],
    "train tar and flat val/": lambda root: (write_tree(root, {_flat(name): VAL[name] for name in VAL}), _train_tar(root))[0],
}


def _open(source: Path, lists: Path | None = None) -> OpenDataset:
    return open_dataset("imagenet-lt", DatasetOptions(source=source, lists=lists))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples(tmp_path: Path, layout: str) -> None:
    dataset = _open(LAYOUTS[layout](tmp_path / "images"), _write_lists(tmp_path / "lists"))
    assert dataset.class_names == WNIDS
    assert {split: samples(dataset, split) for split in SPLITS} == EXPECTED
    assert dataset.stream is None


SPELLINGS: dict[str, Callable[[str], str]] = {"./": "./{}".format, ".//": ".//{}".format, "flat val": _flat}


@pytest.mark.parametrize("layout", ["tree", "flat val", "two tars"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_lists_gives_the_same_samples(tmp_path: Path, spelling: str, layout: str) -> None:
    dataset = _open(LAYOUTS[layout](tmp_path / "images"), _write_lists(tmp_path / "lists", SPELLINGS[spelling]))
    assert {split: samples(dataset, split) for split in SPLITS} == EXPECTED
    assert dataset.class_names == WNIDS


def test_windows_line_ends_blank_lines_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    lists = _write_lists(tmp_path / "lists")
    for path in lists.iterdir():
        path.write_bytes(b"\xef\xbb\xbf\r\n" + path.read_bytes().replace(b"\n", b"\r\n\r\n") + b"  \t\r\n")
    dataset = _open(LAYOUTS["tree"](tmp_path / "images"), lists)
    assert {split: samples(dataset, split) for split in SPLITS} == EXPECTED


@pytest.mark.parametrize("layout", ["tree", "the train tar"])
def test_lists_are_looked_for_beside_the_images_too(tmp_path: Path, layout: str) -> None:
    source = LAYOUTS[layout](tmp_path / "images")
    _write_lists(tmp_path / "images")
    assert {split: samples(_open(source), split) for split in SPLITS} == EXPECTED


def test_what_differs_from_the_published_lists_is_a_complaint(tmp_path: Path) -> None:
    lists = _write_lists(tmp_path / "lists")
    write_list(lists / "ImageNet_LT_train.txt", [entry for entry in LISTS["train"] if entry[1] != 1])
    complaints = _open(LAYOUTS["tree"](tmp_path / "images"), lists).complaints
    assert complaints == (
        "ImageNet_LT_train.txt lists 6 images, 115,846 expected: 115,840 are missing; is the list cut short?",
        "ImageNet_LT_val.txt lists 3 images, 20,000 expected: 19,997 are missing; is the list cut short?",
        "ImageNet_LT_test.txt lists 6 images, 50,000 expected: 49,994 are missing; is the list cut short?",
        "the lists of 'imagenet-lt' name 3 classes, 1,000 expected",
        "1 of 3 classes have no image in ImageNet_LT_train.txt, the first is label 1 (n0202)",
    )


def test_labels_out_of_order_and_a_val_of_training_images_are_complaints(tmp_path: Path) -> None:
    lists = _write_lists(tmp_path / "lists")
    for split, entries in LISTS.items():
        write_list(lists / f"ImageNet_LT_{split}.txt", [(name, 2 - label) for name, label in entries])
    write_list(lists / "ImageNet_LT_val.txt", [("train/n0303/n0303_1.JPEG", 0), ("train/n0101/n0101_5.JPEG", 2)])
    dataset = _open(LAYOUTS["two tars"](tmp_path / "images"), lists)
    assert dataset.class_names == WNIDS[::-1]
    assert dataset.complaints[-1] == "labels do not follow the sorted wnids, as those of ImageNet-LT do"
    assert "train and val share 1 of their images, the first is train/n0303/n0303_1.JPEG (line 9 of " in dataset.complaints[-2]
    assert [name for name, _, _ in samples(dataset, "val")] == ["n0303_1.JPEG", "n0101_5.JPEG"]


def _replace(split: str, line: int, text: str) -> Callable[[Path], None]:
    def spoil(lists: Path) -> None:
        path = lists / f"ImageNet_LT_{split}.txt"
        content = path.read_bytes().split(b"\n")
        content[line - 1] = os.fsencode(text)
        path.write_bytes(b"\n".join(content))

    return spoil


def _all(*spoils: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(lists: Path) -> None:
        for each in spoils:
            each(lists)

    return spoil


def _remove_val(lists: Path) -> None:
    (lists / "ImageNet_LT_val.txt").unlink()


LIST_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no label": (_replace("train", 3, "train/n0101/n0101_2.JPEG"), "line 3 of {train} has no label ('train/n0101/n0101_2.JPEG'): write"),
    "label in words": (
        _replace("train", 3, "train/n0101/n0101_2.JPEG cat"),
        "line 3 of {train} has the label 'cat', which is not an integer",
    ),
    "label 1.0": (_replace("val", 2, "train/n0202/n0202_5.JPEG 1.0"), "line 2 of {val} has the label '1.0', which is not an integer"),
    "label 1_0": (_replace("val", 2, "train/n0202/n0202_5.JPEG 1_0"), "line 2 of {val} has the label '1_0', which is not an integer"),
    "huge label": (_replace("val", 2, "train/n0202/n0202_5.JPEG " + "9" * 5000), "line 2 of {val} has the label '9999"),
    "label below": (_replace("test", 1, "val/n0303/a.JPEG -1"), "line 1 of {test} has label -1, but labels run from 0 to 999"),
    "label above": (_replace("test", 1, "val/n0303/a.JPEG 1000"), "line 1 of {test} has label 1000, but labels run from 0 to 999"),
    "not UTF-8": (_replace("train", 4, os.fsdecode(b"train/n0101/caf\xe9.JPEG 0")), "line 4 of {train} is not UTF-8"),
    "upwards": (
        _replace("train", 2, "train/../../etc/passwd 0"),
        "line 2 of {train} names 'train/../../etc/passwd', which leaves the folder",
    ),
    "upwards first": (_replace("train", 2, "../train/a.JPEG 0"), "line 2 of {train} names '../train/a.JPEG', which leaves the folder"),
    "absolute": (_replace("train", 2, "/etc/passwd 0"), "line 2 of {train} names '/etc/passwd', which is no path below a folder"),
    "backslash": (_replace("train", 2, "train\\n0101\\a.JPEG 0"), "line 2 of {train} names 'train\\n0101\\a.JPEG', which is no path below"),
    "NUL": (_replace("train", 2, "train/n0101/a\0.JPEG 0"), "line 2 of {train} names 'train/n0101/a\\x00.JPEG', which is no path below"),
    "twice": (_replace("train", 4, "./train/n0101/n0101_0.JPEG 0"), "line 4 of {train} names train/n0101/n0101_0.JPEG, as line 1 does"),
    "train in test": (
        _replace("test", 1, "train/n0202/n0202_1.JPEG 1"),
        "train and test share 1 of their images, the first is train/n0202/n0202_1.JPEG (line 6 of {train} and line 1 of {test})",
    ),
    "another root": (
        _replace("train", 2, "images/n0101/a.JPEG 0"),
        "line 2 of {train} names images/n0101/a.JPEG, expected train/<wnid>/<file>",
    ),
    "both halves": (_replace("test", 2, "train/n0101/n0101_4.JPEG 0"), "line 2 of {test} names train/n0101/n0101_4.JPEG, expected"),
    "two wnids": (
        _replace("val", 1, "train/n0202/n0202_4.JPEG 0"),
        "line 1 of {val} gives label 0 to n0202, but line 1 of {train} gives it to n0101",
    ),
    "two labels": (
        _all(
            _replace("train", 8, "train/n0202/n0202_3.JPEG 2"),
            _replace("train", 9, "train/n0202/n0202_4.JPEG 2"),
            _replace("val", 3, ""),
            _replace("test", 1, ""),
            _replace("test", 2, ""),
        ),
        "line 5 of {train} and line 8 of {train} give n0202 two labels, 1 and 2",
    ),
    "empty": (_all(_replace("val", 1, ""), _replace("val", 2, ""), _replace("val", 3, " \t")), "{val} lists no images: fetch it again"),
    "missing": (_remove_val, "{lists} holds no ImageNet_LT_val.txt: put it there, or name"),
    "a folder": (
        _all(_remove_val, lambda lists: (lists / "ImageNet_LT_val.txt").mkdir()),
        "cannot read {val} (Is a directory)",
    ),
    "absent image": (
        _replace("train", 2, "train/n0101/none.JPEG 0"),
        "{images}/train lacks 1 of the 9 images of {train}, the first is train/n0101/none.JPEG (line 2): add them",
    ),
}


@pytest.mark.parametrize("fault", LIST_FAULTS)
def test_faults_of_lists_are_named_with_file_and_line(tmp_path: Path, fault: str) -> None:
    spoil, sentence = LIST_FAULTS[fault]
    lists, images = _write_lists(tmp_path / "lists"), write_tree(tmp_path / "images", IMAGES)
    spoil(lists)
    with pytest.raises(DatasetError) as error:
        _open(images, lists)
    names = {split: lists / f"ImageNet_LT_{split}.txt" for split in SPLITS}
    assert str(error.value).startswith(sentence.format(lists=lists, images=images, **names))
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()


def _gone(images: Path) -> None:
    (images / "val/n0202/ILSVRC2012_val_11.JPEG").unlink()


def _dangling(images: Path) -> None:
    _gone(images)
    (images / "val/n0202/ILSVRC2012_val_11.JPEG").symlink_to("nowhere")


def _folder(images: Path) -> None:
    _gone(images)
    (images / "val/n0202/ILSVRC2012_val_11.JPEG").mkdir()


@pytest.mark.parametrize("spoil", [_gone, _dangling, _folder])
def test_images_that_are_not_there_are_counted(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    images, lists = write_tree(tmp_path / "images", IMAGES), _write_lists(tmp_path / "lists")
    spoil(images)
    sentence = r"images/val lacks 1 of the 6 images of .*/ImageNet_LT_test\.txt, the first is val/n0202/ILSVRC2012_val_11\.JPEG \(line 3\)"
    with pytest.raises(DatasetError, match=sentence):
        _open(images, lists)
    for path in (images / "val").rglob("*.JPEG"):
        path.unlink() if path.is_symlink() or path.is_file() else path.rmdir()
    with pytest.raises(DatasetError, match="lacks 6 of the 6 images of"):
        _open(images, lists)


def test_images_missing_from_a_tar_are_counted(tmp_path: Path) -> None:
    source, lists = LAYOUTS["two tars"](tmp_path / "images"), _write_lists(tmp_path / "lists")
    write_list(lists / "ImageNet_LT_val.txt", [("train/n0404/a.JPEG", 3), ("train/n0101/n0101_5.JPEG", 0), ("train/n0404/b.JPEG", 3)])
    with pytest.raises(
        DatasetError, match=r"_train\.tar lacks 2 of the 3 images of .*val\.txt, the first is train/n0404/a\.JPEG \(line 1\)"
    ):
        _open(source, lists)


def test_links_in_a_circle_are_one_sentence(tmp_path: Path) -> None:
    images, lists = write_tree(tmp_path / "images", IMAGES), _write_lists(tmp_path / "lists")
    _gone(images)
    (images / "val/n0202/ILSVRC2012_val_11.JPEG").symlink_to("ILSVRC2012_val_11.JPEG")
    with pytest.raises(DatasetError, match=r"the links at .*/val/n0202/ILSVRC2012_val_11\.JPEG run in a circle: remove or mend them"):
        _open(images, lists)
    (images / "val/n0202/ILSVRC2012_val_11.JPEG").unlink()
    (images / "val/n0202/ILSVRC2012_val_11.JPEG").write_bytes(b"x")
    (images / "train").rename(tmp_path / "train")
    (images / "train").symlink_to("train")
    with pytest.raises(
        DatasetError, match=r"holds neither train/ nor ILSVRC2012_img_train\.tar: name the folder of ImageNet with --source"
    ):
        _open(images, lists)
    (images / "train").unlink()
    (tmp_path / "train").rename(images / "train")
    (images / "train/n0101/again").symlink_to(images)
    (images / "val/again").symlink_to(images)
    assert len(_open(images, lists).splits["train"].labels_N) == 9


def test_a_folder_without_images_or_with_a_damaged_archive_is_named(tmp_path: Path) -> None:
    lists = _write_lists(tmp_path / "lists")
    (tmp_path / "images").mkdir()
    with pytest.raises(DatasetError, match=rf"{tmp_path}/images holds neither train/ nor ILSVRC2012_img_train\.tar"):
        _open(tmp_path / "images", lists)
    train = _train_tar(tmp_path / "images")
    with pytest.raises(DatasetError, match=rf"{tmp_path}/images holds neither val/ nor ILSVRC2012_img_val\.tar"):
        _open(train, lists)
    _val_tar(tmp_path / "images")
    os.truncate(train, train.stat().st_size // 2)
    with pytest.raises(DatasetError, match=r"ILSVRC2012_img_train\.tar is cut short or damaged after byte"):
        _open(tmp_path / "images", lists)


def test_a_folder_of_lists_that_is_not_there_is_named(tmp_path: Path) -> None:
    images = write_tree(tmp_path / "images", IMAGES)
    with pytest.raises(
        DatasetError, match=rf"there is no folder {tmp_path}/none: name the folder of the lists of 'imagenet-lt' with --lists"
    ):
        _open(images, tmp_path / "none")
    with pytest.raises(DatasetError, match=rf"{images} holds no ImageNet_LT_train\.txt: put it there, or name the folder of the lists"):
        _open(images)


def test_the_published_lists_are_complete_and_in_order(tmp_path: Path, shared_data: Path) -> None:
    """All 185,846 entries are parsed; every 50th is opened, over a tree of empty files."""
    lists = {}
    for split, name in (("train", "train.standin"), ("val", "val"), ("test", "test")):
        path = tmp_path / f"ImageNet_LT_{split}.txt"
        path.write_bytes(lzma.decompress((shared_data / f"lists/ImageNet_LT_{name}.txt.xz").read_bytes()))
        lists[split] = read_list(path, 1000)
    wnid_of, disagreement = class_folders(lists.values(), lambda path: path.split("/")[1])
    wnids = name_classes(wnid_of, num_classes_of(lists))
    assert disagreement is None
    assert list(wnids) == sorted(wnid_of.values())
    assert (wnids[0], wnids[999]) == ("n01440764", "n15075141")
    assert require_disjoint(lists) == ()
    assert count_complaints("imagenet-lt", lists, wnids) == ()
    counts_K = class_counts(lists["train"].labels_N, 1000)
    assert (counts_K.sum(), counts_K.max(), counts_K.min()) == (115_846, 1280, 5)

    for split, images in lists.items():
        entries = list(zip(images.paths, images.labels_N.tolist(), strict=True))[::50]
        write_list(tmp_path / f"ImageNet_LT_{split}.txt", entries)
        write_tree(tmp_path, {name: b"" for name, _ in entries})
    dataset = _open(tmp_path)
    assert [len(dataset.splits[split].labels_N) for split in SPLITS] == [2317, 400, 1000]
    assert len(dataset.class_names) == 1000
