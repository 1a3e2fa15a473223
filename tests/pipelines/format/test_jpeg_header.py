"""What is called plain is read alike by all, nothing makes the walk raise, and a small decode validates as a full one does."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.format.jpeg_header import JpegHeader, read_jpeg_header
from tests.pipelines.format.images import ORIENTATION, PLAIN_JPEGS, damage, damaged, image_bytes, with_exif

RGB_JPEG = image_bytes(keep_rgb=True)  # begins with an Adobe segment of 16 bytes


def strict_complaint(encoded: bytes, **decode: Any) -> bool:
    try:
        simplejpeg.decode_jpeg(encoded, strict=True, **decode)
    except ValueError:
        return True
    return False


class TestHeader:
    @pytest.mark.parametrize("name", PLAIN_JPEGS)
    def test_plain_jpeg_gives_its_size(self, name: str) -> None:
        with Image.open(io.BytesIO(PLAIN_JPEGS[name])) as image:
            expected = JpegHeader(image.height, image.width, len(image.getbands()))
        assert read_jpeg_header(PLAIN_JPEGS[name]) == expected

    @pytest.mark.parametrize(
        "encoded",
        [
            b"",
            b"\xff\xd8",
            image_bytes("PNG"),
            image_bytes(progressive=True),
            image_bytes(mode="CMYK"),
            RGB_JPEG,
            RGB_JPEG[:2] + RGB_JPEG[18:],  # RGB by the names of its components alone
            RGB_JPEG.replace(b"R\x11\0G\x11\0B\x11", b"\1\x11\0\2\x11\0\3\x11").replace(b"\3R\0G\0B\0", b"\3\1\0\2\0\3\0"),  # by Adobe's
            PLAIN_JPEGS["4:2:0"].replace(b"\xff\xda\0\x0c\3\1\0\2\x11\3", b"\xff\xda\0\x0c\3\1\0\2\x11\4"),
            PLAIN_JPEGS["4:2:0"][:-2],
            PLAIN_JPEGS["4:2:0"][:-200],
            image_bytes() + b"\0" * 5_000,
            image_bytes().replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x08"),
            image_bytes().replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
            image_bytes().replace(b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", 61, 93), b"\xff\xc0\x00\x11\x08" + b"\0\0\0\x10"),
            image_bytes(exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
            image_bytes(exif=b"Exif\0\0nonsense"),
            image_bytes(xmp=b'<x tiff:Orientation="6"/>'),
            *(image_bytes(exif=with_exif(orientation=turn)) for turn in range(2, 9)),
        ],
    )
    def test_anything_else_is_not_plain(self, encoded: bytes) -> None:
        assert read_jpeg_header(encoded) is None

    @settings(max_examples=400)
    @given(content=st.binary(max_size=200))
    def test_arbitrary_bytes_never_raise(self, content: bytes) -> None:
        for start in (b"", b"\xff\xd8", b"\xff\xd8\xff\xe1\x00\x40Exif\0\0II*\0", b"\xff\xd8\xff\xc0", b"\xff\xd8\xff\xee\x00\x0eAdobe"):
            assert read_jpeg_header(start + content) is None

    @settings(max_examples=500)
    @given(name=st.sampled_from(sorted(PLAIN_JPEGS)), harm=st.lists(damage, min_size=1, max_size=3))
    def test_what_it_calls_plain_pillow_reads_alike(self, name: str, harm: list[tuple[str, float, int]]) -> None:
        encoded = PLAIN_JPEGS[name]
        for kind, where, amount in harm:
            # Most of a file is image data; aim at the markers more often than chance would.
            encoded = damaged(encoded, kind, where**4, amount) or b"\0"
        header = read_jpeg_header(encoded)
        if header is None:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(encoded)) as image:
                    turned = image.getexif().get(ORIENTATION, 1)
                    found = (image.format, image.height, image.width, len(image.getbands()), image.info.get("progressive"))
        except Exception:
            return  # damage in a table, which the decoder names
        assert found == ("JPEG", *header, None)
        assert turned not in range(2, 9)

    def test_endless_segments_end(self) -> None:
        assert read_jpeg_header(b"\xff\xd8" + b"\xff\xfe\x00\x02" * 1_000_000) is None


class TestStrictDecoder:
    """Decoding at an eighth, in grey, is what validates a kept JPEG: it must complain exactly where a full decode does."""

    @settings(max_examples=800)
    @given(name=st.sampled_from(sorted(PLAIN_JPEGS)), harm=st.lists(damage, max_size=2))
    def test_small_decode_has_the_verdict_of_the_full_one(self, name: str, harm: list[tuple[str, float, int]]) -> None:
        encoded = PLAIN_JPEGS[name]
        for kind, where, amount in harm:
            encoded = damaged(encoded, kind, where, amount) or b"\0"
        small = strict_complaint(encoded, colorspace="GRAY", min_height=1, min_width=1, min_factor=8)
        assert small == strict_complaint(encoded, colorspace="RGB")

    def test_verdicts_agree_on_photographs(self, shared_data: Path) -> None:
        rng = np.random.default_rng(5)
        verdicts = set()
        for path in sorted((shared_data / "photos").iterdir())[::12]:
            whole = path.read_bytes()
            for kind in ("flip", "flip", "cut", "zero", "drop", "zero to the end"):
                encoded = damaged(whole, kind, float(rng.random()), int(rng.integers(8)))
                small = strict_complaint(encoded, colorspace="GRAY", min_height=1, min_width=1, min_factor=8)
                assert small == strict_complaint(encoded, colorspace="RGB")
                verdicts.add(small)
        assert verdicts == {True, False}
