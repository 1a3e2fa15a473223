"""Losses: one file a method behind one seam.

A loss takes the features of the three views, the targets and the model's heads, and returns its total and its named terms. `LOSSES` maps
a name to its class; a new method is one file and one line here.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

from torch import Tensor

from bce3s.config import LossConfig, TrainConfig
from bce3s.losses.seam import Heads, Loss, LossInputs, LossOutput, MixedTargets, OnMixedViews, Phase, Share
from pipelines.config import require_choice

LOSSES: dict[str, str] = {
    "bce3s": "bce3s.losses.bce3s:BCE3SLoss",
    "bce": "bce3s.losses.bce:BCELoss",
    "ce": "bce3s.losses.ce:CELoss",
    "tsl": "bce3s.losses.tsl:TSLLoss",
    "focal": "bce3s.losses.focal:FocalLoss",
    "cb-ce": "bce3s.losses.class_balanced:ClassBalancedCE",
    "cb-focal": "bce3s.losses.class_balanced:ClassBalancedFocal",
    "balanced-softmax": "bce3s.losses.balanced_softmax:BalancedSoftmaxLoss",
    "logit-adjusted": "bce3s.losses.logit_adjusted:LogitAdjustedLoss",
    "ldam-drw": "bce3s.losses.ldam:LDAMLoss",
    "glmc": "bce3s.losses.glmc:GLMCLoss",
    "bcl": "bce3s.losses.bcl:BCLLoss",
}

__all__ = [
    "LOSSES",
    "Heads",
    "Loss",
    "LossInputs",
    "LossOutput",
    "MixedTargets",
    "OnMixedViews",
    "Phase",
    "Share",
    "build_loss",
    "loss_class",
    "resolve_method",
]


def loss_class(name: str) -> Any:
    """The class of a method: its static facts are asked for before there is a network to train.

    Raises:
        ConfigError: unknown name; lists the known ones.
    """
    require_choice("method", name, tuple(LOSSES))
    module_name, class_name = LOSSES[name].split(":")
    return getattr(import_module(module_name), class_name)


def build_loss(config: LossConfig, class_counts_K: Tensor) -> Loss:
    """Builds the loss `config.name` names.

    Args:
        config: name and weights.
        class_counts_K: int64 [K], training images a class, on the device of the run.

    Raises:
        ConfigError: unknown name; lists the known ones.
    """
    loss: Loss = loss_class(config.name)(config, class_counts_K)
    return loss


def resolve_method(config: TrainConfig) -> TrainConfig:
    """`config` with what its method decides filled in: the kind of classifier, and what the partner stream holds.

    Raises:
        ConfigError: unknown method; lists the known ones.
    """
    method = loss_class(config.loss.name)
    if config.model.classifier == "auto":
        # A cosine classifier has no biases: a recipe's prior is then nothing to set, where a user's own choice of both is refused.
        bias_prior = config.model.bias_prior and method.classifier != "cosine"
        config = replace(config, model=replace(config.model, classifier=method.classifier, bias_prior=bias_prior))
    if method.views == "pair" and config.data.order.partner != "same":
        order = replace(config.data.order, partner="same")
        config = replace(config, data=replace(config.data, order=order))
    return config
