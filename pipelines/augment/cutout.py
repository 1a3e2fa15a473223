"""Cutout (DeVries and Taylor 2017, arXiv:1708.04552): one black square a sample."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.randomness import KeyArray, uniforms


def draw_cutout_centers(keys_S: KeyArray, height: int, width: int) -> NDArray[np.int32]:
    """int32 [S, 2]: (y, x), uniform over the pixels of an image of `height` by `width`; a pure function of the uint64 [S] keys."""
    return (uniforms(keys_S, 2) * (height, width)).astype(np.int32)


def cutout(images_SHWC: torch.Tensor, centers_S2: torch.Tensor, side: int) -> torch.Tensor:
    """Sets a square around each centre to 0, cut off at the border.

    Args:
        images_SHWC: uint8 [S, H, W, C]; left as it is.
        centers_S2: int32 [S, 2], (y, x), on the same device.
        side: pixels; rows y − side//2 up to but without y + side//2 are cut, so an odd side cuts one pixel less, as the authors' code does.

    Returns:
        uint8 [S, H, W, C] on the same device; the input itself where nothing is cut.
    """
    half = side // 2
    if half == 0:
        return images_SHWC
    _, height, width, _ = images_SHWC.shape
    first_y, first_x = (centers_S2 - half).unbind(1)
    inside_SH = _covers(first_y, 2 * half, height)
    inside_SW = _covers(first_x, 2 * half, width)
    # uint8 times 0 or 1: several times faster on a CPU than a masked fill, and one kernel on CUDA.
    keep_SHW = (~(inside_SH[:, :, None] & inside_SW[:, None, :])).to(torch.uint8)
    return images_SHWC * keep_SHW[..., None]


def _covers(first_S: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """Positions first … first + length − 1 as bool [S, size]."""
    offsets = torch.arange(size, dtype=torch.int32, device=first_S.device) - first_S[:, None]
    return (offsets >= 0) & (offsets < length)
