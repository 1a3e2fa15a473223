"""Loader `dali`, fed from memory and by index files: the same batches, whatever the shards."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import AugmentConfig, DaliConfig, DataConfig
from pipelines.loaders import PlannedLoader, build_loader, dali_index
from pipelines.types import Batch

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
