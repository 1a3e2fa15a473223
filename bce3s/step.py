"""One training step: the views of one batch, features, loss, backward, update, memory. Nothing is read back from the device.

schedule ─→ [ views ─→ features, loss ─→ backward ] for each micro-batch ─→ update ─→ feature memory ─→ weight average
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bce3s.config import TrainConfig
from bce3s.device import Placement
from bce3s.distributed import ALONE, World, synced_batch_norm
from bce3s.graph import GraphedStep
from bce3s.losses import Loss, LossInputs, LossOutput, MixedTargets, Phase, Share
from bce3s.models import Recogniser
from bce3s.optimizers import build_optimizer, clip_gradients, learning_rate_at, set_learning_rate
from bce3s.weight_average import WeightAverage
from pipelines.augment.mix import channel_statistics, mix_views, normalise
from pipelines.randomness import Purpose, derive_key
from pipelines.types import Batch, ConfigError

# torch 2.13 renamed it, and warns about the old name.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_OWN_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


class TrainStep:
    """Applies one step to a model. Holds the optimizer, the gradient scaler (fp16 only), the weight average and the device constants."""

    def __init__(self, model: Recogniser, loss: Loss, config: TrainConfig, placement: Placement, world: World = ALONE) -> None:
        """Builds the optimizer; the model already lives on the device.

        Raises:
            ConfigError: settings that do not go together.
        """
        if config.optimizer.name == "lars" and placement.precision == "fp16":
            raise ConfigError("optimizer lars does not know fp16's loss scale; take --precision bf16 or fp32, or --set optimizer.name=sgd")
        if config.cuda_graphs and world.size > 1:
            raise ConfigError("cuda_graphs is for a single process yet; leave --set cuda_graphs=true out where there are several ranks")
        parts = world.size * config.accumulate_steps
        if config.data.batch_size % parts:
            micro = f" in {config.accumulate_steps} micro-batches" if config.accumulate_steps > 1 else ""
            raise ConfigError(
                f"batch_size {config.data.batch_size} cannot be shared by {world.size} ranks{micro}: choose a multiple of {parts}"
            )
        if config.sync_batch_norm:
            synced_batch_norm(model, world)
        self.model, self.loss, self.config, self.placement, self.world = model, loss, config, placement, world
        self.optimizer = build_optimizer(model, config.optimizer, placement.device)
        self.scaler = torch.amp.GradScaler(placement.device.type, enabled=placement.precision == "fp16")
        self.average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
        self.features = torch.compile(model.features) if config.compile else model.features
        self._mean, self._std = channel_statistics(config.data.augment, placement.device)
        self._draw_key = torch.zeros((), dtype=torch.int64, device=placement.device)
        self._progress = torch.zeros((), device=placement.device)
        self._phase: Phase | None = None
        self._phase_of, self._takes_pairs = loss.phase, loss.views == "pair"
        self._wrapped: DistributedDataParallel | None = None
        self._graphs = GraphedStep(self.apply, placement.device) if config.cuda_graphs and placement.device.type == "cuda" else None

    def __call__(self, batch: Batch, num_steps: int) -> dict[str, Tensor]:
        """Trains on `batch`, step `batch.step` of `num_steps` of its epoch; returns detached loss terms and "total", float32 [].

        The terms are those of this rank's share of the batch; their mean over the ranks is that of the whole. With CUDA graphs they lie in
        memory that the next step overwrites.
        """
        self.schedule(batch, num_steps)
        terms = self.apply(batch) if self._graphs is None else self._graphs(batch, self._phase)
        if self.average is not None:
            self.average.update()
        return terms

    def schedule(self, batch: Batch, num_steps: int) -> None:
        """Sets the learning rate and the draws of this place in the run, and what is trained in this phase of the loss."""
        # The draw is keyed by place, so a resumed run continues with the same class subsets.
        self._draw_key.fill_(derive_key(self.config.seed, batch.epoch, batch.step, Purpose.CLASS_SUBSET) >> 1)
        self._progress.fill_(batch.epoch / self.config.epochs)
        progress = batch.epoch + batch.step / num_steps
        set_learning_rate(self.optimizer, learning_rate_at(self.config.optimizer, self.config.epochs, progress))
        phase = self._phase_of(batch.epoch, self.config.epochs)
        if phase != self._phase:
            self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        """Ranks average the gradients of what the phase trains; DistributedDataParallel waits for each of them, so it is wrapped anew."""
        self._phase = phase
        self.model.projector.requires_grad_(phase.trains_projector)
        if self.world.size > 1:
            # The ranks start from one seed or one checkpoint, which Trainer verifies; batch-norm's statistics are each rank's own.
            self._wrapped = DistributedDataParallel(
                _Forward(self.model, self._features_and_loss), init_sync=False, gradient_as_bucket_view=True, **_OWN_BUFFERS
            )

    def apply(self, batch: Batch) -> dict[str, Tensor]:
        """The step behind `schedule`: a function of device tensors only, so that it can be captured in a graph."""
        labels_B = batch.labels_S.chunk(2)[0]
        labels_G = self.world.gather_rows(labels_B)
        parts = micro_batches(batch, self.config.data.batch_size // (self.world.size * self.config.accumulate_steps))
        outputs: list[LossOutput] = []
        weights = [part.num_sources / batch.num_sources for part in parts]
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            share = Share(self.world.rank * len(parts) + number, self.world.size * len(parts), weight / self.world.size)
            with self._gradients_stay_here(number + 1 < len(parts)):
                output = self.evaluate_loss(self.views(part), part, labels_G, share)
                self.backward(output.total * weight, first=number == 0)
            outputs.append(output)
        self.update()
        self._remember(outputs, labels_G)
        terms = [{"total": output.total.detach(), **output.terms} for output in outputs]
        return {name: torch.stack([each[name] * weight for each, weight in zip(terms, weights, strict=True)]).sum() for name in terms[0]}

    def _gradients_stay_here(self, more_to_come: bool) -> AbstractContextManager[None]:
        """Only the last micro-batch averages its gradients over the ranks."""
        return self._wrapped.no_sync() if more_to_come and self._wrapped is not None else nullcontext()

    def _remember(self, outputs: list[LossOutput], labels_G: Tensor) -> None:
        """The last sample of each class in the order of the whole batch enters the feature memory, the same on every rank."""
        projections = [output.projections_BP for output in outputs if output.projections_BP is not None]
        if projections:
            self.model.feature_memory.update(self.world.gather_rows(torch.cat(projections)), labels_G)

    def views(self, batch: Batch) -> Tensor:
        """The normalised views [V, 3, H, W] of a training batch, 3B or, of a method that takes pairs, 2B, as the run's precision wants."""
        assert batch.mix is not None, "a training batch carries its mix"
        if self._takes_pairs:
            views = normalise(batch.images_SHWC, self._mean, self._std, self.placement.dtype)
        else:
            views = mix_views(batch.images_SHWC, batch.mix, self._mean, self._std, self.placement.dtype)
        return views if self.placement.channels_last else views.contiguous()

    def evaluate_loss(self, views: Tensor, batch: Batch, labels_G: Tensor | None = None, share: Share | None = None) -> LossOutput:
        """Features of the views [V, 3, H, W] and the loss on them; `labels_G` and `share` are for a part of a larger batch."""
        forward = self._features_and_loss if self._wrapped is None else self._wrapped
        output: LossOutput = forward(views, batch, batch.labels_S.chunk(2)[0] if labels_G is None else labels_G, share or Share())
        return output

    def _features_and_loss(self, views: Tensor, batch: Batch, labels_G: Tensor, share: Share) -> LossOutput:
        assert batch.mix is not None, "a training batch carries its mix"
        labels_B, partner_labels_B = batch.labels_S.chunk(2)
        with self.placement.autocast():
            inputs = LossInputs(
                features_VD=self.features(views),
                mixup=MixedTargets(labels_B, partner_labels_B, batch.mix[0]),
                cutmix=MixedTargets(labels_B, partner_labels_B, batch.mix[1]),
                heads=self.model,
                epoch=batch.epoch,
                num_epochs=self.config.epochs,
                progress=self._progress,
                batch_labels_G=labels_G,
                draw_key=self._draw_key,
                share=share,
            )
            return self.loss(inputs)

    def backward(self, total: Tensor, *, first: bool = True) -> None:
        """Gradients of float32 [] `total`, in place of those before or, unless it is the `first` of the step, added to them."""
        if first:
            self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()

    def update(self) -> None:
        """One optimizer step, clipped if the config says so."""
        clip_norm = self.config.optimizer.clip_norm
        if clip_norm:
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self.model.parameters(), clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def micro_batches(batch: Batch, num_sources: int) -> list[Batch]:
    """Cuts a training batch into as few parts of at most `num_sources` source images with their partners as it takes, in order.

    The parts of a batch that `num_sources` does not divide, the last of an epoch, are as even as can be: batch-norm's running variance,
    which the evaluation that follows reads, would forget what differs between images if one of them were tiny.
    """
    count = -(-batch.num_sources // num_sources)
    return [batch] if count == 1 else list(_cut(batch, count))


def _cut(batch: Batch, count: int) -> Iterator[Batch]:
    total = batch.num_sources
    bounds = [total * number // count for number in range(count + 1)]
    for start, stop in pairwise(bounds):
        instance, partner = slice(start, stop), slice(total + start, total + stop)
        yield replace(
            batch,
            images_SHWC=torch.cat([batch.images_SHWC[instance], batch.images_SHWC[partner]]),
            labels_S=torch.cat([batch.labels_S[instance], batch.labels_S[partner]]),
            ids_S=np.concatenate([batch.ids_S[instance], batch.ids_S[partner]]),
        )


class _Forward(nn.Module):
    """What DistributedDataParallel wraps: the model's parameters, and the computation whose gradients are averaged."""

    def __init__(self, model: Recogniser, compute: Callable[[Tensor, Batch, Tensor, Share], LossOutput]) -> None:
        super().__init__()
        self.model, self._compute = model, compute

    def forward(self, views: Tensor, batch: Batch, labels_G: Tensor, share: Share) -> LossOutput:
        return self._compute(views, batch, labels_G, share)
