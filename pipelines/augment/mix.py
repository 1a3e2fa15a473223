"""The three views of one step: source, mixup and cutmix, from one decode of both streams (method.md, "One step")."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.config import AugmentConfig
from pipelines.randomness import Purpose, derive_key, position_keys, uniforms

MixArray = NDArray[np.float32]


def _draw_lambda(key: int, alpha: float, uniform: float) -> float:
    """λ ~ Beta(alpha, alpha); alpha = 1 is the uniform distribution and needs no generator."""
    return uniform if alpha == 1.0 else float(np.random.Generator(np.random.Philox(key=key)).beta(alpha, alpha))


def draw_mix(seed: int, epoch: int, step: int, image_size: int, config: AugmentConfig) -> MixArray:
    """float32 [6]: (lam_mixup, lam_cutmix, y0, y1, x0, x1), the same on every rank.

    The box has side ⌈image_size·√(1−λ)⌉ around a uniform centre, clipped at the border; lam_cutmix is λ, or the share of pixels that
    stay with the instance image when `cutmix_area_correction` is on (traps.md A11; Yun et al. 2019 correct it).
    """
    key = derive_key(seed, epoch, Purpose.MIX)
    step_key = position_keys(key, np.array([step], np.int64))
    lam_draw, y_draw, x_draw = uniforms(step_key, 3)[0]
    lam = _draw_lambda(int(step_key[0]), config.mix_alpha, float(lam_draw))
    side = math.ceil(image_size * math.sqrt(1.0 - lam))
    corner_y = int(y_draw * image_size) - side // 2
    corner_x = int(x_draw * image_size) - side // 2
    y0, y1 = max(0, corner_y), min(image_size, corner_y + side)
    x0, x1 = max(0, corner_x), min(image_size, corner_x + side)
    lam_cutmix = 1.0 - (y1 - y0) * (x1 - x0) / image_size**2 if config.cutmix_area_correction else lam
    return np.array([lam, lam_cutmix, y0, y1, x0, x1], np.float32)


def channel_statistics(config: AugmentConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of `config`, float32 [3], on the scale 0…255 of the pixels."""
    return torch.tensor(config.mean, device=device) * 255.0, torch.tensor(config.std, device=device) * 255.0


def normalise(images_SHWC: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [S, H, W, 3] → dtype [S, 3, H, W], channels-last in memory; `mean` and `std` are float32 [3] on the scale 0…255."""
    return ((images_SHWC.to(torch.float32) - mean) / std).to(dtype).permute(0, 3, 1, 2)


def mix_views(images_SHWC: torch.Tensor, mix: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The views [3B, 3, H, W] = source | mixup | cutmix of a batch uint8 [2B, H, W, 3] = instance | partner, channels-last in memory.

    `mix` stays on the device: no value is read back, shapes do not depend on it.

    Args:
        images_SHWC: uint8, both streams.
        mix: float32 [6] from `draw_mix`.
        mean: float32 [3] on the scale 0…255.
        std: float32 [3] on the scale 0…255.
        dtype: of the result.
    """
    num_sources, height, width = images_SHWC.shape[0] // 2, images_SHWC.shape[1], images_SHWC.shape[2]
    scaled = (images_SHWC.to(torch.float32) - mean) / std
    instance, partner = scaled[:num_sources], scaled[num_sources:]
    rows = torch.arange(height, device=mix.device)
    columns = torch.arange(width, device=mix.device)
    box = ((rows >= mix[2]) & (rows < mix[3]))[:, None] & ((columns >= mix[4]) & (columns < mix[5]))[None, :]
    views = torch.empty((3 * num_sources, height, width, 3), dtype=dtype, device=images_SHWC.device)
    views[:num_sources] = instance
    views[num_sources : 2 * num_sources] = torch.lerp(partner, instance, mix[0])
    views[2 * num_sources :] = torch.where(box[None, :, :, None], partner, instance)
    return views.permute(0, 3, 1, 2)
