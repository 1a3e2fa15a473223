"""Images for the tests of this folder: drawn, encoded, and damaged."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import simplejpeg
from hypothesis import strategies as st
from PIL import Image

ORIENTATION = 0x0112


def scene(height: int = 61, width: int = 93) -> np.ndarray:
    """uint8 [H, W, 3]: waves, edges and noise, from integers alone."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([(3 * x + y) % 256, (x * y // 7) % 200, 128 + 60 * (((x // 9) + (y // 5)) % 2)], -1).astype(np.uint8)
    pixels[height // 3 : height // 2] = np.random.default_rng(0).integers(0, 256, pixels[height // 3 : height // 2].shape)
    return pixels


def smooth(height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] that survives JPEG and is not the same in any two places."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    return np.stack([40 + 170 * x, 40 + 170 * y, 128 + 60 * np.sin(9 * x + 5 * y)], -1).round().astype(np.uint8)


def image_bytes(kind: str = "JPEG", mode: str = "RGB", pixels: np.ndarray | None = None, **save: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scene() if pixels is None else pixels).convert(mode).save(buffer, kind, **save)
    return buffer.getvalue()


def with_exif(**entries: int) -> Image.Exif:
    exif = Image.Exif()
    for name, value in entries.items():
        exif[{"orientation": ORIENTATION, "width": 256}[name]] = value
    return exif


PLAIN_JPEGS = {
    "4:2:0": image_bytes(quality=90, subsampling="4:2:0"),
    "4:4:4": image_bytes(quality=95, subsampling="4:4:4"),
    "4:2:2": image_bytes(quality=60, subsampling="4:2:2"),
    "4:4:0 and no JFIF": simplejpeg.encode_jpeg(scene(), 80, colorsubsampling="440"),
    "own tables": image_bytes(quality=80, optimize=True),
    "restarts": image_bytes(quality=90, restart_marker_blocks=3),
    "restarts a row": image_bytes(quality=30, restart_marker_rows=1, subsampling="4:4:4"),
    "grey": image_bytes(mode="L", quality=85),
    "grey with restarts": image_bytes(mode="L", quality=40, restart_marker_blocks=2),
    "upright EXIF": image_bytes(exif=with_exif(orientation=1, width=93)),
    "EXIF without orientation": image_bytes(exif=with_exif(width=93)),
    "EXIF with a meaningless orientation": image_bytes(exif=with_exif(orientation=0)),
    "comment and profile": image_bytes(comment=b"c" * 300, icc_profile=b"p" * 70_000),
    "padding behind the end": image_bytes() + b"\0" * 500,
    "upright XMP": image_bytes(xmp=b'<x tiff:Orientation="1"/>'),
    "one pixel": image_bytes(pixels=scene()[:1, :1]),
}

damage = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.sampled_from(["zero", "drop", "repeat"]), st.floats(0, 1), st.integers(1, 300)),
    st.tuples(st.just("zero to the end"), st.floats(0, 1), st.just(0)),
)


def damaged(encoded: bytes, kind: str, where: float, amount: int) -> bytes:
    content = bytearray(encoded)
    i = min(len(content) - 1, int(where * len(content)))
    if kind == "cut":
        del content[i:]
    elif kind == "flip":
        content[i] ^= 1 << amount
    elif kind == "zero":
        content[i : i + amount] = bytes(len(content[i : i + amount]))
    elif kind == "drop":
        del content[i : i + amount]
    elif kind == "repeat":
        content[i:i] = content[i : i + amount]
    else:
        content[i:] = bytes(len(content) - i)
    return bytes(content)
