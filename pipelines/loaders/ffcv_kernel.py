"""FFCV's decoder and resizer for a batch whose crops and flips are given: one compiled loop over the samples, in as many threads as asked.

FFCV compiles its own loop, which draws the crops itself, anew in every process (nine seconds). This one calls the same two
functions of FFCV's C library by name, so that numba can keep the machine code on disk.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numba
import numpy as np
from llvmlite import binding  # type: ignore[import-untyped]
from numba import prange
from numpy.typing import NDArray

from pipelines.format.ffcv_package import import_ffcv
from pipelines.types import IntArray

_LIBRARY = ctypes.CDLL(import_ffcv("ffcv._libffcv", "loader 'ffcv'").__file__)
_types: Any = numba.types  # without annotations of its own


def _function(name: str, signature: Any) -> Any:
    """A function of FFCV's C library, under a name that no other library has."""
    binding.add_symbol(f"ffcv_{name}", ctypes.cast(getattr(_LIBRARY, name), ctypes.c_void_p).value)
    return _types.ExternalFunction(f"ffcv_{name}", signature)


_WORD, _LONG = _types.uint32, _types.int64
# source, its bytes, height, width, destination, height and width to decode, offset y and x, scale as a fraction, crop?, flip?
_IMDECODE: Any = _function(
    "imdecode", _types.int32(_LONG, _types.uint64, _WORD, _WORD, _LONG, _WORD, _WORD, _WORD, _WORD, _WORD, _WORD, _WORD, _WORD)
)
# (unused), source, height, width, window's first and last rows and columns, destination, height, width
_RESIZE: Any = _function("resize", _types.void(*[_LONG] * 11))


@numba.njit(cache=True, nogil=True)
def _crop(pixels: NDArray[np.uint8], height: int, width: int, window_4: NDArray[np.int32], flip: int, image_HWC: NDArray[np.uint8]) -> None:
    """The window of uint8 [height · width · 3] pixels, brought to the size of `image_HWC`; beyond the border black, then unscaled."""
    y, x, window_height, window_width = window_4
    size = image_HWC.shape[0]
    if y >= 0 and x >= 0 and y + window_height <= height and x + window_width <= width:
        _RESIZE(0, pixels.ctypes.data, height, width, y, y + window_height, x, x + window_width, image_HWC.ctypes.data, size, size)
    else:
        for row in range(size):
            for column in range(size):
                inside = 0 <= y + row < height and 0 <= x + column < width
                start = ((y + row) * width + x + column) * 3
                for channel in range(3):
                    image_HWC[row, column, channel] = pixels[start + channel] if inside else 0
    if flip:
        for row in range(size):
            for column in range(size // 2):
                for channel in range(3):
                    other = image_HWC[row, size - 1 - column, channel]
                    image_HWC[row, size - 1 - column, channel] = image_HWC[row, column, channel]
                    image_HWC[row, column, channel] = other


@numba.njit(cache=True, nogil=True, parallel=True)
def decode_crops(
    content: NDArray[np.uint8],
    starts_S: IntArray,
    sizes_S: IntArray,
    are_jpeg_S: NDArray[np.bool_],
    heights_S: IntArray,
    widths_S: IntArray,
    windows_S4: NDArray[np.int32],
    flips_S: NDArray[np.int32],
    images_SHWC: NDArray[np.uint8],
) -> NDArray[np.bool_]:
    """Decodes, crops, resizes and flips the samples of a batch.

    Args:
        content: uint8 [bytes], where they are stored.
        starts_S, sizes_S: int64 [S], bytes: where in it, and how long.
        are_jpeg_S: bool [S]: a JPEG, or height · width · 3 bytes of pixels.
        heights_S, widths_S: int64 [S], pixels.
        windows_S4: int32 [S, 4] (y, x, height, width); one that reaches beyond the image has the size of the result.
        flips_S: int32 [S], 1 mirrors left and right.
        images_SHWC: uint8 [S, size, size, 3], what is written.

    Returns:
        bool [S]: which JPEGs libjpeg complained of; their pixels are not to be used.
    """
    complaints_S = np.zeros(len(starts_S), np.bool_)
    for i in prange(len(starts_S)):
        height, width = heights_S[i], widths_S[i]
        stored = content[starts_S[i] : starts_S[i] + sizes_S[i]]
        if are_jpeg_S[i]:
            pixels = np.empty(height * width * 3, np.uint8)
            complaints_S[i] = 0 != _IMDECODE(
                stored.ctypes.data, sizes_S[i], height, width, pixels.ctypes.data, height, width, 0, 0, 1, 1, 0, 0
            )
            _crop(pixels, height, width, windows_S4[i], flips_S[i], images_SHWC[i])
        else:
            _crop(stored, height, width, windows_S4[i], flips_S[i], images_SHWC[i])
    return complaints_S
