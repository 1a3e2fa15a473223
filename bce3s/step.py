"""One training step: three views from one batch, features, loss, backward, update. Nothing is read back from the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bce3s.config import OptimizerConfig, TrainConfig
from bce3s.device import Placement
from bce3s.losses import Loss, LossInputs, LossOutput, MixedTargets
from bce3s.models import Recogniser
from pipelines.augment.mix import channel_statistics, mix_views
from pipelines.randomness import Purpose, derive_key
from pipelines.types import Batch


def learning_rate_at(config: OptimizerConfig, epochs: int, progress: float) -> float:
    """The rate at `progress` epochs: linear warm-up over at most half of the epochs, then a half cosine to 0 at `epochs`.

    With `schedule` "epoch" the rate is constant within an epoch, as in the reference, which also steps its schedule before the first
    epoch (traps.md A7: its last epoch runs at rate 0); here epoch e runs at the rate of its start, and warm-up at that of its end.
    """
    warmup = min(config.warmup_epochs, epochs / 2)
    if config.schedule == "epoch":
        progress = math.floor(progress)
        if progress < warmup:
            return config.learning_rate * min(1.0, (progress + 1) / warmup)
    if progress < warmup:
        return config.learning_rate * progress / warmup
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / (epochs - warmup))))


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.SGD:
    """Fused SGD; norms and biases in a group of their own if they are spared weight decay."""
    spared = [] if config.decay_norm_and_bias else [p for p in model.parameters() if p.ndim <= 1]
    decayed = [p for p in model.parameters() if config.decay_norm_and_bias or p.ndim > 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    if config.momentum:
        # Momenta start as zeros instead of with the first gradient, which is the same step. The fused kernel wants all of a group at once,
        # the projector joins an epoch late, and a first step that fp16's scaler skips would leave torch's own ones uninitialised.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class TrainStep:
    """Applies one step to a model. Holds the optimizer, the gradient scaler (fp16 only) and the device constants."""

    def __init__(self, model: Recogniser, loss: Loss, config: TrainConfig, placement: Placement) -> None:
        """Builds the optimizer; the model already lives on the device."""
        self.model, self.loss, self.config, self.placement = model, loss, config, placement
        self.optimizer = build_optimizer(model, config.optimizer)
        self.scaler = torch.amp.GradScaler(placement.device.type, enabled=placement.precision == "fp16")
        self.features = torch.compile(model.features) if config.compile else model.features
        self._mean, self._std = channel_statistics(config.data.augment, placement.device)
        self._draw_key = torch.zeros((), dtype=torch.int64, device=placement.device)

    def __call__(self, batch: Batch, num_steps: int) -> dict[str, Tensor]:
        """Trains on `batch`, step `batch.step` of `num_steps` of its epoch; returns detached loss terms and "total", float32 []."""
        self.schedule(batch, num_steps)
        output = self.evaluate_loss(self.views(batch), batch)
        self.backward(output.total)
        self.update()
        if output.projections_BP is not None:
            self.model.feature_memory.update(output.projections_BP, batch.labels_S.chunk(2)[0])
        return {"total": output.total.detach(), **output.terms}

    def schedule(self, batch: Batch, num_steps: int) -> None:
        """Sets the learning rate and the draws of this place in the run."""
        # The draw is keyed by place, so a resumed run continues with the same class subsets.
        self._draw_key.fill_(derive_key(self.config.seed, batch.epoch, batch.step, Purpose.CLASS_SUBSET) >> 1)
        rate = learning_rate_at(self.config.optimizer, self.config.epochs, batch.epoch + batch.step / num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def views(self, batch: Batch) -> Tensor:
        """The normalised views [3B, 3, H, W] of a training batch, in the run's precision and memory layout."""
        assert batch.mix is not None, "a training batch carries its mix"
        views = mix_views(batch.images_SHWC, batch.mix, self._mean, self._std, self.placement.dtype)
        return views if self.placement.channels_last else views.contiguous()

    def evaluate_loss(self, views: Tensor, batch: Batch) -> LossOutput:
        """Features of the views [3B, 3, H, W] and the loss on them."""
        assert batch.mix is not None, "a training batch carries its mix"
        labels_B, partner_labels_B = batch.labels_S.chunk(2)
        with self.placement.autocast():
            inputs = LossInputs(
                features_VD=self.features(views),
                mixup=MixedTargets(labels_B, partner_labels_B, batch.mix[0]),
                cutmix=MixedTargets(labels_B, partner_labels_B, batch.mix[1]),
                heads=self.model,
                epoch=batch.epoch,
                batch_labels_G=labels_B,
                draw_key=self._draw_key,
            )
            return self.loss(inputs)

    def backward(self, total: Tensor) -> None:
        """Gradients of float32 [] `total`, in place of those before."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()

    def update(self) -> None:
        """One optimizer step, clipped if the config says so."""
        clip_norm = self.config.optimizer.clip_norm
        if clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
