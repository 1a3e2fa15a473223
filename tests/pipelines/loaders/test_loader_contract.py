"""What every loader promises: the same batches of ids, labels, crops and mixing in the same order, from any point, at any thread count."""

from __future__ import annotations

import gc
import io
import os
import threading
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config import AugmentConfig, DataConfig, OrderConfig, ResidentConfig
from pipelines.format import ShardSet
from pipelines.loaders import LOADERS, MADE_UP_PIXELS, PlannedLoader, build_loader
from pipelines.types import Batch, ConfigError, ShardError

HAS_FFCV = find_spec("ffcv") is not None
ALL = [pytest.param(name, marks=pytest.mark.skipif(name == "ffcv" and not HAS_FFCV, reason="FFCV is not installed")) for name in LOADERS]
CPU = torch.device("cpu")
PAD = AugmentConfig(crop="pad", policy="autoaugment-cifar10", cutout=8, eval_crop=1.0)
RESIZED = AugmentConfig(crop="resized", eval_crop=0.875)
EXACT = ["dali", "resident"]
OWN_ORDER = {"webdataset"}


@pytest.fixture
def make_shards(make_shards: Any) -> Any:
    """With betons where FFCV is installed, so that loader `ffcv` takes part."""
    return partial(make_shards, beton=HAS_FFCV)


def config_for(loader: str, augment: AugmentConfig = PAD, **changes: Any) -> DataConfig:
    order = OrderConfig(sampling="class-balanced")
    return replace(DataConfig(loader=loader, batch_size=16, image_size=32, num_threads=2, order=order, augment=augment), **changes)


def loader_for(
    shards: ShardSet, loader: str, split: str = "train", seed: int = 0, rank: int = 0, world_size: int = 1, **changes: Any
) -> PlannedLoader:
    return build_loader(shards, split, config_for(loader, **changes), seed=seed, device=CPU, rank=rank, world_size=world_size)


def collect(loader: PlannedLoader, epoch: int = 0, start_step: int = 0) -> list[Batch]:
    batches = list(loader.epoch(epoch, start_step))
    loader.close()
    return batches


def ids_of(batches: list[Batch]) -> list[list[int]]:
    return [batch.ids_S.tolist() for batch in batches]


def assert_same(loader: str, first: list[Batch], second: list[Batch]) -> None:
    assert ids_of(first) == ids_of(second)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one.mix, other.mix, rtol=0, atol=0)
        if loader not in MADE_UP_PIXELS:
            torch.testing.assert_close(one.images_SHWC, other.images_SHWC, rtol=0, atol=0)


@pytest.mark.parametrize("loader", ALL)
class TestEveryLoader:
    def test_batch_has_the_promised_shapes_types_and_labels(self, make_shards: Any, loader: str) -> None:
        shards = make_shards()
        labels_N = shards.split("train").labels_N
        batches = collect(loader_for(shards, loader))
        assert [batch.num_sources for batch in batches] == [16, 16, 16, 16, 10]
        for step, batch in enumerate(batches):
            size = 2 * batch.num_sources
            assert batch.images_SHWC.shape == (size, 32, 32, 3)
            assert batch.images_SHWC.dtype == torch.uint8
            assert (batch.epoch, batch.step) == (0, step)
            assert batch.labels_S.tolist() == labels_N[batch.ids_S].tolist()
            assert batch.mix is not None
            assert batch.mix.shape == (6,)

    def test_instance_half_covers_each_sample_exactly_once(self, make_shards: Any, loader: str) -> None:
        batches = collect(loader_for(make_shards(), loader), epoch=3)
        ids = np.concatenate([batch.ids_S[: batch.num_sources] for batch in batches])
        assert sorted(ids.tolist()) == list(range(74))

    def test_ids_equal_those_of_every_other_loader_and_thread_count(self, make_shards: Any, loader: str) -> None:
        expected = ids_of(collect(loader_for(make_shards(), loader if loader in OWN_ORDER else "synthetic", num_threads=1), epoch=2))
        for num_threads in (1, 2, 3):
            assert ids_of(collect(loader_for(make_shards(), loader, num_threads=num_threads), epoch=2)) == expected

    def test_starting_in_the_middle_continues_exactly(self, make_shards: Any, loader: str) -> None:
        whole = collect(loader_for(make_shards(), loader), epoch=1)
        for start_step in (1, 4, 5):
            assert_same(loader, collect(loader_for(make_shards(), loader), epoch=1, start_step=start_step), whole[start_step:])

    def test_resumed_twice_in_one_epoch_and_at_its_end(self, make_shards: Any, loader: str) -> None:
        """Killed in step 2, again in step 3, and again when the epoch was over."""
        seen: list[Batch] = []
        for start_step, num_batches in ((0, 2), (2, 1), (3, 2), (5, 0)):
            used = loader_for(make_shards(), loader)
            seen += [batch for _, batch in zip(range(num_batches or 99), used.epoch(0, start_step), strict=False)]
            used.close()
        assert_same(loader, seen, collect(loader_for(make_shards(), loader)))

    def test_resumed_with_another_world_size(self, make_shards: Any, loader: str) -> None:
        """Two steps by one rank, the rest by two: the global batches are those of one rank all along."""
        if loader in OWN_ORDER:
            pytest.skip("streams each shard to one rank only, so its batches depend on the world size")
        whole = collect(loader_for(make_shards(), loader))
        pair = [collect(loader_for(make_shards(), loader, rank=rank, world_size=2), start_step=2) for rank in range(2)]
        for one, first, second in zip(whole[2:], *pair, strict=True):
            for stream in range(2):
                halves = [half.ids_S[stream * half.num_sources :][: half.num_sources] for half in (first, second)]
                np.testing.assert_array_equal(np.concatenate(halves), one.ids_S[stream * one.num_sources :][: one.num_sources])

    def test_the_same_partner_is_another_crop_of_the_same_image(self, make_shards: Any, loader: str) -> None:
        """From any step, on one rank and on two; the first crops are those of a run whose partners are drawn."""
        order = OrderConfig(sampling="class-balanced", partner="same")
        pairs = collect(loader_for(make_shards(), loader, order=order), epoch=1)
        assert_same(loader, collect(loader_for(make_shards(), loader, order=order), epoch=1, start_step=2), pairs[2:])
        assert sorted(np.concatenate([batch.ids_S[: batch.num_sources] for batch in pairs]).tolist()) == list(range(74))
        for batch, drawn in zip(pairs, collect(loader_for(make_shards(), loader), epoch=1), strict=True):
            for ids, other_ids in (np.split(batch.ids_S, 2), (batch.ids_S[: batch.num_sources], drawn.ids_S[: batch.num_sources])):
                np.testing.assert_array_equal(ids, other_ids)
            if loader not in MADE_UP_PIXELS:
                first, second = batch.images_SHWC.chunk(2)
                torch.testing.assert_close(first, drawn.images_SHWC[: len(first)], rtol=0, atol=0)
                unlike = (first.float() - second.float()).abs().mean((1, 2, 3)) > 1
                assert unlike.float().mean() > 0.8  # the policy and the crop of one in some hundreds may agree
        for rank in range(2):
            for batch in collect(loader_for(make_shards(), loader, order=order, rank=rank, world_size=2)):
                np.testing.assert_array_equal(*np.split(batch.ids_S, 2))

    def test_an_abandoned_epoch_leaves_no_trace_in_the_next(self, make_shards: Any, loader: str) -> None:
        expected = collect(loader_for(make_shards(), loader), epoch=1)
        used = loader_for(make_shards(), loader)
        for start_step in (0, 2):
            batches = iter(used.epoch(0, start_step))
            next(batches)
            batches.close()  # type: ignore[attr-defined]
        assert_same(loader, collect(used, epoch=1), expected)

    def test_ranks_share_each_global_batch(self, make_shards: Any, loader: str) -> None:
        if loader in OWN_ORDER:
            pytest.skip("streams each shard to one rank only, so its batches depend on the world size")
        single = collect(loader_for(make_shards(), loader))
        pair = [collect(loader_for(make_shards(), loader, rank=rank, world_size=2)) for rank in range(2)]
        for step, whole in enumerate(single):
            B = whole.num_sources
            halves = [pair[rank][step] for rank in range(2)]
            for stream in range(2):
                joined = np.concatenate([half.ids_S[stream * half.num_sources : (stream + 1) * half.num_sources] for half in halves])
                np.testing.assert_array_equal(joined, whole.ids_S[stream * B : (stream + 1) * B])
            torch.testing.assert_close(halves[0].mix, halves[1].mix)

    @pytest.mark.parametrize("world_size", [1, 3])
    def test_evaluation_counts_every_sample_once_at_any_world_size(self, make_shards: Any, loader: str, world_size: int) -> None:
        shards = make_shards()
        seen: list[int] = []
        for rank in range(world_size):
            for batch in collect(loader_for(shards, loader, split="test", rank=rank, world_size=world_size)):
                assert batch.mix is None
                seen += batch.ids_S.tolist()
        assert sorted(seen) == list(range(20))

    def test_images_of_varying_size_are_delivered(self, make_shards: Any, loader: str) -> None:
        shards = make_shards(size=None, extension="jpg")
        for split in ("train", "test"):
            batches = collect(loader_for(shards, loader, split=split, augment=RESIZED))
            assert {tuple(batch.images_SHWC.shape[1:]) for batch in batches} == {(32, 32, 3)}

    def test_closing_leaves_no_threads(self, make_shards: Any, loader: str) -> None:
        before = threading.active_count()
        for _ in range(3):
            used = loader_for(make_shards(), loader)
            next(iter(used.epoch(0)))
            used.close()
            del used
        gc.collect()
        assert threading.active_count() <= before

    def test_abandoned_epochs_leave_no_memory_and_no_threads(self, make_shards: Any, loader: str) -> None:
        used = loader_for(make_shards(), loader)

        def abandon(count: int) -> tuple[float, int]:
            for epoch in range(count):
                next(iter(used.epoch(epoch)))
            gc.collect()
            return anonymous_mib(), len(os.listdir("/proc/self/task"))

        first_mib, first_threads = abandon(10)
        last_mib, last_threads = abandon(40)
        used.close()
        assert last_mib - first_mib < 8
        assert last_threads <= first_threads


def anonymous_mib() -> float:
    """Memory of this process that no file backs."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


@pytest.mark.parametrize("loader", [name for name in ALL if name.values[0] in (*EXACT, "ffcv")])
def test_evaluation_pixels_are_those_of_the_stored_image(make_shards: Any, loader: str) -> None:
    shards = make_shards()
    split = shards.split("test")
    for batch in collect(loader_for(shards, loader, split="test")):
        for sample_id, pixels in zip(batch.ids_S, batch.images_SHWC, strict=True):
            with Image.open(io.BytesIO(split.encoded(np.array([sample_id]))[0].tobytes())) as stored:
                np.testing.assert_array_equal(pixels.numpy(), np.asarray(stored))


def test_dali_and_resident_deliver_the_same_pixels_of_lossless_images(make_shards: Any) -> None:
    for split in ("train", "test"):
        dali, resident = (collect(loader_for(make_shards(), name, split=split)) for name in EXACT)
        assert ids_of(dali) == ids_of(resident)
        for one, other in zip(dali, resident, strict=True):
            torch.testing.assert_close(one.images_SHWC, other.images_SHWC, rtol=0, atol=0)


@pytest.mark.parametrize("min_side", [48, 40])
def test_dali_and_resident_show_the_same_region_of_photographs(make_shards: Any, min_side: int) -> None:
    """Decoders and filters differ by a level, images kept smaller by whole-pixel windows and lost detail, a missing flip by tens."""
    shards = make_shards(size=(48, 48), extension="jpg")
    augment = AugmentConfig(crop="resized", area_range=(0.3, 1.0), eval_crop=0.875)
    for split in ("train", "test"):
        options = {"split": split, "augment": augment, "resident": ResidentConfig(min_side=min_side)}
        dali, resident = (collect(loader_for(shards, name, **options)) for name in EXACT)
        for one, other in zip(dali, resident, strict=True):
            difference = (one.images_SHWC.float() - other.images_SHWC.float()).abs().mean((1, 2, 3))
            assert difference.max() < (1.5 if min_side == 48 else 12)


@pytest.mark.parametrize("loader", ALL)
def test_a_rank_without_a_sample_of_the_last_batch_is_served(make_shards: Any, loader: str) -> None:
    seen = [
        sample_id
        for rank in range(3)
        for batch in collect(loader_for(make_shards(), loader, split="test", rank=rank, world_size=3, batch_size=19))
        for sample_id in batch.ids_S.tolist()
    ]
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"world_size": 3}, "batch_size 16 cannot be shared by 3 ranks"),
        ({"world_size": 4}, r"the last batch of 10 samples cannot be shared by 4 ranks: add --set data\.order\.drop_last=true"),
        ({"batch_size": 75, "order": OrderConfig(drop_last=True)}, "leaves no batch of 74 samples"),
        ({"image_size": 24}, "crop 'pad' needs stored images of 24 px"),
    ],
)
def test_what_cannot_be_shared_or_cropped_is_one_sentence(make_shards: Any, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        loader_for(make_shards(), "synthetic", **changes)


def test_unknown_loader_lists_the_known_ones(make_shards: Any) -> None:
    with pytest.raises(ConfigError, match=f"unknown loader 'torch'; known: auto, {', '.join(LOADERS)}"):
        loader_for(make_shards(), "torch")


def test_an_empty_split_is_one_sentence(make_shards: Any) -> None:
    with pytest.raises(ShardError, match="no samples in its 'val' split"):
        loader_for(make_shards(), "resident", split="val")
