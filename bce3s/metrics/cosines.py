"""Cosines of all pairs of class vectors (classifier rows, class means), block by block: K×K numbers are never held."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class PairwiseCosines:
    """Cosines of the pairs of K vectors, K >= 2.

    The most that K vectors can be apart is the simplex equiangular tight frame, where every cosine is −1/(K−1) (Papyan et al. 2020).

    Args:
        mean, std: over pairs; std is that of the population.
        max: of the closest pair.
        rms_to_simplex: √ of the mean over pairs of (cos + 1/(K−1))².
        mean_abs_to_simplex: mean over pairs of |cos + 1/(K−1)|.
        mean_K, nearest_K: of each vector, the mean and the largest of its K−1 cosines.
    """

    mean: float
    std: float
    max: float
    rms_to_simplex: float
    mean_abs_to_simplex: float
    mean_K: tuple[float, ...]
    nearest_K: tuple[float, ...]

    @property
    def separability(self) -> float:
        """1 − mean: 0 where all point one way, K/(K−1) at the simplex."""
        return 1.0 - self.mean

    def figures(self) -> dict[str, Any]:
        """Without the lists, ready for JSON."""
        return {"separability": self.separability, **{name: value for name, value in asdict(self).items() if not name.endswith("_K")}}


def pairwise_cosines(vectors_KD: Tensor) -> PairwiseCosines | None:
    """Cosines of the rows of float [K, D]; None below two rows, or where one is not finite. A zero row has cosine 0 with all.

    Computed in float64 where the vectors lie: TF32 products would be 10⁻³ off, eight times the 1/(K−1) they are compared with at
    K = 8,142, where the K²·D operations (136 GFLOP at D = 2,048) take seconds on a CPU.
    """
    count = len(vectors_KD)
    if count < 2 or not bool(vectors_KD.isfinite().all()):
        return None
    units_KD = F.normalize(vectors_KD.double(), dim=1, eps=1e-300)
    pairs, target = count * (count - 1), -1.0 / (count - 1)
    # ‖Σu‖² holds all pairs twice and each vector with itself: the mean is known before the pass, which can then sum squares around it
    # (around 0 they would cancel where all cosines are alike).
    own_K = units_KD.square().sum(1)
    mean_K = ((units_KD @ units_KD.sum(0)) - own_K) / (count - 1)
    mean = mean_K.mean()
    squares, squares_to_target, distance = (torch.zeros((), dtype=torch.float64, device=units_KD.device) for _ in range(3))
    nearest_K = units_KD.new_full((count,), -torch.inf)
    for start in range(0, count, _BLOCK_ROWS):
        # Rows of the block with themselves and all that follow: a pair inside the block comes twice, one with a later row once.
        block_ID = units_KD[start : start + _BLOCK_ROWS]
        cosines_IJ, size = block_ID @ units_KD[start:].T, len(block_ID)
        diagonal_I = cosines_IJ.diagonal()
        diagonal_I.copy_(mean)  # with itself: no pair, nothing to add
        squares += _over_pairs((cosines_IJ - mean).square_(), size)
        diagonal_I.fill_(target)
        off_target_IJ = (cosines_IJ - target).abs_()
        distance += _over_pairs(off_target_IJ, size)
        squares_to_target += _over_pairs(off_target_IJ.square_(), size)
        diagonal_I.fill_(-torch.inf)
        nearest_K[start:] = torch.maximum(nearest_K[start:], cosines_IJ.amax(0))
        nearest_K[start : start + size] = torch.maximum(nearest_K[start : start + size], cosines_IJ.amax(1))
    return PairwiseCosines(
        mean=float(mean),
        std=float(squares / pairs) ** 0.5,
        max=float(nearest_K.max()),
        rms_to_simplex=float(squares_to_target / pairs) ** 0.5,
        mean_abs_to_simplex=float(distance / pairs),
        mean_K=tuple(mean_K.tolist()),
        nearest_K=tuple(nearest_K.tolist()),
    )


def _over_pairs(values_IJ: Tensor, size: int) -> Tensor:
    """Their sum with both orders of each pair, where the first `size` columns are the block itself."""
    return values_IJ.sum() + values_IJ[:, size:].sum()
