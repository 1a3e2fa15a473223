"""BCE, joint term only: the baseline that BCE3S extends (the paper's ablation row "BCE joint")."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from bce3s.config import LossConfig
from bce3s.losses.tsl import TSLLoss


class BCELoss(TSLLoss):
    """`TSLLoss` with the joint term as BCE and nothing else; same views, class subset and classifier as BCE3S."""

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Ignores the kinds of `config`."""
        super().__init__(replace(config, joint="bce", contrastive="off", uniform="off"), class_counts_K)
