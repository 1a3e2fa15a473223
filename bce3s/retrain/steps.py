"""The steps of stage two: only the classifier takes gradients, nothing is read back from the device within an epoch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bce3s.config import OptimizerConfig, RetrainConfig
from bce3s.optimizers import build_optimizer, learning_rate_at, set_learning_rate
from bce3s.retrain.class_balanced import StageTwoLoss
from bce3s.retrain.feeds import Feed
from bce3s.retrain.max_norm import MaxNorm
from pipelines.randomness import Purpose, derive_key


class ClassifierSteps:
    """SGD on the parameters of `trained` that take gradients, a half cosine from the peak rate to 0, changed every step; in float32."""

    def __init__(self, trained: nn.Module, loss: StageTwoLoss, config: RetrainConfig, seed: int, first_epoch: int) -> None:
        """Builds the optimizer.

        Args:
            trained: features [B, D] to logits [B, K], on the device of the run.
            loss: of a batch.
            config: of stage two.
            seed: with `first_epoch` + epoch and step it determines every class subset.
            first_epoch: number of epochs that stage one had, so that no draw is made twice.
        """
        config = config.resolved()
        self._trained, self._loss, self._epochs, self._seed, self._first_epoch = trained, loss, config.epochs, seed, first_epoch
        learned = nn.ParameterList(parameter for parameter in trained.parameters() if parameter.requires_grad)
        device = learned[0].device
        self._rates = OptimizerConfig(
            learning_rate=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, schedule="step"
        )
        self._optimizer = build_optimizer(learned, self._rates, device)
        self._draw_key = torch.zeros((), dtype=torch.int64, device=device)
        weight = getattr(trained, "weight", None)
        self._weight_KD = weight if isinstance(weight, nn.Parameter) else None
        self._max_norm = MaxNorm(self._weight_KD, config.max_norm) if config.max_norm and self._weight_KD is not None else None

    def epoch(self, feed: Feed, epoch: int) -> Tensor:
        """Trains one epoch, from 0; the mean of its losses, float32 [] on the device."""
        total = torch.zeros((), device=self._draw_key.device)
        for step, (features_BD, labels_B) in enumerate(feed.epoch(epoch)):
            set_learning_rate(self._optimizer, learning_rate_at(self._rates, self._epochs, epoch + step / feed.num_steps))
            self._draw_key.fill_(derive_key(self._seed, self._first_epoch + epoch, step, Purpose.CLASS_SUBSET) >> 1)
            loss = self._loss(self._trained(features_BD), labels_B, self._draw_key)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            total += loss.detach()
        if self._max_norm is not None and self._weight_KD is not None:
            self._max_norm.project(self._weight_KD)
        return total / feed.num_steps
