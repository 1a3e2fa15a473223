"""Tripartite synergistic learning: a joint, a contrastive and a uniform term, each as BCE or CE (Fan et al., AAAI 2026, the ablation).

What the terms are says `terms`; `fused_bce` and `uniform` compute those of BCE without arrays the size of logits or of classes squared.
Nothing is read back from the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bce3s.config import LossConfig
from bce3s.losses.ce import mixed_ce
from bce3s.losses.class_subset import draw_class_subset, draw_classes
from bce3s.losses.fused_bce import fused_bce
from bce3s.losses.seam import LossDefaults, LossInputs, LossOutput, Phase
from bce3s.losses.terms import contrastive_ce_rows, contrastive_logits, mixed_views, prior_shift, three_views, uniform_ce
from bce3s.losses.uniform import uniform_term


class TSLLoss(LossDefaults):
    """L = L_sc + contrastive_weight·L_ss + uniform_weight·L_cc of the kinds that `LossConfig.joint`, `contrastive` and `uniform` say.

    The contrastive term reads the memory of the step before; the step then writes the source view's projections into it. During
    `contrastive_warmup_epochs` it is only filled. A term of weight 0 is off.
    """

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Keeps kinds and weights; the class counts are for `sigmoid_adjustment`."""
        self.config = config
        self._has_contrastive = config.contrastive != "off" and config.contrastive_weight > 0
        self._has_uniform = config.uniform != "off" and config.uniform_weight > 0
        self._shift_K = prior_shift(class_counts_K, config.sigmoid_adjustment) if config.sigmoid_adjustment else None

    def floors(self, num_classes: int) -> dict[str, float]:
        """The uniform term's value at the simplex, where all cosines are −1/(K−1): of BCE about K·log 2, which dominates the sum."""
        others = num_classes - 1
        if not self._has_uniform or not others:
            return {}
        if self.config.uniform == "ce":
            return {"uniform": math.log1p(others * math.exp(-1.0 / others - 1.0))}
        return {"uniform": math.log1p(math.exp(-1.0)) + others * math.log1p(math.exp(-1.0 / others))}

    def phase(self, epoch: int, num_epochs: int) -> Phase:
        """See `Loss`."""
        del num_epochs
        if not self._has_contrastive:
            return Phase("full", trains_projector=False)
        warming = epoch < self.config.contrastive_warmup_epochs
        return Phase("warm-up" if warming else "full", trains_projector=not warming)

    def __call__(self, inputs: LossInputs, class_mask_K: Tensor | None = None) -> LossOutput:
        """See `Loss`; `class_mask_K`, bool [K], replaces the drawn class subset of a BCE joint term."""
        config, batch_size = self.config, len(inputs.mixup.labels_B)
        total, terms = self._joint(inputs, class_mask_K)
        if self._has_uniform:
            uniform = self._uniform(inputs)
            total, terms["uniform"] = total + config.uniform_weight * uniform, uniform.detach()
        if not self._has_contrastive:
            return LossOutput(total, terms)
        if inputs.epoch >= config.contrastive_warmup_epochs:
            contrastive = self._contrastive(inputs)
            total, terms["contrastive"] = total + config.contrastive_weight * contrastive, contrastive.detach()
        # What the memory takes next needs no gradient. After the term: autocast keeps the weights that it casts first, and some versions
        # of torch would give the term those without a gradient.
        with torch.no_grad():
            projections_BP = inputs.heads.projector(inputs.features_VD[:batch_size])
        return LossOutput(total, terms, projections_BP)

    def _joint(self, inputs: LossInputs, class_mask_K: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the three views, float32 [], and what is logged of it."""
        config, logits_VK, targets = self.config, inputs.heads.classifier(inputs.features_VD), three_views(inputs)
        if config.joint == "ce":
            joint = mixed_ce(logits_VK, targets)
            return joint, {"joint": joint.detach()}
        if self._shift_K is not None:
            # In place: no layer behind keeps its logits, and they are the largest array of the head.
            logits_VK.add_(self._shift_K.to(logits_VK.dtype))
        if class_mask_K is None:
            class_mask_K = draw_class_subset(inputs.batch_labels_G, logits_VK.shape[1], config.negative_ratio, inputs.draw_key)
        # Each view has a mean of its own; they are of one size, so the mean of all rows is the mean of the three.
        joint = fused_bce(logits_VK, targets, class_mask_K, len(inputs.mixup.labels_B), config.logit_clamp).mean()
        return joint, {"joint": joint.detach(), "class_subset_size": class_mask_K.sum().to(joint.dtype)}

    def _uniform(self, inputs: LossInputs) -> Tensor:
        """This share's part of the term, exact or estimated; float32 []."""
        weight_KD, num_samples = inputs.heads.classifier.normalized_weight(), self.config.uniform_samples
        if self.config.uniform == "bce":
            return uniform_term(weight_KD, inputs.share, num_samples, inputs.draw_key)
        num_classes = len(weight_KD)
        drawn_R = draw_classes(inputs.draw_key, num_classes, num_samples) if 0 < num_samples < num_classes else None
        return uniform_ce(weight_KD, inputs.share, drawn_R)

    def _contrastive(self, inputs: LossInputs) -> Tensor:
        """Both mixed views against the memory of the step before, the sum of their means; float32 []."""
        config, memory, batch_size = self.config, inputs.heads.feature_memory, len(inputs.mixup.labels_B)
        projections_VP = inputs.heads.projector(inputs.features_VD[batch_size:])
        logits_VK, targets = contrastive_logits(projections_VP, memory.normalized(), config.temperature), mixed_views(inputs)
        if config.contrastive == "ce":
            losses_V = contrastive_ce_rows(logits_VK, targets, memory.filled_K)
        else:
            losses_V = fused_bce(logits_VK, targets, memory.filled_K, logit_clamp=config.logit_clamp)
        return losses_V.sum() / batch_size
