"""Softmax cross-entropy on the same three views and the same classifier (the paper's ablation row "CE joint")."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from bce3s.config import LossConfig
from bce3s.losses.seam import LossDefaults, LossInputs, LossOutput, MixedTargets
from bce3s.losses.terms import mixed_over_labels, three_views, widened


class CELoss(LossDefaults):
    """Mean of the cross-entropies of the source view and, with soft targets, of the mixed views."""

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Needs neither."""
        del config, class_counts_K

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """See `Loss`."""
        joint = mixed_ce(inputs.heads.classifier(inputs.features_VD), three_views(inputs))
        return LossOutput(joint, {"joint": joint.detach()})


def mixed_ce(logits_BK: Tensor, targets: MixedTargets, weights_K: Tensor | None = None) -> Tensor:
    """−Σ_k t_k·w_k·log softmax(z)_k, mean over the batch (Zhang et al. 2018, mixup).

    Args:
        logits_BK: [B, K].
        targets: the two labels of each row, and λ of all or of each.
        weights_K: float [K], of the classes; None is 1. The mean is over rows, whatever their weights, so shares of a batch add up.

    Returns:
        float32 [] (float64 if the logits are).
    """
    log_BK = functional.log_softmax(widened(logits_BK), dim=1)
    return mixed_over_labels(lambda labels_B: -log_BK.gather(1, labels_B[:, None])[:, 0], targets, weights_K).mean()
