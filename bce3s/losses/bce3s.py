"""BCE3S: BCE joint, BCE contrastive and BCE uniform learning (Fan et al., AAAI 2026; method.md, "One step")."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from bce3s.config import LossConfig
from bce3s.losses.tsl import TSLLoss


class BCE3SLoss(TSLLoss):
    """`TSLLoss` with all three terms as BCE."""

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Ignores the kinds of `config`."""
        super().__init__(replace(config, joint="bce", contrastive="bce", uniform="bce"), class_counts_K)
