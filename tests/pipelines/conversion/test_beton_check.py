"""What is checked of a beton against its tars: whatever is changed in it is found, and named by its id."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.conversion import beton
from pipelines.conversion.beton import check_beton, write_beton
from pipelines.format import ShardSplit

MakeShards = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _ffcv() -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed; 'make env' names the line that installs what it needs")


@pytest.fixture
def split(make_shards: MakeShards) -> ShardSplit:
    split: ShardSplit = make_shards(train=(12, 8, 5), size=None, extension="jpg", name="folder").split("train")
    return split


@pytest.fixture
def path(split: ShardSplit, tmp_path: Path) -> Path:
    write_beton(split, tmp_path / "train.beton")
    return tmp_path / "train.beton"


def records(path: Path, split: ShardSplit) -> np.ndarray:
    """The samples' records, to be damaged in the file."""
    start = beton.HEADER_DTYPE.itemsize + 2 * beton.FIELD_DTYPE.itemsize
    return np.memmap(path, beton.SAMPLE_DTYPE, "r+", start, (len(split),))


def test_a_good_beton_has_no_fault_and_is_counted(path: Path, split: ShardSplit) -> None:
    steps: list[int] = []
    assert list(check_beton(path, split, on_samples=steps.append)) == []
    assert sum(steps) == len(split)


def test_a_flipped_byte_is_named(path: Path, split: ShardSplit) -> None:
    content = np.memmap(path, np.uint8, "r+")
    content[int(records(path, split)["image"]["start"][17]) + 300] ^= 1
    assert list(check_beton(path, split)) == [f"{path}, sample 00000017: its image differs from that of the tar"]


def test_a_flipped_pixel_of_a_png_is_named(make_shards: MakeShards, tmp_path: Path) -> None:
    split = make_shards().split("train")
    write_beton(split, tmp_path / "x.beton")
    content = np.memmap(tmp_path / "x.beton", np.uint8, "r+")
    content[int(records(tmp_path / "x.beton", split)["image"]["start"][3]) + 32 * 32 * 3 - 1] ^= 1
    assert list(check_beton(tmp_path / "x.beton", split)) == [
        f"{tmp_path / 'x.beton'}, sample 00000003: its image differs from that of the tar"
    ]


def test_two_swapped_samples_are_both_named(path: Path, split: ShardSplit) -> None:
    samples = records(path, split)
    samples[[4, 9]] = samples[[9, 4]]
    faults = list(check_beton(path, split))
    assert {fault.partition(": ")[0] for fault in faults} == {f"{path}, sample 00000004", f"{path}, sample 00000009"}
    assert any("its start is" in fault for fault in faults)


def test_a_changed_label_is_named(path: Path, split: ShardSplit) -> None:
    records(path, split)["label"][5] = 77
    assert list(check_beton(path, split)) == [f"{path}, sample 00000005: its label is 77 instead of {split.labels_N[5]}"]


def test_a_table_entry_that_points_elsewhere_is_named(path: Path, split: ShardSplit) -> None:
    np.memmap(path, beton.TABLE_DTYPE, "r+", path.stat().st_size - 24 * len(split))["size"][8] -= 1
    (fault,) = check_beton(path, split)
    assert fault.startswith(f"{path}, sample 00000008: its table entry is (8, ")


def test_a_truncated_or_absent_or_foreign_file_is_one_fault(path: Path, split: ShardSplit) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-24])
    assert list(check_beton(path, split)) == [f"{path} has {len(whole) - 24} bytes instead of {len(whole)}"]
    path.write_bytes(b"\7" + whole[1:])
    assert list(check_beton(path, split)) == [f"{path} has a header that does not fit its tars"]
    path.write_bytes(b"")
    assert "cannot read" in next(check_beton(path, split))
    path.unlink()
    assert list(check_beton(path, split)) == [f"cannot read {path}: No such file or directory"]
    os.mkfifo(path)
    assert list(check_beton(path, split)) == [f"cannot read {path}: it is not a regular file"]


def test_the_beton_of_other_tars_does_not_fit(path: Path, make_shards: MakeShards) -> None:
    other = make_shards(train=(9, 8, 8), size=None, extension="jpg", name="folder").split("train")
    assert list(check_beton(path, other))


def test_it_needs_no_ffcv(path: Path, split: ShardSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "ffcv"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert list(check_beton(path, split)) == []
