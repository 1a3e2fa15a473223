"""Losses: one file a method behind one seam.

A loss takes the features of the three views, the targets and the model's heads, and returns its total and its named terms. `LOSSES` maps
a name to its class; a new method is one file and one line here.
"""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from bce3s.config import LossConfig
from bce3s.losses.seam import Heads, Loss, LossInputs, LossOutput, MixedTargets, Phase, Share
from pipelines.config import require_choice

LOSSES: dict[str, str] = {
    "bce3s": "bce3s.losses.bce3s:BCE3SLoss",
    "bce": "bce3s.losses.bce:BCELoss",
    "ce": "bce3s.losses.ce:CELoss",
}

__all__ = ["LOSSES", "Heads", "Loss", "LossInputs", "LossOutput", "MixedTargets", "Phase", "Share", "build_loss"]


def build_loss(config: LossConfig, class_counts_K: Tensor) -> Loss:
    """Builds the loss `config.name` names.

    Args:
        config: name and weights.
        class_counts_K: int64 [K], training images a class, on the device of the run.

    Raises:
        ConfigError: unknown name; lists the known ones.
    """
    require_choice("loss", config.name, tuple(LOSSES))
    module_name, class_name = LOSSES[config.name].split(":")
    loss: Loss = getattr(import_module(module_name), class_name)(config, class_counts_K)
    return loss
