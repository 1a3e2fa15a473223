"""BCE, joint term only: the baseline that BCE3S extends (the paper's ablation row "BCE joint")."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from bce3s.config import LossConfig
from bce3s.losses.bce3s import BCE3SLoss


class BCELoss(BCE3SLoss):
    """BCE3S with both other weights at 0; same views, class subset and classifier."""

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Ignores the weights of `config`."""
        super().__init__(replace(config, contrastive_weight=0.0, uniform_weight=0.0), class_counts_K)
