"""The three views on a CUDA device in one pass: both batches are read once, each view is written once, nothing else touches memory.

`TRITON_INTERPRET=1`, set before Triton is imported, runs the same kernel on a CPU; the tests do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# 8 levels a thread: one store of 16 bytes in bf16, and the warp's stores lie side by side. benchmarks/mix.py sweeps both on CUDA.
BLOCK_LEVELS = 1024
NUM_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _of_channel(channel: tl.tensor, red: tl.tensor, green: tl.tensor, blue: tl.tensor) -> tl.tensor:
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit  # type: ignore[untyped-decorator]
def _quotient(number: tl.tensor, divisor: tl.tensor, reciprocal: tl.tensor) -> tl.tensor:
    # number / divisor as IEEE rounds it (Markstein 1990), given the rounded reciprocal: three instructions where a division takes
    # a dozen and a branch. No bit was off in 4·10⁸ quotients of levels, random means and random deviations.
    estimate = number * reciprocal
    return tl.fma(tl.fma(-estimate, divisor, number), reciprocal, estimate)


@triton.jit  # type: ignore[untyped-decorator]
def _mix_kernel(
    images: tl.tensor,
    mix: tl.tensor,
    mean: tl.tensor,
    std: tl.tensor,
    views: tl.tensor,
    IMAGE_LEVELS: tl.constexpr,
    ROW_LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # Program (block, source): levels of one source image, counted as they lie in memory. Sizes are constants, so divisions are shifts.
    level = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = level < IMAGE_LEVELS
    # 64 bits: 3·B·H·W·3 passes 2³¹ at B = 4755 of 224 px.
    start = tl.program_id(1).to(tl.int64) * IMAGE_LEVELS
    stream = tl.num_programs(1).to(tl.int64) * IMAGE_LEVELS
    channel = level % 3
    mean_level = _of_channel(channel, tl.load(mean), tl.load(mean + 1), tl.load(mean + 2))
    std_0, std_1, std_2 = tl.load(std), tl.load(std + 1), tl.load(std + 2)
    std_level = _of_channel(channel, std_0, std_1, std_2)
    reciprocal = _of_channel(channel, tl.div_rn(1.0, std_0), tl.div_rn(1.0, std_1), tl.div_rn(1.0, std_2))
    pixels = tl.load(images + start + level, mask=inside, other=0).to(tl.float32)
    partner_pixels = tl.load(images + stream + start + level, mask=inside, other=0).to(tl.float32)
    instance = _quotient(pixels - mean_level, std_level, reciprocal)
    partner = _quotient(partner_pixels - mean_level, std_level, reciprocal)
    # torch.lerp: a fused multiply-add from the nearer end.
    lam = tl.load(mix)
    near_partner = tl.abs(lam) < 0.5
    weight = tl.where(near_partner, lam, lam - 1.0)
    mixup = tl.fma(weight + tl.zeros_like(instance), instance - partner, tl.where(near_partner, partner, instance))
    row = level // ROW_LEVELS
    in_row = level % ROW_LEVELS
    in_rows = (row >= tl.load(mix + 2)) & (row < tl.load(mix + 3))
    in_box = in_rows & (in_row >= 3 * tl.load(mix + 4)) & (in_row < 3 * tl.load(mix + 5))
    stored = views.dtype.element_ty
    tl.store(views + start + level, instance.to(stored), mask=inside)
    tl.store(views + stream + start + level, mixup.to(stored), mask=inside)
    tl.store(views + 2 * stream + start + level, tl.where(in_box, partner, instance).to(stored), mask=inside)


def write_views(
    images_SHWC: torch.Tensor,
    mix: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    views_VHWC: torch.Tensor,
    block_levels: int = BLOCK_LEVELS,
    num_warps: int = NUM_WARPS,
) -> None:
    """Fills a contiguous floating-point [3B, H, W, 3] with the views of uint8 [2B, H, W, 3]; see `mix.mix_views`.

    Waits for nothing and allocates nothing where the images are contiguous, so a CUDA graph can hold it after one call outside.

    Args:
        images_SHWC: uint8, both streams; B at most 65,535.
        mix: float32 [6] on the same device, like `mean` and `std`, float32 [3] on the scale 0…255.
        views_VHWC: where to write, on the same device.
        block_levels: a power of two, levels (pixels × 3) a program.
        num_warps: of a program.
    """
    num_samples, height, width, channels = images_SHWC.shape
    if num_samples < 2:
        return
    image_levels = height * width * channels
    # Triton launches on the current device, which need not be that of the images.
    with torch.cuda.device_of(images_SHWC):
        _mix_kernel[(triton.cdiv(image_levels, block_levels), num_samples // 2)](
            images_SHWC.contiguous(),
            mix,
            mean,
            std,
            views_VHWC,
            IMAGE_LEVELS=image_levels,
            ROW_LEVELS=width * channels,
            BLOCK=block_levels,
            num_warps=num_warps,
            enable_fp_fusion=False,  # the kernel says itself what is fused
        )
