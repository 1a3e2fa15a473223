"""Loader `cached` shows the real loader's first batches, then those again; order, ids and labels go on."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config import AugmentConfig, DataConfig, StreamConfig
from pipelines.format import ShardSet, open_shards
from pipelines.loaders import PlannedLoader, build_loader
from pipelines.loaders.cached import KEPT_BATCHES
from pipelines.types import Batch
from tests.nginx import running_nginx
from tests.pipelines.loaders.streams import CONFIG, CPU, buffer_of, order_of, stream_from, streamed_shards

MakeShards = Callable[..., ShardSet]
TRAIN = (50, 30, 12, 4)  # 96 images: 12 batches of 8


def loader_for(shards: ShardSet, loader: str = "cached", split: str = "train", **changes: Any) -> PlannedLoader:
    config = DataConfig(loader=loader, batch_size=8, image_size=32, num_threads=2, augment=AugmentConfig(crop="resized"))
    return build_loader(shards, split, replace(config, **changes), seed=0, device=torch.device("cpu"))


def pictures(batches: list[Batch]) -> list[bytes]:
    return [batch.images_SHWC.numpy().tobytes() for batch in batches]


class TestAgainstTheRealLoader:
    def test_first_batches_are_real_and_the_others_are_these_in_turn(self, make_shards: MakeShards) -> None:
        shards = make_shards(train=TRAIN, size=None, extension="jpg", name="folder")
        ours, theirs = (loader_for(shards, name) for name in ("cached", "dali"))
        found, expected = list(ours.epoch(0)), list(theirs.epoch(0))
        assert pictures(found[:KEPT_BATCHES]) == pictures(expected[:KEPT_BATCHES])
        found += list(ours.epoch(1))
        assert set(pictures(found)) == set(pictures(expected[:KEPT_BATCHES]))
        later = pictures(found[KEPT_BATCHES:])
        assert all(one != other for one, other in pairwise(later))
        expected += list(theirs.epoch(1))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.ids_S, other.ids_S)
            torch.testing.assert_close(one.labels_S, other.labels_S)
            torch.testing.assert_close(one.mix, other.mix)
        ours.close()
        theirs.close()

    def test_nothing_is_decoded_once_enough_is_kept(self, make_shards: MakeShards) -> None:
        loader = loader_for(make_shards(train=TRAIN, size=None, extension="jpg", name="folder"))
        batches = loader.epoch(0)
        list(islice(batches, KEPT_BATCHES))
        assert loader._source._real is None  # type: ignore[attr-defined]  # closed: who could decode?
        assert [batch.step for batch in batches] == list(range(KEPT_BATCHES, 12))
        loader.close()


def test_smaller_last_batches_are_cut_from_larger_ones(make_shards: MakeShards) -> None:
    """74 images: nine batches of 8 and one of 2."""
    loader = loader_for(make_shards(size=None, extension="jpg", name="folder"))
    batches = list(loader.epoch(0))
    assert [len(batch.images_SHWC) for batch in batches] == [16] * 9 + [4]
    assert any(torch.equal(batches[9].images_SHWC, batch.images_SHWC[:4]) for batch in batches[:KEPT_BATCHES])
    loader.close()


def test_sets_too_small_to_fill_the_cache_are_decoded_as_often_as_it_takes(make_shards: MakeShards) -> None:
    """Two batches an epoch, 8 and 2 images in evaluation: the eighth full one is decoded in the eighth epoch."""
    loader = loader_for(make_shards(test=3), split="test")  # 12 images
    for _ in range(12):
        assert [len(batch.images_SHWC) for batch in loader.epoch(0)] == [8, 4]
    loader.close()


def test_augmentation_after_the_loader_does_not_touch_what_is_kept(make_shards: MakeShards) -> None:
    shards = make_shards(train=TRAIN)
    augment = AugmentConfig(crop="pad", padding=0, flip=False, policy="autoaugment-cifar10", cutout=8)
    loader = loader_for(shards, augment=augment)
    for epoch in range(3):
        list(loader.epoch(epoch))
    split = shards.split("train")
    stored = {np.asarray(Image.open(io.BytesIO(split.encoded(np.array([i]))[0].tobytes()))).tobytes() for i in range(len(split))}
    kept = loader._source._kept  # type: ignore[attr-defined]
    assert len(kept) == KEPT_BATCHES
    assert all(image.numpy().tobytes() in stored for images_SHWC in kept for image in images_SHWC)
    loader.close()


class TestOverHttp:
    def loader(self, url: str, shards: ShardSet) -> PlannedLoader:
        config = replace(CONFIG, loader="cached", stream=StreamConfig(buffer_bytes=buffer_of(shards), patience_s=5.0))
        return build_loader(open_shards(url), "train", config, seed=3, device=CPU)

    def test_what_is_kept_costs_the_requests_of_one_stream(self, make_shards: MakeShards) -> None:
        shards = streamed_shards(make_shards)
        order = order_of(stream_from(shards))
        first_steps = {use.shard for use in order.uses(0, 0) if use.first_step < KEPT_BATCHES}
        with running_nginx(Path(shards.root)) as nginx:
            loader = self.loader(nginx.url, shards)
            found = list(islice(loader.epoch(0), KEPT_BATCHES))
            asked = [request.path for request in nginx.requests() if request.path.endswith(".tar")]
            loader.close()
            expected = list(islice(stream_from(nginx.url).epoch(0), KEPT_BATCHES))
        assert pictures(found) == pictures(expected)
        assert len(asked) == len(set(asked))
        assert len(asked) <= len(first_steps) + 4  # the buffer's, fetched ahead

    def test_an_epoch_and_the_next_ask_for_nothing_else(self, make_shards: MakeShards) -> None:
        shards = streamed_shards(make_shards)
        with running_nginx(Path(shards.root)) as nginx:
            loader = self.loader(nginx.url, shards)
            list(islice(loader.epoch(0), KEPT_BATCHES))
            asked = len(nginx.requests())
            assert [batch.step for batch in loader.epoch(0, KEPT_BATCHES)] == list(range(KEPT_BATCHES, loader.num_steps))
            assert len(list(loader.epoch(1))) == loader.num_steps
            assert len(nginx.requests()) == asked
            loader.close()

    def test_a_dropped_epoch_leaves_nothing_open_and_the_next_goes_on_filling(self, make_shards: MakeShards) -> None:
        shards = streamed_shards(make_shards)
        with running_nginx(Path(shards.root)) as nginx:
            loader = self.loader(nginx.url, shards)
            dropped = loader.epoch(0)
            first = list(islice(dropped, 3))
            again = list(loader.epoch(0))
            assert pictures(again[:3]) == pictures(first)
            kept = loader._source._kept  # type: ignore[attr-defined]
            assert [len(images) for images in kept] == [8] * KEPT_BATCHES
            assert set(pictures(again[:-1])) == set(pictures(again[:5]))  # the last one is smaller, cut from one of them
            loader.close()


@pytest.mark.cuda
def test_what_is_kept_stays_on_the_device(make_shards: MakeShards) -> None:
    config = DataConfig(loader="cached", batch_size=8, image_size=32, augment=AugmentConfig(crop="resized"))
    loader = build_loader(make_shards(train=TRAIN), "train", config, seed=0, device=torch.device("cuda"))
    assert all(batch.images_SHWC.is_cuda for batch in loader.epoch(0))
    assert all(images.is_cuda for images in loader._source._kept)  # type: ignore[attr-defined]
    loader.close()
