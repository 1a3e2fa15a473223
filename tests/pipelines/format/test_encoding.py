"""Plain images keep their bytes, everything readable becomes a plain JPEG, and damage is named."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import resource
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from pipelines.format.encoding import PixelOptions, PreparedSample, prepare_sample
from pipelines.format.jpeg_header import read_jpeg_header
from pipelines.format.resize import shrink_to_area
from pipelines.types import ConfigError, DatasetError, EncodedSample
from tests.pipelines.format.images import PLAIN_JPEGS, image_bytes, scene, smooth, with_exif

PINS = Path(__file__).resolve().parents[3] / "constraints.txt"


def prepare(encoded: bytes, **options: Any) -> PreparedSample:
    prepared = prepare_sample(EncodedSample(encoded=encoded, extension="JPEG", label=3, source="a/b.JPEG"), PixelOptions(**options))
    assert (prepared.sample.label, prepared.sample.source) == (3, "a/b.JPEG")
    return prepared


def pixels_of(prepared: PreparedSample) -> np.ndarray:
    """int32 [H, W, 3] of what is stored, after checking that it is what the shard format promises."""
    encoded = prepared.sample.encoded
    if prepared.reencoded:
        assert prepared.sample.extension == "jpg"
        header = read_jpeg_header(encoded)
        assert header is not None
        assert (header.height, header.width) == (prepared.height, prepared.width)
        assert simplejpeg.decode_jpeg_header(encoded)[2:] in (("YCbCr", "420"), ("Gray", "Gray"))
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.size == (prepared.width, prepared.height)
        return np.asarray(image.convert("RGB")).astype(np.int32)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Decibels, of 8-bit images."""
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((first.astype(np.float64) - second) ** 2))))


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"min_side": 8, "max_side": 8}, "min_side and max_side exclude each other"),
            ({"min_side": 0}, "min_side must be at least 1 pixel, not 0"),
            ({"max_side": -1}, "max_side must be at least 1 pixel, not -1"),
            ({"quality": 0}, "quality must lie in 1…100, not 0"),
            ({"quality": 101}, "quality must lie in 1…100, not 101"),
            ({"max_side": 8, "validate": False}, "max_side decodes every image, so validation cannot be off"),
        ],
    )
    def test_what_cannot_work_is_refused(self, options: dict[str, Any], sentence: str) -> None:
        with pytest.raises(ConfigError, match=sentence):
            PixelOptions(**options)

    def test_manifest_entry_names_mode_and_side(self) -> None:
        kept = {"mode": "keep", "side": None, "quality": 95, "resize": None, "subsampling": "4:2:0", "validated": True}
        assert PixelOptions().recorded() == kept
        assert PixelOptions(validate=False).recorded() == {**kept, "validated": False}
        shrunk = PixelOptions(min_side=256, quality=90).recorded()
        assert shrunk == {**kept, "mode": "min-side", "side": 256, "quality": 90, "resize": "area"}
        assert PixelOptions(max_side=500).recorded()["mode"] == "max-side"

    @given(height=st.integers(1, 65_500), width=st.integers(1, 65_500), side=st.integers(1, 2_000), longer=st.booleans())
    def test_target_hits_the_side_exactly_and_never_enlarges(self, height: int, width: int, side: int, longer: bool) -> None:
        target = PixelOptions(max_side=side).target(height, width) if longer else PixelOptions(min_side=side).target(height, width)
        measure = max if longer else min
        if target is None:
            assert measure(height, width) <= side
            return
        assert measure(target) == side < measure(height, width)
        scale = side / measure(height, width)
        assert all(1 <= new <= old and abs(new - max(1, old * scale)) <= 0.5 for new, old in zip(target, (height, width), strict=True))


class TestKept:
    @pytest.mark.parametrize("options", [{}, {"validate": False}, {"min_side": 61}, {"max_side": 93}, {"min_side": 4000}])
    @pytest.mark.parametrize("name", PLAIN_JPEGS)
    def test_plain_jpeg_keeps_its_bytes(self, name: str, options: dict[str, Any]) -> None:
        prepared = prepare(PLAIN_JPEGS[name], **options)
        assert prepared.sample.encoded == PLAIN_JPEGS[name]
        assert (prepared.sample.extension, prepared.reencoded) == ("jpg", False)
        pixels_of(prepared)

    @pytest.mark.parametrize("options", [{}, {"validate": False}, {"min_side": 61}])
    @pytest.mark.parametrize("mode", ["RGB", "L"])
    def test_plain_png_keeps_its_bytes_whatever_it_is_called(self, mode: str, options: dict[str, Any]) -> None:
        encoded = image_bytes("PNG", mode)
        prepared = prepare(encoded, **options)
        assert (prepared.sample.encoded, prepared.sample.extension, prepared.reencoded) == (encoded, "png", False)
        assert (prepared.height, prepared.width) == (61, 93)

    def test_photographs_keep_their_bytes(self, shared_data: Path) -> None:
        for path in sorted((shared_data / "photos").iterdir())[::9]:
            assert prepare(path.read_bytes()).sample.encoded == path.read_bytes()


class TestReencoded:
    @pytest.mark.parametrize("turn", range(2, 9))
    @pytest.mark.parametrize(("kind", "extra"), [("JPEG", {"quality": 98}), ("PNG", {}), ("TIFF", {})])
    def test_rotation_is_baked_in(self, kind: str, extra: dict[str, Any], turn: int) -> None:
        upright = smooth(48, 80)
        flip, mirror = np.flipud(upright), np.fliplr(upright)
        stored = {2: mirror, 3: np.fliplr(flip), 4: flip, 5: upright.swapaxes(0, 1)}
        # How a camera held that way stores the scene: EXIF's transform undoes it.
        stored |= {6: np.rot90(upright, 1), 7: np.rot90(upright, 2).swapaxes(0, 1), 8: np.rot90(upright, -1)}
        encoded = image_bytes(kind, pixels=np.ascontiguousarray(stored[turn]), exif=with_exif(orientation=turn), **extra)
        assert np.abs(pixels_of(prepare(encoded)) - upright).mean() < 3

    @pytest.mark.parametrize(
        "encoded",
        [
            image_bytes(mode="CMYK", pixels=smooth(48, 80), quality=95),
            image_bytes(progressive=True, pixels=smooth(48, 80), quality=95),
            image_bytes(keep_rgb=True, pixels=smooth(48, 80), quality=95),
            image_bytes("PNG", "RGBA", pixels=smooth(48, 80)),
            image_bytes("PNG", "P", pixels=smooth(48, 80)),
            image_bytes("WEBP", pixels=smooth(48, 80), quality=95),
            image_bytes("GIF", pixels=smooth(48, 80)),
            image_bytes("BMP", pixels=smooth(48, 80)),
            image_bytes("TIFF", pixels=smooth(48, 80)),
            image_bytes("TIFF", "CMYK", pixels=smooth(48, 80)),
            image_bytes(pixels=smooth(48, 80), quality=95) + b"\0" * 9_000,
        ],
    )
    @pytest.mark.parametrize("options", [{}, {"validate": False}, {"min_side": 24}])
    def test_other_formats_keep_their_colours(self, encoded: bytes, options: dict[str, Any]) -> None:
        prepared = prepare(encoded, **options)
        assert prepared.reencoded
        side = 24 if "min_side" in options else 48
        expected = shrink_to_area(smooth(48, 80), side, side * 80 // 48)
        assert np.abs(pixels_of(prepared) - expected).mean() < 13  # the palette image is dithered to 216 colours

    def test_inverted_ycck_is_read_as_adobe_writes_it(self) -> None:
        cmyk = bytearray(image_bytes(mode="CMYK", pixels=np.full((16, 16, 3), (200, 40, 60), np.uint8)))
        assert np.abs(pixels_of(prepare(bytes(cmyk))) - (200, 40, 60)).max() < 8
        cmyk[cmyk.index(b"Adobe") + 11] = 2  # the same numbers as YCCK
        with Image.open(io.BytesIO(cmyk)) as image:
            expected = np.asarray(image.convert("RGB")).astype(np.int32)
        assert np.abs(pixels_of(prepare(bytes(cmyk))) - expected).max() < 8

    def test_alpha_lies_on_white(self) -> None:
        layer = np.zeros((16, 16, 4), np.uint8)
        layer[:, 8:] = (255, 0, 0, 255)
        buffer = io.BytesIO()
        Image.fromarray(layer).save(buffer, "PNG")
        pixels = pixels_of(prepare(buffer.getvalue()))
        assert np.abs(pixels[:, :6] - 255).max() < 12
        assert np.abs(pixels[:, 10:] - (255, 0, 0)).max() < 12

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_sixteen_bits_become_the_upper_eight(self, kind: str) -> None:
        ramp = np.tile(np.linspace(0, 65_535, 128).astype(np.uint16), (32, 1))
        buffer = io.BytesIO()
        Image.fromarray(ramp).save(buffer, kind)
        assert np.abs(pixels_of(prepare(buffer.getvalue()))[..., 0] - (ramp >> 8)).max() <= 3

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_animations_show_their_first_frame(self, kind: str) -> None:
        frames = [Image.new("RGB", (32, 24), colour) for colour in ("blue", "red", "green")]
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        prepared = prepare(buffer.getvalue())
        assert prepared.reencoded
        assert np.abs(pixels_of(prepared) - (0, 0, 255)).max() < 8

    @pytest.mark.parametrize(("depth", "colour_type", "row_bytes"), [(16, 2, 6 * 16), (4, 0, 8), (2, 0, 4)])
    def test_png_that_decoders_round_differently_is_not_kept(self, depth: int, colour_type: int, row_bytes: int) -> None:
        def chunk(name: bytes, content: bytes) -> bytes:
            return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

        rows = zlib.compress((b"\0" + b"\xff" * row_bytes) * 16)
        head = struct.pack(">IIBBBBB", 16, 16, depth, colour_type, 0, 0, 0)
        prepared = prepare(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
        assert prepared.reencoded
        assert (pixels_of(prepared) == 255).all()

    def test_readable_jpeg_with_a_warning_is_written_anew(self) -> None:
        whole = image_bytes(pixels=smooth(61, 93), quality=95)
        harmed = whole[:-2] + bytes(40) + whole[-2:]  # "extraneous bytes before marker 0xd9"
        assert read_jpeg_header(harmed) is not None
        prepared = prepare(harmed)
        assert prepared.reencoded
        assert psnr(pixels_of(prepared), pixels_of(prepare(whole))) > 35

    def test_quality_is_that_of_the_options(self) -> None:
        sizes = [len(prepare(image_bytes("BMP"), quality=quality).sample.encoded) for quality in (10, 50, 95)]
        assert sizes == sorted(sizes)
        assert sizes[-1] > 3 * sizes[0]

    @given(content=st.binary(max_size=60), kind=st.sampled_from(["JPEG", "PNG"]))
    def test_odd_metadata_neither_warns_nor_hides_the_pixels(self, content: bytes, kind: str) -> None:
        prepared = prepare(image_bytes(kind, exif=b"Exif\0\0II*\0\x08\0\0\0" + content))
        assert sorted((prepared.height, prepared.width)) == [61, 93]
        assert prepare(image_bytes(kind, exif=b"Exif\0\0" + content))


class TestRefused:
    @pytest.mark.parametrize("options", [{}, {"validate": False}, {"min_side": 8}])
    @pytest.mark.parametrize(
        ("encoded", "reason"),
        [
            (b"", r"the file is empty \(0 bytes\)"),
            (b"\0" * 5_000, "unknown or damaged format"),
            (b"<!DOCTYPE html><html></html>", "unknown or damaged format"),
            (PLAIN_JPEGS["4:2:0"][:1_500], "truncated"),
            (image_bytes("PNG")[:900], "truncated"),
            (image_bytes("WEBP")[:300], ""),
        ],
    )
    def test_damage_is_one_sentence_with_the_source(self, encoded: bytes, reason: str, options: dict[str, Any]) -> None:
        with pytest.raises(DatasetError, match=rf"^a/b\.JPEG is not a readable image: .*{reason}[^\n]*$"):
            prepare(encoded, **options)

    @pytest.mark.parametrize("mode", ["I", "F"])
    def test_pixels_without_a_known_white_are_not_guessed(self, mode: str) -> None:
        with pytest.raises(DatasetError, match="its pixels are 32-bit numbers, whose white is not known; save it with 8 bits"):
            prepare(image_bytes("TIFF", mode))

    def test_enormous_claims_are_refused_without_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        jpeg = image_bytes().replace(struct.pack(">HH", 61, 93), struct.pack(">HH", 65_000, 65_000))
        png = bytearray(image_bytes("PNG"))
        png[16:24] = struct.pack(">II", 65_000, 65_000)
        png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
        wide = bytearray(png)
        wide[16:24] = struct.pack(">II", 70_000, 2)
        wide[29:33] = struct.pack(">I", zlib.crc32(wide[12:29]))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for limit in (Image.MAX_IMAGE_PIXELS, None):  # some libraries lift Pillow's limit for the whole process
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            for encoded in (jpeg, bytes(png)):
                for options in ({}, {"validate": False}, {"min_side": 8}):
                    with pytest.raises(DatasetError, match=r"a/b\.JPEG is not a readable image: .*(bomb|too large)"):
                        prepare(encoded, **options)
            with pytest.raises(DatasetError, match="70000×2 pixels are too large"):
                prepare(bytes(wide))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB

    def test_large_images_do_not_warn_even_in_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encoded = image_bytes("BMP")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 61 * 93 - 1)  # the image is now of the size at which Pillow warns
        with pytest.warns(Image.DecompressionBombWarning):
            Image.open(io.BytesIO(encoded)).close()
        with ThreadPoolExecutor(4) as pool:
            assert all(prepared.reencoded for prepared in pool.map(prepare, [encoded] * 40))


class TestShrunk:
    @pytest.mark.parametrize(
        ("options", "size"),
        [({"min_side": 40}, (40, 61)), ({"max_side": 40}, (26, 40)), ({"min_side": 1}, (1, 2)), ({"max_side": 1}, (1, 1))],
    )
    @pytest.mark.parametrize("name", ["4:2:0", "grey", "restarts", "comment and profile"])
    def test_the_asked_side_is_met_exactly(self, name: str, options: dict[str, Any], size: tuple[int, int]) -> None:
        prepared = prepare(PLAIN_JPEGS[name], **options)
        assert (prepared.height, prepared.width, prepared.reencoded) == (*size, True)
        pixels_of(prepared)

    def test_every_size_works_at_every_reduction(self) -> None:
        for height, width in [(1, 9), (9, 1), (2, 3), (15, 17), (16, 16), (17, 33), (63, 65), (64, 200)]:
            encoded = simplejpeg.encode_jpeg(scene(height, width), 90)
            for side in range(1, max(height, width)):
                prepared = prepare(encoded, max_side=side)
                assert (max(prepared.height, prepared.width), prepared.reencoded) == (side, True)

    @pytest.mark.parametrize("side", [250, 200, 150, 125, 90, 63, 50, 31])
    def test_fast_and_slow_way_give_one_picture(self, side: int) -> None:
        pixels = smooth(301, 403)
        fast = pixels_of(prepare(simplejpeg.encode_jpeg(pixels, 98, colorsubsampling="444"), min_side=side, quality=98))
        slow = pixels_of(prepare(image_bytes("PNG", pixels=pixels), min_side=side, quality=98))
        assert np.abs(fast - slow).mean() < 1
        # Not shifted either: red rises by 170 over the width, green by as much over the same distance.
        assert np.abs((fast - slow).mean((0, 1))).max() < 0.6

    def test_photographs_look_as_pillow_shrinks_them(self, shared_data: Path) -> None:
        for path in sorted((shared_data / "photos").iterdir())[::40]:
            with Image.open(path) as image:
                rgb = image.convert("RGB")
            for side in (70, 48):
                prepared = prepare(path.read_bytes(), min_side=side)
                assert prepared.reencoded
                shrunk = pixels_of(prepared)
                for filter_, decibels in ((Image.Resampling.BOX, 25), (Image.Resampling.LANCZOS, 23)):
                    assert psnr(shrunk, np.asarray(rgb.resize((prepared.width, prepared.height), filter_))) > decibels

    def test_bytes_are_the_same_everywhere(self) -> None:
        pinned = next(line.split("==")[1].strip() for line in PINS.read_text().splitlines() if line.startswith("simplejpeg=="))
        if importlib.metadata.version("simplejpeg") != pinned:
            pytest.skip(f"the digests are those of simplejpeg {pinned}")
        colour = prepare(simplejpeg.encode_jpeg(scene(301, 403), 92), min_side=128, quality=90)
        half = prepare(simplejpeg.encode_jpeg(scene(301, 403), 92, colorsubsampling="420"), max_side=150)
        digests = [hashlib.sha256(prepared.sample.encoded).hexdigest()[:16] for prepared in (colour, half)]
        assert digests == ["8f2c4f9c83419447", "3102b5ad61221309"]


def test_threads_give_what_one_thread_gives() -> None:
    encoded = [*PLAIN_JPEGS.values(), image_bytes("PNG", "P"), image_bytes(progressive=True)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda content: prepare(content, min_side=20), encoded * 4)) == [
            prepare(content, min_side=20) for content in encoded * 4
        ]


def test_pillow_reads_the_formats_tested_here() -> None:
    assert features.check("webp")
