"""Crops from a ragged buffer: the compiled loop and the Triton kernel give the bits of the torch reference, and that is bilinear."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from pipelines.augment.crop import StoredImages, crop_batch, crop_reference

ROOT = Path(__file__).resolve().parents[3]


def ragged(sizes: list[tuple[int, int]], seed: int = 0) -> StoredImages:
    """Noise: neighbouring pixels have nothing in common, so one wrong index shows."""
    heights_N, widths_N = (np.array(part, np.int64) for part in zip(*sizes, strict=True))
    ends_N = np.cumsum(heights_N * widths_N * 3)
    pixels_P = np.random.default_rng(seed).integers(0, 256, ends_N[-1], dtype=np.uint8)
    parts = [torch.from_numpy(part) for part in (pixels_P, ends_N - heights_N * widths_N * 3, heights_N, widths_N)]
    return StoredImages(pixels_P=parts[0], offsets_N=parts[1], heights_N=parts[2], widths_N=parts[3])


def image_of(stored: StoredImages, i: int) -> torch.Tensor:
    start, height, width = (int(part[i]) for part in (stored.offsets_N, stored.heights_N, stored.widths_N))
    return stored.pixels_P[start : start + height * width * 3].view(height, width, 3)


def reference(stored: StoredImages, ids: list[int], windows: list[tuple[int, ...]], flips: list[int], size: int) -> torch.Tensor:
    plan = torch.tensor(ids), torch.tensor(windows, dtype=torch.int32), torch.tensor(flips, dtype=torch.int32)
    return crop_reference(stored, *plan, None, size)


def compiled(stored: StoredImages, ids: list[int], windows: list[tuple[int, ...]], flips: list[int], size: int) -> torch.Tensor:
    buffers = [part.numpy() for part in (stored.pixels_P, stored.offsets_N, stored.heights_N, stored.widths_N)]
    buffers[0].flags.writeable = False
    # Not zeros: every pixel must be written.
    crops = np.full((len(ids), size, size, 3), 77, np.uint8)
    crop_batch(*buffers, np.array(ids), np.array(windows, np.int32), np.array(flips, np.int32), crops)
    return torch.from_numpy(crops)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[int], list[tuple[int, ...]], list[int], int]:
    """Images from 1 px on; windows inside, across and beyond the border, and often of exactly the crop's size."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4))
    image_size = draw(st.integers(1, 24))
    ids, windows, flips = [], [], []
    for _ in range(draw(st.integers(1, 6))):
        side = st.one_of(st.integers(1, 50), st.just(image_size))
        ids.append(draw(st.integers(0, len(sizes) - 1)))
        windows.append((draw(st.integers(-12, 40)), draw(st.integers(-12, 40)), draw(side), draw(side)))
        flips.append(draw(st.integers(0, 1)))
    return sizes, ids, windows, flips, image_size


@given(batches())
def test_the_compiled_loop_gives_the_bits_of_the_reference(
    batch: tuple[list[tuple[int, int]], list[int], list[tuple[int, ...]], list[int], int],
) -> None:
    sizes, ids, windows, flips, image_size = batch
    stored = ragged(sizes)
    torch.testing.assert_close(
        compiled(stored, ids, windows, flips, image_size), reference(stored, ids, windows, flips, image_size), rtol=0, atol=0
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.integers(4, 24))
def test_the_reference_is_bilinear_at_half_pixel_centres(seed: int, height: int, width: int, image_size: int) -> None:
    stored = ragged([(40, 40)], seed)
    found = reference(stored, [0], [(40 - height, 40 - width, height, width)], [0], image_size)[0].float()
    window = image_of(stored, 0)[40 - height :, 40 - width :].permute(2, 0, 1)[None].float()
    expected = functional.interpolate(window, (image_size, image_size), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    # Weights of 7 bits are off by at most 1/256, once along each axis, at steps of up to 255 levels; and rounding.
    assert (found - expected).abs().max() <= 2 * 255 / 256 + 1
    assert (found - expected).abs().mean() < 0.75


@pytest.mark.parametrize("crop", [reference, compiled])
class TestBothOnTheHost:
    def test_a_window_of_the_crops_size_is_copied(self, crop: type[reference]) -> None:
        stored = ragged([(20, 30), (16, 16)])
        crops = crop(stored, [0, 1, 0], [(4, 14, 16, 16), (0, 0, 16, 16), (0, 3, 16, 16)], [0, 0, 1], 16)
        assert torch.equal(crops[0], image_of(stored, 0)[4:20, 14:30])
        assert torch.equal(crops[1], image_of(stored, 1))
        assert torch.equal(crops[2], image_of(stored, 0)[0:16, 3:19].flip(1))

    def test_outside_the_image_is_black(self, crop: type[reference]) -> None:
        stored = ragged([(16, 16)])
        shifted = crop(stored, [0, 0], [(-3, 2, 16, 16), (-3, 2, 16, 16)], [0, 1], 16)
        expected = functional.pad(image_of(stored, 0), (0, 0, 0, 2, 3, 0))[:16, 2:]
        assert torch.equal(shifted[0], expected)
        assert torch.equal(shifted[1], expected.flip(1))
        assert not crop(stored, [0], [(30, -40, 16, 16)], [0], 16).any()

    def test_a_flip_mirrors_the_resampled_crop(self, crop: type[reference]) -> None:
        stored = ragged([(50, 60)])
        plain, mirrored = crop(stored, [0, 0], [(3, 5, 40, 31)] * 2, [0, 1], 24)
        # Positions are rounded towards one side, so a mirrored one may differ by 1/128 of a pixel.
        assert (plain.flip(1).float() - mirrored.float()).abs().max() <= 2

    def test_the_window_ends_where_it_ends(self, crop: type[reference]) -> None:
        """Resampling must not see pixels beside the window: a field's crop-then-resize does not."""
        stored = ragged([(30, 30)])
        stored.pixels_P.zero_()
        image_of(stored, 0)[10:20, 10:20] = 200
        assert (crop(stored, [0], [(10, 10, 10, 10)], [0], 24) == 200).all()

    def test_windows_of_other_images_far_into_the_buffer(self, crop: type[reference]) -> None:
        stored = ragged([(9, 300), (400, 7), (64, 65)])
        crops = crop(stored, [1, 2, 0], [(399, 6, 1, 1), (0, 1, 64, 64), (0, 268, 9, 32)], [0, 0, 0], 32)
        assert (crops[0] == image_of(stored, 1)[399, 6]).all()
        assert torch.equal(crops[2][:, :, 0][0], image_of(stored, 0)[0, 268:, 0])


TRITON_CASES = """
import numpy as np, torch
from pipelines.augment.crop import StoredImages, crop_reference
from pipelines.augment.crop_triton import crop_fused
rng = np.random.default_rng(0)
for size, count in ((33, 12), (8, 5), (24, 0)):
    heights, widths = rng.integers(1, 60, 6), rng.integers(1, 60, 6)
    ends = np.cumsum(heights * widths * 3)
    parts = [rng.integers(0, 256, ends[-1], dtype=np.uint8), ends - heights * widths * 3, heights, widths]
    stored = StoredImages(**dict(zip(("pixels_P", "offsets_N", "heights_N", "widths_N"), map(torch.from_numpy, parts))))
    windows = np.concatenate([rng.integers(-9, 20, (count, 2)), rng.integers(1, 60, (count, 2))], 1).astype(np.int32)
    windows[::3, 2:] = size
    plan = [torch.from_numpy(part) for part in (rng.integers(0, 6, count), windows, rng.integers(0, 2, count).astype(np.int32))]
    for factors in (None, torch.from_numpy(rng.uniform(0.2, 1.9, (count, 3)).astype(np.float32))):
        assert torch.equal(crop_fused(stored, *plan, factors, size), crop_reference(stored, *plan, factors, size)), (size, factors)
print("same bits")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed")
def test_the_triton_kernels_give_the_bits_of_the_reference() -> None:
    """In Triton's interpreter, which must be chosen before Triton is imported: hence a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", TRITON_CASES], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout == "same bits\n", ran.stderr


@pytest.mark.cuda
def test_the_kernels_on_a_device_give_the_bits_of_the_reference() -> None:
    from pipelines.augment.crop_triton import crop_fused

    stored = ragged([(300, 256), (256, 411), (224, 224)])
    device = torch.device("cuda")
    moved = StoredImages(**{name: part.to(device) for name, part in vars(stored).items()})
    windows = torch.tensor([(0, 0, 224, 224), (9, 30, 100, 211), (-5, 3, 224, 224)] * 4, dtype=torch.int32)
    plan = torch.tensor([2, 1, 0] * 4), windows, torch.tensor([0, 1] * 6, dtype=torch.int32)
    for factors in (None, torch.rand(12, 3) + 0.5):
        expected = crop_reference(stored, *plan, factors, 224)
        found = crop_fused(moved, *(part.to(device) for part in plan), None if factors is None else factors.to(device), 224)
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0)
