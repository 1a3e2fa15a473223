"""What bytes go into a shard: every image is decoded once here, so that nothing undecodable ever reaches training."""

from __future__ import annotations

import io

from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.types import DatasetError, EncodedSample

_EXIF_ORIENTATION = 0x0112
_TURNED = range(2, 9)  # other values, 0 among them, are found in real photographs and mean nothing
_KEPT = {"JPEG": ("jpg", {"RGB", "L"}), "PNG": ("png", {"RGB", "L"})}
_PNG_DEPTH_BYTE = 24  # in the IHDR chunk, which the standard puts first
JPEG_QUALITY = 95
MAX_SIDE = 65_535  # what the index can hold; Pillow itself refuses more than 179 million pixels


def _reencode(image: Image.Image) -> bytes:
    """Upright RGB, baseline 4:2:0 JPEG; transparency is laid on white, as a browser shows it."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    buffer = io.BytesIO()
    upright.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0", optimize=False, progressive=False)
    return buffer.getvalue()


def prepare_sample(sample: EncodedSample) -> tuple[EncodedSample, int, int, bool]:
    """Decodes `sample` in full and returns it ready for a tar: (sample, height, width, re-encoded?).

    Upright 8-bit RGB or grey JPEG and PNG keep their bytes. Everything else (CMYK, palette, alpha, 16 bit, EXIF rotation, other
    formats) becomes an upright RGB JPEG of quality 95, so that any reader sees the same pixels.

    Raises:
        DatasetError: the image does not decode, is empty, or is too large; the sentence names its source.
    """
    try:
        with Image.open(io.BytesIO(sample.encoded)) as image:
            width, height = image.size
            if max(width, height) > MAX_SIDE:
                raise DatasetError(f"{sample.source} is too large to be an image of a data set ({width}x{height} pixels)")
            image.load()
            extension = _kept_extension(image, sample.encoded)
            if extension:
                return _renamed(sample, sample.encoded, extension), height, width, False
            encoded = _reencode(image)
    except UnidentifiedImageError as error:
        raise DatasetError(f"{sample.source} is not a readable image: unknown or damaged format") from error
    except DatasetError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and more
        raise DatasetError(f"{sample.source} is not a readable image: {str(error) or type(error).__name__}") from error
    with Image.open(io.BytesIO(encoded)) as upright:
        width, height = upright.size
    return _renamed(sample, encoded, "jpg"), height, width, True


def _kept_extension(image: Image.Image, encoded: bytes) -> str:
    """The extension under which the stored bytes can stay as they are, or "" if they cannot."""
    extension, modes = _KEPT.get(image.format or "", ("", set()))
    if image.mode not in modes or "transparency" in image.info or image.getexif().get(_EXIF_ORIENTATION) in _TURNED:
        return ""
    # Pillow reads 16-bit RGB and 1- to 4-bit grey PNG as 8 bit; other decoders round differently.
    return "" if extension == "png" and encoded[_PNG_DEPTH_BYTE] != 8 else extension


def _renamed(sample: EncodedSample, encoded: bytes, extension: str) -> EncodedSample:
    return EncodedSample(encoded=encoded, extension=extension, label=sample.label, source=sample.source)
