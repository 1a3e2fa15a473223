"""Losses: one file a method behind one seam.

A loss takes the features of the three views, the targets and the model's heads, and returns its total and its named terms. `LOSSES` maps
a name to its class; a new method is one file and one line here. `BCE3SLoss.for_classes` is the paper's loss for anybody's training loop.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

from torch import Tensor

from bce3s.config import LossConfig, TrainConfig
from bce3s.losses.bce3s import BCE3SLoss
from bce3s.losses.seam import Heads, Loss, LossDefaults, LossInputs, LossOutput, MixedTargets, Phase, Share
from bce3s.losses.standalone import StandaloneLoss
from pipelines.config import require, require_choice

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
    "BCE3SLoss",
    "Heads",
    "Loss",
    "LossDefaults",
    "LossInputs",
    "LossOutput",
    "MixedTargets",
    "Phase",
    "Share",
    "StandaloneLoss",
    "build_loss",
    "loss_class",
    "resolve_method",
]


def loss_class(name: str) -> type[Loss]:
    """The class of a method: its static facts are asked for before there is a network to train.

    Raises:
        ConfigError: unknown name; lists the known ones.
    """
    require_choice("method", name, tuple(LOSSES))
    module_name, class_name = LOSSES[name].split(":")
    method: type[Loss] = getattr(import_module(module_name), class_name)
    return method


def build_loss(config: LossConfig, class_counts_K: Tensor) -> Loss:
    """Builds the loss `config.name` names.

    Args:
        config: name and weights.
        class_counts_K: int64 [K], training images a class, on the device of the run.

    Raises:
        ConfigError: unknown name; lists the known ones.
    """
    return loss_class(config.name)(config, class_counts_K)


def resolve_method(config: TrainConfig) -> TrainConfig:
    """`config` with what its method decides filled in: the kind of classifier, and what the partner stream holds.

    Raises:
        ConfigError: unknown method (lists the known ones), or settings that are not the method's.
    """
    name, loss, model, order = config.loss.name, config.loss, config.model, config.data.order
    method = loss_class(name)
    of_a_grid = (loss.joint, loss.contrastive, loss.uniform) != ("bce", "bce", "bce")
    require(
        name == "tsl" or not of_a_grid, f"joint, contrastive and uniform choose the terms of method tsl, not of {name}: add --method tsl"
    )
    if model.classifier == "auto":
        # A cosine classifier has no biases, so a recipe's prior is nothing to set.
        model = replace(model, classifier=method.classifier, bias_prior=model.bias_prior and method.classifier != "cosine")
    fits = model.classifier == method.classifier or not method.needs_its_classifier
    require(fits, f"method {name} is defined on a {method.classifier} classifier: leave model.classifier={model.classifier} out")
    if order.partner == "auto":
        order = replace(order, partner="same" if method.views == "pair" else "drawn")
    pairs = method.views != "pair" or order.partner == "same"
    require(pairs, f"method {name} trains on two augmentations of each image: leave data.order.partner={order.partner} out")
    return replace(config, model=model, data=replace(config.data, order=order))
