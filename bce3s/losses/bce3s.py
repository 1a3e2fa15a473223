"""BCE3S: BCE joint, BCE contrastive and BCE uniform learning (Fan et al., AAAI 2026; method.md, "One step").

Every term is a sum over classes of softplus, so nothing overflows, and targets with at most two non-zero entries are handled by gathers,
so no [B, K] target is made. Nothing is read back from the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from bce3s.config import LossConfig
from bce3s.losses.seam import LossInputs, LossOutput, MixedTargets, Phase


def widened(values: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return values if values.dtype == torch.float64 else values.float()


def mixed_bce(logits_BK: Tensor, targets: MixedTargets, logit_clamp: float = 64.0, filled_K: Tensor | None = None) -> Tensor:
    """Mean over the batch of L(z, t) = Σ_k [ t_k·softplus(−z_k) + 1{t_k = 0}·softplus(z_k) ].

    This is not soft-target BCE: a class with 0 < t_k < 1 has the positive term only (traps.md A6).

    Args:
        logits_BK: [B, K].
        targets: λ and the two labels of each sample.
        logit_clamp: logits are clamped to ± this.
        filled_K: bool [K], classes that take part; None is all.

    Returns:
        float32 [] (float64 if the logits are).
    """
    z_BK = widened(logits_BK).clamp(-logit_clamp, logit_clamp)
    present = torch.ones((), device=z_BK.device) if filled_K is None else filled_K.to(z_BK.dtype)
    negatives_B = (functional.softplus(z_BK) * present).sum(1)
    same_B = targets.labels_B == targets.partner_labels_B
    own = _positive(z_BK, targets.labels_B, torch.where(same_B, 1.0, targets.lam), filled_K)
    other = _positive(z_BK, targets.partner_labels_B, torch.where(same_B, 0.0, 1.0 - targets.lam), filled_K)
    return (negatives_B + own + other).mean()


def _positive(z_BK: Tensor, labels_B: Tensor, weight_B: Tensor, filled_K: Tensor | None) -> Tensor:
    """What a class with target `weight` adds once all classes were counted as negatives; nothing where the weight is 0."""
    z_B = z_BK.gather(1, labels_B[:, None])[:, 0]
    counts_B = weight_B > 0 if filled_K is None else (weight_B > 0) & filled_K[labels_B]
    return torch.where(counts_B, weight_B * functional.softplus(-z_B) - functional.softplus(z_B), 0.0)


def source_bce(logits_BK: Tensor, labels_B: Tensor, class_mask_K: Tensor, logit_clamp: float = 64.0) -> Tensor:
    """Mean over the batch of the one-hot BCE summed over the classes of `class_mask_K`, bool [K]; float32 []."""
    z_BK = widened(logits_BK).clamp(-logit_clamp, logit_clamp)
    negatives_B = (functional.softplus(z_BK) * class_mask_K.to(z_BK.dtype)).sum(1)
    z_B = z_BK.gather(1, labels_B[:, None])[:, 0]
    # softplus(−z) − softplus(z) = −z; the label's class is always in the subset.
    return (negatives_B - z_B).mean()


def draw_class_subset(labels_G: Tensor, num_classes: int, negative_ratio: float, draw_key: Tensor) -> Tensor:
    """Bool [K]: every class present in the batch, filled up at random to negative_ratio·K (traps.md A1: present classes are never dropped).

    Shapes do not depend on the labels and nothing is read back: all classes are ranked, the present ones first.
    """
    present_K = torch.zeros(num_classes, dtype=torch.bool, device=labels_G.device).index_fill_(0, labels_G, True)
    if negative_ratio >= 1.0:
        return torch.ones_like(present_K)
    order_K = torch.where(present_K, -1, class_draws(draw_key, num_classes)).argsort()
    chosen_K = torch.zeros_like(present_K).index_fill_(0, order_K[: int(num_classes * negative_ratio)], True)
    return chosen_K | present_K


def class_draws(draw_key: Tensor, num_classes: int) -> Tensor:
    """int64 [K] ≥ 0, random: two rounds of a multiply-xorshift mixer of (key, class), the same on every device and rank."""
    values_K = (torch.arange(1, num_classes + 1, device=draw_key.device) * -7046029254386353131) + draw_key
    for _ in range(2):
        values_K = (values_K ^ ((values_K >> 31) & 0x1FFFFFFFF)) * -4658895280553007687
    return values_K >> 1 & 0x3FFFFFFFFFFFFFFF


def contrastive_bce(
    projections_BP: Tensor, memory_KP: Tensor, targets: MixedTargets, temperature: float, logit_clamp: float, filled_K: Tensor
) -> Tensor:
    """L(cos(P(x), M)/τ, t) against the normalised memory [K, P]; classes not yet filled are left out; float32 []."""
    normalized_BP = functional.normalize(widened(projections_BP), dim=1, eps=1e-12)
    return mixed_bce(normalized_BP @ memory_KP.to(normalized_BP.dtype).T / temperature, targets, logit_clamp, filled_K)


def uniform_bce(normalized_weight_KD: Tensor) -> Tensor:
    """(1/K) Σ_k Σ_j [ 1{j=k}·softplus(−w_k·w_j) + 1{j≠k}·softplus(w_k·w_j) ] of normalised rows; float32 []."""
    cosines_KK = widened(normalized_weight_KD @ normalized_weight_KD.T)
    # softplus(−c) = softplus(c) − c on the diagonal.
    return (functional.softplus(cosines_KK).sum() - cosines_KK.diagonal().sum()) / cosines_KK.shape[0]


class BCE3SLoss:
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

    def phase(self, epoch: int) -> Phase:
        """See `Loss`."""
        if not self.config.contrastive_weight:
            return Phase("full", trains_projector=False)
        warming = epoch < self.config.contrastive_warmup_epochs
        return Phase("warm-up" if warming else "full", trains_projector=not warming)

    def __call__(self, inputs: LossInputs, class_mask_K: Tensor | None = None) -> LossOutput:
        """See `Loss`; `class_mask_K`, bool [K], replaces the drawn class subset."""
        config, classifier, labels_B = self.config, inputs.heads.classifier, inputs.mixup.labels_B
        logits_VK = classifier(inputs.features_VD)
        source_BK, mixup_BK, cutmix_BK = logits_VK.chunk(3)
        if class_mask_K is None:
            class_mask_K = draw_class_subset(inputs.batch_labels_G, logits_VK.shape[1], config.negative_ratio, inputs.draw_key)
        joint = (
            source_bce(source_BK, labels_B, class_mask_K, config.logit_clamp)
            + mixed_bce(mixup_BK, inputs.mixup, config.logit_clamp)
            + mixed_bce(cutmix_BK, inputs.cutmix, config.logit_clamp)
        ) / 3
        total, terms = joint, {"joint": joint.detach(), "class_subset_size": class_mask_K.sum().to(joint.dtype)}
        if config.uniform_weight:
            uniform = uniform_bce(classifier.normalized_weight())
            total, terms["uniform"] = total + config.uniform_weight * uniform, uniform.detach()
        projections_BP = None
        if config.contrastive_weight and inputs.epoch < config.contrastive_warmup_epochs:
            with torch.no_grad():
                projections_BP = inputs.heads.projector(inputs.features_VD[: len(labels_B)])
        elif config.contrastive_weight:
            contrastive, projections_BP = self._contrastive(inputs)
            total, terms["contrastive"] = total + config.contrastive_weight * contrastive, contrastive.detach()
        return LossOutput(total, terms, projections_BP)

    def _contrastive(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        """The term against the memory of the step before, and the projections [B, P] that the memory takes next."""
        config, memory = self.config, inputs.heads.feature_memory
        source_BP, mixup_BP, cutmix_BP = inputs.heads.projector(inputs.features_VD).chunk(3)
        rows_KP, filled_K = memory.normalized(), memory.filled_K
        term = contrastive_bce(mixup_BP, rows_KP, inputs.mixup, config.temperature, config.logit_clamp, filled_K) + contrastive_bce(
            cutmix_BP, rows_KP, inputs.cutmix, config.temperature, config.logit_clamp, filled_K
        )
        return term, source_BP.detach()
