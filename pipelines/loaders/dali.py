"""Loader `dali`: NVIDIA DALI decodes only each crop's region, resizes and flips; on the GPU where there is one.

Encoded images are views into the memory-mapped tars and reach DALI without a copy; `dali_index` is the other way to feed it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch

from pipelines.format.reader import ByteArray
from pipelines.format.touch import read_ahead
from pipelines.loaders.dali_decoder import DaliDecoder
from pipelines.loaders.dali_index import IndexPixels
from pipelines.loaders.damage import SampleGuard
from pipelines.loaders.plan import BatchPlan, reading_ahead
from pipelines.loaders.planned import PixelRequest, PixelSource


class DaliPixels:
    """Pixel source `dali`: views into the mapped tars, their pages read ahead of their use."""

    stored_sizes = None
    order = None

    def __init__(self, request: PixelRequest) -> None:
        """Builds the pipeline."""
        self._split, self._lead = request.split, request.config.prefetch_batches
        self._guard = SampleGuard(request.split)
        self._decoder = DaliDecoder(request)

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        """Keeps `prefetch_batches` iterations in flight, and the pages of as many more on their way from the disk."""
        return self._decoder.stream(self._whole(reading_ahead(plans, self._lead, self._advise)))

    def _advise(self, plan: BatchPlan) -> None:
        read_ahead(self._split.addresses(plan.ids_S), self._split.sizes_N[plan.ids_S])

    def _whole(self, plans: Iterator[BatchPlan]) -> Iterator[tuple[BatchPlan, list[ByteArray]]]:
        for plan in plans:
            self._guard.require_whole(plan.ids_S)
            yield plan, self._split.encoded(plan.ids_S)

    def close(self) -> None:
        """Frees DALI's threads and buffers."""
        self._decoder.close()


def open_dali(request: PixelRequest) -> PixelSource:
    """The source that `config.dali.feed` asks for."""
    return DaliPixels(request) if request.config.dali.feed == "memory" else IndexPixels(request)
