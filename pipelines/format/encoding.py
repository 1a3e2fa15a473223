"""What bytes go into a shard: every image is decoded once here, so that nothing undecodable ever reaches training.

Two ways in. A plain JPEG (`jpeg_header`) is checked, and shrunk where asked, by libjpeg-turbo. Everything else, and whatever
libjpeg-turbo complains about, goes through Pillow, the authority on what is readable, and comes out as a plain JPEG.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipelines.config import require
from pipelines.format.jpeg_header import MAX_PIXELS, JpegHeader, read_jpeg_header
from pipelines.format.resize import PixelArray, shrink_to_area
from pipelines.types import DatasetError, EncodedSample, JsonValue

_EXIF_ORIENTATION = 0x0112
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_DEPTH_BYTE = 24  # in the IHDR chunk, which the standard puts first
_DCT_REDUCTIONS = (8, 4, 2)  # sizes at which libjpeg-turbo has vector code
_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
MAX_SIDE = 65_535  # what the index can hold


@dataclass(frozen=True, kw_only=True)
class PixelOptions:
    """What happens to images on their way into shards.

    Args:
        min_side: shrink so that the shorter side has this many pixels. An image is never enlarged.
        max_side: shrink so that the longer side has this many pixels; at most one of the two.
        quality: of every JPEG written, 1…100; an image that keeps its bytes keeps its quality.
        validate: decode every image in full. Off, a plain JPEG is believed from its header and its end.
    """

    min_side: int | None = None
    max_side: int | None = None
    quality: int = 95
    validate: bool = True

    def __post_init__(self) -> None:
        require(self.min_side is None or self.max_side is None, "min_side and max_side exclude each other: give one of them")
        for option, side in (("min_side", self.min_side), ("max_side", self.max_side)):
            require(side is None or side >= 1, f"{option} must be at least 1 pixel, not {side}")
            require(side is None or self.validate, f"{option} decodes every image, so validation cannot be off: drop one of the two")
        require(1 <= self.quality <= 100, f"quality must lie in 1…100, not {self.quality}")

    def recorded(self) -> dict[str, JsonValue]:
        """The same, for a manifest."""
        mode = "min-side" if self.min_side else "max-side" if self.max_side else "keep"
        return {
            "mode": mode,
            "side": self.min_side or self.max_side,
            "quality": self.quality,
            "resize": None if mode == "keep" else "area",
            "subsampling": "4:2:0",
            "validated": self.validate,
        }

    def target(self, height: int, width: int) -> tuple[int, int] | None:
        """Height and width to shrink an image to; None where it is small enough already."""
        now = min(height, width) if self.min_side else max(height, width)
        side = self.min_side or self.max_side or now
        if now <= side:
            return None
        shrunk_height, shrunk_width = ((2 * length * side + now) // (2 * now) for length in (height, width))
        return max(1, shrunk_height), max(1, shrunk_width)


class PreparedSample(NamedTuple):
    """A sample ready for a tar: its size in pixels, and whether its bytes are new."""

    sample: EncodedSample
    height: int
    width: int
    reencoded: bool


def prepare_sample(sample: EncodedSample, options: PixelOptions = PixelOptions()) -> PreparedSample:
    """Checks `sample`, shrinks it where asked, and re-encodes what not every decoder reads alike. Safe in threads.

    Plain JPEG and upright 8-bit RGB or grey PNG keep their bytes unless they are to be shrunk. Everything else (progressive or damaged
    but readable JPEG, CMYK, palette, alpha, 16 bit, EXIF rotation, animations, other formats) becomes an upright baseline 4:2:0 JPEG.
    The extension says what the bytes are, whatever the file was called.

    Raises:
        DatasetError: the image does not decode, is empty, or is too large; the sentence names its source.
    """
    header = read_jpeg_header(sample.encoded)
    if header is not None:
        try:
            return _prepare_plain(sample, header, options)
        except ValueError:
            pass  # damage, a mere warning included: Pillow says whether anything can be read
    return _prepare_any(sample, options)


def _prepare_plain(sample: EncodedSample, header: JpegHeader, options: PixelOptions) -> PreparedSample:
    """Raises ValueError where libjpeg-turbo has any complaint."""
    target = options.target(header.height, header.width)
    if target is None:
        if options.validate:
            # At 1/8 all image data is still parsed and checked; only the inverse transform, which cannot fail, is left out.
            simplejpeg.decode_jpeg(sample.encoded, colorspace="GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
        return PreparedSample(_renamed(sample, sample.encoded, "jpg"), header.height, header.width, False)
    sizes = {factor: (-(-header.height // factor), -(-header.width // factor)) for factor in _DCT_REDUCTIONS}
    reduction = next((factor for factor, size in sizes.items() if size[0] >= target[0] and size[1] >= target[1]), 1)
    # Asking for the size itself rather than the target keeps libjpeg-turbo from 3/8 and 5/8, which take longer than a half.
    reduced_height, reduced_width = sizes.get(reduction, (0, 0))
    pixels_HWC: PixelArray = simplejpeg.decode_jpeg(
        sample.encoded,
        colorspace="GRAY" if header.num_components == 1 else "RGB",
        min_height=reduced_height,
        min_width=reduced_width,
        min_factor=reduction,
        strict=True,
    )
    shrunk_HWC = shrink_to_area(pixels_HWC, *target, reduction=reduction, covers=(header.height, header.width))
    return PreparedSample(_renamed(sample, _encode(shrunk_HWC, options.quality), "jpg"), *target, True)


def _prepare_any(sample: EncodedSample, options: PixelOptions) -> PreparedSample:
    """Through Pillow. Everything is decoded, `validate` or not: it has to be looked at or re-encoded anyway."""
    try:
        _silence_pillow()
        if not sample.encoded:
            raise ValueError("the file is empty (0 bytes)")
        with Image.open(io.BytesIO(sample.encoded)) as image:
            width, height = image.size
            # Pillow has the same limit, unless someone lifted it in this process.
            if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
                raise ValueError(f"{width}×{height} pixels are too large to be an image of a data set")
            image.load()
            if _is_plain_png(image, sample.encoded) and options.target(height, width) is None:
                return PreparedSample(_renamed(sample, sample.encoded, "png"), height, width, False)
            pixels_HWC = np.asarray(_upright_rgb(image))
        target = options.target(*pixels_HWC.shape[:2])
        if target:
            pixels_HWC = shrink_to_area(pixels_HWC, *target)
        encoded = _encode(pixels_HWC, options.quality)
    except UnidentifiedImageError as error:
        raise DatasetError(f"{sample.source} is not a readable image: unknown or damaged format") from error
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and more
        raise DatasetError(f"{sample.source} is not a readable image: {str(error) or type(error).__name__}") from error
    return PreparedSample(_renamed(sample, encoded, "jpg"), pixels_HWC.shape[0], pixels_HWC.shape[1], True)


def _silence_pillow() -> None:
    """Pillow warns of odd metadata and of large images, neither of which matters here.

    Filters belong to the process, so `catch_warnings` around each image would be undone by another thread's. This filter is set once,
    where no caller has set another since, and stays; it speaks of Pillow's own modules alone.
    """
    if warnings.filters[:1] != [_PILLOW_WARNINGS]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _is_plain_png(image: Image.Image, encoded: bytes) -> bool:
    """Does every decoder see the same pixels? Pillow reads 16-bit RGB and 1- to 4-bit grey as 8 bit; others round differently."""
    return (
        image.format == "PNG"
        and image.mode in ("RGB", "L")
        and encoded[_PNG_DEPTH_BYTE] == 8
        and not image.has_transparency_data
        and not getattr(image, "is_animated", False)
        and _orientation(image) not in _TURNED
    )


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # metadata that does not parse says nothing of the pixels, which do
        return 1
    return value if isinstance(value, int) else 1


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB; transparency is laid on white, as a browser shows it.

    Raises:
        ValueError: pixels of 32 bit, whose white is not known.
    """
    orientation = _orientation(image)
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255, which makes nearly all of it white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, whose white is not known; save it with 8 bits a channel")
    if orientation in _TURNED:
        image = image.transpose(_TURNED[orientation])
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def _encode(pixels_HWC: PixelArray, quality: int) -> bytes:
    """A baseline JPEG: uint8 [H, W, 3] as 4:2:0, uint8 [H, W, 1] as grey."""
    grey = pixels_HWC.shape[2] == 1
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels_HWC), quality, colorspace="GRAY" if grey else "RGB", colorsubsampling="Gray" if grey else "420"
    )
    return encoded


def _renamed(sample: EncodedSample, encoded: bytes, extension: str) -> EncodedSample:
    return EncodedSample(encoded=encoded, extension=extension, label=sample.label, source=sample.source)
