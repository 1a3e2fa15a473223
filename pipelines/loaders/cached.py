"""Loader `cached`: real pixels that are decoded once and shown again and again; what training costs when decoding is free.

Order, ids, labels, policy, cutout and mixing go on as planned, and so do the crops in the plans, which nobody cuts any more. AFTER THE
FIRST BATCHES PIXELS AND LABELS DO NOT BELONG TOGETHER: for measuring (`--loader cached`), never for results. Where `synthetic` shows a
network noise, this one shows it photographs, so that what depends on their statistics (clocks, power, non-finite losses) is as in a run.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from importlib import import_module

import torch

from pipelines.loaders.choice import is_streamed
from pipelines.loaders.plan import BatchPlan, StepOrder
from pipelines.loaders.planned import PixelRequest, PixelSource
from pipelines.types import IntArray

KEPT_BATCHES = 8


def _real_source(request: PixelRequest) -> PixelSource:
    """Who decodes the batches that are kept."""
    from pipelines.loaders import LOADERS

    # Few batches are asked for, so one that decodes what is asked for; from a URL, one that fetches no more than that.
    module_name, class_name = LOADERS["webdataset" if is_streamed(request.shards) else "dali"].split(":")
    source: PixelSource = getattr(import_module(module_name), class_name)(request)
    return source


class CachedPixels:
    """Pixel source that keeps the first 8 batches of each size as a real one delivers them, on the device, and returns them in turn."""

    def __init__(self, request: PixelRequest) -> None:
        """Opens the real source; it is closed when enough full batches are kept."""
        self._real: PixelSource | None = _real_source(request)
        self._stored_sizes, self._order = self._real.stored_sizes, self._real.order
        self._max_samples = request.max_samples
        self._kept: list[torch.Tensor] = []
        self._num_shown = 0

    @property
    def stored_sizes(self) -> tuple[IntArray, IntArray] | None:
        """Of the real source."""
        return self._stored_sizes

    @property
    def order(self) -> StepOrder | None:
        """Of the real source."""
        return self._order

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        """Decodes a batch for its plan as long as fewer than 8 kept ones are as large; then takes the next kept one, cut to size."""
        for plan in plans:
            large_enough = [images for images in self._kept if len(images) >= len(plan.ids_S)]
            if len(large_enough) < KEPT_BATCHES:
                yield plan, self._decode(plan)
            else:
                self._num_shown += 1
                yield plan, large_enough[self._num_shown % KEPT_BATCHES][: len(plan.ids_S)]

    def _decode(self, plan: BatchPlan) -> torch.Tensor:
        assert self._real is not None, "no batch is larger than those that were kept"
        stream = self._real.stream(iter([plan]))
        ((_, images_SHWC),) = stream
        self._kept.append(images_SHWC.clone())
        if sum(len(images) == self._max_samples for images in self._kept) == KEPT_BATCHES:
            self._real.close()
            self._real = None
        return images_SHWC

    def close(self) -> None:
        """Frees the kept batches, and the real source if it is still open."""
        if self._real is not None:
            self._real.close()
            self._real = None
        self._kept = []
