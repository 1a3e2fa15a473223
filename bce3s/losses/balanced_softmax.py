"""Balanced softmax (Ren et al. 2020, "Balanced Meta-Softmax for Long-Tailed Visual Recognition"); their meta sampler is not part of it."""

from __future__ import annotations

from torch import Tensor

from bce3s.config import LossConfig
from bce3s.losses.ce import mixed_ce
from bce3s.losses.seam import LossDefaults, LossInputs, LossOutput
from bce3s.losses.terms import image_counts, three_views, widened


class BalancedSoftmaxLoss(LossDefaults):
    """Mean over the three views of −log( n_y·exp(z_y) / Σ_k n_k·exp(z_k) ) (eq. 3 and 4): cross-entropy of z_k + log n_k.

    Training only: the prediction is the arg max of z. A class without training images counts as one of a single image.
    """

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Keeps log n_k; there is no setting."""
        del config
        self._log_counts_K = image_counts(class_counts_K).log().float()

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """See `Loss`."""
        logits_VK = widened(inputs.heads.classifier(inputs.features_VD))
        joint = mixed_ce(logits_VK + self._log_counts_K, three_views(inputs))
        return LossOutput(joint, {"joint": joint.detach()})
