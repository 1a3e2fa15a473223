"""Gather, crop, resize, flip and jitter of a whole batch from one ragged buffer of decoded images.

Images lie one after another in a flat uint8 buffer: sample i has heights_N[i] × widths_N[i] pixels of 3 bytes from offsets_N[i] on.

A window is cropped first (black where it reaches outside its image) and then brought to `image_size` bilinearly at half-pixel centres.
All arithmetic is integer, so that every backend gives the same bits: positions and weights have 7 bits of fraction,

    position = round(128 · ((2i + 1) · length / (2 · image_size) − 1/2)), kept inside the window
    h = 128 a + (b − a) · weight_x                          along a row, 0 … 32640
    v = (h0 >> 1) + ((h1 − h0) · weight_y >> 8)             between two rows
    level = (v + 32) >> 6

which is within one level of exact bilinear sampling with those weights, and copies windows of image_size exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numba import extending
from numpy.typing import NDArray

from pipelines.augment.geometry import FlipArray, WindowArray
from pipelines.augment.jitter import jitter_reference
from pipelines.types import IntArray

ByteArray = NDArray[np.uint8]
_types: Any = numba.types  # without annotations of its own

# ---- torch


@dataclass(frozen=True, kw_only=True)
class StoredImages:
    """A ragged buffer on one device: uint8 [P] and, of its N images, offsets in bytes and sizes in pixels, int64 [N]."""

    pixels_P: torch.Tensor
    offsets_N: torch.Tensor
    heights_N: torch.Tensor
    widths_N: torch.Tensor


def crop_reference(
    stored: StoredImages,
    ids_S: torch.Tensor,
    windows_S4: torch.Tensor,
    flips_S: torch.Tensor,
    factors_S3: torch.Tensor | None,
    image_size: int,
) -> torch.Tensor:
    """The crops in plain torch operations: what the kernels are compared with, and the way on devices without one.

    Args:
        stored: the images.
        ids_S: int64 [S].
        windows_S4: int32 [S, 4]: y, x, height, width.
        flips_S: int32 [S], 1 mirrors left and right.
        factors_S3: float32 [S, 3] of `jitter`, None without.
        image_size: side of the result; all tensors lie on one device.

    Returns:
        uint8 [S, image_size, image_size, 3].
    """
    y_S, x_S, height_S, width_S = windows_S4.to(torch.int64).unbind(1)
    steps = torch.arange(image_size, device=ids_S.device)
    rows_SH = _positions(steps[None], height_S[:, None], image_size)
    columns_SW = _positions(torch.where(flips_S[:, None] > 0, image_size - 1 - steps, steps), width_S[:, None], image_size)
    weight_y, weight_x = (rows_SH & 127)[:, :, None, None], (columns_SW & 127)[:, None, :, None]
    y0_SH, x0_SW = rows_SH >> 7, columns_SW >> 7
    y1_SH, x1_SW = torch.minimum(y0_SH + 1, height_S[:, None] - 1), torch.minimum(x0_SW + 1, width_S[:, None] - 1)

    def levels(y_SH: torch.Tensor, x_SW: torch.Tensor) -> torch.Tensor:
        y = (y_S[:, None] + y_SH)[:, :, None]
        x = (x_S[:, None] + x_SW)[:, None, :]
        height, width = (sizes[ids_S, None, None] for sizes in (stored.heights_N, stored.widths_N))
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        first = stored.offsets_N[ids_S, None, None] + torch.where(inside, y * width + x, 0) * 3
        channels = torch.arange(3, device=ids_S.device)
        return stored.pixels_P[first[..., None] + channels].to(torch.int64) * inside[..., None]

    def along_row(y_SH: torch.Tensor) -> torch.Tensor:
        left, right = levels(y_SH, x0_SW), levels(y_SH, x1_SW)
        return 128 * left + (right - left) * weight_x

    top, bottom = along_row(y0_SH), along_row(y1_SH)
    crops_SHWC = (((top >> 1) + ((bottom - top) * weight_y >> 8) + 32) >> 6).to(torch.uint8)
    return crops_SHWC if factors_S3 is None else jitter_reference(crops_SHWC, factors_S3)


def _positions(steps: torch.Tensor, lengths: torch.Tensor, image_size: int) -> torch.Tensor:
    """int64: where target pixels `steps` lie in windows of `lengths` pixels, with 7 bits of fraction."""
    positions = ((2 * steps + 1) * lengths * 64 + image_size // 2) // image_size - 64
    return torch.minimum(positions.clamp(min=0), (lengths - 1) * 128)


# ---- compiled, for the host


def _load(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_value_type(signature.return_type)
        return builder.load(builder.inttoptr(arguments[0], kind.as_pointer()), align=1)

    return _types.uint64(_types.intp), generate


def _store(typing_context: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], arguments[1].type.as_pointer()), align=1)
        return context.get_dummy_value()

    return _types.void(_types.intp, _types.uint64), generate


_load_word: Any = extending.intrinsic(_load)  # 8 bytes from an address that need not be a multiple of 8
_store_word: Any = extending.intrinsic(_store)


@numba.njit(cache=True, nogil=True)
def crop_batch(
    pixels_P: ByteArray,
    offsets_N: IntArray,
    heights_N: IntArray,
    widths_N: IntArray,
    ids_S: IntArray,
    windows_S4: WindowArray,
    flips_S: FlipArray,
    crops_SHWC: ByteArray,
) -> None:
    """`crop_reference` on the host, into uint8 [S, image_size, image_size, 3]; one thread, without the GIL, all arrays C-contiguous.

    Args:
        pixels_P, offsets_N, heights_N, widths_N: the ragged buffer, as in `StoredImages`.
        ids_S, windows_S4, flips_S: as in `crop_reference`.
        crops_SHWC: the result.
    """
    size = crops_SHWC.shape[1]
    offsets_W, weights_W = np.empty(size, np.int64), np.empty(size, np.uint64)
    rows = np.zeros(2 * (size * 3 + 8), np.uint16)
    # Zeros, not empty: what lies behind a row is read along with its last pixel and must stay a level of 8 bits.
    levels = np.zeros(max(8, np.max(windows_S4[:, 3]) * 3 + 8 if len(ids_S) else 8), np.uint16)
    for s in range(len(ids_S)):
        height, width, start = heights_N[ids_S[s]], widths_N[ids_S[s]], offsets_N[ids_S[s]]
        image = pixels_P[start : start + height * width * 3]
        if windows_S4[s, 2] == size and windows_S4[s, 3] == size:
            _copy_window(image, height, width, windows_S4[s], flips_S[s], crops_SHWC[s])
        else:
            _place_columns(windows_S4[s, 3], flips_S[s], offsets_W, weights_W)
            _resample(image, height, width, windows_S4[s], offsets_W, weights_W, levels, rows, crops_SHWC[s].reshape(-1))


@numba.njit(cache=True, nogil=True)
def _copy_window(image: ByteArray, height: int, width: int, window_4: NDArray[np.int32], flip: int, crop_HWC: ByteArray) -> None:
    size = crop_HWC.shape[0]
    y, x = int(window_4[0]), int(window_4[1])
    for i in range(size):
        row = crop_HWC[i].reshape(-1)
        inside = 0 <= y + i < height
        first, last = (max(0, -x), max(0, min(size, width - x))) if inside else (0, 0)
        if first > 0 or last < size:
            row[:] = 0
        if first >= last:
            continue
        source = image[((y + i) * width + x + first) * 3 : ((y + i) * width + x + last) * 3]
        if flip:
            for j in range(last - first):
                to = (size - 1 - first - j) * 3
                row[to], row[to + 1], row[to + 2] = source[3 * j], source[3 * j + 1], source[3 * j + 2]
        else:
            target = row[first * 3 : last * 3]
            for k in range(len(source)):
                target[k] = source[k]


@numba.njit(cache=True, nogil=True)
def _position(step: int, length: int, size: int) -> int:
    position = ((2 * step + 1) * length * 64 + size // 2) // size - 64
    return max(0, min(position, (length - 1) * 128))


@numba.njit(cache=True, nogil=True)
def _place_columns(length: int, flip: int, offsets_W: IntArray, weights_W: NDArray[np.uint64]) -> None:
    """For each column of the crop the byte offset of its left pixel in a row of uint16 levels, and the right pixel's weight."""
    size = len(offsets_W)
    for j in range(size):
        position = _position(size - 1 - j if flip else j, int(length), size)
        offsets_W[j] = (position >> 7) * 6
        weights_W[j] = position & 127


@numba.njit(cache=True, nogil=True)
def _resample(
    image: ByteArray,
    height: int,
    width: int,
    window_4: NDArray[np.int32],
    offsets_W: IntArray,
    weights_W: NDArray[np.uint64],
    levels: NDArray[np.uint16],
    rows: NDArray[np.uint16],
    crop: ByteArray,
) -> None:
    """Rows first, each once: two neighbouring source rows are kept, stretched to the crop's width, and blended for each row of the crop."""
    size = len(offsets_W)
    pitch = size * 3 + 8
    top, left, length = int(window_4[0]), int(window_4[1]), int(window_4[2])
    held_even, held_odd = -1, -1
    for i in range(size):
        position = _position(i, length, size)
        first, weight = position >> 7, position & 127
        for source in range(first, first + 2 if weight else first + 1):
            if source != (held_odd if source & 1 else held_even):
                _load_row(image, height, width, top + source, left, int(window_4[3]), levels)
                _stretch_row(levels, offsets_W, weights_W, rows, (source & 1) * pitch)
                if source & 1:
                    held_odd = source
                else:
                    held_even = source
        # With weight 0 the second row, whatever it is, does not count: it may lie behind the window.
        _blend_rows(rows, (first & 1) * pitch, (~first & 1) * pitch, weight, crop, i * size * 3, size * 3)


@numba.njit(cache=True, nogil=True)
def _load_row(image: ByteArray, height: int, width: int, y: int, left: int, length: int, levels: NDArray[np.uint16]) -> None:
    """Row y of a window as uint16, black outside the image."""
    first, last = max(0, -left), max(0, min(length, width - left))
    if not 0 <= y < height:
        first, last = 0, 0
    if first > 0 or last < length:
        levels[: length * 3] = 0
    if first < last:
        source = image[(y * width + left + first) * 3 : (y * width + left + last) * 3]
        target = levels[first * 3 : last * 3]
        for k in range(len(source)):
            target[k] = np.uint16(source[k])


@numba.njit(cache=True, nogil=True)
def _stretch_row(
    levels: NDArray[np.uint16], offsets_W: IntArray, weights_W: NDArray[np.uint64], rows: NDArray[np.uint16], start: int
) -> None:
    """The three channels of a pixel, and one of the next, at once in the 16-bit lanes of a word.

    128 a + (b − a) · weight lies in 0 … 32640 in every lane, so borrows between lanes cancel exactly.
    """
    origin, target = levels.ctypes.data, rows.ctypes.data + 2 * start
    for j in range(len(offsets_W)):
        address = origin + offsets_W[j]
        a, b = _load_word(address), _load_word(address + 6)
        # The fourth lane is overwritten by the next pixel; behind the last one there is room for it.
        _store_word(target + 6 * j, (a << np.uint64(7)) + (b - a) * weights_W[j])


@numba.njit(cache=True, nogil=True)
def _blend_rows(rows: NDArray[np.uint16], top: int, bottom: int, weight: int, crop: ByteArray, start: int, length: int) -> None:
    """Written so that LLVM multiplies 16-bit lanes: (difference · 256 weight) >> 16 is one instruction."""
    # Slices are taken here, not by the caller: across a call each would cost two atomic reference counts a row.
    first, second, target = rows[top : top + length], rows[bottom : bottom + length], crop[start : start + length]
    scaled = np.int16(weight << 8)
    for k in range(len(target)):
        level = np.int16(first[k])
        difference = np.int16(np.int16(second[k]) - level)
        step = np.int16(np.int32(difference) * np.int32(scaled) >> np.int32(16))
        target[k] = np.uint8(np.int16((level >> 1) + step + 32) >> np.int16(6))
