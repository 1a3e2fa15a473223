"""The place shards go to: full, read-only, taken, unfinished, somebody else's. Nothing is half-written and nothing foreign is removed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.format import open_shards
from tests.tools.conversions import FOLDER, convert, digests, fast_first, must_convert, photo_folder, refusal, remount, small_disk

# A sample a shard: files take whole pages of the disk, far more than the estimate says, so that it fills while shards are written.
SAMPLE_A_SHARD = (*FOLDER, "--out", "disk/out", "--shard-bytes", "2048")
MANY_SHARDS = (*FOLDER, "--out", "out", "--shard-bytes", "16KiB")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return photo_folder(tmp_path / "photos", {"ant": 40, "bee": 20})


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "3m") as folder:
        yield folder


# ---- the disk


def test_full_disk_while_shards_are_written_then_more_room(tmp_path: Path, disk: Path) -> None:
    photo_folder(tmp_path / "photos", {"ant": 200, "bee": 100})
    sentence = refusal(*SAMPLE_A_SHARD, cwd=tmp_path)
    assert "cannot write shards to disk/out: No space left on device" in sentence
    assert "--resume" in sentence
    assert [path.name for path in disk.iterdir()] == ["out.partial"]
    remount(disk, "size=20m")
    must_convert(*SAMPLE_A_SHARD, "--resume", cwd=tmp_path)
    assert [path.name for path in disk.iterdir()] == ["out"]
    must_convert(*FOLDER, "--out", "undisturbed", "--shard-bytes", "2048", cwd=tmp_path)
    assert digests(disk / "out") == digests(tmp_path / "undisturbed")


@pytest.mark.slow  # FFCV takes five seconds to import
def test_full_disk_while_a_beton_is_written_then_more_room(tmp_path: Path, photos: Path, disk: Path) -> None:
    pytest.importorskip("ffcv", reason="betons need FFCV")
    arguments = (*FOLDER, "--out", "disk/out", "--format", "wds,ffcv")  # a beton takes 8 MiB at least, which the estimate does not know
    sentence = refusal(*arguments, cwd=tmp_path)
    assert "train.beton" in sentence
    assert "make room" in sentence
    assert [path.name for path in disk.iterdir()] == ["out.partial"]
    assert not list((disk / "out.partial").glob("*.beton*"))
    remount(disk, "size=80m")
    must_convert(*arguments, "--resume", cwd=tmp_path)
    assert [path.name for path in disk.iterdir()] == ["out"]
    must_convert(*FOLDER, "--out", "undisturbed", "--format", "wds,ffcv", cwd=tmp_path)
    assert digests(disk / "out") == digests(tmp_path / "undisturbed")


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, disk: Path) -> None:
    photo_folder(tmp_path / "photos", {"ant": 20, "bee": 20}, size=400)
    sentence = refusal(*FOLDER, "--out", "disk/out", cwd=tmp_path)
    assert "the shards need about 0.00" in sentence
    assert "disk/out has 0.00" in sentence
    assert "--min-side" in sentence
    assert list(disk.iterdir()) == []
    must_convert(*FOLDER, "--out", "disk/out", "--min-side", "32", cwd=tmp_path)


def test_read_only_disk(tmp_path: Path, photos: Path, disk: Path) -> None:
    remount(disk, "ro")
    assert "cannot write shards to disk/out: Read-only file system" in refusal(*FOLDER, "--out", "disk/out", cwd=tmp_path)
    assert "Read-only file system" in refusal(*FOLDER, "--out", "disk/deep/er/out", cwd=tmp_path)
    assert list(disk.iterdir()) == []


# ---- what stands there already


@pytest.mark.parametrize(
    ("out", "sentence"),
    [("file", "file is not a shard folder"), ("file/out", "cannot write shards to file/out"), ("photos", "in one another")],
)
def test_output_that_cannot_be(tmp_path: Path, photos: Path, out: str, sentence: str) -> None:
    (tmp_path / "file").write_text("mine")
    for option in ((), ("--overwrite",)):
        assert sentence in refusal(*FOLDER, "--out", out, *option, cwd=tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photos"]


@pytest.mark.parametrize(
    "pair", fast_first(("photos photos/shards", "all/photos all", "photos link/shards", "link photos/x", "photos file://{here}/photos"), 3)
)
def test_source_and_output_lie_apart(tmp_path: Path, photos: Path, pair: str) -> None:
    source, out = pair.split()
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "photos").symlink_to(photos)
    (tmp_path / "link").symlink_to(photos)
    if source == "all/photos":
        (tmp_path / "all" / "photos").unlink()
        photo_folder(tmp_path / "all" / "photos", {"ant": 12, "bee": 12})
    before = digests(tmp_path)
    arguments = ("--dataset", "folder", "--source", source, "--out", out.format(here=tmp_path), "--overwrite")
    assert "lie in one another; choose another --out" in refusal(*arguments, cwd=tmp_path)
    assert digests(tmp_path) == before


def test_existing_shards_are_refused_kept_or_replaced(tmp_path: Path, photos: Path) -> None:
    must_convert(*MANY_SHARDS, cwd=tmp_path)
    before = digests(tmp_path / "out")
    assert "out exists already; add --overwrite to replace it or choose another --out" in refusal(*MANY_SHARDS, cwd=tmp_path)
    must_convert(*MANY_SHARDS, "--resume", cwd=tmp_path)  # there is nothing left to do
    assert digests(tmp_path / "out") == before
    must_convert(*MANY_SHARDS, "--seed", "1", "--overwrite", cwd=tmp_path)
    assert digests(tmp_path / "out") != before
    assert open_shards(tmp_path / "out").manifest["options"]["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_failing_overwrite_leaves_the_old_shards(tmp_path: Path, photos: Path) -> None:
    must_convert(*MANY_SHARDS, cwd=tmp_path)
    before = digests(tmp_path / "out")
    (photos / "bee" / "7.jpg").write_bytes(b"not an image")
    assert "bee/7.jpg is not a readable image" in refusal(*MANY_SHARDS, "--overwrite", cwd=tmp_path)
    assert digests(tmp_path / "out") == before


def unfinished(folder: Path) -> None:
    """Leaves a conversion that stopped at a broken image after some shards."""
    photo = sorted((folder / "photos" / "ant").iterdir())[3]
    whole = photo.read_bytes()
    photo.write_bytes(whole[:100])
    refusal(*MANY_SHARDS, "--processes", "1", cwd=folder)
    photo.write_bytes(whole)
    assert list(folder.glob("out.partial/units/*.json"))


def test_unfinished_output_is_refused_resumed_or_started_over(tmp_path: Path, photos: Path) -> None:
    unfinished(tmp_path)
    sentence = refusal(*MANY_SHARDS, cwd=tmp_path)
    assert "an unfinished conversion lies at" in sentence
    assert "--resume continues it, --overwrite starts over" in sentence
    sentence = refusal(*MANY_SHARDS, "--resume", "--seed", "1", cwd=tmp_path)
    assert "was started with other settings" in sentence
    assert "seed" in sentence
    must_convert(*MANY_SHARDS, "--resume", cwd=tmp_path)
    first = digests(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "aside")
    unfinished(tmp_path)
    must_convert(*MANY_SHARDS, "--overwrite", cwd=tmp_path)
    assert digests(tmp_path / "out") == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside", "out", "photos"]


@pytest.mark.parametrize("damage", ["", pytest.param('{"dataset": "folder"}', marks=pytest.mark.slow)])
def test_damaged_plan(tmp_path: Path, photos: Path, damage: str) -> None:
    unfinished(tmp_path)
    (tmp_path / "out.partial" / "plan.json").write_text(damage)
    assert "plan.json is damaged or of another version" in refusal(*MANY_SHARDS, "--resume", cwd=tmp_path)
    must_convert(*MANY_SHARDS, "--overwrite", cwd=tmp_path)


def test_damaged_records_and_tars_are_made_again(tmp_path: Path, photos: Path) -> None:
    unfinished(tmp_path)
    record = min(tmp_path.glob("out.partial/units/*.json"))
    tar = tmp_path / "out.partial" / json.loads(record.read_bytes())["file"]
    tar.write_bytes(tar.read_bytes()[:-1])
    must_convert(*MANY_SHARDS, "--resume", cwd=tmp_path)
    first = digests(tmp_path / "out")
    must_convert(*MANY_SHARDS, "--overwrite", cwd=tmp_path)
    assert digests(tmp_path / "out") == first


@pytest.mark.parametrize("name", ["out", "out.partial", "out.retired"])
@pytest.mark.parametrize("option", [("--overwrite",), *(pytest.param(each, marks=pytest.mark.slow) for each in ((), ("--resume",)))])
def test_a_foreign_folder_is_never_removed(tmp_path: Path, photos: Path, name: str, option: tuple[str, ...]) -> None:
    photo_folder(tmp_path / name, {"holiday": 2})
    before = digests(tmp_path / name)
    found = convert(*MANY_SHARDS, *option, cwd=tmp_path)
    assert "Traceback" not in found.stderr
    assert digests(tmp_path / name) == before
