"""The cosines of all pairs of classifier rows as two pictures, a histogram and a map: K×K numbers are never held."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from bce3s.report.findings import CosineHistogram, CosineMap

if TYPE_CHECKING:
    from pipelines.types import IntArray

MAX_CELLS = 64
MAX_BINS = 60
_MIN_BINS = 16
_FINE_BINS = 4000  # of [−1, 1], counted first; the bins shown are whole numbers of them, so that those of several runs share bounds
_MERGES = (2, 4, 10, 20, 40, 80, 100, 200, 400)  # widths 0.001 to 0.2; all divide the fine bins
_BLOCK_ROWS = 512


def cosine_pictures(rows_KD: Tensor, class_counts_K: IntArray) -> tuple[CosineHistogram, CosineMap] | None:
    """Histogram and map of the rows of float [K, D]; None below two rows, or where one is not finite. A zero row has cosine 0 with all.

    In float64, as `bce3s.metrics.pairwise_cosines` and for its reason: at K = 8,142 all that is to be seen lies within 0.001.

    Args:
        rows_KD: the classifier's rows as they meet the features.
        class_counts_K: int64 [K], training images: the map goes from head to tail.
    """
    if len(rows_KD) < 2 or not bool(rows_KD.isfinite().all()):
        return None
    units_KD = F.normalize(rows_KD.detach().double(), dim=1, eps=1e-300)
    return _histogram(units_KD), _map(units_KD, class_counts_K)


def _histogram(units_KD: Tensor) -> CosineHistogram:
    count = len(units_KD)
    fine_M = torch.zeros(_FINE_BINS, dtype=torch.float64, device=units_KD.device)
    for start in range(0, count, _BLOCK_ROWS):
        # Rows of the block with those that follow: each pair once.
        cosines_IJ = (units_KD[start : start + _BLOCK_ROWS] @ units_KD[start:].T).clamp_(-1.0, 1.0)
        size = min(_BLOCK_ROWS, count - start)
        rows, columns = torch.triu_indices(size, size, offset=1, device=units_KD.device)
        for cosines in (cosines_IJ[rows, columns], cosines_IJ[:, size:]):
            if cosines.numel():
                fine_M += torch.histc(cosines, _FINE_BINS, -1.0, 1.0)
    pairs, simplex = count * (count - 1) // 2, -1.0 / (count - 1)
    filled = fine_M.nonzero()[:, 0]
    at_simplex = min(_FINE_BINS - 1, int((simplex + 1.0) / 2.0 * _FINE_BINS))
    first, last = min(int(filled[0]), at_simplex), max(int(filled[-1]), at_simplex)
    wanted = min(MAX_BINS, max(_MIN_BINS, math.ceil(2.0 * pairs ** (1 / 3))))  # Rice's rule, within what a figure can show
    merge = next((merge for merge in _MERGES if last // merge - first // merge < wanted), _MERGES[-1])
    low, high = first // merge, last // merge + 1
    counts = fine_M.reshape(-1, merge).sum(1)[low:high].tolist()
    return CosineHistogram(
        edges=tuple(round(edge * merge * 2.0 / _FINE_BINS - 1.0, 4) for edge in range(low, high + 1)),
        counts=tuple(int(each) for each in counts),
        num_pairs=pairs,
        simplex=simplex,
    )


def _map(units_KD: Tensor, class_counts_K: IntArray) -> CosineMap:
    """Mean cosines of blocks: a sum over pairs of a and b is the product of the sums over a and over b."""
    count, device = len(units_KD), units_KD.device
    num_cells = min(MAX_CELLS, count)
    # Stable: of equal counts the lower label first.
    order_K = torch.sort(torch.from_numpy(class_counts_K), descending=True, stable=True).indices
    place_K = torch.arange(count) * num_cells // count
    sizes_G = torch.bincount(place_K, minlength=num_cells).double().to(device)
    cell_K = torch.empty_like(place_K).scatter_(0, order_K, place_K).to(device)
    sums_GD = torch.zeros(num_cells, units_KD.shape[1], dtype=torch.float64, device=device).index_add_(0, cell_K, units_KD)
    own_G = torch.zeros(num_cells, dtype=torch.float64, device=device).index_add_(0, cell_K, torch.linalg.vecdot(units_KD, units_KD))
    products_GG = sums_GD @ sums_GD.T
    pairs_G = sizes_G * (sizes_G - 1)
    inside_G = torch.where(pairs_G > 0, (products_GG.diagonal() - own_G) / pairs_G.clamp_min(1), 1.0)
    cells_GG = products_GG / (sizes_G[:, None] * sizes_G)
    cells_GG.diagonal().copy_(inside_G)
    members = torch.split(order_K, [int(size) for size in sizes_G.tolist()])
    return CosineMap(
        cells=tuple(tuple(row) for row in cells_GG.clamp(-1.0, 1.0).tolist()),
        cell_classes=tuple(tuple(each.tolist()) for each in members),
    )
