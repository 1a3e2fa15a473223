"""Shrinks images by exact area: an output pixel is the mean of what it covers, with integer weights, so every machine gets equal bytes."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from pipelines.types import IntArray

PixelArray = NDArray[np.uint8]
WeightArray = NDArray[np.int32]

# Weights of an output pixel sum to exactly 2^bits along each axis, so a constant image stays constant. Rows and columns together leave 31
# bits for 255 · 2^23 plus the rounding half: the largest sum an int32 holds.
_ROW_BITS = 11
_COLUMN_BITS = 12
_SHIFT = _ROW_BITS + _COLUMN_BITS


def shrink_to_area(
    pixels_HWC: PixelArray, height: int, width: int, *, reduction: int = 1, covers: tuple[int, int] | None = None
) -> PixelArray:
    """Area-resizes an image to a smaller one.

    Args:
        pixels_HWC: uint8 [H, W, C], C-contiguous.
        height, width: of the result; 1 ≤ height ≤ H and 1 ≤ width ≤ W.
        reduction: a decoder gave each pixel as the mean of reduction × reduction pixels of the image.
        covers: height and width of that image in its own pixels; H is ⌈covers[0] / reduction⌉, and the last row stands for less than the
            others. Counting this in keeps the picture where it was to a fraction of a pixel.

    Returns:
        uint8 [height, width, C].
    """
    num_rows, num_columns, _ = pixels_HWC.shape
    full_height, full_width = covers or (num_rows, num_columns)
    # The compiled loops read without bounds checks.
    assert (num_rows, num_columns) == (-(-full_height // reduction), -(-full_width // reduction))
    assert 1 <= height <= num_rows
    assert 1 <= width <= num_columns
    shrunk_HWC: PixelArray = _shrink(
        np.ascontiguousarray(pixels_HWC),
        *_overlaps(height, full_height, reduction, _ROW_BITS),
        *_overlaps(width, full_width, reduction, _COLUMN_BITS),
    )
    return shrunk_HWC


@numba.njit(cache=True, nogil=True)
def _overlaps(num_outputs: int, length: int, reduction: int, bits: int) -> tuple[IntArray, WeightArray]:
    """First sample (int64 [O]) and weights (int32 [O, taps], padded with zeros) of each output along one axis of `length` pixels."""
    # In units of 1/num_outputs pixel both grids fall on integers: output o covers [o, o + 1) · length, sample i [i, i + 1) · sample_length.
    sample_length = reduction * num_outputs
    first_O = np.empty(num_outputs, np.int64)
    weights_OT = np.zeros((num_outputs, length // sample_length + 2), np.int32)
    scale = 1 << bits
    for output in range(num_outputs):
        start = output * length
        sample = start // sample_length
        first_O[output] = sample
        spent, tap = 0, 0
        while spent < scale:
            covered = min((sample + 1) * sample_length - start, length)
            # Rounding the running sum, not each weight: errors do not add up, and the last sum is the scale itself.
            until = (2 * covered * scale + length) // (2 * length)
            weights_OT[output, tap] = until - spent
            spent = until
            sample += 1
            tap += 1
    return first_O, weights_OT


@numba.njit(cache=True, nogil=True)
def _shrink(
    pixels_HWC: PixelArray, first_row_O: IntArray, row_weights_OT: WeightArray, first_column_O: IntArray, column_weights_OT: WeightArray
) -> PixelArray:
    """Rows first, into one line that stays in cache and is summed by vector instructions; then that line's columns; rounds once."""
    num_rows, num_columns, num_channels = pixels_HWC.shape
    rows = pixels_HWC.reshape(num_rows, num_columns * num_channels)
    shrunk_HWC = np.empty((len(first_row_O), len(first_column_O), num_channels), np.uint8)
    line = np.empty(num_columns * num_channels, np.int32)
    half = 1 << (_SHIFT - 1)
    for y in range(len(first_row_O)):
        line[:] = 0
        for tap in range(row_weights_OT.shape[1]):
            weight = row_weights_OT[y, tap]
            if weight == 0:
                continue  # padding, whose row may lie outside the image
            row = rows[first_row_O[y] + tap]
            for i in range(len(line)):
                line[i] += weight * np.int32(row[i])
        for x in range(len(first_column_O)):
            start = first_column_O[x] * num_channels
            # Three sums side by side are twice as fast as a loop over channels; grey uses the first.
            red, green, blue = half, half, half
            for tap in range(column_weights_OT.shape[1]):
                weight = column_weights_OT[x, tap]
                if weight == 0:
                    continue
                i = start + tap * num_channels
                red += weight * line[i]
                if num_channels == 3:
                    green += weight * line[i + 1]
                    blue += weight * line[i + 2]
            shrunk_HWC[y, x, 0] = red >> _SHIFT
            if num_channels == 3:
                shrunk_HWC[y, x, 1] = green >> _SHIFT
                shrunk_HWC[y, x, 2] = blue >> _SHIFT
    return shrunk_HWC
