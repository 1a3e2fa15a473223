"""What is measured: the run that `bce3s fast-train` would start with the same options, cut into its stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import count
from pathlib import Path

import numpy as np
import torch

from bce3s.config import TrainConfig
from bce3s.device import apply_numerics, resolve_placement
from bce3s.losses import build_loss, loss_class
from bce3s.step import TrainStep
from bce3s.train import build_model
from pipelines.config import require_choice
from pipelines.format import ShardSet
from pipelines.loaders import LOADERS, PlannedLoader, build_loader, choose_loader
from pipelines.loaders.plan import BatchPlan, StepOrder, train_plans
from pipelines.loaders.planned import PixelRequest, split_geometry
from pipelines.order import SampleOrder
from pipelines.types import Batch, ConfigError, IntArray, ShardError


class Workload:
    """Data, order, loader and step of one run.

    Attributes:
        choice: the loader and why.
        is_streamed: whether the shards lie at a URL: no tar is here to be read.
        first_epoch: the epoch measured first, the first one in which every term of the loss takes part.
        num_samples: S, decoded images of a full batch.
    """

    def __init__(self, config: TrainConfig, shards: ShardSet) -> None:
        """Checks the options and maps the training split; reads no image.

        Raises:
            UserError: shards of another data set or without training images, unknown names, a device that is missing.
        """
        if shards.dataset != config.dataset:
            raise ConfigError(
                f"{shards.root} holds data set '{shards.dataset}', not '{config.dataset}'; name the right --shards or --dataset"
            )
        if not shards.num_samples("train"):
            raise ShardError(f"{shards.root} has no training images to measure with; make shards that have")
        if loss_class(config.loss.name).views != "mixed":
            raise ConfigError(
                f"profile counts three views for every two decoded images, and method '{config.loss.name}' has two; "
                "take --set loss.name=bce3s for the time of loader and network"
            )
        self.config, self.shards = config, shards
        self.placement = resolve_placement(config)
        apply_numerics(config)
        self.device = self.placement.device
        require_choice("loader", config.data.loader, ("auto", *LOADERS))
        self.choice = choose_loader(config.data, shards, self.device)
        self.is_streamed = not isinstance(shards.root, Path)
        self.split = shards.split("train")
        self.first_epoch = config.loss.contrastive_warmup_epochs
        self.num_samples = self.request(self.device).max_samples

    def request(self, device: torch.device, hw_decoder_load: float | None = None) -> PixelRequest:
        """What a pixel source of this run on `device` is asked for; with another share of the hardware decoder where given."""
        config = self.config.data
        if hw_decoder_load is not None:
            config = replace(config, dali=replace(config.dali, hw_decoder_load=hw_decoder_load))
        return PixelRequest(
            shards=self.shards, split=self.split, config=config, training=True, device=device, rank=0, world_size=1, seed=self.config.seed
        )

    def plans(self) -> Iterator[BatchPlan]:
        """The real order with its crops, epoch after epoch without end."""
        config, split = self.config.data, self.split
        geometry = split_geometry(split, config.image_size)
        for epoch in count(self.first_epoch):
            yield from train_plans(self._order, geometry, config.augment, epoch, 0, 0, 1)

    def epoch_ids(self) -> IntArray:
        """int64 [E]: every id of the first measured epoch as the plans draw them, step by step, instance and partner stream."""
        order = self._order
        streams = (order.instance_epoch(self.first_epoch), order.partner_epoch(self.first_epoch))
        steps = (order.step_positions(step) for step in range(order.num_steps))
        return np.concatenate([stream[positions_B] for positions_B in steps for stream in streams])

    @cached_property
    def _order(self) -> StepOrder:
        """The run's: loader `webdataset` has one of its own."""
        config = self.config.data
        if self.choice.name == "webdataset":
            from pipelines.loaders.webdataset import WebdatasetPixels

            source = WebdatasetPixels(self.request(self.device))
            source.close()
            if source.order is not None:
                return source.order
        return SampleOrder(self.split.labels_N, len(self.shards.class_names), config.batch_size, self.config.seed, config.order)

    def loader(self, name: str | None = None) -> PlannedLoader:
        """The run's loader, or another one under the same settings."""
        config = replace(self.config.data, loader=name or self.choice.name)
        return build_loader(self.shards, "train", config, seed=self.config.seed, device=self.device)

    def step(self, *, channels_last: bool, compiled: bool, graphed: bool = False) -> TrainStep:
        """A fresh model with its training step, in the memory layout asked for."""
        config = replace(self.config, channels_last="on" if channels_last else "off", compile=compiled, cuda_graphs=graphed)
        placement = resolve_placement(config)
        model = build_model(config, len(self.shards.class_names), placement)
        model.train()
        counts_K = torch.from_numpy(self.shards.class_counts("train")).to(placement.device)
        return TrainStep(model, build_loss(config.loss, counts_K), config, placement)

    @property
    def step_key(self) -> str:
        """The row of `NAMES` that is this run's step as configured."""
        if self.config.cuda_graphs and self.device.type == "cuda":
            return "step.graph"
        if self.config.compile:
            return "step.compiled"
        return "step.channels_last" if self.placement.channels_last else "step.contiguous"


class EndlessBatches:
    """A loader's batches, epoch after epoch; an epoch's end costs what it costs in training."""

    def __init__(self, loader: PlannedLoader, first_epoch: int) -> None:
        """Draws nothing yet."""
        self.num_steps = loader.num_steps
        self._loader, self._epoch = loader, first_epoch
        self._batches = loader.epoch(first_epoch)

    def __iter__(self) -> EndlessBatches:
        """Itself."""
        return self

    def __next__(self) -> Batch:
        """The next batch."""
        batch = next(self._batches, None)
        while batch is None:
            self._epoch += 1
            self._batches = self._loader.epoch(self._epoch)
            batch = next(self._batches, None)
        return batch
