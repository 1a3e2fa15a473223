"""The uniform term L_cc without its [K, K] matrix: blocks of the matrix are made, summed and multiplied on, one after the other.

    L = (1/K) Σ_k [ softplus(−c_kk) + Σ_{j≠k} softplus(c_kj) ],  c = W·Wᵀ,  dL/dw_k = (2/K) [ Σ_{j≠k} σ(c_kj)·w_j − σ(−c_kk)·w_k ]

The matrix is symmetric, so only block pairs i ≤ j are computed. The gradient is summed in the forward pass, while a block is at hand: three
products a pair where recomputing takes four and the dense form six (docs/log.md). Beside W and its gradient, memory is that of one block.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from bce3s.losses.class_subset import draw_classes
from bce3s.losses.seam import Share
from bce3s.losses.terms import widened

# Rows a side: on a CPU a block of float32 then stays near the caches; on a GPU it takes a few hundred tiles to fill the device.
BLOCK_ROWS = {"cpu": 1024, "cuda": 2048}

# (rows_ID, columns_JD, same_ratio, wants_slopes) → the block's sum [] and, where wanted, its slopes [I, J] in the dtype of the rows.
# A ratio marks a block on the diagonal and weighs its softplus(−c_kk) against the others.
BlockTerms = Callable[[Tensor, Tensor, "float | None", bool], tuple[Tensor, "Tensor | None"]]


def uniform_term(
    normalized_weight_KD: Tensor,
    share: Share | None = None,
    num_samples: int = 0,
    draw_key: Tensor | None = None,
    block_rows: int | None = None,
) -> Tensor:
    """The uniform term of normalised rows, exact or estimated, differentiable once.

    Args:
        normalized_weight_KD: [K, D] of length 1. Products are taken in autocast's dtype where it is on; sums in float32.
        share: block pairs number `index`, `index` + `count`, … only, divided by `weight`: the sum over the shares by weight is the term.
        num_samples: R; 0 or at least K takes all classes. Otherwise an unbiased estimate from R distinct classes, R ≥ 2:
            (1/K) [ (K/R)·Σ_diagonal + K(K−1)/(R(R−1))·Σ_off ], the same sample in every share.
        draw_key: int64 [] on the device of the rows; needed where classes are drawn.
        block_rows: rows of a block; None is the device's.

    Returns:
        float32 [] (float64 if the rows are).
    """
    num_classes = len(normalized_weight_KD)
    same_weight = pair_weight = 1.0 / num_classes
    rows_KD = normalized_weight_KD
    if 0 < num_samples < num_classes:
        assert draw_key is not None, "an estimate needs the key of its draws"
        rows_KD = rows_KD.index_select(0, draw_classes(draw_key, num_classes, num_samples))
        same_weight, pair_weight = 1.0 / num_samples, (num_classes - 1) / (num_samples * (num_samples - 1))
    plan = _Plan(
        same_weight=same_weight,
        pair_weight=pair_weight,
        share=share or Share(),
        block_rows=block_rows or BLOCK_ROWS.get(rows_KD.device.type, 1024),
        # Inside the function autograd is off and cannot say it.
        wants_gradient=torch.is_grad_enabled() and rows_KD.requires_grad,
    )
    term: Tensor = _BlockedTerm.apply(rows_KD, plan)  # type: ignore[no-untyped-call]
    return term


class _Plan(NamedTuple):
    same_weight: float  # of softplus(−c_kk)
    pair_weight: float  # of softplus(c_kj)
    share: Share
    block_rows: int
    wants_gradient: bool


class _BlockedTerm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_KD: Tensor, plan: _Plan) -> Tensor:
        total, gradient_KD = _sum_blocks(rows_KD, plan)
        if gradient_KD is not None:
            ctx.save_for_backward(gradient_KD.to(rows_KD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (gradient_KD,) = ctx.saved_tensors
        return gradient_KD * slope.to(gradient_KD.dtype), None


def _sum_blocks(rows_KD: Tensor, plan: _Plan) -> tuple[Tensor, Tensor | None]:
    """The term and, where wanted, its gradient [K, D], both in float32 or float64."""
    device_type, dtype = rows_KD.device.type, rows_KD.dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    factors_KD, block_terms = rows_KD.contiguous().to(dtype), _block_terms(device_type, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=wide, device=rows_KD.device)
    gradient_KD = torch.zeros(rows_KD.shape, dtype=wide, device=rows_KD.device) if plan.wants_gradient else None
    blocks = [slice(start, start + plan.block_rows) for start in range(0, len(rows_KD), plan.block_rows)]
    pairs = [(i, j) for i in range(len(blocks)) for j in range(i, len(blocks))]
    for i, j in pairs[plan.share.index :: plan.share.count]:
        rows_ID, columns_JD = factors_KD[blocks[i]], factors_KD[blocks[j]]
        same_ratio = plan.same_weight / plan.pair_weight if i == j else None
        block_sum, slopes_IJ = block_terms(rows_ID, columns_JD, same_ratio, plan.wants_gradient)
        total += block_sum if i == j else 2 * block_sum
        if gradient_KD is not None and slopes_IJ is not None:
            _add_product(gradient_KD[blocks[i]], slopes_IJ, columns_JD)
            if i != j:
                _add_product(gradient_KD[blocks[j]], slopes_IJ.T, rows_ID)
    scale = plan.pair_weight / plan.share.weight
    # c_kj stands in the sum twice, as c_jk too, and c_kk depends on its row twice.
    return total * scale, None if gradient_KD is None else gradient_KD.mul_(2 * scale)


def _add_product(sum_ID: Tensor, slopes_IJ: Tensor, columns_JD: Tensor) -> None:
    if slopes_IJ.dtype == sum_ID.dtype:
        sum_ID.addmm_(slopes_IJ, columns_JD)
    else:
        sum_ID += slopes_IJ @ columns_JD


def _torch_block_terms(rows_ID: Tensor, columns_JD: Tensor, same_ratio: float | None, wants_slopes: bool) -> tuple[Tensor, Tensor | None]:
    cosines_IJ = widened(rows_ID @ columns_JD.T)
    block_sum = functional.softplus(cosines_IJ).sum()
    same_I = cosines_IJ.diagonal().clone() if same_ratio is not None else None
    if same_ratio is not None and same_I is not None:
        block_sum += (same_ratio * functional.softplus(-same_I) - functional.softplus(same_I)).sum()
    if not wants_slopes:
        return block_sum, None
    slopes_IJ = cosines_IJ.sigmoid_()
    if same_ratio is not None and same_I is not None:
        slopes_IJ.diagonal().copy_(torch.sigmoid(-same_I) * -same_ratio)
    return block_sum, slopes_IJ.to(rows_ID.dtype)


def _block_terms(device_type: str, dtype: torch.dtype) -> BlockTerms:
    if device_type != "cuda" or dtype == torch.float64:
        return _torch_block_terms
    return _triton_block_terms() or _torch_block_terms


@functools.cache
def _triton_block_terms() -> BlockTerms | None:
    """The Triton kernel; None where Triton, which comes with torch's CUDA builds, is missing."""
    if importlib.util.find_spec("triton") is None:
        return None
    from bce3s.losses.uniform_triton import block_terms

    return block_terms
