"""Loader `cached`: real pixels that are decoded once and shown again and again; what training costs when decoding is free.

Order, ids, labels, policy, cutout and mixing go on as planned, and so do the crops in the plans, which nobody cuts any more. AFTER THE
FIRST BATCHES PIXELS AND LABELS DO NOT BELONG TOGETHER: for measuring (`--loader cached`), never for results. Where `synthetic` shows a
network noise, this one shows it photographs, so that what depends on their statistics (clocks, power, non-finite losses) is as in a run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from importlib import import_module
from itertools import chain

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
        plans = iter(plans)
        for first in plans:
            shown: deque[BatchPlan] = deque()
            if self._is_wanted(first, ()):
                yield from self._decode(chain([first], plans), shown)
            else:
                shown.append(first)
            for plan in shown:
                large_enough = [images for images in self._kept if len(images) >= len(plan.ids_S)]
                self._num_shown += 1
                yield plan, large_enough[self._num_shown % KEPT_BATCHES][: len(plan.ids_S)]

    def _is_wanted(self, plan: BatchPlan, in_flight: Iterable[int]) -> bool:
        """Whether fewer than 8 batches as large as `plan` are kept, counting the sizes of those that are being decoded."""
        return sum(size >= len(plan.ids_S) for size in (*map(len, self._kept), *in_flight)) < KEPT_BATCHES

    def _decode(self, plans: Iterator[BatchPlan], shown: deque[BatchPlan]) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        """Decodes and keeps batches up to a plan that needs none, which goes to `shown` if the real source asked for it.

        One stream for all of them: each new one would fetch its shards and fill its pipeline anew.
        """
        real = self._real
        assert real is not None, "no batch is larger than those that were kept"
        in_flight: deque[int] = deque()  # sizes

        def wanted() -> Iterator[BatchPlan]:
            for plan in plans:
                if not self._is_wanted(plan, in_flight):
                    shown.append(plan)
                    return
                in_flight.append(len(plan.ids_S))
                yield plan

        with closing(real.stream(wanted())) as stream:
            for plan, images_SHWC in stream:
                in_flight.popleft()
                self._kept.append(images_SHWC.clone())
                if sum(len(images) == self._max_samples for images in self._kept) == KEPT_BATCHES:
                    stream.close()
                    real.close()
                    self._real = None
                yield plan, images_SHWC

    def close(self) -> None:
        """Frees the kept batches, and the real source if it is still open."""
        if self._real is not None:
            self._real.close()
            self._real = None
        self._kept = []
