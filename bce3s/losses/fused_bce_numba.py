"""`fused_bce` on a CPU: compiled loops over rows of logits, in as many threads as torch may use.

exp and log(1 + e) are polynomials, because a loop that calls a library for them is not vectorised: four to five times the speed of torch's
own passes over the same logits (benchmarks/loss.py). Both are within 2·10⁻⁷ of the true value, relatively, over the whole range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment.shares import in_shares

if TYPE_CHECKING:
    from bce3s.losses.fused_bce import RowTargets

# "contract" fuses a * b + c. Nothing may be reordered: _exponential counts on what rounding does.
_exactly = numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy", cache=True)
# A sum over classes in vector lanes needs reordering. No "nnan": a NaN must reach the loss, where training looks for it.
_in_lanes = numba.njit(nogil=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy", cache=True)


def _as_read(level: Any) -> Any:
    """A logit as float32, from itself or from the uint16 of a bfloat16's bits; for compiled loops only."""
    raise NotImplementedError


def _as_stored(value: Any, row: NDArray[Any]) -> Any:
    """`value` as elements of `row` hold it; for compiled loops only."""
    raise NotImplementedError


@overload(_as_read)
def _compile_as_read(level: Any) -> Any:
    def float32(level: Any) -> Any:
        return level

    def bfloat16_bits(level: Any) -> Any:
        return np.uint32(np.uint32(level) << np.uint32(16)).view(np.float32)

    return bfloat16_bits if level == numba.types.uint16 else float32


@overload(_as_stored)
def _compile_as_stored(value: Any, row: Any) -> Any:
    del value

    def float32(value: Any, row: Any) -> Any:
        return value

    def bfloat16_bits(value: Any, row: Any) -> Any:
        # Round to nearest, ties to even, by an addition that carries into the upper half.
        bits = np.float32(value).view(np.uint32)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return bfloat16_bits if row.dtype == numba.types.uint16 else float32


@_exactly
def _exponential(x: np.float32) -> np.float32:
    """exp(x) for x ≤ 0 (Cody and Waite 1980; coefficients of Cephes' expf); 10⁻³⁸ below −87."""
    x = np.float32(-87) if x < np.float32(-87) else x
    # 1.5·2²³ pushes the fraction out: the nearest whole number of powers of two stands in the low bits.
    shifted = x * np.float32(1.44269504) + np.float32(12582912)
    power = shifted - np.float32(12582912)
    rest = (x - power * np.float32(0.693359375)) + power * np.float32(2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    series = series * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(5.0000001201e-1)
    bits = np.uint32(np.float32(shifted).view(np.uint32) + np.uint32(127)) << np.uint32(23)
    return (series * rest * rest + rest + np.float32(1)) * np.uint32(bits).view(np.float32)


@_exactly
def _log_one_plus(e: np.float32) -> np.float32:
    """log(1 + e) for 0 ≤ e ≤ 1 as 2·artanh(e / (2 + e)); keeps a tiny e, which 1 + e would lose."""
    ratio = e / (np.float32(2) + e)
    square = ratio * ratio
    series = np.float32(1 / 13)
    series = series * square + np.float32(1 / 11)
    series = series * square + np.float32(1 / 9)
    series = series * square + np.float32(1 / 7)
    series = series * square + np.float32(1 / 5)
    series = series * square + np.float32(1 / 3)
    return np.float32(2) * (ratio + ratio * square * series)


@_exactly
def _softplus(z: np.float32) -> np.float32:
    return (z if z > np.float32(0) else np.float32(0)) + _log_one_plus(_exponential(-abs(z)))


@_exactly
def _sigmoid(z: np.float32) -> np.float32:
    fade = _exponential(-abs(z))
    return (np.float32(1) if z >= np.float32(0) else fade) / (np.float32(1) + fade)


@_exactly
def _clamped(z: np.float32, clamp: np.float32) -> np.float32:
    return clamp if z > clamp else (-clamp if z < -clamp else z)


@_exactly
def _weights(own: int, other: int, lam: np.float32, present_K: NDArray[np.float32]) -> tuple[np.float32, np.float32]:
    """Targets of the two classes; 0 where one is no positive: no share of the mix, or no part in the loss."""
    own_weight = np.float32(1) if own == other else lam
    other_weight = np.float32(0) if own == other else np.float32(1) - lam
    return own_weight * present_K[own], other_weight * present_K[other]


@_in_lanes
def _row_losses(
    logits_VK: NDArray[Any],
    own_V: NDArray[np.int64],
    other_V: NDArray[np.int64],
    lam_V: NDArray[np.float32],
    present_K: NDArray[np.float32],
    num_masked: int,
    clamp: np.float32,
    losses_V: NDArray[np.float32],
    first: int,
    last: int,
) -> None:
    """Writes the losses of rows `first` up to but without `last`."""
    everything_K = np.ones_like(present_K)
    for v in range(first, last):
        row_K = logits_VK[v]
        counts_K = present_K if v < num_masked else everything_K
        total = np.float32(0)
        for k in range(len(row_K)):
            total += counts_K[k] * _softplus(_clamped(_as_read(row_K[k]), clamp))
        own_weight, other_weight = _weights(own_V[v], other_V[v], lam_V[v], counts_K)
        # The sum took every class for a negative; a positive has its own term instead.
        if own_weight > 0:
            z = _clamped(_as_read(row_K[own_V[v]]), clamp)
            total += own_weight * _softplus(-z) - _softplus(z)
        if other_weight > 0:
            z = _clamped(_as_read(row_K[other_V[v]]), clamp)
            total += other_weight * _softplus(-z) - _softplus(z)
        losses_V[v] = total


@_in_lanes
def _row_gradients(
    logits_VK: NDArray[Any],
    own_V: NDArray[np.int64],
    other_V: NDArray[np.int64],
    lam_V: NDArray[np.float32],
    present_K: NDArray[np.float32],
    num_masked: int,
    clamp: np.float32,
    slopes_V: NDArray[np.float32],
    first: int,
    last: int,
) -> None:
    """Overwrites rows `first` up to but without `last` with slope times gradient."""
    everything_K = np.ones_like(present_K)
    for v in range(first, last):
        row_K, slope = logits_VK[v], slopes_V[v]
        counts_K = present_K if v < num_masked else everything_K
        own, other = own_V[v], other_V[v]
        own_weight, other_weight = _weights(own, other, lam_V[v], counts_K)
        own_z, other_z = _as_read(row_K[own]), _as_read(row_K[other])
        for k in range(len(row_K)):
            z = _as_read(row_K[k])
            inside = np.float32(0) if abs(z) > clamp else slope * counts_K[k]
            row_K[k] = _as_stored(inside * _sigmoid(z), row_K)
        if own_weight > 0:
            inside = np.float32(0) if abs(own_z) > clamp else slope
            row_K[own] = _as_stored(-own_weight * inside * _sigmoid(-own_z), row_K)
        if other_weight > 0:
            inside = np.float32(0) if abs(other_z) > clamp else slope
            row_K[other] = _as_stored(-other_weight * inside * _sigmoid(-other_z), row_K)


def losses(logits_VK: Tensor, targets: RowTargets) -> Tensor:
    """See `fused_bce.RowKernels`; logits are float32 or bfloat16, contiguous."""
    losses_V = torch.empty(len(logits_VK))
    _over_rows(_row_losses, logits_VK, targets, losses_V)
    return losses_V


def overwrite(logits_VK: Tensor, targets: RowTargets, slopes_V: Tensor) -> None:
    """See `fused_bce.RowKernels`; logits are float32 or bfloat16, contiguous."""
    _over_rows(_row_gradients, logits_VK, targets, slopes_V)


def _over_rows(loop: Any, logits_VK: Tensor, targets: RowTargets, values_V: Tensor) -> None:
    bits_VK = logits_VK.detach()
    levels_VK = (bits_VK.view(torch.uint16) if bits_VK.dtype == torch.bfloat16 else bits_VK).numpy()
    own_V, other_V, lam_V, present_K = (tensor.numpy() for tensor in targets[:4])

    def work(first: int, last: int) -> None:
        clamp = np.float32(targets.logit_clamp)
        loop(levels_VK, own_V, other_V, lam_V, present_K, targets.num_masked, clamp, values_V.numpy(), first, last)

    in_shares(work, len(levels_VK), logits_VK.nbytes)
