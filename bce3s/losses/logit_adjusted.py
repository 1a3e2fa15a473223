"""Logit-adjusted softmax cross-entropy (Menon et al. 2021, "Long-Tail Learning via Logit Adjustment")."""

from __future__ import annotations

from torch import Tensor

from bce3s.config import LossConfig
from bce3s.losses.ce import mixed_ce
from bce3s.losses.seam import LossDefaults, LossInputs, LossOutput
from bce3s.losses.terms import image_counts, three_views, widened


class LogitAdjustedLoss(LossDefaults):
    """Mean over the three views of the cross-entropy of z_k + τ·log π_k, π_k = n_k/N and τ = `logit_adjustment` (eq. 10).

    Training only: the prediction is the arg max of z. At τ = 0 it is "ce", at 1 "balanced-softmax". A class without training images
    counts as one of a single image.
    """

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Keeps τ·log π_k."""
        counts_K = image_counts(class_counts_K)
        self._shift_K = (config.logit_adjustment * (counts_K / counts_K.sum()).log()).float()

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """See `Loss`."""
        logits_VK = widened(inputs.heads.classifier(inputs.features_VD))
        joint = mixed_ce(logits_VK + self._shift_K, three_views(inputs))
        return LossOutput(joint, {"joint": joint.detach()})
