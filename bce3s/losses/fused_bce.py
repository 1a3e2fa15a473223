"""The BCE of every row of logits in one pass: logits are read once going forward; going back, the gradient is written over them.

`terms.mixed_bce_rows` is what it computes. The logits [V, K] are the largest array of the head at thousands of classes, and nothing else
needs them once their gradient is known, so nothing of their size is allocated.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bce3s.losses import fused_bce_numba
from bce3s.losses.seam import MixedTargets
from bce3s.losses.terms import mixed_bce_rows


class RowTargets(NamedTuple):
    """What each row of logits is held against.

    Args:
        labels_V, partner_labels_V: int64 [V], contiguous.
        lam_V: float32 [V], weight of the label; the partner has the rest. Where both are one class it has weight 1.
        present_K: float32 [K] of 0 and 1: classes that take part in the first `num_masked` rows; the others see all.
        num_masked: from 0 to V.
        logit_clamp: logits are clamped to ± this, and have no gradient beyond.
    """

    labels_V: Tensor
    partner_labels_V: Tensor
    lam_V: Tensor
    present_K: Tensor
    num_masked: int
    logit_clamp: float


class RowKernels(NamedTuple):
    """The two passes over logits [V, K] on one device.

    Args:
        losses: (logits_VK, targets) → float32 [V].
        overwrite: (logits_VK, targets, slopes_V) → None: puts slopes_V times the gradient of the losses where the logits stood.
    """

    losses: Callable[[Tensor, RowTargets], Tensor]
    overwrite: Callable[[Tensor, RowTargets, Tensor], None]


def fused_bce(
    logits_VK: Tensor, targets: MixedTargets, class_mask_K: Tensor, num_masked: int | None = None, logit_clamp: float = 64.0
) -> Tensor:
    """The BCE of each row against its mixed target, differentiable once: the gradient takes the logits' memory.

    After the backward pass the logits hold their gradient: read them before. A second backward pass raises, and so does that of
    another operation which saved them.

    Args:
        logits_VK: [V, K] as a layer made them, no leaf of the graph.
        targets: of each row; `lam` is [] or [V].
        class_mask_K: bool [K], classes that take part; a row's own classes without it count nothing.
        num_masked: rows, from the first, that the mask is for; None is all of them.
        logit_clamp: logits are clamped to ± this before softplus.

    Returns:
        float32 [V] (float64 if the logits are).

    Raises:
        ValueError: the logits are a leaf that wants its gradient, whose values would be lost.
    """
    num_masked = len(logits_VK) if num_masked is None else num_masked
    kernels = _row_kernels(logits_VK.device, logits_VK.dtype)
    if kernels is None:
        return _reference_rows(logits_VK, targets, class_mask_K, num_masked, logit_clamp)
    if logits_VK.is_leaf and logits_VK.requires_grad:
        raise ValueError("fused_bce writes the gradient over the logits: pass what a layer computed, not a parameter or another leaf")
    rows = RowTargets(
        targets.labels_B.contiguous(),
        targets.partner_labels_B.contiguous(),
        targets.lam.float().expand(len(logits_VK)).contiguous(),
        class_mask_K.float(),
        num_masked,
        logit_clamp,
    )
    losses_V: Tensor = _FusedBCE.apply(logits_VK.contiguous(), rows, kernels)  # type: ignore[no-untyped-call]
    return losses_V


class _FusedBCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_VK: Tensor, targets: RowTargets, kernels: RowKernels) -> Tensor:
        ctx.save_for_backward(logits_VK)
        ctx.targets, ctx.kernels, ctx.is_spent = targets, kernels, False
        return kernels.losses(logits_VK, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes_V: Tensor) -> tuple[Tensor, None, None]:
        if ctx.is_spent:
            raise RuntimeError("the gradient of a fused loss was written over its logits, so it runs backward once; compute the loss again")
        (logits_VK,) = ctx.saved_tensors
        ctx.is_spent = True
        gradient_VK = logits_VK.detach()
        ctx.kernels.overwrite(gradient_VK, ctx.targets, slopes_V.float().contiguous())
        # Whoever else saved the logits must be told that they are gone: autograd compares versions.
        torch.autograd.graph.increment_version(gradient_VK)
        return gradient_VK, None, None


def _reference_rows(logits_VK: Tensor, targets: MixedTargets, class_mask_K: Tensor, num_masked: int, logit_clamp: float) -> Tensor:
    lam_V = targets.lam.expand(len(logits_VK))
    parts = []
    for rows, mask in ((slice(num_masked), class_mask_K), (slice(num_masked, None), None)):
        of_rows = MixedTargets(targets.labels_B[rows], targets.partner_labels_B[rows], lam_V[rows])
        parts.append(mixed_bce_rows(logits_VK[rows], of_rows, logit_clamp, mask))
    return torch.cat(parts)


def _row_kernels(device: torch.device, dtype: torch.dtype) -> RowKernels | None:
    # No fp16 on a CPU: nothing trains in it there, and numba has no such type.
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float32):
        return RowKernels(fused_bce_numba.losses, fused_bce_numba.overwrite)
    return _triton_kernels() if device.type == "cuda" and dtype != torch.float64 else None


@functools.cache
def _triton_kernels() -> RowKernels | None:
    """The Triton kernels; None where Triton, which comes with torch's CUDA builds, is missing."""
    if importlib.util.find_spec("triton") is None:
        return None
    from bce3s.losses import fused_bce_triton

    return RowKernels(fused_bce_triton.losses, fused_bce_triton.overwrite)
