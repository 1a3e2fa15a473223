"""LDAM-DRW (Cao et al. 2019, "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss")."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from bce3s.config import LossConfig
from bce3s.losses.class_balanced import effective_number_weights
from bce3s.losses.seam import LossDefaults, LossInputs, LossOutput, MixedTargets, Phase
from bce3s.losses.terms import image_counts, mixed_over_labels, three_views, widened


class LDAMLoss(LossDefaults):
    """Mean over the three views of the cross-entropy of scaled cosines whose true class is held Δ_y lower (section 3.2); then reweighted.

    From the share `drw_start` of the epochs on, images weigh by their label's effective number (section 3.3). The authors divide by the
    weights of the batch; here by their mean over the training images, which is what that comes to on average and lets shares of a batch
    add up.
    """

    classifier: ClassVar[str] = "cosine"
    needs_its_classifier: ClassVar[bool] = True  # margins are parts of a cosine

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Computes margins and weights once; a class without training images counts as one of a single image."""
        self._drw_start = config.drw_start
        self._margins_K = class_margins(class_counts_K, config.max_margin)
        weights_K = effective_number_weights(class_counts_K, config.effective_number_beta)
        counts_K = image_counts(class_counts_K)
        self._weights_K = (weights_K * (counts_K.sum() / (weights_K * counts_K).sum())).float()

    def phase(self, epoch: int, num_epochs: int) -> Phase:
        """See `Loss`."""
        # The quotient of whole numbers is rounded as the setting was read: 7 of 10 epochs are 0.7 exactly, where 0.7·10 lies above 7.
        return Phase("reweighted" if epoch / num_epochs >= self._drw_start else "plain", trains_projector=False)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """See `Loss`."""
        classifier, targets = inputs.heads.classifier, three_views(inputs)
        is_reweighted = self.phase(inputs.epoch, inputs.num_epochs).name == "reweighted"
        margins_K = classifier.scale * self._margins_K
        joint = mixed_margin_ce(classifier(inputs.features_VD), targets, margins_K, self._weights_K if is_reweighted else None)
        return LossOutput(joint, {"joint": joint.detach()})


def class_margins(class_counts_K: Tensor, max_margin: float) -> Tensor:
    """Δ_k = C/n_k^(1/4), the largest being `max_margin` (Cao et al. 2019, section 3.2), in units of cosines; float32 [K]."""
    margins_K = image_counts(class_counts_K) ** -0.25
    return (max_margin * margins_K / margins_K.max()).float()


def mixed_margin_ce(logits_BK: Tensor, targets: MixedTargets, margins_K: Tensor, weights_K: Tensor | None = None) -> Tensor:
    """−log( exp(z_y − m_y) / (exp(z_y − m_y) + Σ_{k≠y} exp(z_k)) ), mixed over the two labels, mean over the batch.

    Args:
        logits_BK: [B, K].
        targets: the two labels of each row, and λ of all or of each.
        margins_K: m, float [K], in units of logits.
        weights_K: float [K], weight of a part by its label; None is 1. The mean is over rows, whatever their weights.

    Returns:
        float32 [] (float64 if the logits are).
    """
    z_BK = widened(logits_BK)

    def label_losses(labels_B: Tensor) -> Tensor:
        margins_B1 = margins_K[labels_B, None].to(z_BK.dtype)
        return functional.cross_entropy(z_BK.scatter_add(1, labels_B[:, None], -margins_B1), labels_B, reduction="none")

    return mixed_over_labels(label_losses, targets, weights_K).mean()
