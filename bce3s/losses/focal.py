"""Sigmoid focal loss (Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 4), as Cui et al. 2019 classify with it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from bce3s.config import LossConfig
from bce3s.losses.seam import LossDefaults, LossInputs, LossOutput, MixedTargets
from bce3s.losses.terms import mixed_over_labels, three_views, widened


class FocalLoss(LossDefaults):
    """Mean over the three views of the focal loss with γ = `focal_gamma`; γ = 0 is one-hot BCE over all classes."""

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Keeps γ; the class counts are not needed."""
        del class_counts_K
        self._gamma = config.focal_gamma

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """See `Loss`."""
        joint = mixed_focal(inputs.heads.classifier(inputs.features_VD), three_views(inputs), self._gamma)
        return LossOutput(joint, {"joint": joint.detach()})


def mixed_focal(logits_BK: Tensor, targets: MixedTargets, gamma: float, weights_K: Tensor | None = None) -> Tensor:
    """Σ_k (1 − p_k)^γ·(−log p_k) with p_k = σ(z_k) for the label and σ(−z_k) for the others; mixed over the two labels.

    Normalised by the number of images: the sum over classes, the mean over the batch. That is Cui et al.'s; with one label an image their
    division by the number of positives is the same.

    Args:
        logits_BK: [B, K].
        targets: the two labels of each row, and λ of all or of each.
        gamma: γ ≥ 0.
        weights_K: float [K], weight of an image by its label, for its terms of all classes alike (Cui et al. 2019, section 4.3); None is 1.

    Returns:
        float32 [] (float64 if the logits are).
    """
    z_BK = widened(logits_BK)
    negatives_BK = _focal(-z_BK, gamma)
    negatives_B = negatives_BK.sum(1)

    def label_losses(labels_B: Tensor) -> Tensor:
        label_B1 = labels_B[:, None]
        # Every class was counted as a negative; the label has its own term instead.
        return negatives_B - negatives_BK.gather(1, label_B1)[:, 0] + _focal(z_BK.gather(1, label_B1), gamma)[:, 0]

    return mixed_over_labels(label_losses, targets, weights_K).mean()


def _focal(u: Tensor, gamma: float) -> Tensor:
    """(1 − σ(u))^γ·(−log σ(u)); the power as exp(−γ·softplus(u)), whose gradient is finite everywhere."""
    return (-gamma * functional.softplus(u)).exp() * functional.softplus(-u)
