"""The three views on a CPU in one compiled pass: a row at a time, so that what it computes stays in the first-level cache.

Arithmetic is that of `mix.write_views_reference` step by step, with the multiply-add of `torch.lerp` fused as torch fuses it, so values
are the same bits.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from numpy.typing import NDArray

from pipelines.augment.shares import in_shares


def _as_stored(value: np.float32, row: NDArray[Any]) -> Any:
    """`value` as elements of `row` hold it: float32, or bfloat16 as the uint16 of its bits; for compiled loops only."""
    raise NotImplementedError


@overload(_as_stored)
def _compile_as_stored(value: Any, row: Any) -> Any:
    del value

    # numba wants the signature of the function around them, annotations included.
    def float32(value: Any, row: Any) -> Any:
        return value

    def bfloat16_bits(value: Any, row: Any) -> Any:
        # Round to nearest, ties to even, by an addition that carries into the upper half; levels are finite, so there is no NaN to lose.
        bits = np.float32(value).view(np.uint32)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return bfloat16_bits if row.dtype == numba.types.uint16 else float32


# "contract" lets a * b + c become one fused operation, as in torch; without "numpy" each division would first be tested for zero, a
# branch that keeps the loops from being vectorised.
@numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy", cache=True)
def _mix_rows(
    images_SHE: NDArray[np.uint8],
    mix: NDArray[np.float32],
    mean_E: NDArray[np.float32],
    std_E: NDArray[np.float32],
    views_VHE: NDArray[Any],
    first: int,
    last: int,
) -> None:
    """Writes the views of sources `first` up to but without `last`."""
    num_sources = len(images_SHE) // 2
    height, row_levels = images_SHE.shape[1:]
    lam, y0, y1 = mix[0], mix[2], mix[3]
    # torch.lerp starts from the nearer end.
    near_partner = abs(lam) < np.float32(0.5)
    start_E, stop_E = int(np.ceil(3 * mix[4])), int(np.ceil(3 * mix[5]))
    instance_E, partner_E = np.empty(row_levels, np.float32), np.empty(row_levels, np.float32)
    for source in range(first, last):
        for y in range(height):
            pixels_E, partner_pixels_E = images_SHE[source, y], images_SHE[num_sources + source, y]
            source_E, mixup_E = views_VHE[source, y], views_VHE[num_sources + source, y]
            cutmix_E = views_VHE[2 * num_sources + source, y]
            for e in range(row_levels):
                instance_E[e] = (np.float32(pixels_E[e]) - mean_E[e]) / std_E[e]
                source_E[e] = _as_stored(instance_E[e], source_E)
            for e in range(row_levels):
                partner_E[e] = (np.float32(partner_pixels_E[e]) - mean_E[e]) / std_E[e]
            cutmix_E[:] = source_E
            if y0 <= y < y1:
                for e in range(start_E, stop_E):
                    cutmix_E[e] = _as_stored(partner_E[e], cutmix_E)
            if near_partner:
                for e in range(row_levels):
                    mixup_E[e] = _as_stored(lam * (instance_E[e] - partner_E[e]) + partner_E[e], mixup_E)
            else:
                for e in range(row_levels):
                    mixup_E[e] = _as_stored((lam - np.float32(1)) * (instance_E[e] - partner_E[e]) + instance_E[e], mixup_E)


@numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy", cache=True)
def _normalise_rows(
    images_SHE: NDArray[np.uint8],
    mean_E: NDArray[np.float32],
    std_E: NDArray[np.float32],
    normalised_SHE: NDArray[Any],
    first: int,
    last: int,
) -> None:
    for sample in range(first, last):
        for y in range(images_SHE.shape[1]):
            pixels_E, normalised_E = images_SHE[sample, y], normalised_SHE[sample, y]
            for e in range(len(pixels_E)):
                normalised_E[e] = _as_stored((np.float32(pixels_E[e]) - mean_E[e]) / std_E[e], normalised_E)


def write_views(images_SHWC: torch.Tensor, mix: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, views_VHWC: torch.Tensor) -> None:
    """Fills float32 or bfloat16 [3B, H, W, 3], contiguous, with the views of uint8 [2B, H, W, 3]; see `mix.mix_views`."""
    mean_E, std_E = _along_a_row(mean, images_SHWC), _along_a_row(std, images_SHWC)
    images_SHE, views_VHE, lam_and_box = _rows(images_SHWC), _rows(views_VHWC), mix.numpy()

    def work(first: int, last: int) -> None:
        _mix_rows(images_SHE, lam_and_box, mean_E, std_E, views_VHE, first, last)

    in_shares(work, len(images_SHE) // 2, images_SHE.nbytes)


def write_normalised(images_SHWC: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, normalised_SHWC: torch.Tensor) -> None:
    """Fills float32 or bfloat16 [S, H, W, 3], contiguous, with (level − mean) / std of uint8 [S, H, W, 3]."""
    mean_E, std_E = _along_a_row(mean, images_SHWC), _along_a_row(std, images_SHWC)
    images_SHE, normalised_SHE = _rows(images_SHWC), _rows(normalised_SHWC)

    def work(first: int, last: int) -> None:
        _normalise_rows(images_SHE, mean_E, std_E, normalised_SHE, first, last)

    in_shares(work, len(images_SHE), images_SHE.nbytes)


def _along_a_row(channels: torch.Tensor, images_SHWC: torch.Tensor) -> NDArray[np.float32]:
    return np.tile(channels.numpy(), images_SHWC.shape[2])


def _rows(images: torch.Tensor) -> NDArray[Any]:
    """[S, H, W, 3] as [S, H, E]: rows of E = 3·W levels; bfloat16 as the uint16 of its bits."""
    levels: NDArray[Any] = (images.view(torch.uint16) if images.dtype == torch.bfloat16 else images).contiguous().flatten(2).numpy()
    return levels
