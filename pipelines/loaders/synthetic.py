"""Loader `synthetic`: the real order, labels and plans with made-up pixels; shows what training costs when data is free."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch

from pipelines.loaders.plan import BatchPlan
from pipelines.loaders.planned import PixelRequest
from pipelines.randomness import Purpose, derive_key


class SyntheticPixels:
    """Pixel source that returns one block of random pixels, made once on the device, for every batch."""

    stored_sizes = None
    order = None

    def __init__(self, request: PixelRequest) -> None:
        """Draws the block from the run's seed."""
        size = request.config.image_size
        generator = torch.Generator().manual_seed(derive_key(request.seed, Purpose.SYNTHETIC) >> 1)
        block = torch.randint(0, 256, (request.max_samples, size, size, 3), dtype=torch.uint8, generator=generator)
        self._block_SHWC = block.to(request.device)

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        """The same pixels for every plan, as many as it has samples."""
        for plan in plans:
            yield plan, self._block_SHWC[: len(plan.ids_S)]

    def close(self) -> None:
        """Frees the block."""
        self._block_SHWC = self._block_SHWC[:0]
