"""Draws one picture of the demo set: a shape in clutter, from a random generator and nothing else.

Shape and fill make the class. The shape's hue only leans with its name, the background wears the same fills, clutter hides parts, and
place, size, turn, light and noise vary alike for all classes, so no single cue gives the class away.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

FloatArray = NDArray[np.floating[Any]]

FILLS = ("shaded", "striped")

_MIN_SIDE, _MAX_SIDE = 64, 80
# One step between two hues is 0.1: a spread of half a step lets neighbours overlap.
_HUE_SPREAD = 0.05


def draw_scene(shape: str, fill: str, rng: np.random.Generator) -> Image.Image:
    """Draws a picture of class (shape, fill).

    Args:
        shape: one of `SHAPES`.
        fill: one of `FILLS`.
        rng: the only source of chance; equal states give equal pictures.

    Returns:
        RGB, each side 64 to 80 pixels.
    """
    height, width = (int(side) for side in rng.integers(_MIN_SIDE, _MAX_SIDE + 1, 2))
    y_HW, x_HW = np.meshgrid(np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32), indexing="ij")
    side = min(height, width)
    image_HWC = _paint(x_HW, y_HW, FILLS[rng.integers(len(FILLS))], _faint_pair(rng), rng)
    for _ in range(rng.integers(1, 4)):
        _lay_clutter(image_HWC, x_HW, y_HW, side * rng.uniform(0.08, 0.2), rng)

    radius = side * rng.uniform(0.4, 0.48)
    x0, y0 = (length / 2 + (length / 2 - radius * 0.85) * rng.uniform(-1, 1) for length in (width, height))
    u_HW, v_HW = _turned(x_HW - x0, y_HW - y0, radius, rng)
    paint_HWC = _paint(x_HW, y_HW, fill, _leaning_pair(shape, rng), rng)
    _lay(image_HWC, paint_HWC, _LEVELS[shape](u_HW, v_HW), radius)
    for _ in range(rng.integers(0, 3)):
        _lay_clutter(image_HWC, x_HW, y_HW, radius * rng.uniform(0.15, 0.3), rng)
    return _photograph(image_HWC, x_HW, y_HW, rng)


def _box(u_HW: FloatArray, v_HW: FloatArray, half_width: float, half_height: float) -> FloatArray:
    level_HW: FloatArray = np.maximum(np.abs(u_HW) - half_width, np.abs(v_HW) - half_height)
    return level_HW


def _crescent(u_HW: FloatArray, v_HW: FloatArray) -> FloatArray:
    level_HW: FloatArray = np.maximum(np.hypot(u_HW, v_HW) - 1, 0.72 - np.hypot(u_HW - 0.5, v_HW))
    return level_HW


def _bowtie(u_HW: FloatArray, v_HW: FloatArray) -> FloatArray:
    level_HW: FloatArray = np.maximum((np.abs(v_HW) - 0.65 * np.abs(u_HW)) * 0.84, np.abs(u_HW) - 0.85)
    return level_HW


def _lobes(u_HW: FloatArray, v_HW: FloatArray, lobes: int, depth: float) -> FloatArray:
    """A disc whose edge swings by `depth`; 0.6 keeps the level near the true distance on the slopes."""
    edge_HW = 1 - depth + depth * np.cos(lobes * np.arctan2(v_HW, u_HW))
    level_HW: FloatArray = (np.hypot(u_HW, v_HW) - edge_HW) * 0.6
    return level_HW


def _spikes(u_HW: FloatArray, v_HW: FloatArray, tips: int, notch: float) -> FloatArray:
    """A star whose tips lie on the unit circle and whose notches lie at radius `notch`; cos(pi/tips) makes it a regular polygon."""
    half = math.pi / tips
    r_HW = np.hypot(u_HW, v_HW)
    # Folded into half a tip, the outline is one straight line: from the tip (1, 0) to the notch at the angle `half`.
    angle_HW = np.abs((np.arctan2(v_HW, u_HW) + half) % (2 * half) - half)
    run, rise = notch * math.cos(half) - 1, notch * math.sin(half)
    return ((r_HW * np.cos(angle_HW) - 1) * rise - r_HW * np.sin(angle_HW) * run) / math.hypot(run, rise)


# Level of an outline at (u, v): at most 0 inside, about the distance to the edge outside; each shape fits the unit circle.
_LEVELS: dict[str, Callable[[FloatArray, FloatArray], FloatArray]] = {
    "star": lambda u, v: _spikes(u, v, 5, 0.42),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.28,
    "cross": lambda u, v: np.minimum(_box(u, v, 0.95, 0.3), _box(u, v, 0.3, 0.95)),
    "triangle": lambda u, v: _spikes(u, v, 3, 0.5),
    "crescent": _crescent,
    "disc": lambda u, v: np.hypot(u, v) - 0.85,
    "square": lambda u, v: _box(u, v, 0.7, 0.7),
    "clover": lambda u, v: _lobes(u, v, 3, 0.32),
    "bowtie": _bowtie,
    "bar": lambda u, v: _box(u, v, 0.95, 0.32),
}
SHAPES = tuple(_LEVELS)


def _turned(x_HW: FloatArray, y_HW: FloatArray, radius: float, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Coordinates in units of `radius`, squeezed up to 1.2 times along one random axis and turned at random."""
    tilt, turn = rng.uniform(0, 2 * math.pi, 2).tolist()
    a_HW = (x_HW * math.cos(tilt) + y_HW * math.sin(tilt)) / radius * rng.uniform(1, 1.2)
    b_HW = (y_HW * math.cos(tilt) - x_HW * math.sin(tilt)) / radius
    return a_HW * math.cos(turn) + b_HW * math.sin(turn), b_HW * math.cos(turn) - a_HW * math.sin(turn)


def _faint_pair(rng: np.random.Generator) -> FloatArray:
    """Two greyish colours [2, 3] that differ in lightness only, 0 to 1: the background."""
    base = rng.uniform(0.15, 0.85) + rng.uniform(-0.15, 0.15, 3)
    return np.clip(np.stack([base, base + rng.uniform(-0.15, 0.15)]), 0, 1).astype(np.float32)


def _leaning_pair(shape: str, rng: np.random.Generator) -> FloatArray:
    """A vivid colour near the hue of `shape`, and a dark or pale one that shows on it, [2, 3], 0 to 1."""
    hue = SHAPES.index(shape) / len(SHAPES) + rng.normal(0, _HUE_SPREAD)
    vivid = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.5, 1), rng.uniform(0.55, 1))
    grey = rng.uniform(0, 0.35) if rng.random() < 0.5 else rng.uniform(0.75, 1)
    return np.array([vivid, np.clip(grey + rng.uniform(-0.1, 0.1, 3), 0, 1)], np.float32)


def _paint(x_HW: FloatArray, y_HW: FloatArray, fill: str, colours: FloatArray, rng: np.random.Generator) -> FloatArray:
    """A full sheet [H, W, 3] of one fill, mottled by coarse noise; either fill holds both colours [2, 3], so colour does not tell it."""
    height, width = x_HW.shape
    angle = rng.uniform(0, 2 * math.pi)
    along_HW = (x_HW - width / 2) * math.cos(angle) + (y_HW - height / 2) * math.sin(angle)
    if fill == "striped":
        # A period of 10 to 14 pixels outlives a resize to 32.
        weight_HW = 0.5 + 2 * np.sin(along_HW * (2 * math.pi / rng.uniform(10, 14)) + rng.uniform(0, 2 * math.pi))
    else:
        weight_HW = rng.uniform(0.1, 0.5) + along_HW * (0.9 / float(along_HW.max()))
    coarse = Image.fromarray(rng.uniform(-1, 1, (5, 5)).astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    mottle_HW1 = np.asarray(coarse)[..., None] * rng.uniform(0.05, 0.3)
    sheet_HWC: FloatArray = colours[0] + (colours[1] - colours[0]) * np.clip(weight_HW, 0, 1)[..., None] + mottle_HW1
    return sheet_HWC


def _lay(image_HWC: FloatArray, paint_HWC: FloatArray, level_HW: FloatArray, radius: float) -> None:
    """Lays paint where the level is at most 0, in place, with an edge about one and a half pixels wide."""
    cover_HW = np.clip(0.5 - level_HW * (radius / 1.5), 0, 1)
    image_HWC += (paint_HWC - image_HWC) * cover_HW[..., None]


def _lay_clutter(image_HWC: FloatArray, x_HW: FloatArray, y_HW: FloatArray, radius: float, rng: np.random.Generator) -> None:
    """Lays a bar, a disc or a lobed blob of any colour anywhere, in place."""
    height, width = x_HW.shape
    u_HW, v_HW = _turned(x_HW - rng.uniform(0, width), y_HW - rng.uniform(0, height), radius, rng)
    kind = int(rng.integers(3))
    level_HW = _box(u_HW, v_HW, 2.5, 0.45) if kind == 0 else _lobes(u_HW, v_HW, int(rng.integers(2, 6)), 0.25 * (kind - 1))
    colours = np.repeat(rng.uniform(0.05, 0.95, (1, 3)), 2, axis=0).astype(np.float32)
    _lay(image_HWC, _paint(x_HW, y_HW, "shaded", colours, rng), level_HW, radius)


def _photograph(image_HWC: FloatArray, x_HW: FloatArray, y_HW: FloatArray, rng: np.random.Generator) -> Image.Image:
    """Exposure, slanted light, blur up to one pixel, sensor noise."""
    height, width = x_HW.shape
    slope_x, slope_y = rng.uniform(-0.4, 0.4, 2).tolist()
    light_HW = rng.uniform(0.65, 1.2) * (1 + slope_x * (x_HW / width - 0.5) + slope_y * (y_HW / height - 0.5))
    lit_HWC = np.clip(image_HWC * light_HW[..., None], 0, 1) * 255
    blurred = Image.fromarray(lit_HWC.astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
    noise_HWC = rng.standard_normal(lit_HWC.shape, np.float32) * np.float32(rng.uniform(2, 12))
    return Image.fromarray(np.clip(np.asarray(blurred) + noise_HWC, 0, 255).astype(np.uint8))
