"""Loader `dali`, fed from memory and by index files: the same batches, whatever the shards."""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import AugmentConfig, DaliConfig, DataConfig
from pipelines.format import ShardSet, open_shards
from pipelines.loaders import PlannedLoader, build_loader, dali_index
from pipelines.loaders.dali_pipeline import ScheduledPipeline
from pipelines.types import BackendError, Batch, DamagedSampleError, ShardError

RESIZED = AugmentConfig(crop="resized", area_range=(0.3, 1.0))


def loader_for(shards: Any, feed: str, split: str = "train", **options: Any) -> PlannedLoader:
    data = {"loader": "dali", "batch_size": 16, "image_size": 32, "num_threads": 2, "augment": RESIZED} | options
    return build_loader(shards, split, DataConfig(dali=DaliConfig(feed=feed), **data), seed=7, device=torch.device("cpu"))


def collected(loader: PlannedLoader, epoch: int = 1, start_step: int = 0) -> list[Batch]:
    return list(loader.epoch(epoch, start_step))


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert [batch.ids_S.tolist() for batch in first] == [batch.ids_S.tolist() for batch in second]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images_SHWC, other.images_SHWC)
        assert torch.equal(one.labels_S, other.labels_S)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 16 << 10], ids=["one shard", "many shards"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_both_feeds_deliver_the_same_batches(make_shards: Any, shard_bytes: int, split: str) -> None:
    shards = make_shards(size=None, extension="jpg", shard_bytes=shard_bytes)
    assert (len(shards.manifest["splits"]["train"]["shards"]) == 1) == (shard_bytes == 1 << 30)
    memory, index = (collected(loader_for(shards, feed, split)) for feed in ("memory", "index"))
    assert_equal(memory, index)


@pytest.mark.parametrize("prefetch_batches", [1, 3])
def test_an_interrupt_while_a_batch_is_taken_stays_an_interrupt(
    make_shards: Any, monkeypatch: pytest.MonkeyPatch, prefetch_batches: int
) -> None:
    shards = make_shards(size=None, extension="jpg")
    loader = loader_for(shards, "memory", prefetch_batches=prefetch_batches)
    take, taken = ScheduledPipeline._collect, 0

    def interrupted(self: Any, in_flight: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 3:
            self._pipeline.share_outputs()  # as if Ctrl-C came just behind it
            raise KeyboardInterrupt
        return take(self, in_flight)

    monkeypatch.setattr(ScheduledPipeline, "_collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collected(loader)
    assert_equal(collected(loader), collected(loader_for(shards, "memory")))


@pytest.mark.parametrize("prefetch_batches", [1, 2, 3])
def test_segments_smaller_than_the_prefetch_depth_and_the_epoch(
    make_shards: Any, monkeypatch: pytest.MonkeyPatch, prefetch_batches: int
) -> None:
    shards = make_shards(size=None, extension="jpg")
    expected = collected(loader_for(shards, "memory"))
    for steps in (1, 2, 5):
        monkeypatch.setattr(dali_index, "SEGMENT_SAMPLES", 32 * steps)
        assert_equal(collected(loader_for(shards, "index", prefetch_batches=prefetch_batches)), expected)


def test_segments_shrink_with_the_files_a_process_may_open(make_shards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards(size=None, extension="jpg")
    expected = collected(loader_for(shards, "memory"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_shards = len(shards.manifest["splits"]["train"]["shards"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(256, 4 * num_shards), hard))
    try:
        assert_equal(collected(loader_for(shards, "index")), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_index_feed_resumes_in_the_middle_and_leaves_no_threads(make_shards: Any) -> None:
    shards = make_shards(size=None, extension="jpg")
    expected = collected(loader_for(shards, "memory"))
    before = threading.active_count()
    used = loader_for(shards, "index")
    for start_step in (0, 3, 5):
        assert_equal(collected(used, start_step=start_step), expected[start_step:])
        abandoned = used.epoch(0)
        next(abandoned)
    used.close()
    assert threading.active_count() <= before


def test_a_repeated_sample_is_listed_as_often_as_it_is_drawn(make_shards: Any, tmp_path: Path) -> None:
    split = make_shards(size=None, extension="jpg").split("train")
    ids = np.array([3, 3, 0, 3])
    paths, index_paths = dali_index.write_indexes(split, ids, tmp_path)
    listed = [line.split()[1] for path in index_paths for line in Path(path).read_text().splitlines()[1:]]
    assert listed == [str(split.offsets_N[i]) for i in ids]
    assert len(paths) == len(index_paths)


@pytest.fixture
def copied(make_shards: Any, tmp_path: Path) -> ShardSet:
    """Shards to be hurt."""
    root = tmp_path / "shards"
    shutil.copytree(make_shards(size=(48, 48), extension="jpg", shard_bytes=16 << 10).root, root)
    return open_shards(root)


def cut_end(image: bytes) -> bytes:
    """The guard sees that."""
    return image[:-40] + bytes(40)


def overwrite_huffman_table(image: bytes) -> bytes:
    """Beginning and end are whole: DALI alone reports it, when the sample is decoded."""
    start = image.find(b"\xff\xc4") + 5
    return image[:start] + b"\xff" * 16 + image[start + 16 :]


def hurt(shards: ShardSet, sample_id: int, how: Any) -> Path:
    split = shards.split("train")
    path = split.paths[int(split.shards_N[sample_id])]
    with path.open("r+b") as tar:
        tar.seek(int(split.offsets_N[sample_id]))
        image = tar.read(int(split.sizes_N[sample_id]))
        tar.seek(int(split.offsets_N[sample_id]))
        tar.write(how(image))
    return path


@pytest.mark.parametrize("how", [cut_end, overwrite_huffman_table])
class TestDamagedSamplesWithTheIndexFeed:
    def test_stop_names_the_sample_and_its_shard_in_every_epoch(self, copied: ShardSet, how: Any) -> None:
        path = hurt(copied, 5, how)
        loader = loader_for(copied, "index")
        for epoch in range(2):
            with pytest.raises(DamagedSampleError, match=rf"sample 00000005 of {re.escape(str(path))} does not decode") as found:
                collected(loader, epoch)
            assert found.value.ids.tolist() == [5]

    @pytest.mark.parametrize("steps", [1, 3, 100])
    def test_skip_delivers_what_the_memory_feed_delivers(
        self, copied: ShardSet, how: Any, steps: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        hurt(copied, 5, how)
        hurt(copied, 40, how)
        monkeypatch.setattr(dali_index, "SEGMENT_SAMPLES", 32 * steps)
        expected = collected(loader_for(copied, "memory", on_error="skip"))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = collected(loader_for(copied, "index", on_error="skip"))
        assert_equal(found, expected)
        assert not np.isin(np.concatenate([batch.ids_S for batch in found]), [5, 40]).any()
        assert 1 <= sum("another image of the class" in record.getMessage() for record in caplog.records) <= 2

    def test_evaluation_never_skips(self, copied: ShardSet, how: Any) -> None:
        split = copied.split("test")
        with split.paths[0].open("r+b") as tar:
            tar.seek(int(split.offsets_N[2]))
            image = tar.read(int(split.sizes_N[2]))
            tar.seek(int(split.offsets_N[2]))
            tar.write(how(image))
        with pytest.raises(DamagedSampleError, match="sample 00000002"):
            collected(loader_for(copied, "index", "test", on_error="skip"))


class TestRemovedShardsWithTheIndexFeed:
    @pytest.mark.parametrize("on_error", ["stop", "skip"])
    def test_before_an_epoch(self, copied: ShardSet, on_error: str) -> None:
        loader = loader_for(copied, "index", on_error=on_error)
        collected(loader, 0)
        path = copied.split("train").paths[3]
        path.unlink()
        with pytest.raises(ShardError, match=rf"^shard {re.escape(str(path))} was removed while it was read \(No such file.*--resume$"):
            collected(loader, 1)

    def test_in_the_middle_of_one(self, copied: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dali_index, "SEGMENT_SAMPLES", 1)  # a step each
        batches = loader_for(copied, "index", batch_size=2).epoch(0)
        next(batches)
        for path in copied.split("train").paths:
            path.unlink()
        with pytest.raises(ShardError, match=r"shard \S+train-000000\.tar was removed while it was read"):
            list(batches)


class TestTheFolderOfIndexFiles:
    def test_that_cannot_be_written_is_named(self, copied: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gone = tmp_path / "gone"
        monkeypatch.setattr(tempfile, "tempdir", str(gone))
        with pytest.raises(BackendError, match=rf"^cannot write \S+ \S+ \S+ DALI to the temporary folder {gone} .*TMPDIR.*feed=memory"):
            collected(loader_for(copied, "index"))

    def test_without_open_files_to_spare_it_is_named_too(self, copied: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        loader = loader_for(copied, "index")
        expected = collected(loader, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        spare = os.open(os.devnull, os.O_RDONLY)
        os.close(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
        try:
            with pytest.raises(BackendError, match=rf"temporary folder {tmp_path} \(Too many open files\)"):
                collected(loader, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert_equal(collected(loader, 1), expected)
