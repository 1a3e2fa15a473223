"""Sources with faults, as a user meets them: one sentence that names the place and nothing written, or what is broken left out by name."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.format import open_shards
from tests.pipelines.datasets.published import jpeg, member, write_files_tar, write_list, write_tar, write_tree
from tests.tools.conversions import ALL_TRAIN, FOLDER, TOOL, convert, fast_first, must_convert, photo_folder, refusal, tool_environment

IMAGENET = {
    f"{half}/n0{wnid}/{half}_{wnid}{number}.JPEG": jpeg(10 * wnid + number)
    for half in ("train", "val")
    for wnid in range(3)
    for number in range(4)
}
INAT = {f"train_val2018/Aves/{category}/{number}.jpg": jpeg(10 * category + number) for category in range(3) for number in range(4)}


def nothing_written(folder: Path) -> bool:
    """No shards, and nothing that an unfinished conversion leaves once it has written a shard."""
    return not [path.name for path in folder.glob("out*")]


# ---- images


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that says it has width·height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


BROKEN = {
    "zero.jpg": b"",
    "cut.jpg": jpeg(3)[:200],
    "bomb.png": bomb(60_000, 60_000),
    "noise.jpg": np.random.default_rng(0).bytes(2000),
    "text.png": b"<html>404 not found</html>",
    "wide.png": bomb(70_000, 2),
    "cut.png": saved(Image.new("RGB", (40, 40), "red"), "PNG")[:60],
    "header.jpg": jpeg(3)[:2],
}
ODD = {
    "png.JPEG": saved(Image.new("RGB", (9, 7), "red"), "PNG"),
    "jpeg.png": jpeg(1),
    "cmyk.jpg": saved(Image.new("CMYK", (9, 7), (10, 20, 30, 40)), "JPEG"),
    "sixteen.png": saved(Image.fromarray(np.full((7, 9), 40_000, np.uint16)), "PNG"),
    "animated.gif": saved(Image.new("P", (9, 7)), "GIF", save_all=True, append_images=[Image.new("P", (9, 7), 5)], loop=0),
    "grey.png": saved(Image.new("L", (9, 7), 70), "PNG"),
    "alpha.png": saved(Image.new("RGBA", (9, 7), (1, 2, 3, 4)), "PNG"),
    "web.webp": saved(Image.new("RGB", (9, 7), "blue"), "WEBP"),
    "UPPER.JPG": jpeg(2),
}


@pytest.mark.parametrize("name", fast_first(BROKEN, 3))
def test_a_broken_image_stops_the_conversion_by_name(tmp_path: Path, name: str) -> None:
    photo_folder(tmp_path / "photos", {"ant": 3, "bee": 3}, size=8)
    (tmp_path / "photos" / "bee" / name).write_bytes(BROKEN[name])
    sentence = refusal(*ALL_TRAIN, "--out", "out", cwd=tmp_path)
    assert f"photos/bee/{name} is not a readable image" in sentence
    assert "--on-error skip" in sentence
    assert nothing_written(tmp_path)


def test_broken_images_are_skipped_and_odd_ones_converted(tmp_path: Path) -> None:
    photo_folder(tmp_path / "photos", {"ant": 3}, size=8)
    write_tree(tmp_path / "photos" / "bee", BROKEN | ODD)
    arguments = (*ALL_TRAIN, "--on-error", "skip")
    report = must_convert(*arguments, "--out", "out", cwd=tmp_path)
    shards = open_shards(tmp_path / "out")
    assert shards.class_counts("train").tolist() == [3, len(ODD)]
    assert shards.manifest["num_skipped"] == len(BROKEN)
    assert f"{len(BROKEN)} images skipped because they do not decode" in report
    for name in BROKEN:
        assert f"skipped: photos/bee/{name} is not a readable image" in report
        assert sum(f"photos/bee/{name} is not" in sentence for sentence in shards.manifest["skipped"]) == 1
    plain = {"png.JPEG", "jpeg.png", "grey.png", "UPPER.JPG"}
    assert shards.manifest["num_reencoded"] == len(ODD) - len(plain)
    must_convert(*arguments, "--no-validate", "--out", "believed", cwd=tmp_path)
    assert open_shards(tmp_path / "believed").class_counts("train").tolist() == [3, len(ODD)]


def test_nothing_but_broken_images(tmp_path: Path) -> None:
    write_tree(tmp_path / "photos", {f"{name}/{number}.jpg": b"broken" for name in ("ant", "bee") for number in range(10)})
    sentence = refusal(*FOLDER, "--out", "out", "--on-error", "skip", cwd=tmp_path)
    assert "has no readable training image" in sentence
    assert nothing_written(tmp_path)


def test_a_class_of_broken_images_stays_a_class(tmp_path: Path) -> None:
    photo_folder(tmp_path / "photos", {"ant": 12}, size=8)
    write_tree(tmp_path / "photos" / "bee", {f"{number}.jpg": b"broken" for number in range(10)})
    report = must_convert(*FOLDER, "--out", "out", "--on-error", "skip", cwd=tmp_path)
    assert "10 images skipped" in report
    shards = open_shards(tmp_path / "out")
    assert shards.class_names == ("ant", "bee")
    assert shards.class_counts("train")[1] == 0


# ---- files and their names


LOCALES = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LANG": "C", "LC_ALL": "C"},
    "as it is": {},
    "latin": {"PYTHONIOENCODING": "latin-1"},
}


@pytest.mark.parametrize("locale", fast_first(LOCALES, 2))
def test_names_that_are_not_utf_8(tmp_path: Path, locale: str) -> None:
    photo_folder(tmp_path / "photos", {"ant": 12, "Bär [bold]": 3}, size=8)
    for name, content in ((b"\xff.jpg", jpeg(1)), (b"\xfe\n[red].jpg", b"broken"), ("ü日本.jpg".encode(), b"")):
        with open(os.fsencode(tmp_path / "photos" / "ant") + b"/" + name, "wb") as file:
            file.write(content)
    report = must_convert(*FOLDER, "--out", "öut", "--on-error", "skip", cwd=tmp_path, variables=LOCALES[locale])
    assert r"photos/ant/\udcfe\n[red].jpg is not a readable image" in report
    assert "2 images skipped" in report
    assert sum(open_shards(tmp_path / "öut").num_samples(split) for split in ("train", "val", "test")) == 16


def test_a_source_whose_own_name_is_not_utf_8(tmp_path: Path) -> None:
    photo_folder(tmp_path / "photos", {"ant": 12, "bee": 12}, size=8)
    name = os.fsdecode(b"photos-\xff")
    (tmp_path / "photos").rename(tmp_path / name)
    out = os.fsdecode(b"out-\xff")
    must_convert("--dataset", "folder", "--source", name, "--out", out, cwd=tmp_path)
    assert open_shards(tmp_path / out).num_samples("train") == 20


@pytest.mark.parametrize("kind", ["dangling link", "circle of links", "folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    photo_folder(tmp_path / "photos", {"ant": 12, "bee": 12}, size=8)
    strange = tmp_path / "photos" / "bee" / "x.jpg"
    if kind == "folder":
        strange.mkdir()  # nobody's image: passed over, as every folder is
        must_convert(*FOLDER, "--out", "out", cwd=tmp_path)
        return
    strange.symlink_to("x.jpg" if kind == "circle of links" else "gone")
    assert "photos/bee" in refusal(*ALL_TRAIN, "--out", "out", cwd=tmp_path)
    assert nothing_written(tmp_path)
    if kind == "dangling link":
        assert "photos/bee/x.jpg" in must_convert(*ALL_TRAIN, "--out", "out", "--on-error", "skip", cwd=tmp_path)
        assert open_shards(tmp_path / "out").manifest["num_skipped"] == 1


def test_an_unreadable_file_and_folder_are_named(tmp_path: Path) -> None:
    photo_folder(tmp_path / "photos", {"ant": 12, "bee": 12}, size=8)
    # Root reads everything, unless it is held to the permissions.
    held = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    if held and shutil.which(held[0]) is None:
        pytest.skip("running as root, and there is no setpriv")

    def said() -> str:
        command = [*held, sys.executable, TOOL, *FOLDER, "--out", "out"]
        found = subprocess.run(command, cwd=tmp_path, env=tool_environment(), capture_output=True, text=True, check=False)
        assert found.returncode == 2, found.stderr
        assert found.stderr.count("\n") == 1
        return found.stderr

    (tmp_path / "photos" / "bee" / "3.jpg").chmod(0)
    assert "cannot read photos/bee/3.jpg (Permission denied)" in said()
    (tmp_path / "photos" / "ant").chmod(0)
    assert "cannot list photos/ant (Permission denied)" in said()
    (tmp_path / "photos" / "ant").chmod(0o755)
    (tmp_path / "photos" / "bee" / "3.jpg").chmod(0o644)
    tmp_path.chmod(0o555)
    assert "cannot write shards to out: Permission denied" in said()
    tmp_path.chmod(0o755)


# ---- lists and archives


def imagenet(folder: Path) -> Path:
    """A small ImageNet with its lists, whole."""
    write_tree(folder / "images", IMAGENET)
    labels = {name: int(name.split("/")[1][2:]) for name in IMAGENET}
    entries = {half: [(name, labels[name]) for name in IMAGENET if name.startswith(half)] for half in ("train", "val")}
    write_list(folder / "lists" / "ImageNet_LT_train.txt", [entry for entry in entries["train"] if not entry[0].endswith("3.JPEG")])
    write_list(folder / "lists" / "ImageNet_LT_val.txt", [entry for entry in entries["train"] if entry[0].endswith("3.JPEG")])
    write_list(folder / "lists" / "ImageNet_LT_test.txt", entries["val"])
    return folder / "lists" / "ImageNet_LT_train.txt"


def add_line(line: str) -> Callable[[Path], None]:
    def add(list_file: Path) -> None:
        with list_file.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(line + "\n")

    return add


def circle(list_file: Path) -> None:
    (list_file.parent.parent / "images" / "train" / "n00" / "loop.JPEG").symlink_to("loop.JPEG")
    add_line("train/n00/loop.JPEG 0")(list_file)


LIST_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "circle of links": (circle, "loop.JPEG run in a circle"),
    "upwards": (add_line("train/../../secret.JPEG 0"), "which leaves the folder of the images"),
    "missing file": (add_line("train/n00/gone.JPEG 0"), "images/train lacks 1 of the 10 images"),
    "label out of range": (add_line("train/n00/x.JPEG 1000"), "line 10 of lists/ImageNet_LT_train.txt has label 1000"),
    "negative label": (add_line("train/n00/x.JPEG -1"), "line 10 of lists/ImageNet_LT_train.txt has label -1"),
    "word for a label": (add_line("train/n00/x.JPEG dog"), "line 10 of lists/ImageNet_LT_train.txt has the label 'dog'"),
    "no label": (add_line("train/n00/x.JPEG"), "line 10 of lists/ImageNet_LT_train.txt has no label"),
    "duplicate": (add_line("train/n00/train_00.JPEG 0"), "line 10 of lists/ImageNet_LT_train.txt names train/n00/train_00.JPEG, as line 1"),
    "absolute": (add_line("/etc/passwd 0"), "line 10 of lists/ImageNet_LT_train.txt names '/etc/passwd'"),
    "not UTF-8": (add_line("train/n00/\udcff.JPEG 0"), "line 10 of lists/ImageNet_LT_train.txt is not UTF-8"),
    "empty": (lambda file: file.write_text("") and None, "lists/ImageNet_LT_train.txt lists no images"),
    "gone": (lambda file: file.unlink(), "lists holds no ImageNet_LT_train.txt"),
}


@pytest.mark.parametrize("fault", fast_first(LIST_FAULTS, 4))
def test_fault_in_a_list(tmp_path: Path, fault: str) -> None:
    spoil, sentence = LIST_FAULTS[fault]
    spoil(imagenet(tmp_path))
    found = refusal("--dataset", "imagenet-lt", "--source", "images", "--lists", "lists", "--out", "out", cwd=tmp_path)
    assert sentence in found
    assert nothing_written(tmp_path)


def annotations(images: dict[str, int]) -> bytes:
    """What train2018.json holds; ids count from 1."""
    numbered = list(enumerate(images.items(), 1))
    listed = [{"id": number, "file_name": name} for number, (name, _) in numbered]
    labelled = [{"image_id": number, "category_id": label} for number, (_, label) in numbered]
    return json.dumps({"images": listed, "annotations": labelled}).encode()


def inat(folder: Path, **more: int) -> None:
    labels = {name: int(name.split("/")[2]) for name in INAT}
    train = {name: label for name, label in labels.items() if not name.endswith("3.jpg")} | more
    val = {name: label for name, label in labels.items() if name.endswith("3.jpg")}
    write_tree(folder / "lists", {"train2018.json": annotations(train), "val2018.json": annotations(val)})


INAT_ARGUMENTS = ("--dataset", "inat18", "--source", "images.tar", "--lists", "lists", "--out", "out")


@pytest.mark.parametrize(
    ("name", "label", "sentence"),
    [
        ("train_val2018/gone.jpg", 0, "images.tar lacks 1 of the 10 images"),
        ("train_val2018/../../x.jpg", 0, "image 10 of lists/train2018.json names 'train_val2018/../../x.jpg'"),
        ("/x.jpg", 0, "image 10 of lists/train2018.json names '/x.jpg'"),
        ("train_val2018/x.jpg", 8142, "image 10 of lists/train2018.json has label 8142"),
    ],
)
def test_fault_in_annotations(tmp_path: Path, name: str, label: int, sentence: str) -> None:
    write_files_tar(tmp_path / "images.tar", INAT)
    inat(tmp_path, **{name: label})
    assert sentence in refusal(*INAT_ARGUMENTS, cwd=tmp_path)
    assert nothing_written(tmp_path)


def test_json_that_is_none(tmp_path: Path) -> None:
    write_files_tar(tmp_path / "images.tar", INAT)
    inat(tmp_path)
    file = tmp_path / "lists" / "train2018.json"
    for content in (b"", file.read_bytes()[:-40], b"[" * 100_000):
        file.write_bytes(content)
        assert "lists/train2018.json" in refusal(*INAT_ARGUMENTS, cwd=tmp_path)
    assert nothing_written(tmp_path)


def test_archives_that_are_cut_short_or_lead_astray(tmp_path: Path) -> None:
    inat(tmp_path)
    whole = write_files_tar(tmp_path / "whole.tar", INAT).read_bytes()
    first = next(iter(INAT))
    archive = tmp_path / "images.tar"
    for length in (len(whole) // 3 + 17, 0):
        archive.write_bytes(whole[:length])
        assert "images.tar" in refusal(*INAT_ARGUMENTS, cwd=tmp_path)
    links = {"a link": member(first, kind=tarfile.SYMTYPE, link="/etc/passwd"), "upwards": member(f"x/../{first}", jpeg(0))}
    for header, content in links.values():
        write_tar(archive, [(header, content), *(member(*item) for item in list(INAT.items())[1:])])
        assert "fetch the original archive" in refusal(*INAT_ARGUMENTS, cwd=tmp_path)
    packed = gzip.compress(whole)
    for length in (len(packed) // 2, len(packed) - 4):
        archive.write_bytes(packed[:length])
        assert "images.tar is cut short or damaged" in refusal(*INAT_ARGUMENTS, cwd=tmp_path)
        assert not (tmp_path / "out").exists()
    archive.write_bytes(packed)
    must_convert(*INAT_ARGUMENTS, "--resume", cwd=tmp_path)
    assert open_shards(tmp_path / "out").class_counts("train").tolist() == [3, 3, 3]


def test_places_with_an_image_missing(tmp_path: Path) -> None:
    names = [f"data_256/a/abbey/{number}.jpg" for number in range(4)]
    write_tree(tmp_path / "places", {name: jpeg(number) for number, name in enumerate(names)})
    for split, number in (("train", 0), ("val", 1), ("test", 2)):
        write_list(tmp_path / "places" / f"Places_LT_{split}.txt", [(names[number], 0)])
    arguments = ("--dataset", "places-lt", "--source", "places", "--out", "out")
    (tmp_path / "places" / names[1]).unlink()
    assert "lacks 1 of the 1 images of places/Places_LT_val.txt" in refusal(*arguments, cwd=tmp_path)
    assert nothing_written(tmp_path)
    (tmp_path / "places" / names[1]).write_bytes(jpeg(1))
    must_convert(*arguments, cwd=tmp_path)


@pytest.mark.slow  # the datasets library takes seconds to import
def test_hugging_face_folder_that_is_broken(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="data set 'hf' needs datasets")
    (tmp_path / "hub").mkdir()
    variables = {"HF_HOME": str(tmp_path / "cache")}
    arguments = ("--dataset", "hf", "--source", "hub", "--out", "out")
    assert "cannot open hub" in refusal(*arguments, cwd=tmp_path, variables=variables)
    (tmp_path / "hub" / "train.parquet").write_bytes(b"PAR1 and no more")
    found = convert(*arguments, cwd=tmp_path, variables=variables)  # the library logs a line of its own
    assert (found.returncode, "Traceback" in found.stderr) == (2, False)
    assert found.stderr.splitlines()[-1].startswith("error: the datasets library cannot open hub (Parquet magic bytes not found")
    assert nothing_written(tmp_path)
    (tmp_path / "hub" / "train.parquet").unlink()
    photo_folder(tmp_path / "hub", {"ant": 12, "bee": 12}, size=8)
    must_convert(*arguments, cwd=tmp_path, variables=variables)
    (tmp_path / "hub" / "bee" / "3.jpg").write_bytes(b"broken")
    assert "is not a readable image" in refusal(*arguments, "--overwrite", cwd=tmp_path, variables=variables)
    assert open_shards(tmp_path / "out").num_samples("train") == 20
