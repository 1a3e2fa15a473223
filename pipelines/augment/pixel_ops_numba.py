"""The operations of `pixel_ops` compiled for a CPU, image by image in place: several times faster there than whole-batch passes.

Results are Pillow's bit for bit, as those of `pixel_ops` are. Loops run over the levels of a row or image, because loops over pixels of
three bytes are not vectorised. Suffixes: an image is HWC, or its levels in memory order, P; E = 3·W are the levels of one row.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from pipelines.augment.pixel_ops import FILL, LEVELS, Op
from pipelines.randomness import FloatArray

ByteArray = NDArray[np.uint8]


# "nnan" and "nsz": levels are never NaN or −0, which lets LLVM take vector minima and maxima. What would change bits, contraction to a
# fused multiply-add above all, stays off.
@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def apply_stages(images_SHWC: ByteArray, ops_S2: NDArray[np.int8], numbers_S26: FloatArray, first: int, last: int) -> None:
    """Both stages of images `first` up to but without `last`, in place; uint8 [S, H, W, 3], C-contiguous.

    Args:
        images_SHWC: left where their operation is IDENTITY.
        ops_S2: int8 [S, 2], `Op` codes.
        numbers_S26: float64 [S, 2, 6], what the kernels of `pixel_ops` read of each stage.
        first, last: the share of this call.
    """
    before_P = np.empty(images_SHWC[0].size, np.uint8)
    for sample in range(first, last):
        image_HWC = images_SHWC[sample]
        for stage in range(ops_S2.shape[1]):
            op, numbers_6 = ops_S2[sample, stage], numbers_S26[sample, stage]
            if op == Op.IDENTITY:
                continue
            if op <= Op.ROTATE:
                _copy(image_HWC.reshape(-1), before_P)
                _warp(before_P, image_HWC, numbers_6)
            elif op <= Op.CONTRAST:
                base = _grey_mean(image_HWC) if op == Op.CONTRAST else numbers_6[2]
                _bend(image_HWC.reshape(-1), numbers_6[0], numbers_6[1], base, numbers_6[3])
            elif op == Op.AUTOCONTRAST:
                _look_up(image_HWC.reshape(-1), _autocontrast_tables(image_HWC))
            elif op == Op.EQUALIZE:
                _look_up(image_HWC.reshape(-1), _equalize_tables(image_HWC))
            elif op == Op.COLOR:
                _saturate(image_HWC, numbers_6[3])
            else:
                _copy(image_HWC.reshape(-1), before_P)
                _sharpen(before_P, image_HWC, numbers_6[3])


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _blended(level: np.float32, base: np.float32, factor: np.float32) -> np.uint8:
    mixed = (level - base) * factor + base
    return np.uint8(np.int32(min(max(mixed, np.float32(0)), np.float32(255))))


@numba.njit(cache=True, nogil=True)
def _grey(red: np.uint8, green: np.uint8, blue: np.uint8) -> np.int32:
    weighted = np.int32(red) * np.int32(19595) + np.int32(green) * np.int32(38470) + np.int32(blue) * np.int32(7471)
    return np.int32(weighted + np.int32(0x8000)) >> np.int32(16)


@numba.njit(cache=True, nogil=True)
def _warp(before_P: ByteArray, image_HWC: ByteArray, numbers_6: FloatArray) -> None:
    height, width, _ = image_HWC.shape
    a, b, c, d, e, f = [np.int64(number) for number in numbers_6]
    for y in range(height):
        row_E = image_HWC[y].reshape(-1)
        x_fixed, y_fixed = c + b * y, f + e * y
        if a == 65536 and d == 0:
            _move_row(before_P, row_E, int(x_fixed) >> 16, int(y_fixed) >> 16, height)
            continue
        for x in range(width):
            from_x, from_y = x_fixed >> 16, y_fixed >> 16
            x_fixed, y_fixed = x_fixed + a, y_fixed + d
            inside = 0 <= from_x < width and 0 <= from_y < height
            # Unsigned places spare each access numba's question whether it counts from the end.
            place, to = np.uint64(3 * (from_y * width + from_x)) if inside else np.uint64(0), np.uint64(3 * x)
            row_E[to] = before_P[place] if inside else FILL
            row_E[to + np.uint64(1)] = before_P[place + np.uint64(1)] if inside else FILL
            row_E[to + np.uint64(2)] = before_P[place + np.uint64(2)] if inside else FILL


@numba.njit(cache=True, nogil=True)
def _move_row(before_P: ByteArray, row_E: ByteArray, shift: int, from_y: int, height: int) -> None:
    """A row that keeps its scale: translations and horizontal shears."""
    width = len(row_E) // 3
    start, stop = max(0, -shift), min(width, width - shift)
    if stop <= start or not 0 <= from_y < height:
        start, stop = 0, 0
    left, moved, right = row_E[: 3 * start], row_E[3 * start : 3 * stop], row_E[3 * stop :]
    place = 3 * (from_y * width + start + shift) if stop else 0
    source = before_P[place : place + len(moved)]
    for i in range(len(left)):
        left[i] = FILL
    for i in range(len(moved)):
        moved[i] = source[i]
    for i in range(len(right)):
        right[i] = FILL


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _bend(image_P: ByteArray, threshold: float, mask: float, base: float, factor: float) -> None:
    """Inverts from `threshold` on, masks, blends with `base` by `factor`."""
    first_inverted, kept = np.int32(np.ceil(np.float32(threshold))), np.int32(mask)
    base_level, weight = np.float32(base), np.float32(factor)
    for p in range(len(image_P)):
        level = np.int32(image_P[p])
        shaped = (level if level < first_inverted else np.int32(255) - level) & kept
        image_P[p] = _blended(np.float32(shaped), base_level, weight)


@numba.njit(cache=True, nogil=True)
def _copy(source_P: ByteArray, target_P: ByteArray) -> None:
    for p in range(len(source_P)):
        target_P[p] = source_P[p]


@numba.njit(cache=True, nogil=True)
def _grey_mean(image_HWC: ByteArray) -> int:
    image_P = image_HWC.reshape(-1)
    num_pixels = len(image_P) // 3
    total = 0
    for pixel in range(num_pixels):
        total += int(_grey(image_P[3 * pixel], image_P[3 * pixel + 1], image_P[3 * pixel + 2]))
    return (2 * total + num_pixels) // (2 * num_pixels)


@numba.njit(cache=True, nogil=True)
def _look_up(image_P: ByteArray, tables_C256: ByteArray) -> None:
    red, green, blue = tables_C256[0], tables_C256[1], tables_C256[2]
    for p in range(0, len(image_P), 3):
        image_P[p] = red[image_P[p]]
        image_P[p + 1] = green[image_P[p + 1]]
        image_P[p + 2] = blue[image_P[p + 2]]


@numba.njit(cache=True, nogil=True)
def _autocontrast_tables(image_HWC: ByteArray) -> ByteArray:
    row_levels = image_HWC.shape[1] * 3
    darkest_E, brightest_E = np.full(row_levels, 255, np.uint8), np.zeros(row_levels, np.uint8)
    for y in range(len(image_HWC)):
        row_E = image_HWC[y].reshape(-1)
        for e in range(row_levels):
            darkest_E[e] = min(darkest_E[e], row_E[e])
            brightest_E[e] = max(brightest_E[e], row_E[e])
    tables_C256 = np.empty((3, LEVELS), np.uint8)
    for channel in range(3):
        low, high = 255.0, 0.0
        for e in range(channel, row_levels, 3):
            low, high = min(low, np.float64(darkest_E[e])), max(high, np.float64(brightest_E[e]))
        scale = 255.0 / max(high - low, 1.0)
        for level in range(LEVELS):
            stretched = min(max(level * scale + -low * scale, 0.0), 255.0)
            tables_C256[channel, level] = np.uint8(stretched) if high > low else level
    return tables_C256


@numba.njit(cache=True, nogil=True)
def _equalize_tables(image_HWC: ByteArray) -> ByteArray:
    height, width, _ = image_HWC.shape
    histogram_C256 = np.zeros((3, LEVELS), np.int32)
    image_P, red, green, blue = image_HWC.reshape(-1), histogram_C256[0], histogram_C256[1], histogram_C256[2]
    for p in range(0, len(image_P), 3):
        red[image_P[p]] += 1
        green[image_P[p + 1]] += 1
        blue[image_P[p + 2]] += 1
    tables_C256 = np.empty((3, LEVELS), np.uint8)
    for channel in range(3):
        histogram = histogram_C256[channel]
        # Pixels below the brightest level that occurs, in 255 steps; 0 where the channel is too uniform to change.
        brightest = LEVELS - 1
        while histogram[brightest] == 0:
            brightest -= 1
        step = (height * width - histogram[brightest]) // 255
        below = 0
        for level in range(LEVELS):
            tables_C256[channel, level] = min(255, (below + step // 2) // step) if step else level
            below += histogram[level]
    return tables_C256


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _blend_row(row_E: ByteArray, base_E: NDArray[np.float32], factor: float) -> None:
    weight = np.float32(factor)
    for e in range(len(row_E)):
        row_E[e] = _blended(np.float32(row_E[e]), base_E[e], weight)


@numba.njit(cache=True, nogil=True)
def _saturate(image_HWC: ByteArray, factor: float) -> None:
    base_E = np.empty(3 * image_HWC.shape[1], np.float32)
    for y in range(len(image_HWC)):
        row_E = image_HWC[y].reshape(-1)
        for e in range(0, len(row_E), 3):
            grey = np.float32(_grey(row_E[e], row_E[e + 1], row_E[e + 2]))
            base_E[e], base_E[e + 1], base_E[e + 2] = grey, grey, grey
        _blend_row(row_E, base_E, factor)


@numba.njit(cache=True, nogil=True)
def _sharpen(before_P: ByteArray, image_HWC: ByteArray, factor: float) -> None:
    height, width, _ = image_HWC.shape
    row_levels = 3 * width
    columns_E, smooth_E = np.empty(row_levels, np.int32), np.empty(row_levels - 6, np.float32)
    left_E, middle_E, right_E = columns_E[:-6], columns_E[3:-3], columns_E[6:]
    for y in range(1, height - 1):
        start, stop = y * row_levels, (y + 1) * row_levels
        above_E, row_E, under_E = before_P[start - row_levels : start], before_P[start:stop], before_P[stop : stop + row_levels]
        for e in range(row_levels):
            columns_E[e] = np.int32(above_E[e]) + np.int32(row_E[e]) + np.int32(under_E[e])
        inner_E = row_E[3:-3]
        for e in range(len(smooth_E)):
            weighted = left_E[e] + middle_E[e] + right_E[e] + np.int32(4) * np.int32(inner_E[e])
            # Never close to where rounding changes; see `pixel_ops.sharpen`.
            smooth_E[e] = np.float32(np.int32(np.float32(weighted) * np.float32(1 / 13) + np.float32(0.5)))
        _blend_row(image_HWC[y].reshape(-1)[3:-3], smooth_E, factor)
