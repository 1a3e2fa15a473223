"""Where each sample is cropped and whether it is flipped: drawn on the host from counter keys, so every loader crops alike.

A window is (y, x, height, width) in pixels of the stored image; with "pad" it may reach beyond the border, where pixels are black.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

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


def crop_resident(
    images_SHWC: torch.Tensor, windows_S4: torch.Tensor, flips_S: torch.Tensor, image_size: int, resize: bool
) -> torch.Tensor:
    """Crops and flips a batch of equally sized images in whole-batch operations.

    Args:
        images_SHWC: uint8 [S, H, W, 3].
        windows_S4: int32 [S, 4] on the same device.
        flips_S: int32 [S], 1 mirrors left and right.
        image_size: side of the result.
        resize: sample each window bilinearly to image_size; otherwise windows have that size already and pixels are copied exactly.

    Returns:
        uint8 [S, image_size, image_size, 3].
    """
    num_samples, height, width, _ = images_SHWC.shape
    steps = torch.arange(image_size, device=images_SHWC.device)
    columns_SW = torch.where(flips_S[:, None] > 0, image_size - 1 - steps, steps)
    if not resize:
        y_SH = windows_S4[:, 0:1] + steps
        x_SW = windows_S4[:, 1:2] + columns_SW
        inside = ((y_SH >= 0) & (y_SH < height))[:, :, None] & ((x_SW >= 0) & (x_SW < width))[:, None, :]
        rows = torch.arange(num_samples, device=images_SHWC.device)[:, None, None]
        pixels = images_SHWC[rows, y_SH.clamp(0, height - 1)[:, :, None], x_SW.clamp(0, width - 1)[:, None, :]]
        return pixels * inside[..., None]
    window = windows_S4.to(torch.float32)
    # Pixel centres of the target, mapped into the window and then to grid_sample's −1…1 over the stored image.
    y_SH = window[:, 0:1] + (steps + 0.5) * window[:, 2:3] / image_size
    x_SW = window[:, 1:2] + (columns_SW + 0.5) * window[:, 3:4] / image_size
    grid = torch.stack(
        [(2 * x_SW / width - 1)[:, None, :].expand(-1, image_size, -1), (2 * y_SH / height - 1)[:, :, None].expand(-1, -1, image_size)], -1
    )
    sampled = functional.grid_sample(
        images_SHWC.permute(0, 3, 1, 2).to(torch.float32), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
