"""A conversion divided into parts, in any order and at once, gives the folder of a single run."""

from __future__ import annotations

import os
import re
import signal
from itertools import permutations
from pathlib import Path

import pytest

from pipelines.conversion import Resampling, WriteOptions, merge_parts
from pipelines.conversion.site import Site
from pipelines.types import ConfigError, DatasetError, ShardError
from tests.pipelines.conversion.sources import (
    COUNTS,
    Progress,
    convert,
    dies_at,
    digests,
    ended,
    identities,
    in_child,
    must_die,
    photo_folder,
    source_file,
)

EXTRAS = {"resamplings": (Resampling(sampling="class-balanced", epoch_size=60), Resampling(sampling="square-root", materialised=True))}
TRAIN = sum(COUNTS["train"].values())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def single(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("single") / "out"
    convert(photos, out, **EXTRAS)
    return digests(out)


@pytest.mark.parametrize("order", list(permutations((1, 2, 3)))[1::2], ids=str)
def test_in_any_order(photos: Path, single: dict[str, str], tmp_path: Path, order: tuple[int, ...]) -> None:
    totals = []
    for number in order:
        progress = Progress()
        assert convert(photos, tmp_path / "out", progress, part=(number, 3), **EXTRAS) is None
        progress.assert_sound()
        totals.append(progress.seen["shards"][-1][1])
        assert not (tmp_path / "out").exists()
    assert sum(totals) == sum(sum(classes.values()) for classes in COUNTS.values())
    report = merge_parts(tmp_path / "out")
    assert digests(tmp_path / "out") == single
    assert report.class_counts["train"].tolist() == list(COUNTS["train"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("processes", [1, 2])
def test_at_the_same_time(photos: Path, single: dict[str, str], tmp_path: Path, processes: int) -> None:
    numbers = (1, 2, 3)
    parts = [in_child(lambda n=n: convert(photos, tmp_path / "out", part=(n, 3), processes=processes, **EXTRAS)) for n in numbers]  # type: ignore[misc]
    assert [ended(part) for part in parts] == [0, 0, 0]
    merge_parts(tmp_path / "out")
    assert digests(tmp_path / "out") == single
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_part_is_counted(photos: Path, single: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in (1, 3):
        convert(photos, out, part=(number, 3), **EXTRAS)
    units = len([name for name in single if re.fullmatch(r"(train|val|test)-\d+\.tar", name)])
    missing = len(range(1, units, 3))
    before = digests(tmp_path)
    with pytest.raises(ShardError, match=rf"{missing} of {units} shards are not at .*out\.partial yet \(train-000001 is the first\)"):
        merge_parts(out)
    assert digests(tmp_path) == before
    convert(photos, out, part=(2, 3), **EXTRAS)
    merge_parts(out)
    assert digests(out) == single


def test_a_part_again_makes_nothing_anew(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path / "out", part=(1, 2))
    made = identities(tmp_path / "out.partial", "*/*.json") | identities(tmp_path / "out.partial")
    assert len(made) >= 6
    assert convert(photos, tmp_path / "out", part=(1, 2)) is None
    assert identities(tmp_path / "out.partial", "*/*.json") | identities(tmp_path / "out.partial") == made


def test_after_the_merge_there_is_nothing_left_to_do(photos: Path, single: dict[str, str], tmp_path: Path) -> None:
    for number in (1, 2):
        convert(photos, tmp_path / "out", part=(number, 2), **EXTRAS)
    report = merge_parts(tmp_path / "out")
    made = identities(tmp_path / "out")
    for again in (merge_parts(tmp_path / "out"), convert(photos, tmp_path / "out", part=(2, 2), **EXTRAS)):
        assert again is not None
        assert {split: counts.tolist() for split, counts in again.class_counts.items()} == {
            split: counts.tolist() for split, counts in report.class_counts.items()
        }
    with pytest.raises(ShardError, match=r"is complete, but was made with other settings \(the resampled streams differ\)"):
        convert(photos, tmp_path / "out", part=(2, 2))
    assert identities(tmp_path / "out") == made
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parts_of_different_conversions_do_not_mix(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path / "out", part=(1, 2))
    with pytest.raises(ShardError, match="started with other settings"):
        convert(photos, tmp_path / "out", part=(2, 2), seed=1)
    with pytest.raises(ShardError, match="started with other settings"):
        convert(photos, tmp_path / "out", part=(2, 2), seed=1, overwrite=True)  # beside others it cannot start over


def test_parts_replace_a_finished_folder_only_when_they_are_merged(photos: Path, single: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(photos, out, seed=5)
    old = digests(out)
    for number in (2, 1):
        convert(photos, out, part=(number, 2), overwrite=True, **EXTRAS)
        assert digests(out) == old
    merge_parts(out)
    assert digests(out) == single


def test_a_killed_part_is_continued_by_the_same_part(photos: Path, single: dict[str, str], tmp_path: Path) -> None:
    must_die(lambda: convert(photos, tmp_path / "out", dies_at("shards", 12), part=(1, 2), processes=2, **EXTRAS))
    convert(photos, tmp_path / "out", part=(2, 2), **EXTRAS)
    convert(photos, tmp_path / "out", part=(1, 2), **EXTRAS)
    merge_parts(tmp_path / "out")
    assert digests(tmp_path / "out") == single
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("parts", [2, 3])
def test_another_number_of_parts_or_a_single_run_takes_over_what_is_there(
    photos: Path, single: dict[str, str], tmp_path: Path, parts: int
) -> None:
    convert(photos, tmp_path / "out", part=(1, 2), **EXTRAS)
    made = identities(tmp_path / "out.partial")
    if parts == 2:
        convert(photos, tmp_path / "out", resume=True, **EXTRAS)
    else:
        for number in (1, 2, 3):
            convert(photos, tmp_path / "out", part=(number, parts), **EXTRAS)
        merge_parts(tmp_path / "out")
    assert digests(tmp_path / "out") == single
    assert made.items() <= identities(tmp_path / "out").items()


def test_an_image_that_does_not_decode_stops_its_part_alone(tmp_path: Path, single: dict[str, str]) -> None:
    photos = photo_folder(tmp_path / "photos")
    broken = source_file(photos, TRAIN - 1)
    whole = broken.read_bytes()
    broken.write_bytes(b"")
    outcomes = []
    for number in (1, 2, 3):
        try:
            convert(photos, tmp_path / "out", part=(number, 3), **EXTRAS)
            outcomes.append("done")
        except DatasetError as error:
            outcomes.append("stopped" if broken.name in str(error) else str(error))
    assert sorted(outcomes) == ["done", "done", "stopped"]
    broken.write_bytes(whole)
    convert(photos, tmp_path / "out", part=(1 + outcomes.index("stopped"), 3), **EXTRAS)
    merge_parts(tmp_path / "out")
    assert digests(tmp_path / "out") == single


def test_more_parts_than_shards(photos: Path, single: dict[str, str], tmp_path: Path) -> None:
    for number in range(20, 0, -1):
        convert(photos, tmp_path / "out", part=(number, 20), **EXTRAS)
    merge_parts(tmp_path / "out")
    assert digests(tmp_path / "out") == single


def test_a_merge_that_was_killed_before_the_name_is_finished_by_the_next(photos: Path, single: dict[str, str], tmp_path: Path) -> None:
    def killed() -> None:
        Site.publish = lambda self: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        merge_parts(tmp_path / "out")

    for number in (1, 2):
        convert(photos, tmp_path / "out", part=(number, 2), **EXTRAS)
    must_die(killed)
    assert convert(photos, tmp_path / "out", part=(1, 2), **EXTRAS) is None
    assert not (tmp_path / "out").exists()
    merge_parts(tmp_path / "out")
    assert digests(tmp_path / "out") == single


@pytest.mark.parametrize("part", [(0, 3), (4, 3), (1, 0)])
def test_parts_that_do_not_exist(part: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="does not exist: parts are numbered"):
        WriteOptions(part=part)


def test_nothing_to_merge(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"there are no parts to merge at .*: convert them with --part 1/N"):
        merge_parts(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
