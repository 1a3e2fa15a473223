"""Colour jitter (torchvision's ColorJitter without hue): brightness, then contrast, then saturation, each by a drawn factor.

Every stage is Pillow's `ImageEnhance` bit for bit: float32 `(level − base) · factor + base`, clipped to 0…255, truncated. The base is 0 for
brightness, the mean grey level rounded half up for contrast, the pixel's own grey for saturation; a factor of 1 changes nothing.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.augment.pixel_ops import Op, remap, saturate, upload
from pipelines.randomness import KeyArray, uniforms

JitterArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]


def draw_jitter(keys_S: KeyArray, strengths: tuple[float, float, float]) -> JitterArray:
    """float32 [S, 3]: factors of brightness, contrast and saturation, each uniform in max(0, 1 − strength) … 1 + strength.

    Args:
        keys_S: uint64 [S]; the factors of a sample are a pure function of its key.
        strengths: ≥ 0; 0 leaves the stage out (its factor is exactly 1).
    """
    low, high = np.maximum(0.0, 1.0 - np.array(strengths)), 1.0 + np.array(strengths)
    factors: JitterArray = (low + uniforms(keys_S, 3) * (high - low)).astype(np.float32)
    return factors


def jitter(images_SHWC: torch.Tensor, factors_S3: JitterArray) -> torch.Tensor:
    """The images after the three stages; the input is left as it is. Never waits for the device.

    Args:
        images_SHWC: uint8 [S, H, W, 3].
        factors_S3: float32 [S, 3] on the host.

    Returns:
        uint8 [S, H, W, 3] on the same device.
    """
    if images_SHWC.device.type != "cpu":
        return jitter_reference(images_SHWC, upload(factors_S3, images_SHWC.device))
    jittered = images_SHWC.clone(memory_format=torch.contiguous_format)
    jitter_batch(jittered.numpy(), factors_S3)
    return jittered


def jitter_reference(images_SHWC: torch.Tensor, factors_S3: torch.Tensor) -> torch.Tensor:
    """`jitter` in whole-batch torch operations, factors on the device of the images; what the compiled kernels are compared with."""
    if not len(images_SHWC):
        return images_SHWC
    brightness_S, contrast_S, saturation_S = factors_S3.unbind(1)
    for op, factors_S in ((Op.BRIGHTNESS, brightness_S), (Op.CONTRAST, contrast_S)):
        # (threshold, mask, base, factor): no level inverted or masked; `remap` takes contrast's base from the image.
        curves_S6 = factors_S3.new_zeros((len(factors_S3), 6))
        curves_S6[:, 0], curves_S6[:, 1], curves_S6[:, 3] = 256, 255, factors_S
        images_SHWC = remap(images_SHWC, curves_S6, np.full(len(factors_S3), op, np.int8))
    return saturate(images_SHWC, saturation_S)


@numba.njit(cache=True, nogil=True)
def jitter_batch(images_SHWC: ByteArray, factors_S3: JitterArray) -> None:
    """`jitter` in place on the host, uint8 [S, H, W, 3] C-contiguous; releases the GIL."""
    for s in range(len(images_SHWC)):
        jitter_image(images_SHWC[s], factors_S3[s])


# Levels are never NaN, which lets LLVM use vector minimum and maximum; what would change bits (contraction, reassociation) stays off.
_FLAGS = {"nnan", "nsz"}
_BLOCK = 1024


@numba.njit(cache=True, nogil=True, fastmath=_FLAGS)
def jitter_image(image_HWC: ByteArray, factors_3: JitterArray) -> None:
    """The three stages in place on one C-contiguous image; in planes, because loops over pixels of three bytes are not vectorised."""
    levels = image_HWC.reshape(-1)
    num_pixels = len(levels) // 3
    red, green, blue = np.empty(num_pixels, np.uint8), np.empty(num_pixels, np.uint8), np.empty(num_pixels, np.uint8)
    _brighten(levels, factors_3[0])
    for p in range(num_pixels):
        red[p], green[p], blue[p] = levels[3 * p], levels[3 * p + 1], levels[3 * p + 2]
    total = 0
    for start in range(0, num_pixels, _BLOCK):
        block = slice(start, start + _BLOCK)
        total += int(_grey_sum(red[block], green[block], blue[block]))
    mean = np.float32((2 * total + num_pixels) // (2 * num_pixels))
    _contrast_and_saturate(red, green, blue, mean, factors_3[1], factors_3[2])
    for p in range(num_pixels):
        levels[3 * p], levels[3 * p + 1], levels[3 * p + 2] = red[p], green[p], blue[p]


@numba.njit(cache=True, nogil=True, fastmath=_FLAGS)
def _blended(level: np.float32, base: np.float32, factor: np.float32) -> np.int32:
    mixed = (level - base) * factor + base
    return np.int32(min(max(mixed, np.float32(0)), np.float32(255)))


@numba.njit(cache=True, nogil=True, fastmath=_FLAGS)
def _grey(red: np.int32, green: np.int32, blue: np.int32) -> np.int32:
    weighted = np.int32(red * np.int32(19595) + green * np.int32(38470) + blue * np.int32(7471) + np.int32(0x8000))
    return weighted >> np.int32(16)


@numba.njit(cache=True, nogil=True, fastmath=_FLAGS)
def _brighten(levels: ByteArray, factor: np.float32) -> None:
    for k in range(len(levels)):
        levels[k] = np.uint8(_blended(np.float32(levels[k]), np.float32(0), factor))


@numba.njit(cache=True, nogil=True, fastmath=_FLAGS)
def _grey_sum(red: ByteArray, green: ByteArray, blue: ByteArray) -> np.int32:
    total = np.int32(0)
    for p in range(len(red)):
        total += _grey(np.int32(red[p]), np.int32(green[p]), np.int32(blue[p]))
    return total


@numba.njit(cache=True, nogil=True, fastmath=_FLAGS)
def _contrast_and_saturate(
    red: ByteArray, green: ByteArray, blue: ByteArray, mean: np.float32, contrast: np.float32, saturation: np.float32
) -> None:
    for p in range(len(red)):
        r = _blended(np.float32(red[p]), mean, contrast)
        g = _blended(np.float32(green[p]), mean, contrast)
        b = _blended(np.float32(blue[p]), mean, contrast)
        grey = np.float32(_grey(r, g, b))
        red[p] = np.uint8(_blended(np.float32(r), grey, saturation))
        green[p] = np.uint8(_blended(np.float32(g), grey, saturation))
        blue[p] = np.uint8(_blended(np.float32(b), grey, saturation))
