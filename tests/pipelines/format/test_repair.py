"""An index is rebuilt from tars that can be vouched for, byte for byte as it was, and from no others."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.format.repair import repair_indexes
from pipelines.format.verify import verify_shards
from pipelines.types import ShardError
from tests.pipelines.format.folders import edit_index, forge_checksums, patch, read_json, write_folder, write_json


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("good") / "shards")


@pytest.fixture
def root(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "shards"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "flipped": lambda path: patch(path, 300, b"\x13"),
    "of another split": lambda path: shutil.copy(path.with_name("test.index.npy"), path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", ["train.index.npy", "train-square-root.index.npy"])
def test_a_damaged_index_comes_back_byte_for_byte(root: Path, file: str, damage: Callable[[Path], object]) -> None:
    before = digests(root)
    damage(root / file)
    repair = repair_indexes(root)
    assert repair.problems == []
    assert [sentence.split(" ")[:2] for sentence in repair.done] == [["rebuilt", str(root / file)]]
    assert digests(root) == before
    assert verify_shards(root) == []


def test_a_good_folder_is_left_alone(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    repair = repair_indexes(root)
    assert (repair.done, repair.problems) == ([], [])
    assert {path: path.stat().st_mtime_ns for path in root.iterdir()} == before


def test_an_index_whose_forged_checksum_fits_is_rebuilt_and_the_manifest_follows(root: Path) -> None:
    before = digests(root)
    edit_index(root, "label", slice(2, 4), [1, 0])
    forge_checksums(root)
    assert verify_shards(root) != []
    repair = repair_indexes(root)
    assert [sentence.split(" ")[0] for sentence in repair.done] == ["rebuilt", "updated"]
    assert "refuse to resume" in repair.done[1]
    assert verify_shards(root) == []
    assert digests(root) == before


def test_wrong_counts_in_the_manifest_are_taken_from_the_tars(root: Path) -> None:
    before = digests(root)
    manifest = read_json(root)
    train = manifest["splits"]["train"]
    train["num_samples"], train["class_counts"], train["shards"][1]["num_samples"] = 17, [9, 5, 3], 4
    write_json(root, manifest)
    assert verify_shards(root) != []
    repair = repair_indexes(root)
    assert len(repair.done) == 1
    assert repair.done[0].startswith(f"updated {root / 'manifest.json'}")
    assert digests(root) == before


def test_tars_that_do_not_match_their_checksums_are_not_believed(root: Path) -> None:
    index = np.load(root / "train.index.npy")
    patch(root / "train-000001.tar", int(index["offset"][5]) + 200, b"!!")
    (root / "train.index.npy").unlink()
    (root / "test.index.npy").unlink()
    repair = repair_indexes(root)
    assert [str(problem).replace(f"{root}/", "") for problem in repair.problems] == [
        "train-000001.tar has not the checksum that the manifest says: it is damaged; copy it again or make the shards again",
        "train.index.npy was not rebuilt, because its tars are not whole",
    ]
    assert not (root / "train.index.npy").exists()
    assert [sentence.split(" ")[1] for sentence in repair.done] == [str(root / "test.index.npy")]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda path: path.unlink(), r"manifest\.json cannot be rebuilt: class names and checksums stood only there"),
        (lambda path: path.write_text("{"), r"manifest\.json is damaged"),
        (
            lambda path: path.write_text('{"format": "bce3s-shards", "version": 1}'),
            r"manifest\.json lacks dataset, .*nothing can be rebuilt",
        ),
    ],
    ids=["missing", "damaged", "incomplete"],
)
def test_without_a_manifest_nothing_can_be_rebuilt(root: Path, change: Callable[[Path], object], sentence: str) -> None:
    change(root / "manifest.json")
    with pytest.raises(ShardError, match=sentence):
        repair_indexes(root)


def test_a_folder_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no shards at .*tools/make_shards\.py"):
        repair_indexes(tmp_path / "absent")
