"""What the tests of streaming share: loaders over URLs, and the same batches decoded from a local folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import AugmentConfig, DataConfig, OrderConfig, StreamConfig
from pipelines.format import ShardSet, open_shards
from pipelines.loaders import PlannedLoader, build_loader
from pipelines.loaders.block_order import BlockOrder
from pipelines.loaders.dali import DaliPixels
from pipelines.loaders.planned import PixelRequest
from pipelines.loaders.webdataset import WebdatasetPixels
from pipelines.types import Batch

CPU = torch.device("cpu")
MakeShards = Callable[..., ShardSet]
COUNTS = (40, 20, 9, 5)
CONFIG = DataConfig(
    loader="webdataset",
    batch_size=4,
    image_size=32,
    num_threads=1,
    order=OrderConfig(sampling="class-balanced"),
    augment=AugmentConfig(crop="resized", eval_crop=0.875),
    stream=StreamConfig(patience_s=5.0),
)


def streamed_shards(make_shards: MakeShards) -> ShardSet:
    """74 training photographs of four classes in about nine shards."""
    return make_shards(train=COUNTS, size=(48, 48), extension="jpg", shard_bytes=32 << 10)


def buffer_of(shards: ShardSet, num_shards: int = 4) -> int:
    return num_shards * max(shard["shard_bytes"] for shard in shards.manifest["splits"]["train"]["shards"])


def stream_from(
    location: Path | str | ShardSet,
    split: str = "train",
    *,
    rank: int = 0,
    world_size: int = 1,
    num_shards: int = 4,
    patience_s: float = 5.0,
    **changes: Any,
) -> PlannedLoader:
    """A `webdataset` loader whose buffer holds `num_shards` of the largest shards."""
    shards = location if isinstance(location, ShardSet) else open_shards(location)
    stream = StreamConfig(buffer_bytes=buffer_of(shards, num_shards), patience_s=patience_s)
    config = replace(CONFIG, stream=stream, **changes)
    return build_loader(shards, split, config, seed=3, device=CPU, rank=rank, world_size=world_size)


def source_of(loader: PlannedLoader) -> WebdatasetPixels:
    source = vars(loader)["_source"]
    assert isinstance(source, WebdatasetPixels)
    return source


def order_of(loader: PlannedLoader) -> BlockOrder:
    order = source_of(loader).order
    assert order is not None
    return order


def decoded_locally(shards: ShardSet, streamed: PlannedLoader, split: str = "train") -> PlannedLoader:
    """Loader `dali` over the local folder, in the order that `streamed` serves."""
    request: PixelRequest = vars(streamed)["_request"]
    request = replace(request, shards=shards, split=shards.split(split))
    source = DaliPixels(request)
    source.order = source_of(streamed).order  # type: ignore[assignment]
    return PlannedLoader(request, source, len(shards.class_names))


def collect(loader: PlannedLoader, epoch: int = 0, start_step: int = 0) -> list[Batch]:
    batches = list(loader.epoch(epoch, start_step))
    loader.close()
    return batches


def instance_ids(batches: list[Batch]) -> list[int]:
    return np.concatenate([batch.ids_S[: batch.num_sources] for batch in batches]).tolist()


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    """Ids, crops and pixels."""
    assert [batch.ids_S.tolist() for batch in first] == [batch.ids_S.tolist() for batch in second]
    for one, other in zip(first, second, strict=True):
        assert (one.epoch, one.step) == (other.epoch, other.step)
        torch.testing.assert_close(one.images_SHWC, other.images_SHWC, rtol=0, atol=0)


def shard_names(shards: ShardSet) -> list[str]:
    return [shard["file"] for shard in shards.manifest["splits"]["train"]["shards"]]


def shard_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
