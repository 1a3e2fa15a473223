"""The three views of one step: source, mixup and cutmix, from one decode of both streams (method.md, "One step")."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.augment import mix_numba
from pipelines.config import AugmentConfig
from pipelines.randomness import Purpose, derive_key, position_keys, uniforms

MixArray = NDArray[np.float32]

# (images_SHWC, mix, mean, std, views_VHWC): fills the views, which are contiguous.
WriteViews = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


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
    if _is_compiled_for(images_SHWC.device, dtype):
        normalised = torch.empty(images_SHWC.shape, dtype=dtype)
        mix_numba.write_normalised(images_SHWC, mean, std, normalised)
        return normalised.permute(0, 3, 1, 2)
    return ((images_SHWC.to(torch.float32) - mean) / std).to(dtype).permute(0, 3, 1, 2)


def mix_views(
    images_SHWC: torch.Tensor,
    mix: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The views [3B, 3, H, W] = source | mixup | cutmix of a batch uint8 [2B, H, W, 3] = instance | partner, channels-last in memory.

    `mix` stays on the device: no value is read back, shapes do not depend on it. What writes the views is what benchmarks/mix.py found
    fastest on each device; all give the values of `write_views_reference`, bit for bit.

    Args:
        images_SHWC: uint8, both streams.
        mix: float32 [6] from `draw_mix`.
        mean: float32 [3] on the scale 0…255.
        std: float32 [3] on the scale 0…255.
        dtype: of the result.
        out: the views of an earlier call with the same shapes, to be overwritten and returned. Fresh memory costs a CPU more than the
            mixing itself at 224 px, and a CUDA graph needs the same addresses each time.

    Raises:
        ValueError: `out` has another shape, dtype, device or memory order than the result.
    """
    _, height, width, channels = images_SHWC.shape
    shape = (3 * (len(images_SHWC) // 2), height, width, channels)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=images_SHWC.device).permute(0, 3, 1, 2)
    views_VHWC = out.permute(0, 2, 3, 1)
    if views_VHWC.shape != shape or out.dtype != dtype or out.device != images_SHWC.device or not views_VHWC.is_contiguous():
        needed = f"{dtype} {[shape[0], channels, height, width]}, channels-last, on {images_SHWC.device}"
        raise ValueError(f"the views need {needed}, not {out.dtype} {list(out.shape)}, strides {out.stride()}, on {out.device}")
    _fastest_writer(images_SHWC.device, dtype)(images_SHWC, mix, mean, std, views_VHWC)
    return out


def write_views_reference(
    images_SHWC: torch.Tensor, mix: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, views_VHWC: torch.Tensor
) -> None:
    """What the views are, in torch's words; the arguments of `mix_views`, and where to write: [3B, H, W, 3] on the same device."""
    num_sources, height, width = images_SHWC.shape[0] // 2, images_SHWC.shape[1], images_SHWC.shape[2]
    scaled = (images_SHWC.to(torch.float32) - mean) / std
    instance, partner = scaled[:num_sources], scaled[num_sources:]
    rows = torch.arange(height, device=mix.device)
    columns = torch.arange(width, device=mix.device)
    box = ((rows >= mix[2]) & (rows < mix[3]))[:, None] & ((columns >= mix[4]) & (columns < mix[5]))[None, :]
    views_VHWC[:num_sources] = instance
    views_VHWC[num_sources : 2 * num_sources] = torch.lerp(partner, instance, mix[0])
    views_VHWC[2 * num_sources :] = torch.where(box[None, :, :, None], partner, instance)


def _is_compiled_for(device: torch.device, dtype: torch.dtype) -> bool:
    # No fp16: nothing trains in fp16 on a CPU, and numba has no such type there.
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float32)


def _fastest_writer(device: torch.device, dtype: torch.dtype) -> WriteViews:
    if _is_compiled_for(device, dtype):
        return mix_numba.write_views
    return _triton_writer() or write_views_reference if device.type == "cuda" else write_views_reference


@functools.cache
def _triton_writer() -> WriteViews | None:
    """The Triton kernel; None where Triton, which comes with torch's CUDA builds, is missing."""
    if importlib.util.find_spec("triton") is None:
        return None
    from pipelines.augment.mix_triton import write_views

    return write_views
