"""Class-balanced loss by the effective number of samples (Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bce3s.config import LossConfig
from bce3s.losses.ce import mixed_ce
from bce3s.losses.focal import mixed_focal
from bce3s.losses.seam import LossDefaults, LossInputs, LossOutput
from bce3s.losses.terms import image_counts, three_views


def effective_number_weights(class_counts_K: Tensor, beta: float) -> Tensor:
    """Class weights (1 − β)/(1 − β^n_k), of mean 1 over the classes with images (Cui et al. 2019, eq. 2 and section 4); float32 [K].

    Args:
        class_counts_K: int64 [K], training images; a class without any, which is no label, weighs as one of a single image.
        beta: β in [0, 1); 0 weighs all alike, towards 1 it is 1/n_k.
    """
    # 1 − β^n as expm1: the difference itself loses digits where β is near 1. β = 0 has the logarithm −inf, and weights of 1.
    log_beta = math.log(beta) if beta else -math.inf
    weights_K = 1.0 / -(image_counts(class_counts_K) * log_beta).expm1()
    present_K = (class_counts_K > 0) | (class_counts_K.sum() == 0)
    return (weights_K * (present_K.sum() / torch.where(present_K, weights_K, 0.0).sum())).float()


class ClassBalancedCE(LossDefaults):
    """Softmax cross-entropy of the three views, each image weighed by its label (section 4.1)."""

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Weighs the classes once."""
        self._weights_K = effective_number_weights(class_counts_K, config.effective_number_beta)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """See `Loss`."""
        joint = mixed_ce(inputs.heads.classifier(inputs.features_VD), three_views(inputs), self._weights_K)
        return LossOutput(joint, {"joint": joint.detach()})


class ClassBalancedFocal(LossDefaults):
    """Sigmoid focal loss of the three views, each image weighed by its label (section 4.3)."""

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Weighs the classes once."""
        self._gamma = config.focal_gamma
        self._weights_K = effective_number_weights(class_counts_K, config.effective_number_beta)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """See `Loss`."""
        joint = mixed_focal(inputs.heads.classifier(inputs.features_VD), three_views(inputs), self._gamma, self._weights_K)
        return LossOutput(joint, {"joint": joint.detach()})
