"""Loaders: the same ids in the same order with the same crops, whatever reads and decodes the pixels.

`LOADERS` maps a name to a pixel source. A new loader is one file with a `PixelSource` (planned.py) and one line here.
"""

from __future__ import annotations

from importlib import import_module

import torch

from pipelines.config import DataConfig, require_choice
from pipelines.format import ShardSet
from pipelines.loaders.choice import LoaderChoice, choose_loader, is_streamed
from pipelines.loaders.planned import PixelRequest, PlannedLoader
from pipelines.types import ConfigError, ShardError

LOADERS: dict[str, str] = {
    "cached": "pipelines.loaders.cached:CachedPixels",
    "dali": "pipelines.loaders.dali:open_dali",
    "ffcv": "pipelines.loaders.ffcv:FfcvPixels",
    "resident": "pipelines.loaders.resident:ResidentPixels",
    "synthetic": "pipelines.loaders.synthetic:SyntheticPixels",
    "webdataset": "pipelines.loaders.webdataset:WebdatasetPixels",
}
MADE_UP_PIXELS = ("cached", "synthetic")  # for measuring: what they show does not belong to the labels
_NEED_NO_FOLDER = ("cached", "synthetic", "webdataset")

__all__ = ["LOADERS", "MADE_UP_PIXELS", "DataConfig", "LoaderChoice", "PlannedLoader", "build_loader", "choose_loader"]


def build_loader(
    shards: ShardSet,
    split: str,
    config: DataConfig,
    *,
    seed: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    training: bool | None = None,
) -> PlannedLoader:
    """Builds the loader `config` asks for over one split.

    Args:
        shards: opened shard folder, or shards at a URL (loader `webdataset`).
        split: "train" gives two augmented streams; "val" and "test" give every sample once, centre-cropped.
        training: False gives "train" as the others are given; by default the split decides.
        config: loader, sizes, order and augmentation.
        seed: of the run; with (epoch, step, rank) it determines every batch.
        device: where batches are delivered.
        rank: of this process.
        world_size: number of processes that share each batch.

    Raises:
        ConfigError: unknown loader, a batch that ranks cannot share, or a crop that the images do not fit.
        ShardError: the split is empty or its shards are damaged.
        BackendError: the loader's package is not installed.
    """
    require_choice("loader", config.loader, ("auto", *LOADERS))
    name = choose_loader(config, shards, device).name if config.loader == "auto" else config.loader
    if shards.num_samples(split) == 0:
        raise ShardError(f"{shards.root} has no samples in its '{split}' split; name another split or make shards that have it")
    if is_streamed(shards) and name not in _NEED_NO_FOLDER:
        raise ConfigError(f"loader '{name}' needs a folder, and {shards.root} is a URL: copy the shards here, or take --loader webdataset")
    training = split == "train" if training is None else training
    if training:
        _require_equal_shares(shards.num_samples(split), config, world_size)
    module_name, class_name = LOADERS[name].split(":")
    source_class = getattr(import_module(module_name), class_name)
    data = shards.split(split)
    if (
        training
        and config.augment.crop == "pad"
        and not ((data.heights_N == config.image_size) & (data.widths_N == config.image_size)).all()
    ):
        raise ConfigError(
            f"crop 'pad' needs stored images of {config.image_size} px, and {shards.root} has others; take --set data.augment.crop=resized"
        )
    request = PixelRequest(
        shards=shards, split=data, config=config, training=training, device=device, rank=rank, world_size=world_size, seed=seed
    )
    return PlannedLoader(request, source_class(request), num_classes=len(shards.class_names))


def _require_equal_shares(num_samples: int, config: DataConfig, world_size: int) -> None:
    """Every rank must get the same number of samples of every batch, and at least one."""
    rest = num_samples % config.batch_size
    if config.batch_size % world_size:
        raise ConfigError(f"batch_size {config.batch_size} cannot be shared by {world_size} ranks: choose a multiple of {world_size}")
    if config.order.drop_last and num_samples < config.batch_size:
        raise ConfigError(f"batch_size {config.batch_size} with drop_last leaves no batch of {num_samples} samples: choose a smaller one")
    if rest % world_size and not config.order.drop_last:
        raise ConfigError(f"the last batch of {rest} samples cannot be shared by {world_size} ranks: add --set data.order.drop_last=true")
