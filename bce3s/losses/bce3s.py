"""BCE3S: BCE joint, BCE contrastive and BCE uniform learning (Fan et al., AAAI 2026; method.md, "One step").

What the terms are says `terms`; `fused_bce` and `uniform` compute them without arrays the size of logits or of classes squared. Nothing is
read back from the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bce3s.config import LossConfig
from bce3s.losses.class_subset import draw_class_subset
from bce3s.losses.fused_bce import fused_bce
from bce3s.losses.seam import LossInputs, LossOutput, MixedTargets, OnMixedViews, Phase
from bce3s.losses.terms import contrastive_logits
from bce3s.losses.uniform import uniform_term


class BCE3SLoss(OnMixedViews):
    """L = L_sc + contrastive_weight·L_ss + uniform_weight·L_cc.

    The contrastive term reads the memory of the step before; the step then writes the source view's projections into it. During
    `contrastive_warmup_epochs` it is only filled.
    """

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Keeps the weights; neither parameters nor the class counts are needed."""
        del class_counts_K
        self.config = config

    def floors(self, num_classes: int) -> dict[str, float]:
        """The uniform term's value at the simplex, where all cosines are −1/(K−1): about K·log 2, a constant that dominates the sum."""
        if not self.config.uniform_weight or num_classes < 2:
            return {}
        return {"uniform": math.log1p(math.exp(-1.0)) + (num_classes - 1) * math.log1p(math.exp(-1.0 / (num_classes - 1)))}

    def phase(self, epoch: int, num_epochs: int) -> Phase:
        """See `Loss`."""
        del num_epochs
        if not self.config.contrastive_weight:
            return Phase("full", trains_projector=False)
        warming = epoch < self.config.contrastive_warmup_epochs
        return Phase("warm-up" if warming else "full", trains_projector=not warming)

    def __call__(self, inputs: LossInputs, class_mask_K: Tensor | None = None) -> LossOutput:
        """See `Loss`; `class_mask_K`, bool [K], replaces the drawn class subset."""
        config, classifier, batch_size = self.config, inputs.heads.classifier, len(inputs.mixup.labels_B)
        logits_VK = classifier(inputs.features_VD)
        if class_mask_K is None:
            class_mask_K = draw_class_subset(inputs.batch_labels_G, logits_VK.shape[1], config.negative_ratio, inputs.draw_key)
        # Each view has a mean of its own; they are of one size, so the mean of all rows is the mean of the three.
        joint = fused_bce(logits_VK, three_views(inputs), class_mask_K, batch_size, config.logit_clamp).mean()
        total, terms = joint, {"joint": joint.detach(), "class_subset_size": class_mask_K.sum().to(joint.dtype)}
        if config.uniform_weight:
            uniform = uniform_term(classifier.normalized_weight(), inputs.share, config.uniform_samples, inputs.draw_key)
            total, terms["uniform"] = total + config.uniform_weight * uniform, uniform.detach()
        if not config.contrastive_weight:
            return LossOutput(total, terms)
        if inputs.epoch >= config.contrastive_warmup_epochs:
            contrastive = self._contrastive(inputs)
            total, terms["contrastive"] = total + config.contrastive_weight * contrastive, contrastive.detach()
        # What the memory takes next needs no gradient. After the term: autocast keeps the weights that it casts first, and some versions
        # of torch would give the term those without a gradient.
        with torch.no_grad():
            projections_BP = inputs.heads.projector(inputs.features_VD[:batch_size])
        return LossOutput(total, terms, projections_BP)

    def _contrastive(self, inputs: LossInputs) -> Tensor:
        """Both mixed views against the memory of the step before, the sum of their means; float32 []."""
        config, memory, batch_size = self.config, inputs.heads.feature_memory, len(inputs.mixup.labels_B)
        projections_VP = inputs.heads.projector(inputs.features_VD[batch_size:])
        logits_VK = contrastive_logits(projections_VP, memory.normalized(), config.temperature)
        losses_V = fused_bce(logits_VK, _stacked(inputs.mixup, inputs.cutmix), memory.filled_K, logit_clamp=config.logit_clamp)
        return losses_V.sum() / batch_size


def three_views(inputs: LossInputs) -> MixedTargets:
    """Targets of the views source, mixup and cutmix, [3B]: the source view has its own label alone."""
    source_B = inputs.mixup.labels_B
    return _stacked(MixedTargets(source_B, source_B, torch.ones_like(inputs.mixup.lam)), inputs.mixup, inputs.cutmix)


def _stacked(*views: MixedTargets) -> MixedTargets:
    return MixedTargets(
        torch.cat([view.labels_B for view in views]),
        torch.cat([view.partner_labels_B for view in views]),
        torch.cat([view.lam.expand(len(view.labels_B)) for view in views]),
    )
