"""The losses of stage two on the logits of one batch: class-balanced BCE, and plain cross-entropy under class-balanced sampling."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from bce3s.losses import MixedTargets
from bce3s.losses.class_balanced import effective_number_weights
from bce3s.losses.class_subset import draw_class_subset
from bce3s.losses.fused_bce import fused_bce


class StageTwoLoss(Protocol):
    """What a classifier is retrained with."""

    def __call__(self, logits_BK: Tensor, labels_B: Tensor, draw_key: Tensor) -> Tensor:
        """Loss, float32 []; `draw_key`, int64 [], is a number of its own for every step, on the device of the logits."""
        ...


class ClassBalancedBCE:
    """Mean over the batch of w_y·Σ_k [ 1{k=y}·softplus(−z_k) + 1{k≠y}·softplus(z_k) ] over a class subset (method.md, "Stage two").

    The weight of a sample's class is on all of its terms (traps.md A14). Logits are clamped, which the reference leaves out here (B1).
    """

    def __init__(self, class_counts_K: Tensor, beta: float, negative_ratio: float, logit_clamp: float) -> None:
        """Weighs the classes once.

        Args:
            class_counts_K: int64 [K], training images, on the device of the run.
            beta: β of the effective number (Cui et al. 2019); the weights have mean 1 over classes.
            negative_ratio: share of the K classes in a step, those of the batch always among them (traps.md A1).
            logit_clamp: logits are clamped to ± this.
        """
        self.weights_K = effective_number_weights(class_counts_K, beta)
        self._negative_ratio, self._logit_clamp = negative_ratio, logit_clamp

    def __call__(self, logits_BK: Tensor, labels_B: Tensor, draw_key: Tensor) -> Tensor:
        """See `StageTwoLoss`; the backward pass writes over the logits."""
        mask_K = draw_class_subset(labels_B, logits_BK.shape[1], self._negative_ratio, draw_key)
        targets = MixedTargets(labels_B, labels_B, torch.ones((), device=labels_B.device))
        losses_B = fused_bce(logits_BK, targets, mask_K, logit_clamp=self._logit_clamp)
        return (self.weights_K[labels_B] * losses_B).mean()


class CrossEntropy:
    """Softmax cross-entropy, of cRT and LWS (Kang et al. 2020); the sampling does the balancing."""

    def __call__(self, logits_BK: Tensor, labels_B: Tensor, draw_key: Tensor) -> Tensor:
        """See `StageTwoLoss`."""
        del draw_key
        return functional.cross_entropy(logits_BK, labels_B)
