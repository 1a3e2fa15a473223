"""Where each sample is cropped and whether it is flipped: drawn on the host from counter keys, so every loader crops alike.

A window is (y, x, height, width) in pixels of the stored image; with "pad" it may reach beyond the border, where pixels are black.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipelines.config import AugmentConfig
from pipelines.randomness import FloatArray, KeyArray, uniforms
from pipelines.types import IntArray

WindowArray = NDArray[np.int32]
FlipArray = NDArray[np.int32]

# The ten attempts of the field's RandomResizedCrop, all drawn at once; each takes an area, a ratio and a corner.
_ATTEMPTS = 10
_DRAWS = 4 * _ATTEMPTS + 1


def _resized_windows(draws_SA4: FloatArray, heights_S: IntArray, widths_S: IntArray, config: AugmentConfig) -> WindowArray:
    """RandomResizedCrop (Szegedy et al. 2015, in the field's usual form): the first of ten attempts that fits, else the centre."""
    areas_SA = (heights_S * widths_S)[:, None] * (config.area_range[0] + draws_SA4[..., 0] * (config.area_range[1] - config.area_range[0]))
    low, high = math.log(config.aspect_range[0]), math.log(config.aspect_range[1])
    ratios_SA = np.exp(low + draws_SA4[..., 1] * (high - low))
    width_SA = np.rint(np.sqrt(areas_SA * ratios_SA)).astype(np.int64)
    height_SA = np.rint(np.sqrt(areas_SA / ratios_SA)).astype(np.int64)
    fits_SA: NDArray[np.bool_] = (width_SA > 0) & (width_SA <= widths_S[:, None]) & (height_SA > 0) & (height_SA <= heights_S[:, None])
    first_S = np.argmax(fits_SA, axis=1)
    rows_S = np.arange(len(first_S))
    height_S, width_S = height_SA[rows_S, first_S], width_SA[rows_S, first_S]
    y_S = (draws_SA4[rows_S, first_S, 2] * (heights_S - height_S + 1)).astype(np.int64)
    x_S = (draws_SA4[rows_S, first_S, 3] * (widths_S - width_S + 1)).astype(np.int64)
    drawn_S4 = np.stack([y_S, x_S, height_S, width_S], axis=1)
    fallback_S4 = _ratio_windows(heights_S, widths_S, config.aspect_range)
    any_S1 = np.any(fits_SA, axis=1, keepdims=True)
    return np.where(any_S1, drawn_S4, fallback_S4).astype(np.int32)


def _ratio_windows(heights_S: IntArray, widths_S: IntArray, aspect_range: tuple[float, float]) -> IntArray:
    """The largest centred window whose aspect ratio lies in `aspect_range`."""
    ratio_S = np.clip(widths_S / heights_S, *aspect_range)
    width_S = np.minimum(widths_S, np.maximum(1, np.rint(heights_S * ratio_S))).astype(np.int64)
    height_S = np.minimum(heights_S, np.maximum(1, np.rint(widths_S / ratio_S))).astype(np.int64)
    return np.stack([(heights_S - height_S) // 2, (widths_S - width_S) // 2, height_S, width_S], axis=1)


def center_windows(heights_S: IntArray, widths_S: IntArray, keep: float) -> WindowArray:
    """int32 [S, 4]: the centred square of `keep` times the shorter side (evaluation: Resize 256, CenterCrop 224 is keep = 0.875)."""
    side_S = np.maximum(1, np.rint(np.minimum(heights_S, widths_S) * keep)).astype(np.int64)
    return np.stack([(heights_S - side_S) // 2, (widths_S - side_S) // 2, side_S, side_S], axis=1).astype(np.int32)


def draw_windows(
    keys_S: KeyArray, heights_S: IntArray, widths_S: IntArray, image_size: int, config: AugmentConfig
) -> tuple[WindowArray, FlipArray]:
    """Crop windows int32 [S, 4] and flips int32 [S] (0 or 1), a pure function of each sample's key.

    Args:
        keys_S: uint64 [S], one key per drawn sample.
        heights_S: int64 [S], of each stored image in pixels.
        widths_S: int64 [S], likewise.
        image_size: side of the crop in pixels ("pad"); "resized" and "none" resize their window to it later.
        config: kind and ranges of the crop.
    """
    draws_S = uniforms(keys_S, _DRAWS)
    if config.crop == "resized":
        windows_S4 = _resized_windows(draws_S[:, 1:].reshape(len(keys_S), _ATTEMPTS, 4), heights_S, widths_S, config)
    elif config.crop == "pad":
        # The stored image has the crop's size (`build_loader` asks for it), so the window only shifts, by up to `padding` each way.
        shifts_S2 = np.floor(draws_S[:, 1:3] * (2 * config.padding + 1)) - config.padding
        windows_S4 = np.concatenate([shifts_S2, np.full((len(keys_S), 2), image_size)], axis=1).astype(np.int32)
    else:
        windows_S4 = center_windows(heights_S, widths_S, config.eval_crop)
    flips_S = (draws_S[:, 0] < 0.5).astype(np.int32) if config.flip else np.zeros(len(keys_S), np.int32)
    return windows_S4, flips_S


def rescale_windows(windows_S4: WindowArray, from_S2: IntArray, to_S2: IntArray) -> WindowArray:
    """The windows as they lie in the same images at another size, rounded to whole pixels; at least one pixel remains.

    Args:
        windows_S4: int32 [S, 4].
        from_S2: int64 [S, 2], (height, width) that the windows were drawn for.
        to_S2: int64 [S, 2], of the images at hand; windows of images of unchanged size stay as they are.
    """
    scale_S2 = to_S2 / from_S2
    starts_S2 = np.minimum(np.rint(windows_S4[:, :2] * scale_S2).astype(np.int64), to_S2 - 1)
    ends_S2 = np.clip(np.rint((windows_S4[:, :2] + windows_S4[:, 2:]) * scale_S2).astype(np.int64), starts_S2 + 1, to_S2)
    changed_S1 = (from_S2 != to_S2).any(axis=1, keepdims=True)
    return np.where(changed_S1, np.concatenate([starts_S2, ends_S2 - starts_S2], axis=1), windows_S4).astype(np.int32)
