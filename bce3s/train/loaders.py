"""The loaders of one run: one a split, the training one opened anew where the images grow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from bce3s.config import TrainConfig, parse_image_sizes
from bce3s.distributed import World
from pipelines.format import ShardSet
from pipelines.loaders import PlannedLoader, build_loader
from pipelines.types import BackendError


class RunLoaders:
    """Opens the splits of a run for one of its ranks."""

    def __init__(self, config: TrainConfig, shards: ShardSet, splits: tuple[str, ...], device: torch.device, world: World) -> None:
        """Opens all of them; `config` names a loader, not "auto".

        Raises:
            UserError: what `build_loader` raises.
        """
        self._config, self._shards, self._device, self._world = config, shards, device, world
        self._train_side = self.image_size(0)
        self._loaders: dict[str, PlannedLoader] = {}
        for split in dict.fromkeys(splits):
            self._loaders[split] = self._open(split, self._train_side if split == "train" else config.data.image_size)

    def __getitem__(self, split: str) -> PlannedLoader:
        """The loader of a split."""
        return self._loaders[split]

    def image_size(self, epoch: int) -> int:
        """Side of the training images of an epoch, in pixels."""
        sizes = parse_image_sizes(self._config.image_sizes)
        return sizes[max(first for first in sizes if first <= epoch)] if sizes else self._config.data.image_size

    def of_epoch(self, epoch: int) -> PlannedLoader:
        """The training loader, opened anew where the epoch's images have another size."""
        side = self.image_size(epoch)
        if side != self._train_side:
            self._loaders["train"].close()
            self._loaders["train"], self._train_side = self._open("train", side), side
        return self._loaders["train"]

    def _open(self, split: str, image_size: int) -> PlannedLoader:
        config, world, seed = replace(self._config.data, image_size=image_size), self._world, self._config.seed
        return build_loader(self._shards, split, config, seed=seed, device=self._device, rank=world.rank, world_size=world.size)

    @contextmanager
    def at_fault(self) -> Iterator[None]:
        """Inside, what cannot be read or written is a loader's fault, not the run folder's."""
        try:
            yield
        except OSError as error:
            name = self._config.data.loader
            raise BackendError(f"loader '{name}' failed: {error}; mend that, then add --resume to continue") from error

    def close(self) -> None:
        """Frees all of them."""
        for loader in self._loaders.values():
            loader.close()
