"""`fused_bce` on a CUDA device: one program a row sums its loss, one a block of a row writes the gradient over the logits.

A row's sum is taken by one program in one order, so the same bits come every time. `TRITON_INTERPRET=1`, set before Triton is
imported, runs the same kernels on a CPU; the tests do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from bce3s.losses.fused_bce import RowTargets

# 8 classes a thread: 16 bytes at once in half precision where K is a multiple of 16, and single ones, coalesced all the same, elsewhere.
BLOCK_CLASSES = 1024
NUM_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _softplus(z: tl.tensor) -> tl.tensor:
    # log(1 + e) as 2·artanh(e / (2 + e)), e in 0…1: 1 + e would lose a tiny e.
    fade = tl.exp(-tl.abs(z))
    ratio = fade / (2.0 + fade)
    square = ratio * ratio
    series = (((square / 13 + 1.0 / 11) * square + 1.0 / 9) * square + 1.0 / 7) * square + 1.0 / 5
    series = (series * square + 1.0 / 3) * square
    # where keeps a NaN of z through `ratio`; training looks for one in the loss.
    return tl.where(z > 0, z, 0.0) + 2.0 * (ratio + ratio * series)


@triton.jit  # type: ignore[untyped-decorator]
def _sigmoid(z: tl.tensor) -> tl.tensor:
    fade = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, fade) / (1.0 + fade)


@triton.jit  # type: ignore[untyped-decorator]
def _clamped(z: tl.tensor, clamp: tl.tensor) -> tl.tensor:
    return tl.where(z > clamp, clamp, tl.where(z < -clamp, -clamp, z))


@triton.jit  # type: ignore[untyped-decorator]
def _positive(z: tl.tensor, weight: tl.tensor) -> tl.tensor:
    # What a positive adds once its class was counted as a negative.
    return tl.where(weight > 0, weight * _softplus(-z) - _softplus(z), 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _targets_of(
    row: tl.tensor, own: tl.tensor, other: tl.tensor, lam: tl.tensor, present: tl.tensor, is_masked: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    # The two classes of a row and their weights; 0 where one is no positive.
    own_class, other_class, own_lam = tl.load(own + row), tl.load(other + row), tl.load(lam + row)
    is_same = own_class == other_class
    own_weight = tl.where(is_same, 1.0, own_lam) * tl.where(is_masked, tl.load(present + own_class), 1.0)
    other_weight = tl.where(is_same, 0.0, 1.0 - own_lam) * tl.where(is_masked, tl.load(present + other_class), 1.0)
    return own_class, other_class, own_weight, other_weight


@triton.jit  # type: ignore[untyped-decorator]
def _losses_kernel(
    logits: tl.tensor,
    own: tl.tensor,
    other: tl.tensor,
    lam: tl.tensor,
    present: tl.tensor,
    losses: tl.tensor,
    num_classes: tl.tensor,
    num_masked: tl.tensor,
    clamp: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    # Program (row). 64 bits: V·K passes 2³¹ at 262,144 rows of 8,192 classes.
    row = tl.program_id(0).to(tl.int64)
    is_masked = row < num_masked
    row_logits = logits + row * num_classes
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < num_classes
        z = _clamped(tl.load(row_logits + k, mask=inside, other=0.0).to(tl.float32), clamp)
        counts = tl.load(present + k, mask=inside & is_masked, other=1.0)
        sums += tl.where(inside, counts * _softplus(z), 0.0)
    own_class, other_class, own_weight, other_weight = _targets_of(row, own, other, lam, present, is_masked)
    own_z = _clamped(tl.load(row_logits + own_class).to(tl.float32), clamp)
    other_z = _clamped(tl.load(row_logits + other_class).to(tl.float32), clamp)
    tl.store(losses + row, tl.sum(sums, 0) + _positive(own_z, own_weight) + _positive(other_z, other_weight))


@triton.jit  # type: ignore[untyped-decorator]
def _overwrite_kernel(
    logits: tl.tensor,
    own: tl.tensor,
    other: tl.tensor,
    lam: tl.tensor,
    present: tl.tensor,
    slopes: tl.tensor,
    num_classes: tl.tensor,
    num_masked: tl.tensor,
    clamp: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    # Program (row, block of classes): each logit is read and overwritten by one thread, so none sees another's gradient.
    row = tl.program_id(0).to(tl.int64)
    is_masked = row < num_masked
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < num_classes
    place = logits + row * num_classes + k
    z = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    own_class, other_class, own_weight, other_weight = _targets_of(row, own, other, lam, present, is_masked)
    gradient = tl.load(present + k, mask=inside & is_masked, other=1.0) * _sigmoid(z)
    of_positive = -_sigmoid(-z)
    gradient = tl.where(k == own_class, tl.where(own_weight > 0, own_weight * of_positive, gradient), gradient)
    gradient = tl.where(k == other_class, tl.where(other_weight > 0, other_weight * of_positive, gradient), gradient)
    gradient = tl.where(tl.abs(z) > clamp, 0.0, gradient) * tl.load(slopes + row)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)


def losses(logits_VK: Tensor, targets: RowTargets) -> Tensor:
    """See `fused_bce.RowKernels`; logits are float16, bfloat16 or float32, contiguous. Waits for nothing."""
    num_rows, num_classes = logits_VK.shape
    losses_V = torch.empty(num_rows, dtype=torch.float32, device=logits_VK.device)
    _launch(_losses_kernel, (num_rows,), logits_VK, targets, losses_V, min(BLOCK_CLASSES, triton.next_power_of_2(num_classes)))
    return losses_V


def overwrite(logits_VK: Tensor, targets: RowTargets, slopes_V: Tensor) -> None:
    """See `fused_bce.RowKernels`; logits are float16, bfloat16 or float32, contiguous. Waits for nothing."""
    num_rows, num_classes = logits_VK.shape
    block = min(BLOCK_CLASSES, triton.next_power_of_2(num_classes))
    _launch(_overwrite_kernel, (num_rows, triton.cdiv(num_classes, block)), logits_VK, targets, slopes_V, block)


def _launch(
    kernel: triton.JITFunction, grid: tuple[int, ...], logits_VK: Tensor, targets: RowTargets, values_V: Tensor, block: int
) -> None:
    # Triton launches on the current device, which need not be that of the logits.
    with torch.cuda.device_of(logits_VK):
        kernel[grid](
            logits_VK,
            *targets[:4],
            values_V,
            logits_VK.shape[1],
            targets.num_masked,
            targets.logit_clamp,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
