"""Pillow's pixel operations for whole batches, on the device the images are on.

Each kernel takes gathered rows of a batch and one row of host-resolved numbers an image, and gives new pixels; none waits for the
device. Integer and float32 steps are in Pillow's order, so results equal those of Pillow 13 on x86-64 bit for bit. R in the suffixes
counts the images one kernel works on.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

FILL = 128
LEVELS = 256


class Op(enum.IntEnum):
    """Operations in the order kernels need them: sorting by code makes every kernel's rows contiguous.

    Amounts: shears are source pixels a pixel, translations fractions of the side, rotations degrees counter-clockwise,
    posterize bits kept, solarize the lowest inverted level; brightness, contrast, colour and sharpness are factors around 1.
    """

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    INVERT = 6
    POSTERIZE = 7
    SOLARIZE = 8
    BRIGHTNESS = 9
    CONTRAST = 10
    AUTOCONTRAST = 11
    EQUALIZE = 12
    COLOR = 13
    SHARPNESS = 14


def upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array on `device`, same shape and dtype; on CUDA the copy is asynchronous (pinned memory)."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def warp(images_RHWC: torch.Tensor, matrices_R6: torch.Tensor) -> torch.Tensor:
    """Pillow's `Image.transform(size, AFFINE, fillcolor=(128, 128, 128))`, nearest sampling.

    Args:
        images_RHWC: uint8 [R, H, W, 3].
        matrices_R6: [R, 6], the output-to-input matrix (a, b, c, d, e, f) in 16.16 fixed point, c and f at the centre of pixel (0, 0).

    Returns:
        uint8 [R, H, W, 3].
    """
    num_rows, height, width, _ = images_RHWC.shape
    device = images_RHWC.device
    a, b, c, d, e, f = matrices_R6.to(torch.int32)[..., None, None].unbind(1)
    xs = torch.arange(width, dtype=torch.int32, device=device)
    ys = torch.arange(height, dtype=torch.int32, device=device)[:, None]
    source_x = torch.addcmul(torch.addcmul(c, b, ys), a, xs).bitwise_right_shift_(16).clamp_(-1, width)
    source_y = torch.addcmul(torch.addcmul(f, e, ys), d, xs).bitwise_right_shift_(16).clamp_(-1, height)
    # A frame of one grey pixel stands for everything outside: cheaper than masks over three channels.
    framed = torch.nn.functional.pad(images_RHWC, (0, 0, 1, 1, 1, 1), value=FILL)
    pitch = width + 2
    area = (height + 2) * pitch
    starts_R = torch.arange(pitch + 1, pitch + 1 + num_rows * area, area, dtype=torch.int32, device=device)
    index = source_y.mul_(pitch).add_(source_x).add_(starts_R[:, None, None])
    return framed.flatten(0, 2).index_select(0, index.view(-1)).view(images_RHWC.shape)


def remap(images_RHWC: torch.Tensor, curves_R6: torch.Tensor, ops_R: NDArray[np.int8]) -> torch.Tensor:
    """Every operation that is a table of 256 levels for each image and channel.

    Args:
        images_RHWC: uint8 [R, H, W, 3].
        curves_R6: [R, 6], first columns (threshold, mask, base, factor): levels from `threshold` on are inverted, then masked, then
            blended with `base` by `factor`. Contrast takes its base, autocontrast and equalize their whole table, from the image.
        ops_R: int8 [R] on the host, ascending, INVERT…EQUALIZE.

    Returns:
        uint8 [R, H, W, 3].
    """
    contrast, autocontrast, equalize = np.searchsorted(ops_R, (Op.CONTRAST, Op.AUTOCONTRAST, Op.EQUALIZE)).tolist()
    places_RP = _table_places(images_RHWC)
    tables: list[torch.Tensor] = []
    if autocontrast > 0:
        curves = curves_R6[:autocontrast].clone()
        if autocontrast > contrast:
            curves[contrast:, 2] = _grey_mean(images_RHWC[contrast:autocontrast])
        tables.append(_curve_tables(curves).expand(-1, 3, -1))
    if equalize > autocontrast:
        tables.append(_autocontrast_tables(images_RHWC[autocontrast:equalize]))
    if len(ops_R) > equalize:
        tables.append(_equalize_tables(places_RP[equalize:] - equalize * 3 * LEVELS))
    return torch.cat(tables).view(-1).index_select(0, places_RP.view(-1)).view(images_RHWC.shape)


def saturate(images_RHWC: torch.Tensor, factors_R: torch.Tensor) -> torch.Tensor:
    """Pillow's `ImageEnhance.Color`: uint8 [R, H, W, 3] blended with its own grey by float32 [R] factors (1 keeps the image)."""
    # Written out three times: a channel axis of stride 0 would cost the CPU more in each pass of the blend.
    grey_RHWC = _luma(images_RHWC).float()[..., None].expand(-1, -1, -1, 3).contiguous()
    return _blend(grey_RHWC, images_RHWC.float(), factors_R[:, None, None, None])


def sharpen(images_RHWC: torch.Tensor, factors_R: torch.Tensor) -> torch.Tensor:
    """Pillow's `ImageEnhance.Sharpness`: uint8 [R, H, W, 3] blended with its SMOOTH filter by float32 [R] factors; the edge is kept."""
    wide = images_RHWC.short()
    columns = (wide[:, :-2] + wide[:, 1:-1]).add_(wide[:, 2:])
    centre = wide[:, 1:-1, 1:-1]
    weighted = (columns[:, :, :-2] + columns[:, :, 1:-1]).add_(columns[:, :, 2:]).add_(centre, alpha=4)
    # sum/13 + 1/2 is never closer than 1/26 to an integer, so any float32 order of the sum gives Pillow's level.
    smooth = weighted.float().mul_(1 / 13).add_(0.5).floor_()
    sharpened = images_RHWC.clone()
    sharpened[:, 1:-1, 1:-1] = _blend(smooth, centre.float(), factors_R[:, None, None, None])
    return sharpened


def _blend(base: torch.Tensor, image: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Pillow's `Image.blend`, all float32: clipped, then truncated. Multiply and add stay apart because Pillow rounds between them."""
    return (image - base).mul_(factor).add_(base).clamp_(0, 255).to(torch.uint8)


def _luma(images_RHWC: torch.Tensor) -> torch.Tensor:
    """int32 [R, H, W]: ITU-R 601-2 grey in 16 bits of fraction, as `Image.convert("L")`."""
    red, green, blue = images_RHWC.to(torch.int32).unbind(-1)
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(0x8000).bitwise_right_shift_(16)


def _table_places(images_RHWC: torch.Tensor) -> torch.Tensor:
    """int32 [R, H·W·3]: where each pixel's level lies in flattened tables [R, 3, 256]."""
    num_rows, height, width, channels = images_RHWC.shape
    device = images_RHWC.device
    # Two additions along whole images: one with a channel axis of length 3 innermost takes the CPU four times as long.
    channel_starts_P = torch.arange(0, channels * LEVELS, LEVELS, dtype=torch.int32, device=device).repeat(height * width)
    row_starts_R = torch.arange(0, num_rows * channels * LEVELS, channels * LEVELS, dtype=torch.int32, device=device)
    return images_RHWC.flatten(1).to(torch.int32).add_(channel_starts_P).add_(row_starts_R[:, None])


def _grey_mean(images_RHWC: torch.Tensor) -> torch.Tensor:
    """int64 [R]: the mean grey level, rounded half up."""
    grey_RHW = _luma(images_RHWC)
    count = grey_RHW[0].numel()
    return (2 * grey_RHW.sum((1, 2)) + count) // (2 * count)


def _levels(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(LEVELS, dtype=dtype, device=images.device)


def _curve_tables(curves_R6: torch.Tensor) -> torch.Tensor:
    """uint8 [R, 1, 256] from the columns `remap` describes."""
    threshold, mask, base, factor = curves_R6[:, :4, None, None].float().unbind(1)
    levels = _levels(curves_R6, torch.int32)
    shaped = torch.where(levels < threshold, levels, 255 - levels) & mask.to(torch.int32)
    return _blend(base, shaped.float(), factor)


def _autocontrast_tables(images_RHWC: torch.Tensor) -> torch.Tensor:
    """uint8 [R, 3, 256]: each channel stretched to 0…255; a channel of one level is left alone."""
    darkest, brightest = torch.aminmax(images_RHWC.flatten(1, 2), dim=1)
    # Pillow computes in double and truncates: float32 would land one level off where the exact result is an integer.
    low, high = darkest.double()[..., None], brightest.double()[..., None]
    levels = _levels(images_RHWC, torch.float64)
    span = (high - low).clamp_(min=1.0)
    # Not 255 / span: torch turns that into 255 times a rounded reciprocal.
    scale = torch.full_like(span, 255.0).div_(span)
    stretched = (levels * scale + -low * scale).clamp_(0, 255)
    return torch.where(high > low, stretched, levels).to(torch.uint8)


def _equalize_tables(places_RP: torch.Tensor) -> torch.Tensor:
    """uint8 [R, 3, 256] from `_table_places`: the cumulative histogram of each channel in steps, as `ImageOps.equalize`."""
    num_rows = len(places_RP)
    places = places_RP.flatten().long()
    # Not bincount: on CUDA it waits for the device.
    histogram = torch.zeros(num_rows * 3 * LEVELS, dtype=torch.int32, device=places.device)
    histogram = histogram.scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32)).view(num_rows, 3, LEVELS)
    below = histogram.cumsum(2, dtype=torch.int32) - histogram
    # Pixels below the brightest level that occurs, in 255 steps; 0 where the channel is too uniform to change.
    step = (below * (histogram > 0)).amax(2, keepdim=True) // 255
    steps = (below + step // 2).double().div_(step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, steps, _levels(places, torch.float64)).to(torch.uint8)
