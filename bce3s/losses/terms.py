"""The terms of BCE3S in torch's words (method.md, "One step"): what float64 runs on and what the fused kernels are tested against.

Beside them the same terms as CE, and what methods share. BCE is a sum over classes of softplus, so nothing overflows, and targets with at
most two non-zero entries are handled by gathers, so no [B, K] target is made. Nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from bce3s.losses.seam import LossInputs, MixedTargets, Share


def three_views(inputs: LossInputs) -> MixedTargets:
    """Targets of the views source, mixup and cutmix, [3B]: the source view has its own label alone."""
    source_B = inputs.mixup.labels_B
    return _stacked(MixedTargets(source_B, source_B, torch.ones_like(inputs.mixup.lam)), inputs.mixup, inputs.cutmix)


def mixed_views(inputs: LossInputs) -> MixedTargets:
    """Targets of the views mixup and cutmix, [2B]."""
    return _stacked(inputs.mixup, inputs.cutmix)


def _stacked(*views: MixedTargets) -> MixedTargets:
    return MixedTargets(
        torch.cat([view.labels_B for view in views]),
        torch.cat([view.partner_labels_B for view in views]),
        torch.cat([view.lam.expand(len(view.labels_B)) for view in views]),
    )


def image_counts(class_counts_K: Tensor) -> Tensor:
    """Training images a class, float64 [K]; a class without any counts as one of a single image, so that logs and weights are finite."""
    return class_counts_K.clamp_min(1).double()


def prior_shift(class_counts_K: Tensor, tau: float) -> Tensor:
    """τ·log(K·π_k), float32 [K], 0 for a class of average size: what logit adjustment adds in training or takes off afterwards.

    Menon et al. 2021, eq. 9 and 10, have τ·log π_k. The constant log K changes neither a prediction nor a softmax; a sigmoid sees it, and
    with it keeps a class of average size as confident as it was.

    Args:
        class_counts_K: int64 [K], training images; a class without any counts as one of a single image.
        tau: 0 shifts nothing.
    """
    counts_K = image_counts(class_counts_K)
    return (tau * (counts_K / counts_K.mean()).log()).float()


def mixed_over_labels(label_losses: Callable[[Tensor], Tensor], targets: MixedTargets, weights_K: Tensor | None = None) -> Tensor:
    """λ·w_y·ℓ(y) + (1−λ)·w_y'·ℓ(y') of each row with label y and partner y' (Zhang et al. 2018, mixup, for any loss).

    Args:
        label_losses: ℓ, from labels int64 [B] to the loss of each row as if the label were its only one, [B].
        targets: the two labels of each row, and λ of all or of each.
        weights_K: w, float [K]; None is 1. Each part has the weight of its own label.

    Returns:
        [B] of the dtype of the losses.
    """
    labels_B, partner_labels_B = targets.labels_B, targets.partner_labels_B
    own_B, other_B = label_losses(labels_B), label_losses(partner_labels_B)
    if weights_K is not None:
        own_B, other_B = weights_K[labels_B] * own_B, weights_K[partner_labels_B] * other_B
    return targets.lam * own_B + (1 - targets.lam) * other_B


def widened(values: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return values if values.dtype == torch.float64 else values.float()


def mixed_bce(logits_BK: Tensor, targets: MixedTargets, logit_clamp: float = 64.0, filled_K: Tensor | None = None) -> Tensor:
    """Mean over the batch of L(z, t) = Σ_k [ t_k·softplus(−z_k) + 1{t_k = 0}·softplus(z_k) ]; see `mixed_bce_rows`."""
    return mixed_bce_rows(logits_BK, targets, logit_clamp, filled_K).mean()


def mixed_bce_rows(logits_BK: Tensor, targets: MixedTargets, logit_clamp: float = 64.0, filled_K: Tensor | None = None) -> Tensor:
    """L(z, t) = Σ_k [ t_k·softplus(−z_k) + 1{t_k = 0}·softplus(z_k) ] of each row.

    This is not soft-target BCE: a class with 0 < t_k < 1 has the positive term only (traps.md A6).

    Args:
        logits_BK: [B, K].
        targets: the two labels of each row, and λ of all or of each.
        logit_clamp: logits are clamped to ± this.
        filled_K: bool [K], classes that take part; None is all.

    Returns:
        float32 [B] (float64 if the logits are).
    """
    z_BK = widened(logits_BK).clamp(-logit_clamp, logit_clamp)
    present = torch.ones((), device=z_BK.device) if filled_K is None else filled_K.to(z_BK.dtype)
    negatives_B = (functional.softplus(z_BK) * present).sum(1)
    same_B = targets.labels_B == targets.partner_labels_B
    own = _positive(z_BK, targets.labels_B, torch.where(same_B, 1.0, targets.lam), filled_K)
    other = _positive(z_BK, targets.partner_labels_B, torch.where(same_B, 0.0, 1.0 - targets.lam), filled_K)
    return negatives_B + own + other


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


def contrastive_logits(projections_BP: Tensor, memory_KP: Tensor, temperature: float) -> Tensor:
    """cos(P(x), M)/τ, [B, K], against the normalised memory [K, P]; under autocast in its dtype."""
    normalized_BP = functional.normalize(widened(projections_BP), dim=1, eps=1e-12)
    # τ divides the projections, which are smaller than the cosines.
    return normalized_BP / temperature @ memory_KP.to(normalized_BP.dtype).T


def contrastive_bce(
    projections_BP: Tensor, memory_KP: Tensor, targets: MixedTargets, temperature: float, logit_clamp: float, filled_K: Tensor
) -> Tensor:
    """L(cos(P(x), M)/τ, t) against the normalised memory [K, P]; classes not yet filled are left out; float32 []."""
    return mixed_bce(contrastive_logits(projections_BP, memory_KP, temperature), targets, logit_clamp, filled_K)


def uniform_bce(normalized_weight_KD: Tensor) -> Tensor:
    """(1/K) Σ_k Σ_j [ 1{j=k}·softplus(−w_k·w_j) + 1{j≠k}·softplus(w_k·w_j) ] of normalised rows; float32 []."""
    cosines_KK = widened(normalized_weight_KD @ normalized_weight_KD.T)
    # softplus(−c) = softplus(c) − c on the diagonal.
    return (functional.softplus(cosines_KK).sum() - cosines_KK.diagonal().sum()) / cosines_KK.shape[0]


def contrastive_ce_rows(logits_BK: Tensor, targets: MixedTargets, filled_K: Tensor) -> Tensor:
    """−Σ_k t_k·log softmax(s)_k of each row, the softmax over `filled_K` only; the ablation's CE (Fan et al. 2026), as we read it.

    Args:
        logits_BK: s = cos(P(x), M)/τ, [B, K].
        targets: the two labels of each row, and λ of all or of each; a label that is not filled adds nothing.
        filled_K: bool [K]; where none is, the loss and its gradient are 0.

    Returns:
        float32 [B] (float64 if the logits are).
    """
    s_BK = widened(logits_BK)
    # The least number instead of −inf: a row without any class then has a softmax all the same, and no NaN.
    log_BK = functional.log_softmax(s_BK.masked_fill(~filled_K, torch.finfo(s_BK.dtype).min), dim=1)

    def label_losses(labels_B: Tensor) -> Tensor:
        return torch.where(filled_K[labels_B], -log_BK.gather(1, labels_B[:, None])[:, 0], 0.0)

    return mixed_over_labels(label_losses, targets)


def uniform_ce(normalized_weight_KD: Tensor, share: Share | None = None, drawn_R: Tensor | None = None) -> Tensor:
    """(1/K) Σ_k −log( exp(w_k·w_k) / Σ_j exp(w_k·w_j) ) of normalised rows, over all j; the ablation's CE (Fan et al. 2026), as we read it.

    Args:
        normalized_weight_KD: [K, D] of length 1. Products are taken in autocast's dtype where it is on; sums in float32.
        share: rows k number `index`, `index` + `count`, … only, divided by `weight`: the sum over the shares by weight is the term.
        drawn_R: int64 [R], distinct classes: their mean over k is an unbiased estimate; None takes all.

    Returns:
        float32 [] (float64 if the rows are).
    """
    share = share or Share()
    rows_RD = normalized_weight_KD if drawn_R is None else normalized_weight_KD.index_select(0, drawn_R)
    rows_ID = rows_RD[share.index :: share.count]
    cosines_IK = widened(rows_ID @ normalized_weight_KD.T)
    return (cosines_IK.logsumexp(1) - rows_ID.square().sum(1)).sum() / (len(rows_RD) * share.weight)
