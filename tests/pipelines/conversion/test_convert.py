"""The same bytes from any number of hands, interrupted or not; what decides them is settled first and held to."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.conversion import RESAMPLINGS, Resampling, plan
from pipelines.format import PixelOptions, open_shards
from pipelines.types import BackendError, DatasetError, ShardError
from tests.pipelines.conversion.sources import (
    COUNTS,
    Progress,
    children,
    convert,
    die_after_writing,
    dies_at,
    digests,
    ended,
    identities,
    in_child,
    jpeg,
    must_die,
    opened,
    orders_of,
    photo_folder,
    runs,
    slow,
    source_file,
    wait_until,
)

TRAIN = sum(COUNTS["train"].values())
EVERYTHING = sum(sum(classes.values()) for classes in COUNTS.values())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    convert(photos, out)
    found = digests(out)
    assert len([name for name in found if name.startswith("train-")]) >= 5
    return found


class TestSameBytes:
    @pytest.mark.parametrize("hands", [{"processes": 2}, {"num_threads": 3}, {"processes": 3, "num_threads": 2}], ids=str)
    def test_whoever_converts(self, photos: Path, undisturbed: dict[str, str], tmp_path: Path, hands: dict[str, int]) -> None:
        progress = Progress()
        report = convert(photos, tmp_path / "out", progress, **hands)
        assert report is not None
        assert digests(tmp_path / "out") == undisturbed
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert progress.seen["shards"][-1] == (EVERYTHING, EVERYTHING)
        progress.assert_sound()

    @pytest.mark.parametrize("hands", [{"processes": 1}, {"processes": 2}, {"num_threads": 2}], ids=str)
    def test_resumed_after_an_image_that_did_not_decode(self, tmp_path: Path, undisturbed: dict[str, str], hands: dict[str, int]) -> None:
        photos, out = photo_folder(tmp_path / "photos"), tmp_path / "out"
        broken = source_file(photos, TRAIN - 2)
        whole = broken.read_bytes()
        broken.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DatasetError, match=rf"{broken.name} is not a readable image.*--on-error skip, then --resume continues"):
            convert(photos, out, **hands)
        finished = identities(tmp_path / "out.partial")
        assert finished
        assert not out.exists()
        assert not list(tmp_path.rglob("*.tar.partial"))
        broken.write_bytes(whole)
        progress = Progress()
        convert(photos, out, progress, resume=True, **hands)
        assert digests(out) == undisturbed
        assert finished.items() <= identities(out).items()  # none was made twice
        assert progress.seen["shards"][0][0] > 0
        progress.assert_sound()

    @pytest.mark.parametrize("processes", [1, 2])
    @pytest.mark.parametrize("done", [1, 20, EVERYTHING])
    def test_resumed_after_a_kill(self, photos: Path, undisturbed: dict[str, str], tmp_path: Path, processes: int, done: int) -> None:
        must_die(lambda: convert(photos, tmp_path / "out", dies_at("shards", done), processes=processes))
        assert not (tmp_path / "out").exists()
        convert(photos, tmp_path / "out", resume=True, processes=processes)
        assert digests(tmp_path / "out") == undisturbed
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("file", ["plan.json", "units/train-000002.json", "train.index.npy", "manifest.json"])
    def test_resumed_after_a_kill_right_after_a_file(self, photos: Path, undisturbed: dict[str, str], tmp_path: Path, file: str) -> None:
        def killed() -> None:
            die_after_writing(file)
            convert(photos, tmp_path / "out", processes=2)

        must_die(killed)
        convert(photos, tmp_path / "out", resume=True, processes=2)
        assert digests(tmp_path / "out") == undisturbed

    def test_a_damaged_record_or_a_tar_cut_short_is_made_again(self, photos: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
        must_die(lambda: convert(photos, tmp_path / "out", dies_at("shards", EVERYTHING)))
        partial = tmp_path / "out.partial"
        (partial / "units" / "train-000000.json").write_text("{")
        (partial / "units" / "train-000001.json").write_text('{"name": "train-000001"}')
        tar = partial / "train-000002.tar"
        tar.write_bytes(tar.read_bytes()[:-512])
        (partial / "train-000003.tar").unlink()
        convert(photos, tmp_path / "out", resume=True)
        assert digests(tmp_path / "out") == undisturbed


class TestPlan:
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"seed": 1}, r"\(the images or their order differ\)"),
            ({"limit": 30}, r"\(the number of images, the images or their order differ\)"),
            ({"shard_bytes": 8 << 10}, r"\(shard_bytes differ\)"),
            ({"pixels": PixelOptions(max_side=16)}, r"\(what happens to images differ\)"),
            ({"resamplings": (Resampling(sampling="class-balanced"),)}, r"\(the formats or resampled streams differ\)"),
        ],
        ids=str,
    )
    def test_another_conversion_is_not_resumed(self, photos: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
        must_die(lambda: convert(photos, tmp_path / "out", dies_at("shards", 20)))
        before = digests(tmp_path / "out.partial")
        with pytest.raises(ShardError, match=rf"started with other settings {sentence}.*start over with --overwrite"):
            convert(photos, tmp_path / "out", resume=True, **changes)
        assert digests(tmp_path / "out.partial") == before
        convert(photos, tmp_path / "out", overwrite=True, **changes)
        convert(photos, tmp_path / "fresh", **changes)
        assert digests(tmp_path / "out") == digests(tmp_path / "fresh")

    def test_other_images_are_another_conversion(self, tmp_path: Path) -> None:
        photos = photo_folder(tmp_path / "photos")
        must_die(lambda: convert(photos, tmp_path / "out", dies_at("shards", 20)))
        source_file(photos, 0).rename(source_file(photos, 0).with_name("renamed.jpg"))
        with pytest.raises(ShardError, match=r"\(the images or their order differ\)"):
            convert(photos, tmp_path / "out", resume=True)

    def test_a_stored_plan_that_is_damaged_is_named(self, photos: Path, tmp_path: Path) -> None:
        must_die(lambda: convert(photos, tmp_path / "out", dies_at("shards", 20)))
        for content in ("", "[]", "{}", '{"dataset": 1}'):
            (tmp_path / "out.partial" / "plan.json").write_text(content)
            with pytest.raises(ShardError, match=r"out\.partial/plan\.json is damaged or of another version.*--overwrite"):
                convert(photos, tmp_path / "out", resume=True)

    def test_the_stored_number_of_samples_a_shard_is_kept(
        self, photos: Path, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        must_die(lambda: convert(photos, tmp_path / "out", dies_at("shards", 20)))
        monkeypatch.setattr(plan, "_PROBED", 1)  # another estimate
        convert(photos, tmp_path / "other")
        assert digests(tmp_path / "other") != undisturbed
        convert(photos, tmp_path / "out", resume=True)
        assert digests(tmp_path / "out") == undisturbed

    def test_shards_of_another_division_are_not_taken(self, photos: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
        must_die(lambda: convert(photos, tmp_path / "out", dies_at("shards", 1)))
        must_die(lambda: convert(photos, tmp_path / "other", dies_at("shards", 20), shard_bytes=12 << 10))
        (tmp_path / "other.partial" / "plan.json").unlink()
        shutil.copytree(tmp_path / "other.partial", tmp_path / "out.partial", dirs_exist_ok=True)  # as if parts had settled on two plans
        convert(photos, tmp_path / "out", resume=True)
        assert digests(tmp_path / "out") == undisturbed

    def test_splits_may_be_empty(self, tmp_path: Path) -> None:
        photos = photo_folder(tmp_path / "photos", {"train": {"ant": 9, "bee": 4}})
        report = convert(photos, tmp_path / "out", processes=2)
        assert report is not None
        assert {split: int(counts.sum()) for split, counts in report.class_counts.items()} == {"train": 13, "val": 0, "test": 0}
        shards = open_shards(tmp_path / "out")
        assert [len(shards.split(split)) for split in ("train", "val", "test")] == [13, 0, 0]
        assert {path.name.partition("-")[0] for path in (tmp_path / "out").glob("*.tar")} == {"train"}


class TestSkipping:
    @pytest.mark.parametrize("processes", [1, 2])
    def test_a_shard_without_a_readable_image_is_left_out(self, tmp_path: Path, processes: int) -> None:
        photos, out = photo_folder(tmp_path / "photos"), tmp_path / "out"

        def killed() -> None:
            die_after_writing("units/train-000000.json")
            convert(photos, out)

        must_die(killed)
        per_shard = json.loads((tmp_path / "out.partial" / "plan.json").read_bytes())["samples_per_shard"]["train"]
        broken = [*range(per_shard, 2 * per_shard), 2 * per_shard + 1]
        dataset = opened(photos)
        kept = [dataset.splits["train"].read(int(row)) for at, row in enumerate(orders_of(dataset)["train"]) if at not in broken]
        for position in broken:
            source_file(photos, position).write_bytes(b"")
        (tmp_path / "out.partial" / "train-000001.tar").write_bytes(b"of a run that was killed before it wrote the record")
        progress = Progress()
        report = convert(photos, out, progress, resume=True, on_error="skip", processes=processes)
        progress.assert_sound()
        assert report is not None
        assert report.num_skipped == len(broken) == len(report.skipped)
        assert all("is not a readable image" in sentence for sentence in report.skipped)
        shards = open_shards(out)
        files = [shard["file"] for shard in shards.manifest["splits"]["train"]["shards"]]
        assert files[:2] == ["train-000000.tar", "train-000002.tar"]
        assert sorted(files) == sorted(path.name for path in out.glob("train-*.tar"))
        split = shards.split("train")
        assert [encoded.tobytes() for encoded in split.encoded(np.arange(len(split)))] == [sample.encoded for sample in kept]
        assert split.labels_N.tolist() == [sample.label for sample in kept]
        assert np.load(out / "train.index.npy")["shard"].tolist() == sorted(np.load(out / "train.index.npy")["shard"].tolist())
        # Names in the tars keep the position of what was left out.
        assert f"({2 * per_shard + 2:08d}.jpg)" in split.describe(per_shard + 1)

    def test_nothing_readable_is_nothing_to_resume(self, tmp_path: Path) -> None:
        photos = photo_folder(tmp_path / "photos", {"train": {"ant": 9}})
        for position in range(9):
            source_file(photos, position).write_bytes(b"")
        with pytest.raises(DatasetError, match="no readable training image"):
            convert(photos, tmp_path / "out", on_error="skip", processes=2)
        assert [path.name for path in tmp_path.iterdir()] == ["photos"]


class TestProcesses:
    def test_no_worker_outlives_a_killed_parent(self, photos: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
        def killed() -> None:
            def react(stage: str, done: int) -> None:
                (tmp_path / "workers").write_text(" ".join(map(str, children())))
                dies_at("shards", 5).react(stage, done)

            convert(slow(opened(photos), 0.02), tmp_path / "out", Progress(react), processes=2)

        must_die(killed)
        workers = [int(worker) for worker in (tmp_path / "workers").read_text().split()]
        assert len(workers) == 2
        assert wait_until(lambda: not any(map(runs, workers)), within_s=2)
        convert(photos, tmp_path / "out", resume=True)
        assert digests(tmp_path / "out") == undisturbed

    def test_ctrl_c_ends_workers_soon_and_leaves_no_half_files(self, photos: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
        def planned() -> None:
            die_after_writing("units/train-000000.json")
            convert(photos, tmp_path / "out")

        def interrupted() -> None:
            def react(stage: str, done: int) -> None:
                if done >= 2:
                    (tmp_path / "when").write_text(str(time.monotonic()))
                    signal.raise_signal(signal.SIGINT)

            try:
                # A unit takes 3 s.
                convert(slow(opened(photos), 0.4), tmp_path / "out", Progress(react), processes=2, resume=True)
            except KeyboardInterrupt:
                assert time.monotonic() - float((tmp_path / "when").read_text()) < 2
                assert not children()
                return
            raise AssertionError("not interrupted")

        must_die(planned)
        assert ended(in_child(interrupted)) == 0
        assert not list(tmp_path.rglob("*.tar.partial"))
        convert(photos, tmp_path / "out", resume=True)
        assert digests(tmp_path / "out") == undisturbed

    def test_a_killed_worker_is_a_sentence(self, photos: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
        others = children()  # what other tests need

        def react(stage: str, done: int) -> None:
            if done >= 15:
                for worker in [child for child in children() if child not in others][:1]:
                    os.kill(worker, signal.SIGKILL)

        with pytest.raises(ShardError, match=r"a worker process was killed.*--resume and fewer --processes"):
            convert(slow(opened(photos), 0.01), tmp_path / "out", Progress(react), processes=2)
        convert(photos, tmp_path / "out", resume=True, processes=2)
        assert digests(tmp_path / "out") == undisturbed

    @pytest.mark.parametrize("processes", [1, 2])
    def test_a_disk_that_takes_no_more_is_a_sentence(
        self, photos: Path, undisturbed: dict[str, str], tmp_path: Path, processes: int
    ) -> None:
        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            with pytest.raises(ShardError, match=r"cannot write shards to .*out: File too large; nothing was left under that name$"):
                convert(photos, tmp_path / "out", processes=processes)

        assert ended(in_child(limited)) == 0
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.rglob("*.tar"))
        convert(photos, tmp_path / "out", resume=True)
        assert digests(tmp_path / "out") == undisturbed


def test_too_little_room_is_said_before_anything_is_written(photos: Path, tmp_path: Path) -> None:
    streams = tuple(Resampling(sampling=sampling, epoch_size=1 << 30, materialised=True) for sampling in RESAMPLINGS)  # 13 TB
    with pytest.raises(ShardError, match=r"the shards need about .* GB and .* GB free: make room"):
        convert(photos, tmp_path / "out", resamplings=streams)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "options", "sentence"),
    [
        ("ray", {"executor": "ray"}, r"--executor ray needs Ray: pip install 'bce3s\[ray\]'"),
        ("ffcv.writer", {"formats": ("wds", "ffcv")}, r"a \.beton file needs FFCV"),
    ],
)
def test_a_missing_package_is_named(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, options: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=sentence):
        convert(photos, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_noise_differs() -> None:
    assert len({jpeg(number) for number in range(EVERYTHING)}) == EVERYTHING
