"""`crop.crop_reference` on a CUDA device in one pass, and with colour jitter a second one over the crops, in place.

`TRITON_INTERPRET=1`, set before Triton is imported, runs the same kernels on a CPU; the tests do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipelines.augment.crop import StoredImages

BLOCK_PIXELS = 512
NUM_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _position(step: tl.tensor, length: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    position = ((2 * step + 1) * length * 64 + SIZE // 2) // SIZE - 64
    return tl.minimum(tl.maximum(position, 0), (length - 1) * 128)


@triton.jit  # type: ignore[untyped-decorator]
def _blended(level: tl.tensor, base: tl.tensor, factor: tl.tensor) -> tl.tensor:
    mixed = (level.to(tl.float32) - base) * factor + base
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _grey(red: tl.tensor, green: tl.tensor, blue: tl.tensor) -> tl.tensor:
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit  # type: ignore[untyped-decorator]
def _crop_kernel(
    pixels: tl.tensor,
    offsets: tl.tensor,
    heights: tl.tensor,
    widths: tl.tensor,
    ids: tl.tensor,
    windows: tl.tensor,
    flips: tl.tensor,
    factors: tl.tensor,
    grey_sums: tl.tensor,
    crops: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    JITTER: tl.constexpr,
) -> None:
    # Program (block, sample): pixels of one crop. Numbers of the window have 64 bits: a side times 128 · SIZE may pass 2³¹.
    sample = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < SIZE * SIZE
    image = tl.load(ids + sample)
    source = pixels + tl.load(offsets + image)
    height, width = tl.load(heights + image), tl.load(widths + image)
    top, left = tl.load(windows + 4 * sample).to(tl.int64), tl.load(windows + 4 * sample + 1).to(tl.int64)
    rows, columns = tl.load(windows + 4 * sample + 2).to(tl.int64), tl.load(windows + 4 * sample + 3).to(tl.int64)
    step_x = pixel % SIZE
    step_x = tl.where(tl.load(flips + sample) > 0, SIZE - 1 - step_x, step_x)
    y = _position((pixel // SIZE).to(tl.int64), rows, SIZE)
    x = _position(step_x.to(tl.int64), columns, SIZE)
    weight_y, weight_x = (y & 127).to(tl.int32), (x & 127).to(tl.int32)
    y0, x0 = top + (y >> 7), left + (x >> 7)
    y1, x1 = tl.minimum(y0 + 1, top + rows - 1), tl.minimum(x0 + 1, left + columns - 1)
    above, below = valid & (y0 >= 0) & (y0 < height), valid & (y1 >= 0) & (y1 < height)
    before, behind = (x0 >= 0) & (x0 < width), (x1 >= 0) & (x1 < width)
    target = crops + (sample * SIZE * SIZE + pixel) * 3
    grey = tl.zeros([BLOCK], tl.int32) + 0x8000
    for channel in tl.static_range(3):
        a = tl.load(source + (y0 * width + x0) * 3 + channel, mask=above & before, other=0).to(tl.int32)
        b = tl.load(source + (y0 * width + x1) * 3 + channel, mask=above & behind, other=0).to(tl.int32)
        c = tl.load(source + (y1 * width + x0) * 3 + channel, mask=below & before, other=0).to(tl.int32)
        d = tl.load(source + (y1 * width + x1) * 3 + channel, mask=below & behind, other=0).to(tl.int32)
        upper, lower = 128 * a + (b - a) * weight_x, 128 * c + (d - c) * weight_x
        level = ((upper >> 1) + ((lower - upper) * weight_y >> 8) + 32) >> 6
        if JITTER:
            level = _blended(level, 0.0, tl.load(factors + 3 * sample))
            grey += level * (19595 if channel == 0 else (38470 if channel == 1 else 7471))
        tl.store(target + channel, level.to(tl.uint8), mask=valid)
    if JITTER:
        # An integer sum, so the order of the programs does not change it.
        tl.atomic_add(grey_sums + sample, tl.sum(tl.where(valid, grey >> 16, 0).to(tl.int64)))


@triton.jit  # type: ignore[untyped-decorator]
def _colour_kernel(crops: tl.tensor, factors: tl.tensor, grey_sums: tl.tensor, NUM_PIXELS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    # Contrast and saturation, in place; `grey_sums` are those of the brightened crops.
    sample = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < NUM_PIXELS
    mean = ((2 * tl.load(grey_sums + sample) + NUM_PIXELS) // (2 * NUM_PIXELS)).to(tl.float32)
    contrast, saturation = tl.load(factors + 3 * sample + 1), tl.load(factors + 3 * sample + 2)
    target = crops + (sample * NUM_PIXELS + pixel) * 3
    red = _blended(tl.load(target, mask=valid, other=0), mean, contrast)
    green = _blended(tl.load(target + 1, mask=valid, other=0), mean, contrast)
    blue = _blended(tl.load(target + 2, mask=valid, other=0), mean, contrast)
    grey = _grey(red, green, blue).to(tl.float32)
    tl.store(target, _blended(red, grey, saturation).to(tl.uint8), mask=valid)
    tl.store(target + 1, _blended(green, grey, saturation).to(tl.uint8), mask=valid)
    tl.store(target + 2, _blended(blue, grey, saturation).to(tl.uint8), mask=valid)


def crop_fused(
    stored: StoredImages,
    ids_S: torch.Tensor,
    windows_S4: torch.Tensor,
    flips_S: torch.Tensor,
    factors_S3: torch.Tensor | None,
    image_size: int,
) -> torch.Tensor:
    """The bits of `crop.crop_reference`, same arguments, same result; at most 65,535 samples. Never waits for the device."""
    num_samples = len(ids_S)
    crops_SHWC = torch.empty((num_samples, image_size, image_size, 3), dtype=torch.uint8, device=ids_S.device)
    if not num_samples:
        return crops_SHWC
    grid = (triton.cdiv(image_size * image_size, BLOCK_PIXELS), num_samples)
    # Not read without jitter, but a kernel wants pointers.
    factors = ids_S if factors_S3 is None else factors_S3
    grey_sums_S = ids_S if factors_S3 is None else torch.zeros_like(ids_S)
    # Triton launches on the current device, which need not be that of the images. Fused multiply-adds would change bits of the jitter.
    with torch.cuda.device_of(ids_S):
        _crop_kernel[grid](
            stored.pixels_P,
            stored.offsets_N,
            stored.heights_N,
            stored.widths_N,
            ids_S,
            windows_S4,
            flips_S,
            factors,
            grey_sums_S,
            crops_SHWC,
            SIZE=image_size,
            BLOCK=BLOCK_PIXELS,
            JITTER=factors_S3 is not None,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
        if factors_S3 is not None:
            _colour_kernel[grid](
                crops_SHWC,
                factors_S3,
                grey_sums_S,
                NUM_PIXELS=image_size * image_size,
                BLOCK=BLOCK_PIXELS,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
    return crops_SHWC
