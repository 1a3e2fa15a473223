"""Loaders: the same ids in the same order with the same crops, whatever reads and decodes the pixels.

`LOADERS` maps a name to a pixel source. A new loader is one file with a class that has `stream` and `close`, and one line here.
"""

from __future__ import annotations

from importlib import import_module

import torch

from pipelines.config import DataConfig, require_choice
from pipelines.format import ShardSet
from pipelines.loaders.planned import PixelRequest, PlannedLoader
from pipelines.types import ConfigError, ShardError

LOADERS: dict[str, str] = {
    "dali": "pipelines.loaders.dali:DaliPixels",
    "resident": "pipelines.loaders.resident:ResidentPixels",
    "synthetic": "pipelines.loaders.synthetic:SyntheticPixels",
}
RESIDENT_MAX_IMAGE_SIZE = 64

__all__ = ["LOADERS", "PlannedLoader", "build_loader", "choose_loader"]


def choose_loader(name: str, image_size: int) -> tuple[str, str]:
    """Resolves "auto"; returns the loader's name and why it was chosen, in a few words.

    Raises:
        ConfigError: unknown name; lists the known ones.
    """
    require_choice("loader", name, ("auto", *LOADERS))
    if name != "auto":
        return name, "asked for"
    if image_size <= RESIDENT_MAX_IMAGE_SIZE:
        return "resident", f"images of {image_size} px or less fit in memory decoded"
    return "dali", f"images above {RESIDENT_MAX_IMAGE_SIZE} px are decoded while training"


def build_loader(
    shards: ShardSet, split: str, config: DataConfig, *, seed: int, device: torch.device, rank: int = 0, world_size: int = 1
) -> PlannedLoader:
    """Builds the loader `config` asks for over one split.

    Args:
        shards: opened shard folder.
        split: "train" gives two augmented streams; "val" and "test" give every sample once, centre-cropped.
        config: loader, sizes, order and augmentation.
        seed: of the run; with (epoch, step, rank) it determines every batch.
        device: where batches are delivered.
        rank: of this process.
        world_size: number of processes that share each batch.

    Raises:
        ConfigError: unknown loader, or a batch smaller than the number of ranks.
        ShardError: the split is empty or its shards are damaged.
        BackendError: the loader's package is not installed.
    """
    name, _ = choose_loader(config.loader, config.image_size)
    if config.batch_size < world_size:
        raise ConfigError(f"batch_size {config.batch_size} is smaller than the {world_size} ranks it is split over")
    if shards.num_samples(split) == 0:
        raise ShardError(f"{shards.root} has no samples in its '{split}' split")
    module_name, class_name = LOADERS[name].split(":")
    source_class = getattr(import_module(module_name), class_name)
    data = shards.split(split)
    request = PixelRequest(split=data, config=config, training=split == "train", device=device, rank=rank, world_size=world_size, seed=seed)
    return PlannedLoader(request, source_class(request), num_classes=len(shards.class_names))
