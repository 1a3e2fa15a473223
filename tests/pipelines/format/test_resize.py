"""An output pixel is the mean of what it covers, and nothing moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.format.resize import shrink_to_area
from tests.pipelines.format.images import scene


class TestShrinkToArea:
    @given(
        size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
        share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
        channels=st.sampled_from([1, 3]),
        seed=st.integers(0, 99),
    )
    def test_every_pixel_is_the_mean_of_what_it_covers(
        self, size: tuple[int, int], share: tuple[float, float], channels: int, seed: int
    ) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
        height, width = (max(1, round(part * side)) for part, side in zip(share, size, strict=True))

        def overlaps(num_outputs: int, num_samples: int) -> Any:
            edges = np.arange(num_outputs + 1) * num_samples / num_outputs
            ends = np.minimum(edges[1:, None], np.arange(1, num_samples + 1))
            return np.clip(ends - np.maximum(edges[:-1, None], np.arange(num_samples)), 0, None) * num_outputs / num_samples

        expected = np.einsum("yh,hwc,xw->yxc", overlaps(height, size[0]), pixels, overlaps(width, size[1]))
        assert np.abs(shrink_to_area(pixels, height, width) - expected).max() <= 0.75  # half is rounding, the rest the weights'

    @given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)), target=st.integers(1, 300), value=st.integers(0, 255))
    def test_constant_stays_constant(self, size: tuple[int, int], target: int, value: int) -> None:
        pixels = np.full((*size, 3), value, np.uint8)
        assert (shrink_to_area(pixels, min(size[0], target), min(size[1], target)) == value).all()

    @pytest.mark.parametrize("reduction", [1, 2, 4, 8])
    @pytest.mark.parametrize("length", [250, 251, 253, 255])
    def test_a_ramp_stays_where_it_was(self, length: int, reduction: int) -> None:
        # What a decoder gives at a fraction of the size: means of blocks, the last of them filled up by repeating the edge.
        ramp = np.arange(length, dtype=np.float64)
        padded = np.pad(ramp, (0, -length % reduction), "edge").reshape(-1, reduction).mean(1)
        pixels = np.tile(padded.round().astype(np.uint8)[None, :, None], (4, 1, 3))
        shrunk = shrink_to_area(pixels, 4, 25, reduction=reduction, covers=(4 * reduction, length))
        centres = (np.arange(25) + 0.5) * length / 25 - 0.5
        shifts = shrunk[0, :, 0] - centres
        # Rounding twice is up to one; blocks of eight under outputs of ten add steps. A drift to the right would be up to 5.
        assert np.abs(shifts[:-1]).max() < (1.1 if reduction < 8 else 1.6)

    def test_whole_factors_equal_pillows_reduce(self) -> None:
        pixels = scene(64, 96)
        for factor in (2, 4, 8):
            expected = np.asarray(Image.fromarray(pixels).reduce(factor)).astype(np.int32)
            assert np.abs(shrink_to_area(pixels, 64 // factor, 96 // factor) - expected).max() <= 1
