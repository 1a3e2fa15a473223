"""Softmax cross-entropy on the same three views and the same classifier (the paper's ablation row "CE joint")."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from bce3s.config import LossConfig
from bce3s.losses.seam import LossInputs, LossOutput, MixedTargets, OnMixedViews


class CELoss(OnMixedViews):
    """Mean of the cross-entropies of the source view and, with soft targets, of the mixed views."""

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Needs neither."""
        del config, class_counts_K

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """See `Loss`."""
        mixup, cutmix = inputs.mixup, inputs.cutmix
        source_BK, mixup_BK, cutmix_BK = inputs.heads.classifier(inputs.features_VD).float().chunk(3)
        joint = (functional.cross_entropy(source_BK, mixup.labels_B) + mixed_ce(mixup_BK, mixup) + mixed_ce(cutmix_BK, cutmix)) / 3
        return LossOutput(joint, {"joint": joint.detach()})


def mixed_ce(logits_BK: Tensor, targets: MixedTargets) -> Tensor:
    """−Σ_k t_k·log softmax(z)_k, mean over the batch (Zhang et al. 2018, mixup); float32 []."""
    log_BK = functional.log_softmax(logits_BK.float(), dim=1)
    own_B = log_BK.gather(1, targets.labels_B[:, None])[:, 0]
    other_B = log_BK.gather(1, targets.partner_labels_B[:, None])[:, 0]
    return -(targets.lam * own_B + (1 - targets.lam) * other_B).mean()
