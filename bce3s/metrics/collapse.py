"""Neural collapse: how near features, class means and classifier are to one simplex (Papyan, Han & Donoho 2020, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bce3s.metrics.cosines import PairwiseCosines, pairwise_cosines


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """Measures that go to 0 as a network collapses; K counts the classes with images, M are their means less the mean of the means.

    Classes weigh alike in M, so that the head of a long tail does not decide where its middle is; on balanced sets this is the paper's
    global mean. The paper measures the training images: that is `bce3s evaluate RUN --features --split train`. A run's summary measures
    the split that it reports on, test, whose images the network never saw. None where a figure is not defined: fewer than two classes,
    means that are all one, or for `nc1` no class of two images.

    Args:
        nc1: tr(Σ_W Σ_B⁺)/K, variability within classes against that between them. Σ_B = M Mᵀ/K; Σ_W is the covariance around the class
            means over the images of all classes with at least two (the paper's average over images: on a long tail the head weighs more).
        nc2_equinorm_means, nc2_equinorm_rows: standard deviation over mean of the lengths of M's columns, and of the classifier's rows as
            they meet the features (always 0 where a classifier normalises them).
        nc2_equiangular_means, nc2_equiangular_rows: mean over pairs of |cos + 1/(K−1)|, of the same (rows are not centred).
        nc3: ‖Wᵀ/‖W‖ − M/‖M‖‖², Frobenius, in [0, 4]: whether the classifier is its class means.
    """

    nc1: float | None
    nc2_equinorm_means: float | None
    nc2_equinorm_rows: float | None
    nc2_equiangular_means: float | None
    nc2_equiangular_rows: float | None
    nc3: float | None


def neural_collapse(means_KD: Tensor, within_DD: Tensor | None, rows_KD: Tensor, row_cosines: PairwiseCosines | None) -> Collapse:
    """The measures, in float64.

    Args:
        means_KD: float64 [K, D], of the classes with images.
        within_DD: float64 [D, D], Σ_W; None without a class of two images.
        rows_KD: float [K, D], the classifier's rows of these classes as they meet the features.
        row_cosines: of their pairs.
    """
    rows_KD = rows_KD.double()
    if len(means_KD) < 2 or not bool(means_KD.isfinite().all() & rows_KD.isfinite().all()):
        return Collapse(**dict.fromkeys(Collapse.__dataclass_fields__))
    centred_KD = means_KD - means_KD.mean(0)
    mean_cosines = pairwise_cosines(centred_KD)
    apart = bool(centred_KD.norm() > 1e-12 * means_KD.norm())  # else all means are one, and what is left of them is rounding
    has_rows = bool(rows_KD.norm() > 0)
    self_dual = (rows_KD / rows_KD.norm() - centred_KD / centred_KD.norm()).square().sum() if apart and has_rows else None
    return Collapse(
        nc1=_nc1(centred_KD, within_DD) if apart and within_DD is not None else None,
        nc2_equinorm_means=_spread_of_lengths(centred_KD) if apart else None,
        nc2_equinorm_rows=_spread_of_lengths(rows_KD) if has_rows else None,
        nc2_equiangular_means=mean_cosines.mean_abs_to_simplex if apart and mean_cosines else None,
        nc2_equiangular_rows=row_cosines.mean_abs_to_simplex if has_rows and row_cosines else None,
        nc3=None if self_dual is None else float(self_dual),
    )


def _spread_of_lengths(vectors_KD: Tensor) -> float:
    lengths_K = vectors_KD.norm(dim=1)
    return float(lengths_K.std(correction=0) / lengths_K.mean())


def _nc1(centred_KD: Tensor, within_DD: Tensor) -> float:
    """tr(Σ_W Σ_B⁺)/K = Σ_r v_rᵀ Σ_W v_r / λ_r, over the eigenvectors v_r of M Mᵀ that belong to class means at all.

    They come from the smaller of the two Gram matrices, on the CPU, where LAPACK is exact and needs no device memory: at K = 8,142 and
    D = 2,048 6 s on two cores, where a thin SVD takes 30. Eigenvalues below max(K, D)·2⁻⁵² of the largest are the directions that
    centring or a lack of classes left empty; what features in float32 hold is above it.
    """
    centred_KD, within_DD = centred_KD.cpu(), within_DD.cpu()
    num_classes, dim = centred_KD.shape
    by_class = num_classes <= dim
    values, vectors = torch.linalg.eigh(centred_KD @ centred_KD.T if by_class else centred_KD.T @ centred_KD)
    kept = values > max(num_classes, dim) * torch.finfo(torch.float64).eps * values[-1]
    kept[: max(0, len(values) - (num_classes - 1))] = False  # centred: at most K − 1 of them
    directions_DR = centred_KD.T @ vectors[:, kept] if by_class else vectors[:, kept]
    directions_DR = directions_DR / directions_DR.norm(dim=0)
    within_R = (directions_DR * (within_DD @ directions_DR)).sum(0)
    return float((within_R / values[kept]).sum())
